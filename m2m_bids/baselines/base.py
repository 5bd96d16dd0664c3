"""
What a method of registration gets and gives, and the images that other programs see.

Other programs get the images that a network of M2M-Reg gets: rigidly aligned, in [0, 1], the T1w
skull-stripped, on an isotropic cube around the brain in the template's pose, as in the comparison
of the M2M-Reg paper (128 voxels of 1.5 mm).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.api import Modality, images_on_grid
from m2m_bids.spatial.conform import template_grid
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.transforms import Chain

EXTENT_MM = 192.0
# Similarity is measured in the brain and a rim: the edge of the brain tells more than its inside,
# while what a PET shows of the scalp has nothing to go with in a skull-stripped T1w.
RIM_MM = 8.0
# Beyond the cube, fields fall to zero over this length, so that their end is no fold.
FADE_MM = 30.0


@dataclass(frozen=True, eq=False)
class Images:
    """
    A pair to register.

    Parameters
    ----------
    moving : Nifti1Image, 3-D
        Static PET or FA image.
    fixed : Nifti1Image, 3-D
        T1w image.
    fixed_mask : Nifti1Image, 3-D
        Brain mask on the grid of ``fixed``.
    fixed2moving : ndarray, shape (4, 4)
        Rigid map from fixed points to moving points, RAS+ mm.
    template2fixed : ndarray, shape (4, 4)
        Affine map from points of MNI space to fixed points, RAS+ mm.
    modality : {"pet", "fa"}
        Kind of the moving image.
    fixed_dseg : Nifti1Image, 3-D, optional
        Labels of tissues, 1 GM, 2 WM and 3 CSF, in the world of ``fixed``; M2M-Reg uses them.
    """

    moving: nb.Nifti1Image
    fixed: nb.Nifti1Image
    fixed_mask: nb.Nifti1Image
    fixed2moving: np.ndarray
    template2fixed: np.ndarray
    modality: Modality
    fixed_dseg: nb.Nifti1Image | None = None


@dataclass(frozen=True)
class Options:
    """
    How methods are run.

    Parameters
    ----------
    device : str
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``, for methods
        that can use a GPU.
    n_threads : int
        Threads on the CPU; 0 leaves them to each program.
    random_seed : int
        Seed of methods that draw samples.
    spacing_mm : float
        Voxels of the images that other programs see, mm in MNI space.
    n_refine : int
        Steps of instance optimisation of M2M-Reg.
    """

    device: str = "auto"
    n_threads: int = 0
    random_seed: int = 0
    spacing_mm: float = 1.5
    n_refine: int = 60


class Outcome(NamedTuple):
    """
    Result of a method.

    Parameters
    ----------
    chain : tuple of Transform
        Map from fixed points to moving points, RAS+ mm, outermost first.
    reason : str
        Why a part of it was not applied; empty if all was.
    """

    chain: Chain
    reason: str = ""


@dataclass(frozen=True)
class Method:
    """
    A way to register.

    Parameters
    ----------
    key : str
        Name in tables and options.
    title : str
        Name as shown.
    register : callable
        Takes `Images` and `Options`, returns an `Outcome`.
    missing : callable
        Takes the modality, or None for any; says what is missing to run the method, and how to get
        it, or returns None. Loads no program.
    is_given : bool
        Whether its transform is given with the images, so that nothing is computed.
    uses_gpu : bool
        Whether it runs on a GPU where there is one.
    """

    key: str
    title: str
    register: Callable[[Images, Options], Outcome]
    missing: Callable[[Modality | None], str | None] = lambda modality: None
    is_given: bool = False
    uses_gpu: bool = False


@dataclass(frozen=True, eq=False)
class GridImages:
    """
    A rigidly aligned pair on one isotropic grid, its affine a positive diagonal and a shift.

    Parameters
    ----------
    moving, fixed : Nifti1Image, float32, shape (n, n, n)
        In [0, 1]; the fixed one is skull-stripped.
    region : Nifti1Image, uint8, same grid
        1 where similarity is measured: the fixed brain and its rim.
    """

    moving: nb.Nifti1Image
    fixed: nb.Nifti1Image
    region: nb.Nifti1Image


def images_in_template(images: Images, spacing_mm: float) -> GridImages:
    """
    Bring a pair to the cube around the brain, in MNI space.

    Parameters
    ----------
    images : Images
    spacing_mm : float
        Voxel size in MNI space.

    Returns
    -------
    GridImages

    Raises
    ------
    ImageError
        If the images do not overlap.
    """
    size = round(EXTENT_MM / spacing_mm)
    grid = template_grid(images.template2fixed, size=size, spacing_mm=spacing_mm)
    moving, fixed = images_on_grid(
        images.moving,
        images.fixed,
        images.fixed_mask,
        fixed2moving=images.fixed2moving,
        grid=grid,
    )
    region = ndimage.distance_transform_edt(fixed == 0) * spacing_mm <= RIM_MM
    affine = template_grid(np.eye(4), size=size, spacing_mm=spacing_mm).affine
    return GridImages(
        nb.Nifti1Image(moving, affine),
        nb.Nifti1Image(fixed, affine),
        nb.Nifti1Image(region.astype(np.uint8), affine),
    )


def chain_through_template(
    images: Images,
    displacement_mm: np.ndarray,
    affine: np.ndarray,
    *,
    linear: np.ndarray | None = None,
) -> Chain:
    """
    Put what a program found on the cube between the affine and the rigid map of the pair.

    Parameters
    ----------
    images : Images
        The pair.
    displacement_mm : ndarray, shape (I, J, K, 3)
        Offsets on the grid of `images_in_template`, RAS+ mm of MNI space: from points of the fixed
        image to points of the rigidly aligned moving image.
    affine : ndarray, shape (4, 4)
        Voxel to MNI space.
    linear : ndarray, shape (4, 4), optional
        Affine map that follows the displacement, in MNI space.

    Returns
    -------
    tuple of Transform
        Map from fixed points to moving points, RAS+ mm, outermost first.
    """
    n = int(np.ceil(FADE_MM / np.linalg.norm(affine[:3, 0])))
    padded = np.pad(displacement_mm, [(n, n)] * 3 + [(0, 0)], mode="linear_ramp")
    shifted = np.array(affine, dtype=float)
    shifted[:3, 3] -= shifted[:3, :3] @ (n, n, n)
    to_moving = images.fixed2moving @ images.template2fixed
    if linear is not None:
        to_moving = to_moving @ linear
    return (to_moving, DisplacementField(padded, shifted), np.linalg.inv(images.template2fixed))
