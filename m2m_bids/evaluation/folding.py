"""Folds of displacement fields."""

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine

from m2m_bids.spatial.fields import DisplacementField, jacobian_determinant
from m2m_bids.spatial.interpolation import interpolate


def folding_percentage(field: DisplacementField, mask: nb.Nifti1Image | None = None) -> float:
    """
    Return the share of a field's grid points at which its map folds.

    Parameters
    ----------
    field : DisplacementField
        Displacement in world millimetres, at least two grid points along each axis.
    mask : Nifti1Image, 3-D, optional
        Where to count, on any grid of the same world: the points of the field whose nearest voxel
        of the mask is not zero. All points by default.

    Returns
    -------
    float
        Points whose Jacobian determinant is not positive, percent of those in the mask.

    Raises
    ------
    ValueError
        If an axis has a single grid point, or no grid point is in the mask.
    """
    determinant = jacobian_determinant(field)
    if mask is not None:
        determinant = determinant[mask_on_field(mask, field)]
    if determinant.size == 0:
        raise ValueError("mask: no grid point of the field is inside")
    return 100 * np.count_nonzero(determinant <= 0) / determinant.size


def mask_on_field(mask: nb.Nifti1Image, field: DisplacementField) -> np.ndarray:
    """
    Sample a mask at the grid points of a field.

    Parameters
    ----------
    mask : Nifti1Image, 3-D
        Zero outside.
    field : DisplacementField
        Field in the world of the mask.

    Returns
    -------
    ndarray of bool, shape of the field's grid
        By nearest voxel; False outside the mask's grid.

    Raises
    ------
    ValueError
        If the mask is not 3-D.
    """
    if len(mask.shape) != 3:
        raise ValueError(f"mask must be 3-D, got shape {mask.shape}")
    inside = (np.asanyarray(mask.dataobj) != 0).astype(np.uint8)
    ijk = apply_affine(np.linalg.inv(mask.affine), field.points())
    return interpolate(inside, ijk, order=0) > 0
