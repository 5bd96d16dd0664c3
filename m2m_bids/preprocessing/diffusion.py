"""Fractional anisotropy maps, cleaned for registration."""

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import name_of
from m2m_bids.spatial.images import ImageError, require_3d

# The theoretical maximum of FA is 1; above the square root of 1.5 nothing can come from a tensor.
FLOOR = 0.02


def clean_fa(image: nb.Nifti1Image) -> nb.Nifti1Image:
    """
    Clean an FA map so that an intensity-based registration can use it.

    What is not finite or negative becomes 0. Values above 1 come from tensors with a negative
    eigenvalue, at the rim of the brain and where the signal drops out: they are not clipped to 1,
    which would leave them brighter than any tract, but replaced by the median of the valid voxels
    in their 3 x 3 x 3 neighbourhood (0 if there is none), repeatedly from outside in. Everything
    but the largest connected part is set to 0.

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
        If the image is not 3-D or has no finite positive voxel.
    """
    file = name_of(image)
    image = require_3d(image, file)
    data = np.asarray(image.dataobj, dtype=np.float32)
    data = np.where(np.isfinite(data) & (data > 0), data, 0).astype(np.float32)
    if not data.any():
        raise ImageError(
            f"{file}: no finite positive voxel, expected fractional anisotropy in [0, 1]. "
            "Repeat the tensor fit, or leave this scan out."
        )
    return nb.Nifti1Image(data, image.affine)
