"""Folds of chains of transforms."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import nibabel as nb
import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage

from m2m_bids.spatial.fields import (
    DisplacementField,
    check_affine,
    grid_points,
    jacobian_determinant,
)
from m2m_bids.spatial.transforms import Transform, as_chain, map_points

_POINTS_PER_SLAB = 1_000_000


def folding_percentage(transforms: Transform | Sequence[Transform], mask: nb.Nifti1Image) -> float:
    """
    Return the share of a mask's voxels at which the map of a chain folds.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Chain from points of the fixed image to points of the moving image, outermost first.
    mask : Nifti1Image, 3-D
        Where to count, on the grid of the fixed image; zero outside. Any affine.

    Returns
    -------
    float
        Voxels of the mask whose Jacobian determinant is not positive, percent. The map is
        differentiated in the world by central differences from voxel to voxel, one-sided at the
        border of the grid. Rigid transforms in the chain change nothing.

    Raises
    ------
    ValueError
        If the mask is not 3-D, is empty, or has an axis of a single voxel.
    """
    if len(mask.shape) != 3:
        raise ValueError(f"mask must be 3-D, got shape {mask.shape}")
    inside = np.asanyarray(mask.dataobj) != 0
    if not inside.any():
        raise ValueError("mask: no voxel is inside")
    (box,) = ndimage.find_objects(inside.astype(np.uint8))
    # A voxel more on each side, for the differences.
    box = tuple(slice(max(axis.start - 1, 0), axis.stop + 1) for axis in box)
    inside = inside[box]
    affine = mask.affine @ from_matvec(np.eye(3), [axis.start for axis in box])
    n_folds = 0
    for slab in _slabs(transforms, inside.shape, affine):
        # One affine takes argument and value from voxels to the world: the determinant stays.
        determinant = jacobian_determinant(DisplacementField(slab.displacement, np.eye(4)))
        own = determinant[slab.start - slab.first : slab.stop - slab.first]
        n_folds += np.count_nonzero(own[inside[slab.start : slab.stop]] <= 0)
    return float(100 * n_folds / np.count_nonzero(inside))


def folding_percentage_paper(
    transforms: Transform | Sequence[Transform], shape: Sequence[int], affine: np.ndarray
) -> float:
    """
    Return the share of a grid's cells at which the map of a chain folds, as the paper counts.

    The M2M-Reg paper reports the percentage of voxels with a negative determinant
    (``%|J_phi| < 0``); its authors' public code takes the determinant of the differences of each
    voxel to its predecessor along each axis, everywhere in the grid of the network (``flips`` of
    the ICON project's losses). In contrast to `folding_percentage`, background counts, a
    determinant of zero does not, and central differences cannot hide a fold between two voxels.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Chain from points of the fixed image to points of the moving image, outermost first.
    shape : sequence of 3 int
        Voxels along each axis of a grid in the world of the fixed image, at least two. A field
        ends with a step where it is not zero at its border, so that the grid should lie in it: the
        paper's has 128 voxels of 1.5 mm.
    affine : ndarray, shape (4, 4)
        Voxel to world of the grid.

    Returns
    -------
    float
        Cells with a negative determinant, percent of all cells.

    Raises
    ------
    ValueError
        If an axis has a single voxel, or the affine is none.
    """
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"shape must be three numbers from 2 on, got {tuple(shape)}")
    n_negative = 0
    for slab in _slabs(transforms, shape, check_affine(affine)):
        # The plane after the slab belongs to the next slab's cells.
        determinant = _cell_determinant(slab.displacement[: slab.stop - slab.first])
        n_negative += np.count_nonzero(determinant < 0)
    return float(100 * n_negative / np.prod(np.subtract(shape, 1)))


class _Slab(NamedTuple):
    """
    Displacement in voxels of some planes of a grid.

    The planes of the slab are ``start`` to ``stop - 1``; the displacement, shape (n, J, K, 3),
    begins with plane ``first`` and has a plane more on each side where the grid has one.
    """

    first: int
    start: int
    stop: int
    displacement: np.ndarray


def _slabs(
    transforms: Transform | Sequence[Transform], shape: Sequence[int], affine: np.ndarray
) -> Iterator[_Slab]:
    """Displace the voxels of a grid through a chain, some planes at a time to save memory."""
    chain = (np.linalg.inv(affine), *as_chain(transforms), affine)
    step = max(1, _POINTS_PER_SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        first, last = max(start - 1, 0), min(stop + 1, shape[0])
        offset = from_matvec(np.eye(3), (first, 0, 0))
        ijk = grid_points((last - first, *shape[1:]), offset)
        yield _Slab(first, start, stop, map_points(chain, ijk) - ijk)


def _cell_determinant(displacement: np.ndarray) -> np.ndarray:
    """Return the determinants of backward differences, displacement in voxels."""
    here = displacement[1:, 1:, 1:]
    i = here - displacement[:-1, 1:, 1:] + (1, 0, 0)
    j = here - displacement[1:, :-1, 1:] + (0, 1, 0)
    k = here - displacement[1:, 1:, :-1] + (0, 0, 1)
    return (np.cross(i, j) * k).sum(-1)
