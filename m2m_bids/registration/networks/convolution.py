"""Convolutions as PyTorch's own, computed another way on the CPU where that is faster.

On two AVX2 cores, in float32, PyTorch's forward pass and its gradient with respect to the image
run near the rate of matrix products once activations are stored channels last
(`channels_last`), except where the weights outnumber the activations and are reordered at every
call. The gradient with respect to the weights runs at a tenth of that rate where one side has few
channels. `convolve` leaves to PyTorch what it does well, and everything on other devices.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Floats gathered at a time for a weight gradient: within the last-level cache, and so many that
# threads seldom wait for each other.
_N_GATHERED = 6_000_000


def channels_last(x: Tensor) -> Tensor:
    """
    Store images channels last on the CPU, the order in which its convolutions are fast.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
        The same values.
    """
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


def convolve(layer: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """
    Apply a convolution layer of the U-Net.

    Parameters
    ----------
    layer : Conv3d or ConvTranspose3d
        Of kernel 3 and padding 1 (stride 1 or 2), or transposed, of kernel 4, stride 2 and
        padding 1.
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor
        What ``layer(x)`` returns.
    """
    if x.device.type != "cpu":
        return layer(x)
    # PyTorch's own choice for few positions forgets the order.
    return channels_last(_convolve(layer, channels_last(x)))


def _convolve(layer: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    n_positions = x.shape[2:].numel()
    if isinstance(layer, nn.ConvTranspose3d):
        return _scatter_convolve(layer, x) if n_positions < layer.in_channels else layer(x)
    if layer.stride == (2, 2, 2):
        return _gather_convolve(layer, x) if n_positions < 16 * layer.in_channels else layer(x)
    if 4 * layer.out_channels <= layer.in_channels and not torch.is_autocast_enabled("cpu"):
        return _NarrowConvolution.apply(x, layer.weight, layer.bias)
    return layer(x)


def _gather_convolve(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """Convolve with kernel 3, stride 2 and padding 1 as one product with the stored weights."""
    taps = functional.pad(x, (1,) * 6).unfold(2, 3, 2).unfold(3, 3, 2).unfold(4, 3, 2)
    taps = taps.permute(0, 2, 3, 4, 1, 5, 6, 7)
    shape = taps.shape[:4]
    y = functional.linear(taps.flatten(4).flatten(0, 3), layer.weight.flatten(1), layer.bias)
    return y.unflatten(0, shape).permute(0, 4, 1, 2, 3)


def _scatter_convolve(layer: nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """Convolve transposed (kernel 4, stride 2, padding 1): one product, overlapping sums."""
    rows = x.permute(0, 2, 3, 4, 1)
    y = torch.matmul(rows.flatten(0, 3), layer.weight.flatten(1))
    y = y.view(*rows.shape[:4], layer.out_channels, 4, 4, 4)
    for axis in (1, 2, 3):
        y = _overlap(y, axis)
    return y.permute(0, 4, 1, 2, 3) + layer.bias.view(1, -1, 1, 1, 1)


def _overlap(y: Tensor, axis: int) -> Tensor:
    """Sum the four taps, of the dimension after the channels, that land on each doubled voxel."""
    # Voxel i lands on 2 i - 1, 2 i, 2 i + 1 and 2 i + 2.
    first, second, third, fourth = y.unbind(5)
    size = first.shape[axis]
    zero = torch.zeros_like(first.narrow(axis, 0, 1))
    even = second + torch.cat((zero, fourth.narrow(axis, 0, size - 1)), axis)
    odd = third + torch.cat((first.narrow(axis, 1, size - 1), zero), axis)
    return torch.stack((even, odd), axis + 1).flatten(axis, axis + 1)


class _NarrowConvolution(torch.autograd.Function):
    """Convolution (kernel 3, stride 1, padding 1) to few channels, with a fast backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return functional.conv3d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _narrow_gradients(grad, *ctx.saved_tensors)


def _narrow_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Return the gradients of a convolution to few channels: of images, weights and bias.

    The 27 shifts of the output's gradient are gathered slab by slab; both gradients are matrix
    products with them.
    """
    n_out, n_in = weight.shape[:2]
    n_rows = 27 * n_out
    # A voxel's tap t is the output's tap 2 - t.
    matrix = weight.flip(2, 3, 4).permute(0, 2, 3, 4, 1).reshape(n_rows, n_in)
    taps = functional.pad(grad.contiguous(), (1,) * 6)
    taps = taps.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).permute(0, 1, 5, 6, 7, 2, 3, 4)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
    grad_matrix = torch.zeros_like(matrix)
    n_planes = max(1, _N_GATHERED // (n_rows * x.shape[3] * x.shape[4]))
    for image, image_grad, image_taps in zip(x, grad_x, taps, strict=True):
        for start in range(0, x.shape[2], n_planes):
            slab = slice(start, start + n_planes)
            gathered = image_taps[..., slab, :, :].reshape(n_rows, -1)
            rows = image[:, slab].permute(1, 2, 3, 0).reshape(-1, n_in)
            rows_grad = image_grad[:, slab].permute(1, 2, 3, 0).view_as(rows)
            torch.mm(gathered.t(), matrix, out=rows_grad)
            grad_matrix.addmm_(gathered, rows)
    grad_weight = grad_matrix.view(n_out, 3, 3, 3, n_in).flip(1, 2, 3).permute(0, 4, 1, 2, 3)
    return grad_x, grad_weight, grad.sum((0, 2, 3, 4))


def leading_channels(x: Tensor, n_channels: int) -> Tensor:
    """
    Return the first channels of images; on the CPU, with a gradient in their order.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)
    n_channels : int

    Returns
    -------
    Tensor, shape (N, n_channels, I, J, K)
    """
    if x.device.type != "cpu" or x.shape[1] == n_channels:
        return x[:, :n_channels]
    return _LeadingChannels.apply(x, n_channels)


class _LeadingChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n_channels):
        ctx.shape = x.shape
        return channels_last(x[:, :n_channels])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = grad.new_empty(ctx.shape).contiguous(memory_format=torch.channels_last_3d)
        n_channels = grad.shape[1]
        grad_x[:, :n_channels] = grad
        grad_x[:, n_channels:] = 0
        return grad_x, None


def normalize(layer: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """
    Apply a normalisation layer and put a skip connection behind it.

    Parameters
    ----------
    layer : Module
    x : Tensor, shape (N, C, I, J, K)
    skip : Tensor, shape (N, C', I', J', K')
        On a grid no larger than that of ``x``, whose last voxels are left out.

    Returns
    -------
    Tensor, shape (N, C + C', I', J', K')
        Concatenation of ``layer(x)`` and ``skip``.
    """
    if _is_batch_norm_on_cpu(layer, x):
        statistics = _Statistics(layer, x)
        x = _BatchNorm.apply(x, layer.weight, layer.bias, statistics)
    else:
        x = layer(x)
    i, j, k = skip.shape[2:]
    return torch.cat((x[:, :, :i, :j, :k], skip), 1)


def normalize_and_convolve(
    layer: nn.Module, x: Tensor, skip: Tensor, convolution: nn.Conv3d
) -> Tensor:
    """
    Apply `normalize` and the convolution of a U-Net's end, at full resolution.

    On the CPU the concatenation is computed again for the gradient instead of being kept.

    Parameters
    ----------
    layer, x, skip
        As of `normalize`.
    convolution : Conv3d
        Of kernel 3 and padding 1.

    Returns
    -------
    Tensor, shape (N, C, I', J', K')
    """
    if not _is_batch_norm_on_cpu(layer, x) or torch.is_autocast_enabled("cpu"):
        return convolve(convolution, normalize(layer, x, skip))
    statistics = _Statistics(layer, x)
    return _NormalizedConvolution.apply(
        x, layer.weight, layer.bias, skip, convolution.weight, convolution.bias, statistics
    )


def _is_batch_norm_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    is_exact = x.dtype in (torch.float32, torch.float64)
    is_batch_norm = isinstance(layer, nn.BatchNorm3d) and layer.training
    return is_batch_norm and is_exact and x.device.type == "cpu"


class _Statistics:
    """
    Mean and scale of a batch, which the layer's running statistics follow.

    PyTorch's batch normalisation adds up float32 images that are stored channels last one voxel
    after the other, which leaves four digits of the variance.
    """

    def __init__(self, layer: nn.BatchNorm3d, x: Tensor):
        with torch.no_grad():
            self.mean = _channel_means(x)
            # The images' own mean is taken off first: no cancellation.
            variance = _channel_means((x - self.mean).square_())
            self.scale = torch.rsqrt(variance + layer.eps)
            layer.num_batches_tracked += 1
            n = x.numel() // x.shape[1]
            for running, value in (
                (layer.running_mean, self.mean),
                (layer.running_var, variance * (n / (n - 1))),
            ):
                running.lerp_(value.flatten().to(running.dtype), layer.momentum)

    def normalized(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the normalised images."""
        slope = self.scale * _as_channels(weight)
        return torch.addcmul(_as_channels(bias) - slope * self.mean, x, slope)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `normalized`, and of mean and scale in it."""
        n = grad.numel() // grad.shape[1]
        mean_grad = _channel_means(grad)
        covariance = _channel_means((x - self.mean).mul_(grad))
        slope = self.scale * _as_channels(weight)
        along = -slope * covariance * self.scale.square()
        grad_x = torch.addcmul(-slope * mean_grad - along * self.mean, grad, slope)
        grad_x.addcmul_(x, along)
        return grad_x, (n * covariance * self.scale).flatten(), (n * mean_grad).flatten()


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, statistics):
        ctx.statistics = statistics
        ctx.save_for_backward(x, weight)
        return statistics.normalized(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *ctx.statistics.gradients(grad, *ctx.saved_tensors), None


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, skip, conv_weight, conv_bias, statistics):
        ctx.statistics = statistics
        ctx.save_for_backward(x, weight, bias, skip, conv_weight)
        joined = _joined(statistics, x, weight, bias, skip)
        return functional.conv3d(joined, conv_weight, conv_bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, skip, conv_weight = ctx.saved_tensors
        joined = _joined(ctx.statistics, x, weight, bias, skip)
        grad_joined, *grad_convolution = _narrow_gradients(grad, joined, conv_weight)
        del joined
        n_channels = x.shape[1]
        grad_normalized = grad_joined[:, :n_channels]
        outside = [
            size
            for a, b in zip(x.shape[:1:-1], skip.shape[:1:-1], strict=True)
            for size in (0, a - b)
        ]
        if any(outside):
            grad_normalized = functional.pad(grad_normalized, outside)
        gradients = ctx.statistics.gradients(grad_normalized, x, weight)
        return *gradients, grad_joined[:, n_channels:], *grad_convolution, None


def _joined(
    statistics: _Statistics, x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor
) -> Tensor:
    i, j, k = skip.shape[2:]
    normalized = statistics.normalized(x, weight, bias)[:, :, :i, :j, :k]
    return torch.cat((normalized, skip), 1)


def _channel_means(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3, 4), keepdim=True)


def _as_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
