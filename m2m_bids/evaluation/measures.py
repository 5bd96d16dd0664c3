"""All numbers of one registration: overlap, folds and landmark error."""

from collections.abc import Sequence

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage

from m2m_bids.evaluation.folding import folding_percentage, folding_percentage_paper
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.evaluation.records import Value, label_measures
from m2m_bids.spatial.landmarks import Landmarks
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import Transform, map_points

# The grid of the M2M-Reg paper, on which it counts folds.
PAPER_SPACING_MM = 1.5
PAPER_SIZE = 128
N_REFERENCE_POINTS = 10_000


def measure_registration(
    transforms: Transform | Sequence[Transform],
    mask: nb.Nifti1Image,
    *,
    fixed_labels: nb.Nifti1Image,
    moving_labels: nb.Nifti1Image | None = None,
    landmarks: Landmarks | None = None,
) -> dict[str, Value]:
    """
    Measure a registration, as fields of a record.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Chain from points of the fixed image to points of the moving image, outermost first.
    mask : Nifti1Image, 3-D
        Brain mask on the grid of the fixed image.
    fixed_labels : Nifti1Image, 3-D
        Labels as from `m2m_bids.evaluation.labels.evaluation_labels`, in the world of the fixed
        image; overlap is measured on their grid.
    moving_labels : Nifti1Image, 3-D, optional
        Such labels in the world of the moving image.
    landmarks : Landmarks, optional
        Where the true map takes points of the fixed image.

    Returns
    -------
    dict of str to float or str
        ``folding_percent``, ``folding_percent_paper`` and, with landmarks, ``landmark_error_mm``
        and, with labels, the fields of `m2m_bids.evaluation.records.label_measures`.

    Raises
    ------
    ValueError
        If the mask is empty, or labels or landmarks cannot be compared.
    """
    shape, affine = paper_grid(mask)
    measures: dict[str, Value] = {
        "folding_percent": folding_percentage(transforms, mask),
        "folding_percent_paper": folding_percentage_paper(transforms, shape, affine),
    }
    if landmarks is not None:
        measures["landmark_error_mm"] = float(landmark_errors(transforms, *landmarks).mean())
    if moving_labels is not None:
        moved = resample(moving_labels, transforms, fixed_labels, order=0)
        measures |= label_measures(
            np.asarray(moved.dataobj), np.asarray(fixed_labels.dataobj), fixed_labels.affine
        )
    return measures


def paper_grid(mask: nb.Nifti1Image) -> tuple[tuple[int, ...], np.ndarray]:
    """
    Lay the paper's grid, 128 voxels of 1.5 mm along each axis, around a brain.

    Parameters
    ----------
    mask : Nifti1Image, 3-D
        Brain mask, zero outside.

    Returns
    -------
    shape : tuple of 3 int
        Fewer voxels along an axis where the grid would leave that of the mask.
    affine : ndarray, shape (4, 4)
        Voxel to world; the axes are those of the mask.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    boxes = ndimage.find_objects((np.asarray(mask.dataobj) != 0).astype(np.uint8))
    if not boxes:
        raise ValueError("mask: no voxel is inside")
    zooms = np.linalg.norm(mask.affine[:3, :3], axis=0)
    center = np.array([(axis.start + axis.stop - 1) / 2 for axis in boxes[0]])
    half = (PAPER_SIZE - 1) / 2 * PAPER_SPACING_MM / zooms
    first = np.maximum(center - half, 0)
    last = np.minimum(center + half, np.array(mask.shape) - 1)
    # Rounding must not lose the last voxel of a grid that fits exactly.
    shape = np.floor((last - first) * zooms / PAPER_SPACING_MM + 1e-6).astype(int) + 1
    return tuple(shape.tolist()), mask.affine @ from_matvec(
        np.diag(PAPER_SPACING_MM / zooms), first
    )


def landmarks_of(transforms: Transform | Sequence[Transform], mask: nb.Nifti1Image) -> Landmarks:
    """
    Take points of a brain through a known map.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        True or reference chain from points of the fixed image to points of the moving image.
    mask : Nifti1Image, 3-D
        Brain mask in the world of the fixed image, zero outside.

    Returns
    -------
    Landmarks
        Ten thousand voxels of the mask, drawn alike each time, or all if it has fewer.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    ijk = np.argwhere(np.asarray(mask.dataobj))
    if not len(ijk):
        raise ValueError("mask: no voxel is inside")
    chosen = np.random.default_rng(0).permutation(len(ijk))[:N_REFERENCE_POINTS]
    fixed = apply_affine(mask.affine, ijk[chosen])
    return Landmarks(fixed, map_points(transforms, fixed))
