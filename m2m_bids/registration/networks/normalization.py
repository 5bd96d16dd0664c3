"""Normalisation in front of a skip connection or of a convolution, alone or together with it.

On the CPU statistics are added up in float64, the end of a U-Net is computed plane by plane, and
what a convolution gets is not kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from m2m_bids.registration.grids import can_be_compiled
from m2m_bids.registration.networks.convolution import (
    Convolution,
    channels_last,
    image_gradient,
)
from m2m_bids.registration.networks.planes import convolve_joined, joined_weight_gradient
from m2m_bids.registration.networks.recomputation import computed_again

# Rows of channels that are reduced at a time, within the cache of a core.
_N_ROWS = 9216
# What is left of values below zero.
_LEAK = 0.01


def normalize(
    layer: nn.Module, x: Tensor, skip: Tensor
) -> tuple[Tensor, Callable[[], Tensor] | None]:
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
    joined : Tensor, shape (N, C + C', I', J', K')
        Concatenation of ``layer(x)`` and ``skip``.
    again : callable, optional
        Computes the same once more, where that is little work.
    """
    if not layer.training or not _is_batch_norm_on_cpu(layer, x):
        return _join(layer(x), skip), None
    statistics = _Statistics(x, layer)
    normalized = _BatchNorm.apply(x, layer.weight, layer.bias, statistics)
    x, fixed_skip, weight, bias = (y.detach() for y in (x, skip, layer.weight, layer.bias))
    return _join(normalized, skip), lambda: _join(statistics.apply(x, weight, bias), fixed_skip)


def _join(x: Tensor, skip: Tensor) -> Tensor:
    i, j, k = skip.shape[2:]
    return torch.cat((x[:, :, :i, :j, :k], skip), 1)


def normalize_and_convolve(
    layer: nn.Module, x: Tensor, skip: Tensor, convolution: nn.Conv3d
) -> Tensor:
    """
    Apply `normalize` and the convolution of a U-Net's end, at full resolution.

    On the CPU the concatenation is made plane by plane and never kept.

    Parameters
    ----------
    layer, x, skip
        As of `normalize`.
    convolution : Conv3d
        Of kernel 3 and padding 1, to few channels.

    Returns
    -------
    Tensor, shape (N, C, I', J', K')
    """
    if x.device.type != "cpu":
        return convolution(_join(layer(x), skip))
    conv_weight, conv_bias = convolution.weight, convolution.bias
    if torch.is_autocast_enabled("cpu"):
        x, skip, conv_weight, conv_bias = (y.float() for y in (x, skip, conv_weight, conv_bias))
    with torch.autocast("cpu", enabled=False):
        if _is_batch_norm_on_cpu(layer, x):
            statistics = _Statistics(x, layer)
            parameters = layer.weight, layer.bias
        else:
            x = layer(x)
            statistics, parameters = None, (None, None)
        x = channels_last(x)
        return _End.apply(x, skip, conv_weight, conv_bias, *parameters, statistics)


def rectify(x: Tensor) -> Tensor:
    """
    Normalise each channel of each image to zero mean and unit variance; leaky rectification.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
        In the order of memory of ``x``, which PyTorch's instance normalisation does not keep.
    """
    images = [functional.batch_norm(image, None, None, training=True) for image in x.split(1)]
    return _rectify(torch.cat(images) if len(images) > 1 else images[0])


def rectify_and_convolve(layer: Convolution, x: Tensor) -> Tensor:
    """
    Apply `rectify` and a convolution.

    Parameters
    ----------
    layer : Convolution
    x : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C', I, J, K)
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return layer(rectify(x))
    images = [_rectify_and_convolve(layer, image) for image in channels_last(x).split(1)]
    return torch.cat(images) if len(images) > 1 else images[0]


def _rectify_and_convolve(layer: Convolution, image: Tensor) -> Tensor:
    statistics = _Statistics(image)
    one_and_zero = image.new_ones(image.shape[1]), image.new_zeros(image.shape[1])
    normalized = _BatchNorm.apply(image, *one_and_zero, statistics)
    fixed = image.detach()
    with computed_again(normalized, lambda: _rectify(statistics.apply(fixed, *one_and_zero))):
        return layer(_rectify(normalized))


def _rectify(x: Tensor) -> Tensor:
    return functional.leaky_relu_(x, _LEAK)


def _is_batch_norm_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    is_exact = x.dtype in (torch.float32, torch.float64)
    return isinstance(layer, nn.BatchNorm3d) and is_exact and x.device.type == "cpu"


class _Statistics:
    """
    Mean and scale of a batch, which the layer's running statistics follow; or those, at rest.

    Without a layer, of the images alone. PyTorch's batch normalisation adds up float32 images that
    are stored channels last one voxel after the other, which leaves four digits of the variance.
    """

    def __init__(self, x: Tensor, layer: nn.BatchNorm3d | None = None):
        self.is_of_batch = layer is None or layer.training
        self.n = x.numel() // x.shape[1]
        with torch.no_grad():
            if self.is_of_batch:
                self.mean, variance = _moments(x)
                if layer is not None:
                    self._update(layer, variance)
            else:
                self.mean, variance = layer.running_mean.clone(), layer.running_var
            self.scale = torch.rsqrt(variance + (1e-5 if layer is None else layer.eps))

    def _update(self, layer: nn.BatchNorm3d, variance: Tensor) -> None:
        layer.num_batches_tracked += 1
        for running, value in (
            (layer.running_mean, self.mean),
            (layer.running_var, variance * (self.n / (self.n - 1))),
        ):
            running.lerp_(value.to(running.dtype), layer.momentum)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalise images."""
        slope = self.scale * weight
        constant = bias - slope * self.mean
        return torch.addcmul(_as_channels(constant), x, _as_channels(slope))

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `apply` with respect to images, weight and bias."""
        sums, products = _channel_sums(grad, x)
        bias_grad = sums.to(grad.dtype)
        weight_grad = self.scale * (products - self.mean * sums).to(grad.dtype)
        slope, along, constant = self.coefficients(weight, weight_grad, bias_grad)
        grad_x = torch.addcmul(_as_channels(constant), grad, _as_channels(slope))
        return grad_x.addcmul_(x, _as_channels(along)), weight_grad, bias_grad

    def coefficients(
        self, weight: Tensor, weight_grad: Tensor, bias_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return the coefficients of the gradient with respect to the images.

        It is ``slope * grad + along * x + constant``, with the gradient of the normalised images;
        the last two come from mean and scale.
        """
        slope = self.scale * weight
        if not self.is_of_batch:
            return slope, torch.zeros_like(slope), torch.zeros_like(slope)
        along = -slope * self.scale * weight_grad / self.n
        return slope, along, -slope * bias_grad / self.n - along * self.mean


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel."""
    sums, squares = _channel_sums(x, x)
    n = x.numel() // x.shape[1]
    mean = sums / n
    return mean.to(x.dtype), (squares / n - mean.square()).to(x.dtype)


def _channel_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum images, and their products with others, over the voxels of each channel, in float64."""
    if can_be_compiled(a):
        from m2m_bids.registration.volumes import channel_sums

        return channel_sums(a, b)
    chunks = zip(*(x.movedim(1, -1).flatten(0, 3).split(_N_ROWS) for x in (a, b)), strict=True)
    rows = [(x.double(), y.double()) for x, y in chunks]
    return sum(x.sum(0) for x, _ in rows), sum((x * y).sum(0) for x, y in rows)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, statistics):
        ctx.statistics = statistics
        ctx.save_for_backward(x, weight)
        return statistics.apply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *ctx.statistics.backward(grad, x, weight), None


class _End(torch.autograd.Function):
    """Convolution (kernel 3, padding 1), to few channels, of normalised images and a skip."""

    @staticmethod
    def forward(ctx, x, skip, conv_weight, conv_bias, weight, bias, statistics):
        ctx.statistics = statistics
        ctx.save_for_backward(x, skip, conv_weight, weight, bias)
        affine = None
        if statistics is not None:
            slope = statistics.scale * weight
            affine = slope, bias - slope * statistics.mean
        return convolve_joined(x, skip, affine, conv_weight).add_(_as_channels(conv_bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, skip, conv_weight, weight, bias = ctx.saved_tensors
        statistics = ctx.statistics
        sums = _tap_sums(grad)
        affine = None
        if statistics is not None:
            affine = statistics.scale, -statistics.scale * statistics.mean
        grad_conv = joined_weight_gradient(grad, x, skip, affine)
        grad = channels_last(grad)
        n = x.shape[1]
        own, grad_own = conv_weight[:, :n], grad_conv[:, :n]
        grad_skip = image_gradient(grad, conv_weight[:, n:]) if ctx.needs_input_grad[1] else None
        grad_weight = grad_bias = None
        if statistics is None:
            grad_x = _pad_end(image_gradient(grad, own), x)
        else:
            # The normalised images' gradient is never made: its sums are products of weights.
            grad_weight = (own * grad_own).sum((0, 2, 3, 4))
            grad_bias = (own * sums[:, None]).sum((0, 2, 3, 4))
            grad_own.mul_(_as_channels(weight)).add_(_as_channels(bias) * sums[:, None])
            slope, along, constant = statistics.coefficients(weight, grad_weight, grad_bias)
            grad_x = image_gradient(grad, own * _as_channels(slope), constant)
            grad_x = _pad_end(grad_x, x, constant).addcmul_(x, _as_channels(along))
        return grad_x, grad_skip, grad_conv, sums[:, 1, 1, 1], grad_weight, grad_bias, None


def _tap_sums(grad: Tensor) -> Tensor:
    """Sum the gradient of an output over the voxels whose taps are inside: (C, 3, 3, 3)."""
    for axis in (4, 3, 2):
        total, size = grad.sum(axis), grad.shape[axis]
        first, last = grad.select(axis, 0), grad.select(axis, size - 1)
        grad = torch.stack((total - first, total, total - last), -1)
        # Axes that are still to be summed stay in front.
    return grad.sum(0).permute(0, 3, 2, 1)


def _pad_end(grad: Tensor, x: Tensor, constant: Tensor | None = None) -> Tensor:
    """Pad a gradient, to the size of ``x``, with the constant."""
    if grad.shape == x.shape:
        return grad
    i, j, k = grad.shape[2:]
    padded = torch.zeros_like(x) if constant is None else _as_channels(constant).expand_as(x)
    padded = padded.clone(memory_format=torch.channels_last_3d)
    padded[:, :, :i, :j, :k] = grad
    return padded


def _as_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
