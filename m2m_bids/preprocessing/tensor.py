"""Diffusion tensors, and the maps that are read from them."""

import logging
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.ants_bridge import name_of, same_grid
from m2m_bids.preprocessing.motion import correct_motion
from m2m_bids.spatial.gradients import Gradients, check_sufficient, read_gradients
from m2m_bids.spatial.images import ImageError, load_image, require_3d
from m2m_bids.spatial.resampling import resample

logger = logging.getLogger(__name__)

# A mask of another grid that overlaps less with the head in the image is of another space. Masks
# of the same brain by different programs overlap by 0.9 or more.
MIN_MASK_DICE = 0.7


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
    mask_file: Path | str | None = None,
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
    mask_file : Path or str, optional
        Brain mask that came with the image. One of another grid is resampled (nearest voxel);
        without it, or where it cannot be used, the mask is that of `brain_mask`.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    TensorMaps

    Raises
    ------
    ImageError
        If image and gradients do not fit together, or do not determine a tensor.
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
    b0 = nb.Nifti1Image(data[..., gradients.is_b0].mean(axis=-1), image.affine)
    inside, chosen = choose_mask(mask_file, b0)
    steps.append(chosen)
    n_b0 = int(gradients.is_b0.sum())
    steps.append(
        f"tensor fitted by weighted least squares (DIPY) to {len(gradients.b_values) - n_b0} "
        f"volumes with b <= {gradients.b_values.max():g} and {n_b0} without weighting"
    )
    return _fit(data, inside, image.affine, gradients, "; ".join(steps))


def choose_mask(mask_file: Path | str | None, b0: nb.Nifti1Image) -> tuple[np.ndarray, str]:
    """
    Take the brain mask that came with an image, or find one where there is none of use.

    Parameters
    ----------
    mask_file : Path or str, optional
        Brain mask in the world of the image.
    b0 : Nifti1Image, shape (I, J, K)
        Mean of the volumes without diffusion weighting.

    Returns
    -------
    mask : ndarray of bool, shape (I, J, K)
    chosen : str
        Which one it is, and why not the given one.
    """
    if mask_file is None:
        return brain_mask(b0), "in a brain mask found in the image (median_otsu)"
    try:
        return _given_mask(mask_file, b0)
    except ImageError as error:
        logger.warning("the brain is found in the image instead: %s", error)
        why = f"the one that came with it cannot be used: {error}".rstrip(".")
        return brain_mask(b0), f"in a brain mask found in the image (median_otsu; {why})"


def _given_mask(mask_file: Path | str, b0: nb.Nifti1Image) -> tuple[np.ndarray, str]:
    """Read a mask, and bring it to the grid of an image if it is of the same space."""
    mask = require_3d(load_image(mask_file), mask_file)
    mask.set_filename(mask_file)  # messages name it
    chosen = "in the brain mask that came with the image"
    if mask.shape == b0.shape and np.allclose(mask.affine, b0.affine, atol=1e-3):
        return same_grid(mask, b0), chosen
    is_brain = nb.Nifti1Image((np.asarray(mask.dataobj) > 0).astype(np.uint8), mask.affine)
    inside = np.asarray(resample(is_brain, (), b0, order=0).dataobj) > 0
    head = brain_mask(b0)
    dice = 2 * np.count_nonzero(inside & head) / max(inside.sum() + head.sum(), 1)
    if dice < MIN_MASK_DICE:
        raise ImageError(
            f"{mask_file}: a mask of another grid ({mask.shape}, the image has {b0.shape}) that "
            f"overlaps with the brain in the image by {dice:.2f} (Dice), expected at least "
            f"{MIN_MASK_DICE}. Give a mask in the space of the image."
        )
    return inside, f"{chosen}, resampled from another grid"


def brain_mask(b0: nb.Nifti1Image) -> np.ndarray:
    """
    Find the brain in an image without diffusion weighting, by DIPY's ``median_otsu``.

    Parameters
    ----------
    b0 : Nifti1Image, shape (I, J, K)

    Returns
    -------
    ndarray of bool, shape (I, J, K)
    """
    from dipy.segment.mask import median_otsu

    mean = np.asarray(b0.dataobj)
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
