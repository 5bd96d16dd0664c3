"""
Carry images and affines between nibabel (RAS+) and ANTs (LPS+).

ITK stores only grids with orthogonal axes, so ANTs never sees an image as it is: it sees a
*working copy* on an isotropic grid parallel to the image, and what it estimates comes back as a
matrix between worlds. LPS exists only in this module.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.itk import write_affine

if TYPE_CHECKING:
    import ants

RAS2LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Stage(NamedTuple):
    """
    One stage of ``antsRegistration``.

    Attributes
    ----------
    transform : str
        For example ``Rigid[0.1]``.
    metric : str
        With ``{}`` for the pair of files, for example ``MI[{},1,32,Regular,0.5]``.
    convergence : str
        For example ``[100x50,1e-6,10]``.
    shrink : str
        Shrink factors of the levels, for example ``2x1``.
    smooth : str
        Smoothing of the levels, for example ``2x1mm``.
    """

    transform: str
    metric: str
    convergence: str
    shrink: str
    smooth: str


def name_of(image: nb.Nifti1Image) -> str:
    """Return the file name of an image for messages, or ``image`` if it has none."""
    return str(image.get_filename() or "image")


def finite_data(image: nb.Nifti1Image) -> np.ndarray:
    """
    Return the voxels of a 3-D image as float32, what is not finite set to 0.

    Raises
    ------
    ImageError
        If the image is not three-dimensional or holds no finite value other than zero.
    """
    if image.ndim != 3:
        raise ImageError(
            f"{name_of(image)}: {image.ndim}-D image {image.shape}, expected 3-D. "
            "Pass one volume of it."
        )
    data = np.asarray(image.dataobj, dtype=np.float32)
    data = np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0)
    if not data.any():
        raise ImageError(
            f"{name_of(image)}: every voxel is zero or not finite, expected an image of a head. "
            "Check how the file was written, or leave this scan out."
        )
    return data


def same_grid(mask: nb.Nifti1Image, image: nb.Nifti1Image) -> np.ndarray:
    """
    Return a mask as a boolean array after checking that it lies on the grid of an image.

    Raises
    ------
    ImageError
        If shape or affine differ (by more than 1e-3), or if the mask is empty.
    """
    if mask.shape != image.shape or not np.allclose(mask.affine, image.affine, atol=1e-3):
        raise ImageError(
            f"{name_of(mask)}: the mask's grid {mask.shape} differs from the grid {image.shape} "
            f"of {name_of(image)}. Resample the mask onto the image."
        )
    inside = np.asarray(mask.dataobj) > 0
    if not inside.any():
        raise ImageError(f"{name_of(mask)}: the mask is empty, expected a brain in it.")
    return inside


def resample_onto(
    data: np.ndarray, vox2ras: np.ndarray, shape: Sequence[int], target: np.ndarray, *, order=1
) -> np.ndarray:
    """
    Resample an array from one grid to another grid of the same world.

    Parameters
    ----------
    data : ndarray, shape (I, J, K)
        Values; the outermost voxels continue outside.
    vox2ras : ndarray, shape (4, 4)
        Affine of ``data``.
    shape : sequence of int
        Shape of the target grid.
    target : ndarray, shape (4, 4)
        Voxel-to-world affine of the target grid.
    order : int
        Order of the spline.

    Returns
    -------
    ndarray, shape ``shape``
        Values on the target grid.
    """
    matrix = np.linalg.solve(vox2ras, target)
    return ndimage.affine_transform(
        data, matrix[:3, :3], matrix[:3, 3], tuple(shape), order=order, mode="nearest"
    )


def parallel_grid(
    shape: Sequence[int], vox2ras: np.ndarray, spacing_mm: float
) -> tuple[tuple[int, int, int], np.ndarray]:
    """
    Lay an isotropic, orthogonal grid over a field of view.

    Its axes follow the image's (the rotation nearest to them, RAS+ order), and it spans the
    centres of the outermost voxels.

    Parameters
    ----------
    shape : sequence of int
        Shape of the image.
    vox2ras : ndarray, shape (4, 4)
        Affine of the image; may hold shear and any axis order.
    spacing_mm : float
        Spacing of the grid.

    Returns
    -------
    shape : tuple of int
        Shape of the grid.
    vox2ras : ndarray, shape (4, 4)
        Affine of the grid; columns are orthogonal and form a right-handed system.
    """
    order = nb.io_orientation(vox2ras)
    columns = vox2ras[:3, np.argsort(order[:, 0])] * order[np.argsort(order[:, 0]), 1]
    left, _, right = np.linalg.svd(columns / np.linalg.norm(columns, axis=0))
    rotation = left @ right
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    box = rotation.T @ (vox2ras[:3, :3] @ corners + vox2ras[:3, 3:])
    low, high = box.min(axis=1), box.max(axis=1)
    size = np.maximum(1, np.floor((high - low) / spacing_mm + 1e-6).astype(int) + 1)
    grid = np.eye(4)
    grid[:3, :3] = rotation * spacing_mm
    grid[:3, 3] = rotation @ ((low + high - (size - 1) * spacing_mm) / 2)
    return tuple(int(n) for n in size), grid


def working_copy(
    image: nb.Nifti1Image, spacing_mm: float, *, data: np.ndarray | None = None
) -> nb.Nifti1Image:
    r"""
    Copy an image to an isotropic orthogonal grid for an estimation.

    Along axes finer than the grid the image is smoothed first, with

    .. math:: \sigma = \sqrt{(s_{grid}^2 - s_{voxel}^2) / (8 \ln 2)},

    which turns a voxel's box into one of the grid's size [Cardoso et al., MICCAI 2015].

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        Image with any invertible affine.
    spacing_mm : float
        Spacing of the copy.
    data : ndarray, shape (I, J, K), optional
        Values to use instead of the image's own (a mask, a cleaned copy).

    Returns
    -------
    Nifti1Image
        float32 copy, RAS+ axis order, in the world of ``image``.

    Raises
    ------
    ImageError
        If the image is not 3-D or has no signal.
    """
    data = finite_data(image) if data is None else np.asarray(data, dtype=np.float32)
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)
    sigma_mm = np.sqrt(np.maximum(spacing_mm**2 - zooms**2, 0.0) / (8 * np.log(2)))
    if sigma_mm.max() > 0.05 * spacing_mm:
        data = ndimage.gaussian_filter(data, sigma_mm / zooms, mode="nearest", truncate=3.0)
    shape, grid = parallel_grid(image.shape, image.affine, spacing_mm)
    return nb.Nifti1Image(resample_onto(data, image.affine, shape, grid), grid)


def to_ants(image: nb.Nifti1Image) -> "ants.ANTsImage":
    """
    Convert an image to ANTs.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        Image whose axes are orthogonal (a working copy is).

    Returns
    -------
    ants.ANTsImage
        float32 image, same voxel order, in LPS+.

    Raises
    ------
    ImageError
        If the axes are not orthogonal to 1e-3: ITK cannot store them.
    """
    import ants

    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)
    direction = image.affine[:3, :3] / zooms
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise ImageError(
            f"{name_of(image)}: sheared affine, expected orthogonal axes. Use a working copy."
        )
    return ants.from_numpy(
        np.asarray(image.dataobj, dtype=np.float32),
        origin=tuple(float(x) for x in RAS2LPS[:3, :3] @ image.affine[:3, 3]),
        spacing=tuple(float(zoom) for zoom in zooms),
        direction=RAS2LPS[:3, :3] @ direction,
    )


def read_affine(file: Path) -> np.ndarray:
    """
    Read a linear transform of ANTs (``.mat`` or ``.txt``).

    Parameters
    ----------
    file : Path
        A ``MatrixOffsetTransformBase``: affine, rigid, similarity by matrix.

    Returns
    -------
    ndarray, shape (4, 4)
        Maps points of the fixed world to points of the moving world, RAS+ mm.
    """
    import ants

    transform = ants.read_transform(str(file))
    parameters = np.asarray(transform.parameters, dtype=float)
    centre = np.asarray(transform.fixed_parameters, dtype=float)
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = parameters[9:] + centre - matrix[:3, :3] @ centre
    return RAS2LPS @ matrix @ RAS2LPS


def as_rigid(matrix: np.ndarray) -> np.ndarray:
    """Remove what rounding left of scale and shear from a rigid matrix."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    rigid = matrix.copy()
    rigid[:3, :3] = left @ right
    return rigid


class Registration(NamedTuple):
    """
    What ``antsRegistration`` estimated.

    Attributes
    ----------
    fixed2moving : ndarray, shape (4, 4)
        Linear part, fixed world to moving world, RAS+ mm.
    displacement_mm : ndarray, shape (I, J, K, 3), or None
        Offsets of the deformable part on the grid of the fixed image, RAS+ mm:
        ``x -> fixed2moving @ (x + displacement(x))``. None without a deformable stage.
    inverse_displacement_mm : ndarray, shape (I, J, K, 3), or None
        The inverse of ``id + displacement``, on the same grid.
    """

    fixed2moving: np.ndarray
    displacement_mm: np.ndarray | None
    inverse_displacement_mm: np.ndarray | None


def register(
    fixed: nb.Nifti1Image,
    moving: nb.Nifti1Image,
    stages: Sequence[Stage],
    *,
    fixed2moving: np.ndarray,
    fixed_mask: nb.Nifti1Image | None = None,
    random_seed: int = 0,
) -> Registration:
    """
    Run ``antsRegistration`` on two working copies.

    Parameters
    ----------
    fixed, moving : Nifti1Image, shape (I, J, K)
        Images with orthogonal axes.
    stages : sequence of Stage
        Linear stages first.
    fixed2moving : ndarray, shape (4, 4)
        Point map to start from, RAS+ mm.
    fixed_mask : Nifti1Image, optional
        Where the metric is measured, on the grid of ``fixed``.
    random_seed : int
        Seed of ITK's sampling, 0 or more. Results repeat exactly with one ITK thread
        (``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1``); with more, ANTs sums in another order each
        time.

    Returns
    -------
    Registration
        Linear and deformable parts.

    Raises
    ------
    ValueError
        If the seed is negative.
    RuntimeError
        If ANTs ends with an error.
    """
    import ants

    if random_seed < 0:
        raise ValueError(f"random_seed={random_seed}: expected 0 or more")
    with TemporaryDirectory(prefix="m2m-ants-") as folder:
        prefix = Path(folder) / "out"
        files = {}
        for name, image in {"fixed": fixed, "moving": moving, "mask": fixed_mask}.items():
            if image is not None:
                files[name] = str(Path(folder) / f"{name}.nii")
                ants.image_write(to_ants(image), files[name])
        start = write_affine(fixed2moving, Path(folder) / "start.txt")
        # ANTs takes a seed of 0 for the clock.
        arguments = ["-d", "3", "-r", str(start), "-o", str(prefix)]
        arguments += ["--random-seed", str(random_seed + 1), "--float", "1", "-z", "1", "-u", "0"]
        for stage in stages:
            arguments += ["-m", stage.metric.format(f"{files['fixed']},{files['moving']}")]
            arguments += ["-t", stage.transform, "-c", stage.convergence]
            arguments += ["-f", stage.shrink, "-s", stage.smooth]
            if fixed_mask is not None:
                arguments += ["-x", f"[{files['mask']},NA]"]
        ants.registration(fixed=arguments, moving=None)
        fields = [Path(f"{prefix}1{name}.nii.gz") for name in ("Warp", "InverseWarp")]
        return Registration(
            read_affine(Path(f"{prefix}0GenericAffine.mat")),
            *[read_displacement(file) if file.exists() else None for file in fields],
        )


def read_displacement(file: Path) -> np.ndarray:
    """Read an ITK displacement field as RAS+ millimetres, shape (I, J, K, 3)."""
    data = np.asarray(nb.load(file).dataobj, dtype=np.float32)
    return data[:, :, :, 0, :] * np.array([-1, -1, 1], dtype=np.float32)
