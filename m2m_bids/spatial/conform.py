"""The cubic grid on which networks see images, and sampling of images on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage

from m2m_bids.spatial.interpolation import interpolate

BRAIN_CENTER_MM = (0.0, -17.0, 5.0)
"""Centre of the bounding box of the MNI152 brain mask, which is 144 x 180 x 154 mm."""

_FWHM_TO_SIGMA = 1 / np.sqrt(8 * np.log(2))


@dataclass(frozen=True, eq=False)
class NetworkGrid:
    """
    Cubic grid of a network in the world of the fixed image.

    Parameters
    ----------
    size : int
        Number of voxels along every axis, at least 2.
    affine : ndarray, shape (4, 4)
        Voxel to RAS+ millimetres. Any invertible affine: the grid of the template carried into the
        fixed image's world may be anisotropic and sheared there.

    Raises
    ------
    ValueError
        If the size is below 2 or the affine cannot be inverted.
    """

    size: int
    affine: np.ndarray

    def __post_init__(self):
        affine = np.array(self.affine, dtype=float)
        if self.size < 2:
            raise ValueError(f"size must be at least 2, got {self.size}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine):
            raise ValueError(f"affine must be an invertible (4, 4) matrix, got {self.affine}")
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        return (self.size, self.size, self.size)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbours along each axis in the world, shape (3,), mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def template_grid(
    template2fixed: np.ndarray,
    *,
    size: int = 64,
    spacing_mm: float = 3.0,
    center_mm: tuple[float, float, float] = BRAIN_CENTER_MM,
) -> NetworkGrid:
    """
    Return the cubic grid around the MNI brain, carried into the world of the fixed image.

    Parameters
    ----------
    template2fixed : ndarray, shape (4, 4)
        Maps points of MNI space to points of the fixed image, RAS+ mm.
    size : int
        Number of voxels along every axis.
    spacing_mm : float
        Isotropic voxel size in MNI space.
    center_mm : tuple of float
        Centre of the grid in MNI space.

    Returns
    -------
    NetworkGrid
    """
    start = np.asarray(center_mm) - (size - 1) / 2 * spacing_mm
    return NetworkGrid(
        size, np.asarray(template2fixed) @ from_matvec(np.eye(3) * spacing_mm, start)
    )


def sample_on_grid(
    image: nb.Nifti1Image,
    grid: NetworkGrid,
    *,
    point_map: np.ndarray | None = None,
    order: int = 1,
    cval: float = 0.0,
) -> np.ndarray:
    r"""
    Sample an image on a network grid, smoothed before if the grid is coarser than the image.

    Voxels are taken as Gaussians with the voxel size as their full width at half maximum. Along
    source axis :math:`d` the image lacks the variance :math:`\sigma_d^2 = (m_d^2 - 1) / (8 \ln 2)`
    voxels², where :math:`m_d` is the norm of row :math:`d` of the matrix that takes grid voxels to
    image voxels: the ratio of the voxel sizes if the axes are parallel (Cardoso et al., "Scale
    factor point spread function matching: beyond aliasing in image resampling", MICCAI 2015).
    Nothing is smoothed where :math:`m_d \le 1`, or with order 0. Voxels that are not finite count
    as zero.

    Parameters
    ----------
    image : Nifti1Image, 3-D
        Image to sample.
    grid : NetworkGrid
        Where to sample, in the world of the fixed image.
    point_map : ndarray, shape (4, 4), optional
        Maps points of the fixed image's world to points of this image's world; identity without
        it.
    order : int
        Order of the spline: 0 nearest voxel, 1 linear, 3 cubic.
    cval : float
        Value outside the image.

    Returns
    -------
    ndarray, float32, shape (n, n, n)

    Raises
    ------
    ValueError
        If the image is not 3-D.
    """
    if len(image.shape) != 3:
        raise ValueError(f"image must be 3-D, got shape {image.shape}")
    point_map = np.eye(4) if point_map is None else np.asarray(point_map)
    grid2image = np.linalg.inv(image.affine) @ point_map @ grid.affine
    data = np.asarray(image.dataobj, dtype=np.float32)
    if not np.isfinite(data).all():
        data = np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0)
    if order > 0:
        excess = np.maximum((grid2image[:3, :3] ** 2).sum(axis=1) - 1, 0)
        sigmas = np.sqrt(excess) * _FWHM_TO_SIGMA
        # Below a tenth of a voxel the kernel is a single one.
        data = ndimage.gaussian_filter(data, np.where(sigmas < 0.1, 0, sigmas), mode="nearest")
    ijk = apply_affine(grid2image, np.moveaxis(np.indices(grid.shape, dtype=float), 0, -1))
    return interpolate(data, ijk, order=order, cval=cval)


def to_ras(image: nb.Nifti1Image) -> nb.Nifti1Image:
    """
    Reorder and flip the axes of an image to point right, anterior and superior, nearly.

    Parameters
    ----------
    image : Nifti1Image
        Image of three or more axes.

    Returns
    -------
    Nifti1Image
        The same voxels at the same world positions; nothing is interpolated.
    """
    return nb.as_closest_canonical(image)


def grid_with_spacing(image: nb.Nifti1Image, spacing_mm: Sequence[float]) -> nb.Nifti1Image:
    """
    Lay a grid of other voxels over the field of view of an image.

    Parameters
    ----------
    image : Nifti1Image
        Gives the directions of the axes, and the field of view.
    spacing_mm : sequence of 3 float
        Voxel sizes along its axes.

    Returns
    -------
    Nifti1Image, uint8
        Zeros on a grid with the same centre, which covers the field of view.

    Raises
    ------
    ValueError
        If a voxel size is not positive.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(f"spacing_mm must be positive, got {spacing_mm}")
    old_shape = np.array(image.shape[:3])
    old_spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    shape = np.maximum(np.ceil(old_shape * old_spacing / spacing - 1e-3).astype(int), 1)
    matrix = image.affine[:3, :3] / old_spacing * spacing
    centre = apply_affine(image.affine, (old_shape - 1) / 2)
    affine = from_matvec(matrix, centre - matrix @ ((shape - 1) / 2))
    return nb.Nifti1Image(np.zeros(shape, np.uint8), affine)


def spacing_in_ras(image: nb.Nifti1Image) -> np.ndarray:
    """Voxel sizes of an image along its axes nearest to right, anterior and superior, (3,) mm."""
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    return spacing[np.argsort(nb.io_orientation(image.affine)[:, 0])]
