"""Diffusion tensors, and the maps that are read from them."""

from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.ants_bridge import name_of, same_grid
from m2m_bids.preprocessing.motion import correct_motion
from m2m_bids.spatial.gradients import Gradients, check_sufficient, read_gradients
from m2m_bids.spatial.images import ImageError


class TensorMaps(NamedTuple):
    """
    Maps of a tensor, float32 on the grid of the image, zero outside the brain.

    Attributes
    ----------
    fa : Nifti1Image, shape (I, J, K)
        Fractional anisotropy, in [0, 1].
    md, ad, rd : Nifti1Image, shape (I, J, K)
        Mean, axial and radial diffusivity, mm^2/s.
    direction : ndarray, shape (I, J, K, 3)
        Principal direction, unit vectors in the world, RAS+; the sign has no meaning.
    method : str
        How the tensor was fitted.
    """

    fa: nb.Nifti1Image
    md: nb.Nifti1Image
    ad: nb.Nifti1Image
    rd: nb.Nifti1Image
    direction: np.ndarray
    method: str


def fit_dwi(
    image: nb.Nifti1Image,
    bval_file: Path | str,
    bvec_file: Path | str,
    *,
    is_raw: bool,
    mask: nb.Nifti1Image | None = None,
    random_seed: int = 0,
) -> TensorMaps:
    """
    Fit a tensor to a diffusion-weighted image.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K, N)
        Diffusion-weighted image.
    bval_file, bvec_file : Path or str
        Its gradients, see `read_gradients`.
    is_raw : bool
        Whether motion between the volumes is corrected first; of a preprocessed image it is not.
    mask : Nifti1Image, shape (I, J, K), optional
        Brain mask; by default that of `brain_mask`.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    TensorMaps

    Raises
    ------
    ImageError
        If image, gradients and mask do not fit together, or do not determine a tensor.
    """
    file = name_of(image)
    if image.ndim != 4:
        raise ImageError(
            f"{file}: {image.ndim}-D image {image.shape}, expected a diffusion-weighted one of 4. "
            "Merge its volumes, or leave this scan out."
        )
    gradients = read_gradients(
        bval_file, bvec_file, n_volumes=image.shape[3], vox2ras=image.affine
    )
    check_sufficient(gradients, file)
    used = gradients.is_used
    gradients = Gradients(gradients.b_values[used], gradients.directions[used])
    data = np.asarray(image.dataobj)[..., used].astype(np.float32)
    data = np.maximum(np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0), 0)
    if not data[..., gradients.is_b0].any():
        raise ImageError(
            f"{file}: no signal without diffusion weighting, expected a head. "
            "Check how the file was written, or leave this scan out."
        )
    steps = []
    if is_raw:
        corrected = correct_motion(data, image.affine, gradients, random_seed=random_seed)
        data, gradients = corrected.data, corrected.gradients
        steps.append(
            f"each volume rigidly aligned with the first without diffusion weighting (up to "
            f"{corrected.max_shift_mm:.1f} mm, {corrected.max_angle_deg:.1f} degrees), gradients "
            "rotated; without correction of eddy currents and susceptibility distortion"
        )
    inside = brain_mask(data[..., gradients.is_b0]) if mask is None else same_grid(
        mask, nb.Nifti1Image(data[..., 0], image.affine)
    )  # fmt: skip
    if mask is not None:
        steps.append("in the brain mask that came with the image")
    n_b0 = int(gradients.is_b0.sum())
    steps.append(
        f"tensor fitted by weighted least squares (DIPY) to {len(gradients.b_values) - n_b0} "
        f"volumes with b <= {gradients.b_values.max():g} and {n_b0} without weighting"
    )
    return _fit(data, inside, image.affine, gradients, "; ".join(steps))


def brain_mask(b0_data: np.ndarray) -> np.ndarray:
    """
    Find the brain in volumes without diffusion weighting, by DIPY's ``median_otsu``.

    Parameters
    ----------
    b0_data : ndarray, shape (I, J, K, N)

    Returns
    -------
    ndarray of bool, shape (I, J, K)
    """
    from dipy.segment.mask import median_otsu

    mean = b0_data.mean(axis=-1)
    _, mask = median_otsu(mean, median_radius=2, numpass=2, finalize_mask=True)
    return mask.astype(bool)


def _fit(
    data: np.ndarray, inside: np.ndarray, affine: np.ndarray, gradients: Gradients, method: str
) -> TensorMaps:
    """Fit a tensor in every voxel of a mask."""
    from dipy.core.gradients import gradient_table
    from dipy.reconst.dti import TensorModel

    # Directions are those of the world, and so are the tensor's.
    table = gradient_table(gradients.b_values, bvecs=gradients.directions)
    tensor = TensorModel(table, fit_method="WLS").fit(data[inside])

    def filled(values: np.ndarray) -> np.ndarray:
        out = np.zeros((*inside.shape, *values.shape[1:]), dtype=np.float32)
        out[inside] = np.nan_to_num(values)
        return out

    maps = (nb.Nifti1Image(filled(values), affine)
            for values in (tensor.fa, tensor.md, tensor.ad, tensor.rd))  # fmt: skip
    return TensorMaps(*maps, filled(tensor.directions[..., 0, :]), method)
