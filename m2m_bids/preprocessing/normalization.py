"""From a T1w image to a template, deformably."""

from typing import NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.ants_bridge import (
    Stage,
    finite_data,
    register,
    same_grid,
    working_copy,
)
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.templates import Template
from m2m_bids.spatial.transforms import Chain

SPACING_MM = 2.0
RIM_MM = 6.0
STAGES = (
    Stage("Affine[0.1]", "MI[{},1,32,Regular,0.5]", "[100x50,1e-6,10]", "2x1", "2x1mm"),
    Stage("SyN[0.25,3,0]", "MI[{},1,32]", "[70x50x20,1e-6,10]", "4x2x1", "2x1x0vox"),
)


class Normalization(NamedTuple):
    """
    Maps between a T1w image and a template.

    Attributes
    ----------
    template2anat : tuple of Transform
        From points of the template to points of the T1w, RAS+ mm, outermost first: brings images
        from the T1w to the template.
    anat2template : tuple of Transform
        Its inverse.
    """

    template2anat: Chain
    anat2template: Chain


def normalize_t1w(
    t1w: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    template: Template,
    *,
    template2anat: np.ndarray,
    random_seed: int = 0,
) -> Normalization:
    """
    Register the brain of a T1w image to that of a template, by an affine map and SyN.

    Both are compared without skull, by mutual information on grids of 2 mm [Avants et al., Med
    Image Anal 2008], as in ANTs' quick script; cross-correlation takes many times as long.

    Parameters
    ----------
    t1w : Nifti1Image, 3-D
        T1w image without bias field.
    mask : Nifti1Image
        Brain mask on its grid.
    template : Template
    template2anat : ndarray, shape (4, 4)
        Affine that maps points of MNI space to points of the T1w, RAS+ mm, to start from. Where
        it leaves the brains apart, as for a template in another world, their centres are laid on
        each other instead.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    Normalization

    Raises
    ------
    ImageError
        If an image has no signal, or a mask is empty or on another grid.
    RuntimeError
        If ANTs ends with an error.
    """
    moving = _brain(t1w, mask)
    fixed = _brain(template.t1w, template.mask)
    result = register(
        fixed,
        moving,
        STAGES,
        fixed2moving=_start(fixed, moving, template2anat),
        random_seed=random_seed,
    )
    if result.displacement_mm is None or result.inverse_displacement_mm is None:
        raise RuntimeError("ANTs wrote no displacement field")
    return Normalization(
        (result.fixed2moving, DisplacementField(result.displacement_mm, fixed.affine)),
        (
            DisplacementField(result.inverse_displacement_mm, fixed.affine),
            np.linalg.inv(result.fixed2moving),
        ),
    )


def _brain(image: nb.Nifti1Image, mask: nb.Nifti1Image) -> nb.Nifti1Image:
    """Copy an image without what is outside of its brain to an isotropic grid with a margin."""
    data = finite_data(image) * same_grid(mask, image)
    low, high = np.percentile(data[data > 0], (0.5, 99.5))
    n = np.ceil(RIM_MM / np.linalg.norm(image.affine[:3, :3], axis=0)).astype(int)
    padded = np.pad(np.clip(data / high, 0, 1) * (data > low / 2), [(k, k) for k in n])
    affine = image.affine @ nb.affines.from_matvec(np.eye(3), -n)
    return working_copy(nb.Nifti1Image(padded, affine), SPACING_MM)


def _start(fixed: nb.Nifti1Image, moving: nb.Nifti1Image, fixed2moving: np.ndarray) -> np.ndarray:
    """Return the affine if it lays the brains on each other, else the shift of their centres."""
    fixed_centre, moving_centre = (_centre_mm(image) for image in (fixed, moving))
    shift = moving_centre - nb.affines.apply_affine(fixed2moving, fixed_centre)
    if np.linalg.norm(shift) < 30:
        return fixed2moving
    return nb.affines.from_matvec(np.eye(3), moving_centre - fixed_centre)


def _centre_mm(image: nb.Nifti1Image) -> np.ndarray:
    """Centre of mass of what is not dark, RAS+ mm."""
    voxels = np.argwhere(np.asarray(image.dataobj) > 0.1)
    return nb.affines.apply_affine(image.affine, voxels.mean(axis=0))
