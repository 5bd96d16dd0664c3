"""Passes over volumes of channels on the CPU, channels last, compiled: each reads memory once."""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2m_bids.registration.compiled import compiled, share

# Voxels of a partial sum.
_N_ROWS = 4096
# Voxels that lie channel by channel while they are normalised.
_N_TOGETHER = 64


def channel_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """
    Sum images, and their products with others, over all voxels of each channel, in float64.

    Parameters
    ----------
    a, b : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    sums, products : Tensor, shape (C,)
    """
    rows = [x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1]).numpy() for x in (a, b)]
    n_items = -(-len(rows[0]) // _N_ROWS)
    partial = np.zeros((n_items, 2, a.shape[1]))
    share(_add_channels, n_items, a.numel(), *rows, partial)
    sums, products = torch.from_numpy(partial.sum(0))
    return sums, products


@compiled
def _add_channels(a, b, sums, start, stop):
    for item in range(start, stop):
        plain, products = sums[item]
        for row in range(item * _N_ROWS, min((item + 1) * _N_ROWS, len(a))):
            row_a, row_b = a[row], b[row]
            for c in range(len(row_a)):
                value = np.float64(row_a[c])
                plain[c] += value
                products[c] += value * np.float64(row_b[c])


def double_backward(grad: Tensor) -> Tensor:
    """
    Return the gradient of images whose voxels were doubled along every axis.

    Parameters
    ----------
    grad : Tensor, shape (N, C, 2 * I, 2 * J, 2 * K)
        Of what `interpolate` gives with ``scale_factor=2``, trilinearly.

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
        Channels last.
    """
    n, n_channels, *shape = grad.shape
    result = grad.new_empty(n, *(size // 2 for size in shape), n_channels)
    for image, out in zip(grad.permute(0, 2, 3, 4, 1).contiguous(), result, strict=True):
        share(_halve, len(out), image.numel(), image.flatten(2).numpy(), out.numpy())
    return result.permute(0, 4, 1, 2, 3)


@compiled
def _halve(grad, out, start, stop):
    """Add up rows of voxels and channels, and then voxels, with the weights of doubling."""
    n_planes, n_rows, n_columns, n_channels = out.shape
    rows = np.empty(grad.shape[1:], grad.dtype)
    row = np.empty((1, grad.shape[2]), grad.dtype)
    for i in range(start, stop):
        i0, i3 = max(2 * i - 1, 0), min(2 * i + 2, 2 * n_planes - 1)
        for j in range(len(rows)):
            _add_four(grad[i0, j], grad[2 * i, j], grad[2 * i + 1, j], grad[i3, j], rows[j])
        for j in range(n_rows):
            j0, j3 = max(2 * j - 1, 0), min(2 * j + 2, 2 * n_rows - 1)
            _add_four(rows[j0], rows[2 * j], rows[2 * j + 1], rows[j3], row[0])
            voxels = row.reshape(2 * n_columns, n_channels)
            for k in range(n_columns):
                k0, k3 = max(2 * k - 1, 0), min(2 * k + 2, 2 * n_columns - 1)
                _add_four(voxels[k0], voxels[2 * k], voxels[2 * k + 1], voxels[k3], out[i, j, k])


@compiled
def _add_four(x0, x1, x2, x3, out):
    near, far = out.dtype.type(0.75), out.dtype.type(0.25)
    for at in range(len(out)):
        out[at] = far * (x0[at] + x3[at]) + near * (x1[at] + x2[at])


def normalize_voxels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """
    Apply layer normalisation to voxels of few channels.

    Parameters
    ----------
    x : Tensor, shape (..., C)
    weight, bias : Tensor, shape (C,)

    Returns
    -------
    Tensor, shape (..., C)
        It can be differentiated once.
    """
    return _VoxelNorm.apply(x, weight, bias)


class _VoxelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x = x.contiguous()
        mean = x.new_empty(*x.shape[:-1], 1)
        scale, y = torch.empty_like(mean), torch.empty_like(x)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        rows, out = (image.view(-1, x.shape[-1]).numpy() for image in (x, y))
        arrays = (array.flatten().numpy() for array in (weight, bias))
        n_items = -(-len(rows) // _N_ROWS)
        moments = (moment.view(-1).numpy() for moment in (mean, scale))
        share(_normalize, n_items, rows.size, rows, *arrays, out, *moments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, scale, weight, bias = ctx.saved_tensors
        return torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, [x.shape[-1]], mean, scale, weight, bias, ctx.needs_input_grad
        )


@compiled
def _normalize(x, weight, bias, out, means, scales, start, stop):
    n_channels = x.shape[1]
    one, count, epsilon = x.dtype.type(1), x.dtype.type(n_channels), x.dtype.type(1e-5)
    channels = np.empty((n_channels, _N_TOGETHER), x.dtype)
    for first in range(start * _N_ROWS, min(stop * _N_ROWS, len(x)), _N_TOGETHER):
        last = min(first + _N_TOGETHER, len(x))
        mean, scale = means[first:last], scales[first:last]
        for row in range(len(mean)):
            mean[row] = scale[row] = 0
            for c in range(n_channels):
                channels[c, row] = x[first + row, c]
        for c in range(n_channels):
            channel = channels[c]
            for row in range(len(mean)):
                mean[row] += channel[row] / count
        for c in range(n_channels):
            channel = channels[c]
            for row in range(len(mean)):
                channel[row] -= mean[row]
                scale[row] += channel[row] * channel[row]
        for row in range(len(mean)):
            scale[row] = one / np.sqrt(scale[row] / count + epsilon)
        for c in range(n_channels):
            channel, slope, constant = channels[c], weight[c], bias[c]
            for row in range(len(mean)):
                channel[row] = channel[row] * scale[row] * slope + constant
        for row in range(len(mean)):
            for c in range(n_channels):
                out[first + row, c] = channels[c, row]
