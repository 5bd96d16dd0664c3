"""Gaussian smoothing that knows the field of view."""

import nibabel as nb
import numpy as np
from scipy import ndimage

_FWHM_PER_SIGMA = np.sqrt(8 * np.log(2))


def voxel_sigmas(fwhm_mm: float | tuple[float, ...], affine: np.ndarray) -> np.ndarray:
    """
    Turn full widths at half maximum into standard deviations along the axes of an array.

    Parameters
    ----------
    fwhm_mm : float or tuple of 3 floats
        Of all axes, or of the one that goes most to the right, to the front, and upwards.
    affine : ndarray, shape (4, 4)
        Voxel to world.

    Returns
    -------
    ndarray, shape (3,)
        In voxels, in the order of the array's axes.

    Examples
    --------
    >>> swapped = np.array([[0, 0, 2.0, 0], [0, 3.0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1]])
    >>> np.round(voxel_sigmas((2, 3, 12), swapped) * np.sqrt(8 * np.log(2)), 6)
    array([3., 1., 1.])
    """
    widths = np.broadcast_to(np.asarray(fwhm_mm, dtype=float), 3)
    world_axis = nb.io_orientation(affine)[:, 0].astype(int)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    return widths[world_axis] / spacing_mm / _FWHM_PER_SIGMA


def smooth(image: nb.Nifti1Image, fwhm_mm: float, is_seen: np.ndarray) -> nb.Nifti1Image:
    """
    Smooth an image inside its field of view.

    Values are weighted means of what was scanned, so that they do not fall off at the border of
    the field of view; what is outside stays zero.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        Image; each frame is smoothed, but for one that is no number anywhere, which stays so.
    fwhm_mm : float
        Full width at half maximum.
    is_seen : ndarray of bool, shape (I, J, K)
        Field of view of the scan.

    Returns
    -------
    Nifti1Image, float32, of the same shape
    """
    sigmas = voxel_sigmas(fwhm_mm, image.affine)
    weight = ndimage.gaussian_filter(is_seen.astype(np.float32), sigmas, mode="constant")
    data = np.asanyarray(image.dataobj)
    frames = data.reshape(*image.shape[:3], -1)
    output = np.zeros(frames.shape, dtype=np.float32)
    for t in range(frames.shape[3]):
        is_number = np.isfinite(frames[..., t])
        if not is_number.any():
            output[..., t] = np.nan
            continue
        masked = np.where(is_seen & is_number, frames[..., t], 0)
        blurred = ndimage.gaussian_filter(masked.astype(np.float32), sigmas, mode="constant")
        output[is_seen, t] = blurred[is_seen] / weight[is_seen]
    header = image.header.copy()
    header.set_data_dtype(np.float32)
    return nb.Nifti1Image(output.reshape(image.shape), image.affine, header)
