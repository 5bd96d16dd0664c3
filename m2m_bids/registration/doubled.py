"""Convolutions of doubled images on the CPU, computed on the grid from before the doubling.

A convolution of an image that was interpolated to twice as many voxels is linear in the coarse
voxels, and multiplying channels commutes with interpolating and shifting voxels. So every coarse
voxel is multiplied with the 27 taps of the kernel once, for the eight fine voxels that it becomes,
and it is the products that are doubled, shifted and added up, axis by axis. These are an eighth of
the multiplications, and of the finer grid nothing but the result is stored.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2m_bids.registration.compiled import compiled, share

# Voxels of planes that are multiplied at a time; one plane is, however large.
_N_ROWS = 512


def convolve_before_doubling(x: Tensor, weight: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """
    Convolve images that are interpolated trilinearly to twice as many voxels along every axis.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)
        On the CPU.
    weight : Tensor, shape (C', C, 3, 3, 3)
    shape : tuple of int
        Voxels of the result, ``2 * I`` or ``2 * I - 1`` and so on: the last ones of a doubled
        image may be cut off before it is padded with zeros and convolved.

    Returns
    -------
    Tensor, shape (N, C', *shape)
        Channels last.
    """
    return _ConvolveDoubled.apply(x, weight, tuple(shape))


class _ConvolveDoubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shape):
        x = x.permute(0, 2, 3, 4, 1).contiguous()
        ctx.save_for_backward(x, weight)
        matrix = _to_matrix(weight)
        y = x.new_empty(len(x), *shape, len(weight))
        for image, image_y in zip(x, y, strict=True):
            _convolve(image, matrix, image_y)
        return y.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        matrix = _to_matrix(weight)
        grad_x, grad_matrix = torch.empty_like(x), torch.zeros_like(matrix)
        images = x, grad.permute(0, 2, 3, 4, 1).contiguous(), grad_x
        for image, image_grad, image_grad_x in zip(*images, strict=True):
            _convolve_backward(image_grad, image, matrix, image_grad_x, grad_matrix)
        taps = grad_matrix.view(3, 3, 3, *weight.shape[:2])
        return grad_x.permute(0, 4, 1, 2, 3), taps.permute(3, 4, 2, 1, 0), None


def _to_matrix(weight: Tensor) -> Tensor:
    """Lay out weights as rows: taps, those of the last axis first, and then output channels."""
    return weight.permute(4, 3, 2, 0, 1).reshape(-1, weight.shape[1])


def _convolve(image: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Convolve an image, shape (I, J, K, C), to (I', J', K', C')."""
    (places, weights), by_row, by_voxel = (_places_to_double(size) for size in out.shape[:3])
    slabs = _slabs(image)
    # What the two planes before a slab add to its own is kept.
    buffers = planes, *_ = _buffers(image, out, 2 + slabs[0].stop)
    written = 0
    for slab in slabs:
        own_planes, rows, products = (x[2 : 2 + slab.stop - slab.start] for x in buffers)
        torch.mm(image[slab].flatten(0, 2), matrix.t(), out=products.flatten(0, 2))
        _double(_lines(products), by_voxel, _lines(rows))
        _double(rows.unsqueeze(2), by_row, own_planes.unsqueeze(2))
        # The last plane lacks what the one after the slab adds to it.
        end = len(out) if slab.stop == len(image) else 2 * (slab.stop - 1)
        table = places[written:end] - (slab.start - 2), weights[written:end]
        _double(planes[None], table, out[None, written:end])
        planes[:2] = planes[-2:].clone()
        written = end


def _convolve_backward(
    grad: Tensor, image: Tensor, matrix: Tensor, grad_image: Tensor, grad_matrix: Tensor
) -> None:
    """Write the gradient with respect to an image, and add that with respect to the matrix."""
    (places, weights), by_row, by_voxel = (_places_to_halve(size) for size in grad.shape[:3])
    slabs = _slabs(image)
    buffers = _buffers(image, grad, slabs[0].stop)
    for slab in slabs:
        planes, rows, products = (x[: slab.stop - slab.start] for x in buffers)
        _halve(grad[None], (places[slab], weights[slab]), planes[None])
        _halve(planes.unsqueeze(2), by_row, rows.unsqueeze(2))
        _halve(_lines(rows), by_voxel, _lines(products))
        products = products.flatten(0, 2)
        torch.mm(products, matrix, out=grad_image[slab].flatten(0, 2))
        grad_matrix.addmm_(products.t(), image[slab].flatten(0, 2))


def _slabs(image: Tensor) -> list[slice]:
    """Divide an image, shape (I, J, K, C), into planes that are multiplied at a time."""
    step = max(1, _N_ROWS // image[0, ..., 0].numel())
    return [slice(i, min(i + step, len(image))) for i in range(0, len(image), step)]


def _buffers(image: Tensor, out: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for planes, rows and products of n planes: 3, 9 and 27 taps of each output."""
    (_, n_j, n_k, _), (_, to_j, to_k, n_out) = image.shape, out.shape
    shapes = (to_j, to_k, 3 * n_out), (n_j, to_k, 9 * n_out), (n_j, n_k, 27 * n_out)
    return tuple(image.new_zeros(n, *shape) for shape in shapes)


def _lines(x: Tensor) -> Tensor:
    """View voxels of planes, shape (n, J, K, M), as lines of voxels, (n * J, K, 1, 1, M)."""
    return x.flatten(0, 1)[:, :, None, None]


@lru_cache(maxsize=64)
def _places_to_double(size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Return which coarse voxels an axis' fine voxels are made of, by tap, and their weights.

    Shapes (size, 3, 2). A tap sees zeros beyond the ends.
    """
    seen = np.arange(size)[:, None] + np.arange(-1, 2)
    nearer = seen // 2
    further = nearer + 2 * (seen % 2) - 1
    weights = ((seen >= 0) & (seen < size))[..., None] * np.array((0.75, 0.25))
    places = np.stack((nearer, further), -1).clip(0, (size - 1) // 2)
    return places, weights


@lru_cache(maxsize=64)
def _places_to_halve(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which fine voxels see a coarse one, by tap, and the weights; shapes (n, 3, 4)."""
    n = (size + 1) // 2
    seen = 2 * np.arange(n)[:, None, None] + np.arange(-1, 3)
    places = seen - np.arange(-1, 2)[:, None]
    is_inside = (seen >= 0) & (seen < size) & (places >= 0) & (places < size)
    weights = is_inside * np.array((0.25, 0.75, 0.75, 0.25))
    # The voxels at the ends of a doubled axis are made of one alone.
    weights[(seen == 0) & is_inside] = 1
    weights[(seen == 2 * n - 1) & is_inside] = 1
    return places.clip(0, size - 1), weights


def _double(taps: Tensor, table: tuple[np.ndarray, np.ndarray], out: Tensor) -> None:
    """
    Double an axis and add up its taps.

    Parameters
    ----------
    taps : Tensor, shape (A, n, B, C, 3 * M)
    table : tuple of ndarray, shape (m, 3, 2)
        Of `_places_to_double`.
    out : Tensor, shape (A, m, B, C, M)
        Is written.
    """
    places, weights = table
    x, y = taps.unflatten(4, (3, -1)).numpy(), out.numpy()
    share(_add_taps, y[..., 0, 0].size, y.size, x, places, weights.astype(y.dtype), y)


@compiled
def _add_taps(taps, places, weights, out, start, stop):
    _, n_fine, n_rows, n_columns, n_numbers = out.shape
    for item in range(start, stop):
        a, at, b = item // n_rows // n_fine, item // n_rows % n_fine, item % n_rows
        (p0, p1), (p2, p3), (p4, p5) = places[at]
        (w0, w1), (w2, w3), (w4, w5) = weights[at]
        for c in range(n_columns):
            x0, x1 = taps[a, p0, b, c, 0], taps[a, p1, b, c, 0]
            x2, x3 = taps[a, p2, b, c, 1], taps[a, p3, b, c, 1]
            x4, x5 = taps[a, p4, b, c, 2], taps[a, p5, b, c, 2]
            y = out[a, at, b, c]
            for k in range(n_numbers):
                y[k] = w0 * x0[k] + w1 * x1[k] + w2 * x2[k] + w3 * x3[k] + w4 * x4[k] + w5 * x5[k]


def _halve(grad: Tensor, table: tuple[np.ndarray, np.ndarray], out: Tensor) -> None:
    """
    Apply the transpose of `_double`.

    Parameters
    ----------
    grad : Tensor, shape (A, m, B, C, M)
    table : tuple of ndarray, shape (n, 3, 4)
        Of `_places_to_halve`.
    out : Tensor, shape (A, n, B, C, 3 * M)
        Is written.
    """
    places, weights = table
    x, y = grad.numpy(), out.unflatten(4, (3, -1)).numpy()
    share(_spread_taps, y[..., 0, 0, 0].size, y.size, x, places, weights.astype(y.dtype), y)


@compiled
def _spread_taps(grad, places, weights, out, start, stop):
    _, n_coarse, n_rows, n_columns, _, n_numbers = out.shape
    for item in range(start, stop):
        a, at, b = item // n_rows // n_coarse, item // n_rows % n_coarse, item % n_rows
        for c in range(n_columns):
            for tap in range(3):
                p0, p1, p2, p3 = places[at, tap]
                w0, w1, w2, w3 = weights[at, tap]
                x0, x1, x2, x3 = (
                    grad[a, p0, b, c],
                    grad[a, p1, b, c],
                    grad[a, p2, b, c],
                    grad[a, p3, b, c],
                )
                y = out[a, at, b, c, tap]
                for k in range(n_numbers):
                    y[k] = w0 * x0[k] + w1 * x1[k] + w2 * x2[k] + w3 * x3[k]
