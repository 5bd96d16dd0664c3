"""Products of images' axes with banded matrices on the CPU, compiled: windows of any kind."""

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from m2m_bids.registration.compiled import compiled, share

# Rows that are added up at a time.
_N_TAPS = 4


def multiply_axes_by_bands(images: Tensor, bands: list[Tensor], radius: int) -> Tensor:
    """
    Multiply the last three axes of images with banded matrices.

    Parameters
    ----------
    images : Tensor, shape (..., I, J, K)
    bands : list of Tensor, shape (I, I), (J, J) and (K, K)
        Zero further from the diagonal than the radius.
    radius : int

    Returns
    -------
    Tensor, shape (..., I, J, K)
    """
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    shape = images.shape[-3:]
    to_i, to_j, to_k = (band.contiguous().numpy() for band in bands)
    diagonals = _diagonals(to_k, radius)
    # Slabs of the second axis, so that the rows of each follow each other.
    between = np.empty((shape[1], shape[0], shape[2]), to_k.dtype)
    inputs = images.detach().contiguous().view(-1, *shape).numpy()
    for image, out in zip(inputs, result.view(-1, *shape).numpy(), strict=True):
        n_numbers = image.size * radius
        share(_multiply_planes, shape[0], n_numbers, image, to_j, diagonals, radius, between)
        share(_multiply_first, shape[1], n_numbers, between, to_i, radius, out)
    return result


def _diagonals(band: np.ndarray, radius: int) -> np.ndarray:
    """Lay out a band by its diagonals, and zeros to a multiple of what is added at a time."""
    n_taps = -(-(2 * radius + 1) // _N_TAPS) * _N_TAPS
    padded = np.zeros((len(band), len(band) + n_taps), band.dtype)
    padded[:, radius : radius + len(band)] = band
    # Tap t of row i is in column i + t.
    to_row, to_column = padded.strides
    return as_strided(padded, (n_taps, len(band)), (to_column, to_row + to_column)).copy()


@compiled
def _multiply_planes(image, band, diagonals, radius, out, start, stop):
    """Multiply the last two axes, plane by plane of the first, into slabs of the second."""
    n_rows, n_columns = image.shape[1:]
    rows = np.empty((n_rows, n_columns), image.dtype)
    padded = np.zeros(n_columns + len(diagonals) + radius, image.dtype)
    for i in range(start, stop):
        for j in range(n_rows):
            row, inside, total = image[i, j], padded[radius:], rows[j]
            for k in range(n_columns):
                inside[k] = row[k]
                total[k] = 0
            for tap in range(0, len(diagonals), _N_TAPS):
                w0, w1, w2, w3 = (
                    diagonals[tap],
                    diagonals[tap + 1],
                    diagonals[tap + 2],
                    diagonals[tap + 3],
                )
                x0, x1, x2, x3 = (
                    padded[tap:],
                    padded[tap + 1 :],
                    padded[tap + 2 :],
                    padded[tap + 3 :],
                )
                for k in range(n_columns):
                    total[k] += w0[k] * x0[k] + w1[k] * x1[k] + w2[k] * x2[k] + w3[k] * x3[k]
        for j in range(n_rows):
            _add_up(band[j], rows, j, radius, out[j, i])


@compiled
def _multiply_first(slabs, band, radius, out, start, stop):
    """Multiply the first axis, slab by slab of the second."""
    for j in range(start, stop):
        for i in range(len(out)):
            _add_up(band[i], slabs[j], i, radius, out[i, j])


@compiled
def _add_up(weights, rows, at_row, radius, total):
    """Add up the weighted rows around one of them."""
    first, last = max(0, at_row - radius), min(len(rows), at_row + radius + 1)
    for k in range(len(total)):
        total[k] = 0
    n_together = (last - first) // _N_TAPS * _N_TAPS
    for at in range(first, first + n_together, _N_TAPS):
        w0, w1, w2, w3 = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
        x0, x1, x2, x3 = rows[at], rows[at + 1], rows[at + 2], rows[at + 3]
        for k in range(len(total)):
            total[k] += w0 * x0[k] + w1 * x1[k] + w2 * x2[k] + w3 * x3[k]
    for at in range(first + n_together, last):
        weight, row = weights[at], rows[at]
        for k in range(len(total)):
            total[k] += weight * row[k]
