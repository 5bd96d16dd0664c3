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
_N_GATHERED = 12_000_000


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
    """Convolve transposed with kernel 4, stride 2, padding 1 as one product and overlapping sums."""
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
    """Convolution of kernel 3, stride 1 and padding 1 to few channels, with a fast backward pass.

    The 27 shifts of the output's gradient are gathered slab by slab; both gradients are matrix
    products with them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return functional.conv3d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
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
                torch.mm(gathered.t(), matrix, out=image_grad[:, slab].permute(1, 2, 3, 0).view_as(rows))
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


def normalize(layer: nn.Module, x: Tensor) -> Tensor:
    """
    Apply a normalisation layer.

    Parameters
    ----------
    layer : Module
        Batch normalisation in training is computed here on the CPU: PyTorch's adds up float32
        images stored channels last one voxel after the other, which leaves four digits.
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
        What ``layer(x)`` returns.
    """
    if not (isinstance(layer, nn.BatchNorm3d) and layer.training and x.device.type == "cpu"):
        return layer(x)
    y, mean, variance = _BatchNorm.apply(x, layer.weight, layer.bias, layer.eps)
    with torch.no_grad():
        n = x.numel() // x.shape[1]
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
        variance = variance * (n / (n - 1))
        layer.running_var.lerp_(variance.to(layer.running_var.dtype), layer.momentum)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = _channel_means(x)
        centred = x - mean
        variance = _channel_means(centred.square())
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(centred, scale, weight)
        variance, mean = variance.flatten(), mean.flatten()
        ctx.mark_non_differentiable(mean, variance)
        return torch.addcmul(_as_channels(bias), centred, scale * _as_channels(weight)), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _variance):
        centred, scale, weight = ctx.saved_tensors
        n = grad.numel() // grad.shape[1]
        mean_grad = _channel_means(grad)
        covariance = _channel_means(grad * centred)
        slope = scale * _as_channels(weight)
        grad_x = torch.addcmul(-slope * mean_grad, grad, slope)
        grad_x.addcmul_(centred, -slope * covariance * scale.square())
        return grad_x, (n * covariance * scale).flatten(), (n * mean_grad).flatten(), None


def _channel_means(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3, 4), keepdim=True)


def _as_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
