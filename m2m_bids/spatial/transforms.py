"""
Transforms of world points: affines, displacement fields and their chains.

A chain is a tuple of affines and fields, outermost first: ``(a, b)`` maps a point x to
``a(b(x))``. Points are RAS+ millimetres. Images are pulled back: the chain that carries images
from moving to fixed maps points of fixed to points of moving.
"""

from collections.abc import Sequence

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine, from_matvec

from m2m_bids.spatial.conform import NetworkGrid
from m2m_bids.spatial.fields import (
    DisplacementField,
    check_affine,
    grid_points,
    interpolate_vectors,
    invert_displacement,
)

Transform = np.ndarray | DisplacementField
Chain = tuple[Transform, ...]


def as_chain(transforms: Transform | Sequence[Transform]) -> Chain:
    """
    Return one transform or several, outermost first, as a tuple.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        A (4, 4) affine, a field, or any number of both.

    Returns
    -------
    tuple of Transform
        Affines are checked and float64.
    """
    if isinstance(transforms, DisplacementField):
        return (transforms,)
    if isinstance(transforms, np.ndarray) and transforms.ndim == 2:
        return (check_affine(transforms),)
    return tuple(x if isinstance(x, DisplacementField) else check_affine(x) for x in transforms)


def map_points(transforms: Transform | Sequence[Transform], points: np.ndarray) -> np.ndarray:
    """
    Map points through a chain, the last transform first.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Outermost first.
    points : ndarray, shape (..., 3)
        Positions, RAS+ mm.

    Returns
    -------
    ndarray, float64, shape (..., 3)
        Positions, RAS+ mm.

    Examples
    --------
    >>> shift, scale = np.eye(4), np.diag([2.0, 2.0, 2.0, 1.0])
    >>> shift[0, 3] = 10
    >>> map_points((shift, scale), np.array([1.0, 2.0, 3.0]))
    array([12.,  4.,  6.])
    """
    points = np.asarray(points, dtype=float)
    for transform in reversed(_merge_affines(as_chain(transforms))):
        if isinstance(transform, DisplacementField):
            points = transform.map(points)
        else:
            points = apply_affine(transform, points)
    return points


def compose(
    outer: Transform | Sequence[Transform], inner: Transform | Sequence[Transform]
) -> Chain:
    r"""
    Chain two transforms exactly; nothing is interpolated.

    .. math:: \varphi_{AC}(x) = \varphi_{AB}(\varphi_{BC}(x))

    Parameters
    ----------
    outer : Transform or sequence of Transform
        Maps points of B to points of A.
    inner : Transform or sequence of Transform
        Maps points of C to points of B.

    Returns
    -------
    tuple of Transform
        Maps points of C to points of A.
    """
    return as_chain(outer) + as_chain(inner)


def invert(transforms: Transform | Sequence[Transform]) -> Chain:
    """
    Invert a chain.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Maps points of B to points of A, outermost first.

    Returns
    -------
    tuple of Transform
        Maps points of A to points of B: the inverse of each transform, in reverse order. Fields
        are inverted on their own grid to 0.01 mm where they can be, see `invert_displacement`.
    """
    return tuple(
        invert_displacement(transform)[0]
        if isinstance(transform, DisplacementField)
        else np.linalg.inv(transform)
        for transform in reversed(as_chain(transforms))
    )


def displacement_from_unit(
    disp_unit: np.ndarray,
    grid: NetworkGrid,
    reference_image: nb.Nifti1Image,
    *,
    spacing_mm: float = 3.0,
) -> DisplacementField:
    """
    Turn a network's displacement into a world field that covers the fixed image.

    Parameters
    ----------
    disp_unit : ndarray, shape (3, n, n, n)
        Displacement on the network grid, unit coordinates ``ijk / (n - 1)``: it takes points of
        the fixed image to points of the moving image as that was sampled on the grid.
    grid : NetworkGrid
        The network grid in the fixed image's world.
    reference_image : Nifti1Image
        The fixed image.
    spacing_mm : float
        Isotropic spacing of the field.

    Returns
    -------
    DisplacementField
        Field parallel to the axes of the reference (to the nearest orthogonal axes if those are
        sheared), centred on its field of view and covering all of it. Interpolated linearly from
        the network grid; outside that, the displacement of its border continues.

    Raises
    ------
    ValueError
        If the displacement has another shape than the grid.
    """
    disp_unit = np.asarray(disp_unit)
    if disp_unit.shape != (3, *grid.shape):
        raise ValueError(f"disp_unit must have shape {(3, *grid.shape)}, got {disp_unit.shape}")
    unit2world = grid.affine[:3, :3] * (grid.size - 1)
    disp_mm = np.moveaxis(disp_unit, 0, -1).astype(np.float32) @ unit2world.T.astype(np.float32)
    affine, shape = _covering_grid(reference_image, spacing_mm)
    ijk = grid_points(shape, np.linalg.inv(grid.affine) @ affine)
    return DisplacementField(interpolate_vectors(disp_mm, np.clip(ijk, 0, grid.size - 1)), affine)


def unit_from_world(transforms: Transform | Sequence[Transform], grid: NetworkGrid) -> np.ndarray:
    """
    Sample the displacement of a chain on a network grid, in unit coordinates.

    The inverse of `displacement_from_unit` inside the grid.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Chain from points of the fixed image's world to points of the same world, outermost first:
        without the point map with which the moving image is sampled on the grid.
    grid : NetworkGrid
        The network grid in the fixed image's world.

    Returns
    -------
    ndarray, float32, shape (3, n, n, n)
        Displacement, unit coordinates ``ijk / (n - 1)``.
    """
    points = grid_points(grid.shape, grid.affine)
    disp_mm = map_points(transforms, points) - points
    world2unit = np.linalg.inv(grid.affine[:3, :3]) / (grid.size - 1)
    return np.moveaxis(disp_mm @ world2unit.T, -1, 0).astype(np.float32)


def _merge_affines(chain: Chain) -> Chain:
    """Multiply neighbouring affines."""
    merged: list[Transform] = []
    for transform in chain:
        is_field = isinstance(transform, DisplacementField)
        if merged and not is_field and not isinstance(merged[-1], DisplacementField):
            merged[-1] = merged[-1] @ transform
        else:
            merged.append(transform)
    return tuple(merged)


def _covering_grid(image: nb.Nifti1Image, spacing_mm: float) -> tuple[np.ndarray, list[int]]:
    """Affine and shape of an orthogonal isotropic grid that covers the voxels of an image."""
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    u, _, vt = np.linalg.svd(axes)
    rotation = u @ vt
    corners = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in image.shape[:3]))).reshape(3, -1)
    along_axes = apply_affine(image.affine, corners.T) @ rotation
    low, high = along_axes.min(axis=0), along_axes.max(axis=0)
    shape = np.maximum(np.ceil((high - low) / spacing_mm).astype(int) + 1, 2)
    origin = (low + high) / 2 - (shape - 1) / 2 * spacing_mm
    return from_matvec(rotation * spacing_mm, rotation @ origin), shape.tolist()
