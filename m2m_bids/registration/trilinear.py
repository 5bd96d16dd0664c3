"""Trilinear sampling on the CPU, compiled: what `grid_sample` gives, several times as fast.

Positions are taken in blocks. First come a block's places in the grid, of which the processor
computes several at a time; what is left for each channel are eight voxels and seven products. The
kernels take positions (N, 3, P), images (N, C, I * J * K) and values (N, C, P), the shape of the
image's grid and its margin.
"""

import numpy as np
import torch
from numba import uint64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from m2m_bids.registration.compiled import compiled, share

_BLOCK = 512


def sample_trilinearly(image: Tensor, positions: Tensor, *, is_zero_outside: bool) -> Tensor:
    """
    Sample images on the CPU at unit coordinates.

    Parameters
    ----------
    image : Tensor, shape (N, C, I, J, K)
        float32 or float64; a batch of one is used for every batch of positions.
    positions : Tensor, shape (N, 3, I', J', K')
        Of the same type, unit coordinates of the image's grid.
    is_zero_outside : bool
        Whether the image falls to zero within a voxel beyond its border, or stays as it is there.

    Returns
    -------
    Tensor, shape (N, C, I', J', K')
        It can be differentiated once.
    """
    return _Sampling.apply(image, positions, int(is_zero_outside))


class _Sampling(torch.autograd.Function):
    """Sampling of an image with a margin of so many voxels of zero, and nearest voxels beyond."""

    @staticmethod
    def forward(ctx, image, positions, margin):
        ctx.save_for_backward(image, positions)
        ctx.margin = margin
        padded = _padded(image, margin)
        values = image.new_empty(len(positions), image.shape[1], *positions.shape[2:])
        points, voxels, samples = _flat(positions), _flat(padded), _flat(values)
        shape = tuple(padded.shape[2:])
        # Compilers' memory amid that of activations would keep the heap from shrinking: now.
        if ctx.needs_input_grad[0]:
            _scatter(points, samples, voxels, shape, margin, 0, 0)
        if ctx.needs_input_grad[1]:
            _differentiate(points, voxels, samples, points, shape, margin, 0, 0)
        arrays = points, voxels, samples
        share(_interpolate, _n_blocks(positions), values.numel(), *arrays, shape, margin)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, positions = ctx.saved_tensors
        margin, padded = ctx.margin, _padded(image, ctx.margin)
        shape, points, values = tuple(padded.shape[2:]), _flat(positions), _flat(grad)
        grad_image = grad_positions = None
        if ctx.needs_input_grad[0]:
            grad_image = padded.new_zeros(padded.shape)
            n_items = grad_image.shape[:2].numel()
            share(_scatter, n_items, values.size, points, values, _flat(grad_image), shape, margin)
            grad_image = functional.pad(grad_image, (-margin,) * 6)
        if ctx.needs_input_grad[1]:
            grad_positions = positions.new_empty(positions.shape)
            arrays = points, _flat(padded), values, _flat(grad_positions)
            share(_differentiate, _n_blocks(positions), points.size, *arrays, shape, margin)
        return grad_image, grad_positions, None


def _padded(image: Tensor, margin: int) -> Tensor:
    return functional.pad(image, (margin,) * 6) if margin else image


def _flat(x: Tensor) -> np.ndarray:
    """View a tensor with its voxels along one axis; a copy, where they are not contiguous."""
    return x.detach().contiguous().flatten(2).numpy()


def _n_blocks(positions: Tensor) -> int:
    return len(positions) * _blocks_of(positions[0, 0].numel())


@compiled
def _blocks_of(n_points):
    return -(-n_points // _BLOCK)


@compiled
def _interpolate(points, image, values, shape, margin, start, stop):
    """Interpolate in blocks of positions, the items."""
    to_i, to_j, to_k = _steps(shape)
    firsts = np.empty(_BLOCK, np.uint32)
    weights = np.empty((3, _BLOCK), points.dtype)
    for item in range(start, stop):
        n, first, last = _locate_block(item, points, shape, margin, firsts, weights)
        for c in range(values.shape[1]):
            voxels, out = image[n % len(image), c], values[n, c, first:last]
            for p in range(len(out)):
                at = uint64(firsts[p])
                i, j, k = weights[0, p], weights[1, p], weights[2, p]
                v00, v01 = voxels[at], voxels[at + to_j]
                v10, v11 = voxels[at + to_i], voxels[at + to_i + to_j]
                v00 += k * (voxels[at + to_k] - v00)
                v01 += k * (voxels[at + to_j + to_k] - v01)
                v10 += k * (voxels[at + to_i + to_k] - v10)
                v11 += k * (voxels[at + to_i + to_j + to_k] - v11)
                v0, v1 = v00 + j * (v01 - v00), v10 + j * (v11 - v10)
                out[p] = v0 + i * (v1 - v0)


@compiled
def _differentiate(points, image, values, grad_points, shape, margin, start, stop):
    """Differentiate products of values and samples by positions; items as of `_interpolate`."""
    to_i, to_j, to_k = _steps(shape)
    firsts = np.empty(_BLOCK, np.uint32)
    weights = np.empty((3, _BLOCK), points.dtype)
    slopes = np.empty((3, _BLOCK), points.dtype)
    for item in range(start, stop):
        n, first, last = _locate_block(item, points, shape, margin, firsts, weights)
        for p in range(last - first):
            slopes[0, p] = slopes[1, p] = slopes[2, p] = 0
        for c in range(values.shape[1]):
            voxels, value = image[n % len(image), c], values[n, c, first:last]
            for p in range(len(value)):
                at = uint64(firsts[p])
                i, j, k = weights[0, p], weights[1, p], weights[2, p]
                v00, v01 = voxels[at], voxels[at + to_j]
                v10, v11 = voxels[at + to_i], voxels[at + to_i + to_j]
                k00, k01 = voxels[at + to_k] - v00, voxels[at + to_j + to_k] - v01
                k10 = voxels[at + to_i + to_k] - v10
                k11 = voxels[at + to_i + to_j + to_k] - v11
                v00, v01, v10, v11 = v00 + k * k00, v01 + k * k01, v10 + k * k10, v11 + k * k11
                j0, j1 = v01 - v00, v11 - v10
                k0, k1 = k00 + j * (k01 - k00), k10 + j * (k11 - k10)
                slopes[0, p] += value[p] * (v10 + j * j1 - (v00 + j * j0))
                slopes[1, p] += value[p] * (j0 + i * (j1 - j0))
                slopes[2, p] += value[p] * (k0 + i * (k1 - k0))
        for axis in range(3):
            _keep_inside(
                slopes[axis, : last - first],
                points[n, axis, first:last],
                shape[axis],
                margin,
                grad_points[n, axis, first:last],
            )


@compiled
def _scatter(points, values, grad_image, shape, margin, start, stop):
    """Add values to the voxels that they were sampled from; items are images of one channel."""
    n_channels = values.shape[1]
    to_i, to_j, to_k = _steps(shape)
    firsts = np.empty(_BLOCK, np.uint32)
    weights = np.empty((3, _BLOCK), points.dtype)
    for n in range(len(points)):
        # The share's channels of the image that these positions are of.
        base = n % len(grad_image) * n_channels
        channels = range(max(start - base, 0), min(stop - base, n_channels))
        n_blocks = _blocks_of(points.shape[2]) if len(channels) > 0 else 0
        for block in range(n * n_blocks, (n + 1) * n_blocks):
            _, first, last = _locate_block(block, points, shape, margin, firsts, weights)
            for c in channels:
                voxels, value = grad_image[n % len(grad_image), c], values[n, c, first:last]
                for p in range(len(value)):
                    at = uint64(firsts[p])
                    j, k = weights[1, p], weights[2, p]
                    v1 = value[p] * weights[0, p]
                    v0 = value[p] - v1
                    v01, v11 = v0 * j, v1 * j
                    v00, v10 = v0 - v01, v1 - v11
                    k00, k01, k10, k11 = v00 * k, v01 * k, v10 * k, v11 * k
                    voxels[at] += v00 - k00
                    voxels[at + to_k] += k00
                    voxels[at + to_j] += v01 - k01
                    voxels[at + to_j + to_k] += k01
                    voxels[at + to_i] += v10 - k10
                    voxels[at + to_i + to_k] += k10
                    voxels[at + to_i + to_j] += v11 - k11
                    voxels[at + to_i + to_j + to_k] += k11


@compiled
def _steps(shape):
    """From a voxel to the next one of each axis, of which there is none in a single plane."""
    return (
        uint64(shape[1] * shape[2] if shape[0] > 1 else 0),
        uint64(shape[2] if shape[1] > 1 else 0),
        uint64(shape[2] > 1),
    )


@compiled
def _locate_block(block, points, shape, margin, firsts, weights):
    """Locate a block of positions; say of which batch it is, and from where to where."""
    n_blocks = _blocks_of(points.shape[2])
    n, first = block // n_blocks, block % n_blocks * _BLOCK
    last = min(first + _BLOCK, points.shape[2])
    _locate(points[n, :, first:last], shape, margin, firsts, weights)
    return n, first, last


@compiled
def _locate(points, shape, margin, firsts, weights):
    """Find the voxel before each position, and how far the position is on the way to the next."""
    for p in range(points.shape[1]):
        firsts[p] = 0
    for axis in range(3):
        size = shape[axis]
        zero, end = points.dtype.type(0), points.dtype.type(size - 1)
        scale, shift = points.dtype.type(size - 1 - 2 * margin), points.dtype.type(margin)
        last = np.int32(max(size - 2, 0))
        for p in range(points.shape[1]):
            x = points[axis, p] * scale + shift
            x = zero if x < zero else x
            x = end if x > end else x
            # NaN, which is not above zero, is sampled from the first voxel with a weight of NaN.
            voxel = min(np.int32(x if x > zero else zero), last)
            weights[axis, p] = x - points.dtype.type(voxel)
            firsts[p] = firsts[p] * np.uint32(size) + np.uint32(voxel)


@compiled
def _keep_inside(slopes, points, size, margin, out):
    """Scale slopes from voxels to unit coordinates; zero where the border's value is taken."""
    zero, end = points.dtype.type(0), points.dtype.type(size - 1)
    scale, shift = points.dtype.type(size - 1 - 2 * margin), points.dtype.type(margin)
    for p in range(len(points)):
        x = points[p] * scale + shift
        out[p] = slopes[p] * scale if zero < x < end else zero
