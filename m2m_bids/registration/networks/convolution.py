"""Convolutions as PyTorch's own, computed another way on the CPU where that is faster.

On two AVX2 cores, in float32, PyTorch's forward pass and its gradient with respect to the image
run near the rate of matrix products once activations are stored channels last
(`channels_last`), except where the weights outnumber the activations and are reordered at every
call, or where there are few output channels. The gradients with respect to weights and bias run at
a fraction of that rate where one side has few channels, but for processors with AVX-512. PyTorch
keeps what it does well, and everything on other devices.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from m2m_bids.registration.grids import can_be_compiled, multiply_axes
from m2m_bids.registration.networks.planes import joined_weight_gradient

# Numbers in a plane of the images, up to which PyTorch's convolutions do without oneDNN.
_SLOW_FOR_PYTORCH = 20480
# Output channels that are few with AVX-512 too.
_FEW_CHANNELS = 8


def channels_last(x: Tensor) -> Tensor:
    """
    Store images channels last, the order in which convolutions are fast.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
        The same values.
    """
    return x.contiguous(memory_format=torch.channels_last_3d)


def convolved_dtype(x: Tensor) -> torch.dtype:
    """
    Return the type in which images on the CPU are convolved; elsewhere that of the images.

    Parameters
    ----------
    x : Tensor

    Returns
    -------
    dtype
        Autocast's, if it is enabled.
    """
    is_converted = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if is_converted else x.dtype


class Convolution(nn.Conv3d):
    """
    Convolution of kernel 3, stride 1 and padding 1.

    Parameters
    ----------
    n_in, n_out : int
        Channels.
    bias : bool
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True):
        super().__init__(n_in, n_out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """
        Convolve images.

        Parameters
        ----------
        x : Tensor, shape (N, C, I, J, K)

        Returns
        -------
        Tensor, shape (N, C', I, J, K)
        """
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if x.shape[2:].numel() < self.in_channels:
            # PyTorch takes products here, and does not reorder the weights.
            return channels_last(super().forward(channels_last(x)))
        return _Convolution.apply(channels_last(x), self.weight, self.bias)


class _Convolution(torch.autograd.Function):
    """
    PyTorch's convolution, but for the gradient of weights that lead to few channels.

    For small images PyTorch takes a slower implementation by itself.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return convolve_image(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = channels_last(grad)
        grad_x = image_gradient(grad, weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum((0, 2, 3, 4)) if ctx.has_bias else None
        return grad_x, weight_gradient(grad, x, weight), grad_bias


def convolve_image(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Convolve images with kernel 3 and padding 1, without a gradient.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)
        On the CPU, channels last.
    weight : Tensor, shape (C', C, 3, 3, 3)
    bias : Tensor, shape (C',), optional

    Returns
    -------
    Tensor, shape (N, C', I, J, K)
        Channels last.
    """
    return channels_last(_conv3d(x, weight, bias))


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """
    Return the gradient of `convolve_image` with respect to the weights.

    Parameters
    ----------
    grad : Tensor, shape (N, C', I, J, K)
        Channels last, as ``x`` is.
    x, weight
        As of `convolve_image`.

    Returns
    -------
    Tensor, shape (C', C, 3, 3, 3)
    """
    n_out, n_in = weight.shape[:2]
    # Where positions are so few, most of a plane is padding, and weights outnumber images.
    is_for_planes = x.shape[2:].numel() >= 4 * n_in
    if is_for_planes and not (_is_pytorch_fast() and n_out >= _FEW_CHANNELS):
        if n_out > n_in:
            # Sums of products, of which either factor may be the one that is moved.
            swapped = joined_weight_gradient(x, grad, grad[:, :0], None)
            return swapped.flip(2, 3, 4).transpose(0, 1).contiguous()
        if n_out < n_in or x.shape[:4].numel() <= _SLOW_FOR_PYTORCH:
            return joined_weight_gradient(grad, x, x[:, :0], None)
    options = [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options, mask)[1]


@lru_cache(maxsize=1)
def _is_pytorch_fast() -> bool:
    """Tell whether PyTorch's gradients with respect to weights run near the rate of products."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def convolve(layer: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """
    Apply a convolution layer of the U-Net.

    Parameters
    ----------
    layer : Conv3d or ConvTranspose3d
        Of kernel 3, stride 2 and padding 1, or transposed, of kernel 4, stride 2 and padding 1.
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
    if isinstance(layer, nn.Conv3d):
        if n_positions < 16 * layer.in_channels:
            return _gather_convolve(layer, x)
        return _conv3d(x, layer.weight, layer.bias, stride=2)
    if n_positions < layer.in_channels:
        return _scatter_convolve(layer, x)
    is_own = layer.out_channels <= 32 and not _is_pytorch_fast()
    if is_own and not torch.is_autocast_enabled("cpu"):
        return _TransposedConvolution.apply(x, layer.weight, layer.bias)
    return layer(x)


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolve with padding 1."""
    is_autocast = torch.is_autocast_enabled("cpu")
    if x.dtype != torch.float32 or is_autocast or not torch.backends.mkldnn.is_available():
        return functional.conv3d(x, weight, bias, stride=stride, padding=1)
    # PyTorch gives images of few channels to a slower implementation.
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, [1] * 3, [stride] * 3, [1] * 3, 1)


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


class _TransposedConvolution(torch.autograd.Function):
    """Convolution transposed (kernel 4, stride 2, padding 1) to few channels."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return functional.conv_transpose3d(x, weight, bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = channels_last(grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _conv3d(grad, weight, stride=2)
        return grad_x, _transposed_weight_gradient(grad, x), grad.sum((0, 2, 3, 4))


def _transposed_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """
    Return the gradient of `_TransposedConvolution` with respect to the weights.

    Output voxels ``2 p - 1`` and ``2 p`` of an axis see inputs ``p - 1`` and ``p``: padded inputs
    ``p`` and ``p + 1``. The eight blocks of weights are products of the padded input, shifted
    along its rows, with the output's gradient as eight times the channels.
    """
    n_in, n_out = x.shape[1], grad.shape[1]
    # The plane too many is what the last shifts reach into.
    padded = functional.pad(x, (1, 1, 1, 1, 1, 2)).permute(0, 2, 3, 4, 1)
    _, n_i, n_j, n_k, _ = padded.shape
    blocks = grad.new_zeros(n_j, n_k, 2, 2, 2, n_out)
    products = grad.new_zeros(2, 2, 2, n_in, 8 * n_out)
    for image, image_grad in zip(padded, grad.permute(0, 2, 3, 4, 1), strict=True):
        rows = image.reshape(-1, n_in)
        for i in range(n_i - 2):
            _fill_blocks(blocks, image_grad, i)
            flat = blocks.view(-1, 8 * n_out).expand(2, -1, -1)
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                start = ((i + a) * n_j + b) * n_k
                # What a shift moves over the end of a row or plane meets zeros in the blocks.
                shifted = rows.as_strided(
                    (2, n_in, n_j * n_k),
                    (n_in, 1, n_in),
                    rows.storage_offset() + start * n_in,
                )
                products[a, b].baddbmm_(shifted, flat)
    products = products.view(2, 2, 2, n_in, 2, 2, 2, n_out)
    # Voxel 2 p - 1 + r takes tap 2 + r of input p - 1 and tap r of input p.
    taps = products.flip(0, 1, 2).permute(3, 7, 0, 4, 1, 5, 2, 6)
    return taps.reshape(n_in, n_out, 4, 4, 4)


_CORNERS = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


def _fill_blocks(blocks: Tensor, grad: Tensor, i: int) -> None:
    """Lay out planes ``2 i - 1`` and ``2 i`` of a gradient as blocks of two by two by two."""
    _, n_j, n_k, _ = grad.shape
    for a, b, c in _CORNERS:
        part = blocks[1 - b : n_j // 2 + 1 - b, 1 - c : n_k // 2 + 1 - c, a, b, c]
        if 0 <= 2 * i - 1 + a < len(grad):
            part.copy_(grad[2 * i - 1 + a, 1 - b :: 2, 1 - c :: 2])
        else:
            part.zero_()


def add_doubled(y: Tensor, x: Tensor) -> Tensor:
    """
    Add images with half the voxels, interpolated trilinearly.

    Parameters
    ----------
    y : Tensor, shape (N, C, 2 * I, 2 * J, 2 * K)
        Is overwritten if the types agree.
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, 2 * I, 2 * J, 2 * K)
        In the more exact type.
    """
    if x.device.type == "cpu":
        dtype = torch.promote_types(x.dtype, y.dtype)
        return _AddDoubled.apply(y.to(dtype), x.to(dtype))
    doubled = double(x)
    return y.add_(doubled) if y.dtype == doubled.dtype else y + doubled


def double(x: Tensor) -> Tensor:
    """
    Interpolate images trilinearly to twice as many voxels along every axis.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, 2 * I, 2 * J, 2 * K)
        As of `torch.nn.functional.interpolate` with ``scale_factor=2`` and without
        ``align_corners``, whose kernel on a GPU takes longer than the convolutions of a U-Net.
    """
    if x.device.type == "cpu":
        return functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    return _double_by_products(x)


def convolve_doubled(layer: Convolution, x: Tensor, shape: torch.Size) -> Tensor:
    """
    Apply a convolution to images with twice as many voxels along every axis.

    Parameters
    ----------
    layer : Convolution
        Without bias.
    x : Tensor, shape (N, C, I, J, K)
        Is interpolated as by `double`.
    shape : Size
        Voxels of the result, ``2 * I`` or ``2 * I - 1`` and so on: the last ones of the doubled
        images may be cut off before these are padded with zeros and convolved.

    Returns
    -------
    Tensor, shape (N, C', *shape)
    """
    if can_be_compiled(x) and not torch.is_autocast_enabled("cpu"):
        from m2m_bids.registration.doubled import convolve_before_doubling

        return convolve_before_doubling(x, layer.weight, shape)
    i, j, k = shape
    return layer(channels_last(double(x)[:, :, :i, :j, :k]))


def _double_by_products(x: Tensor) -> Tensor:
    i, j, k = (_doubling(n, x.dtype, x.device) for n in x.shape[2:])
    if x.is_contiguous(memory_format=torch.channels_last_3d):
        rows = k @ x.permute(0, 2, 3, 4, 1)
        planes = j @ rows.flatten(-2)
        doubled = (i @ planes.flatten(-2)).unflatten(-1, (len(j), *rows.shape[-2:]))
        return doubled.permute(0, 4, 1, 2, 3)
    return multiply_axes(x, i, j, k)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for training too
def _doubling(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix, shape (2 * n, n), that doubles an axis."""
    rows = torch.arange(2 * n)
    nearer = rows // 2
    further = (nearer + 2 * (rows % 2) - 1).clamp(0, n - 1)
    matrix = torch.zeros(2 * n, n)
    matrix[rows, nearer] += 0.75
    matrix[rows, further] += 0.25
    return matrix.to(device, dtype)


class _AddDoubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x):
        ctx.mark_dirty(y)
        ctx.shape = x.shape
        for image_y, image in zip(y, x, strict=True):
            _add_doubled_planes(image_y, image)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if can_be_compiled(grad):
            from m2m_bids.registration.volumes import double_backward

            return grad, double_backward(grad)
        size, scales = list(grad.shape[2:]), (2.0, 2.0, 2.0)
        backward = torch.ops.aten.upsample_trilinear3d_backward
        return grad, backward(grad, size, list(ctx.shape), False, *scales)


def _add_doubled_planes(y: Tensor, x: Tensor) -> None:
    """Add an image of half the size: plane by plane, so that no larger image is made."""
    last = y.shape[1] - 1
    for start in range(0, x.shape[1], 8):
        planes = x[:, start : start + 8].transpose(0, 1)
        planes = functional.interpolate(
            planes, scale_factor=2, mode="bilinear", align_corners=False
        )
        for i, plane in enumerate(planes, start):
            y[:, 2 * i : 2 * i + 2].add_(plane[:, None], alpha=0.75)
            y[:, max(2 * i - 1, 0)].add_(plane, alpha=0.25)
            y[:, min(2 * i + 2, last)].add_(plane, alpha=0.25)


def leading_channels(x: Tensor, n_channels: int) -> Tensor:
    """
    Copy the first channels of images; on the CPU, with a gradient in their order.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)
    n_channels : int

    Returns
    -------
    Tensor, shape (N, n_channels, I, J, K)
    """
    if x.device.type != "cpu" or x.shape[1] == n_channels:
        return x[:, :n_channels].clone()
    return _LeadingChannels.apply(x, n_channels)


class _LeadingChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n_channels):
        ctx.shape = x.shape
        return x[:, :n_channels].clone(memory_format=torch.channels_last_3d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = grad.new_empty(ctx.shape).contiguous(memory_format=torch.channels_last_3d)
        n_channels = grad.shape[1]
        grad_x[:, :n_channels] = grad
        grad_x[:, n_channels:] = 0
        return grad_x, None


def image_gradient(grad: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Return the gradient of a convolution (kernel 3, padding 1) with respect to the images.

    Parameters
    ----------
    grad : Tensor, shape (N, C', I, J, K)
    weight : Tensor, shape (C', C, 3, 3, 3)
    bias : Tensor, shape (C,), optional
        Is added.

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
    """
    return convolve_image(grad, weight.flip(2, 3, 4).transpose(0, 1), bias)
