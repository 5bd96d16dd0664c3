"""Fractional anisotropy maps, cleaned for registration."""

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import name_of
from m2m_bids.spatial.images import ImageError, require_3d

# A part with less than this fraction of the largest part's voxels is a stray spike, not brain.
SMALLEST_PART = 0.05


def clean_fa(image: nb.Nifti1Image) -> nb.Nifti1Image:
    """
    Clean an FA map so that an intensity-based registration can use it.

    What is not finite or negative becomes 0. Values above 1 are failed tensor fits (a negative
    eigenvalue), mostly at the rim of the brain. Clipped to 1 they would stay brighter than any
    tract, so they become the median of the valid voxels among their 26 neighbours, 0 if there
    are none. Small separate parts, such as spikes outside the brain, are set to 0.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, 1)
        FA map; may hold NaN and values above 1.

    Returns
    -------
    Nifti1Image
        float32 map in [0, 1] on the same grid.

    Raises
    ------
    ImageError
        If the image is not 3-D, has no finite positive voxel, or is not scaled to [0, 1] (most
        positive voxels are above 1).
    """
    file = name_of(image)
    image = require_3d(image, file)
    data = np.asarray(image.dataobj, dtype=np.float32)
    data = np.where(np.isfinite(data) & (data > 0), data, np.float32(0))
    if not data.any():
        raise ImageError(
            f"{file}: no finite positive voxel, expected fractional anisotropy in [0, 1]. "
            "Repeat the tensor fit, or leave this scan out."
        )
    if np.median(data[data > 0]) > 1:
        raise ImageError(
            f"{file}: median {np.median(data[data > 0]):.4g} of the positive voxels, expected "
            "fractional anisotropy in [0, 1]. Rescale the map."
        )
    data = _replace_failed(data)
    labels, n_parts = ndimage.label(data > 0, structure=np.ones((3, 3, 3)))
    if n_parts > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        data[sizes[labels] < SMALLEST_PART * sizes.max()] = 0
    return nb.Nifti1Image(data, image.affine)


def _replace_failed(data: np.ndarray) -> np.ndarray:
    """Replace values above 1 by the median of their valid neighbours, or 0."""
    failed = np.argwhere(data > 1)
    if not len(failed):
        return data
    padded = np.pad(np.where((data > 0) & (data <= 1), data, np.nan), 1, constant_values=np.nan)
    offsets = np.stack(np.meshgrid(*[(0, 1, 2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    around = failed[:, None, :] + offsets
    neighbours = padded[tuple(np.moveaxis(around, -1, 0))]
    has_valid = np.isfinite(neighbours).any(axis=1)
    replacement = np.zeros(len(failed), dtype=np.float32)
    replacement[has_valid] = np.nanmedian(neighbours[has_valid], axis=1)
    cleaned = data.copy()
    cleaned[tuple(failed.T)] = replacement
    return cleaned
