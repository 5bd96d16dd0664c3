"""Displacement fields in world millimetres: interpolation, inversion, Jacobian determinant."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine

from m2m_bids.spatial.interpolation import interpolate


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """
    Offsets of points on a regular grid: the map ``x + disp(x)``.

    Parameters
    ----------
    data : ndarray, shape (I, J, K, 3)
        Displacement in RAS+ millimetres; kept as float32.
    affine : ndarray, shape (4, 4)
        Voxel to RAS+ millimetres of the grid, orthogonal axes: ITK stores no others.

    Raises
    ------
    ValueError
        If shapes are wrong, a value is not finite, or the axes are not orthogonal.
    """

    data: np.ndarray
    affine: np.ndarray

    def __post_init__(self):
        data = np.ascontiguousarray(self.data, dtype=np.float32)
        affine = check_affine(self.affine)
        if data.ndim != 4 or data.shape[3] != 3 or data.size == 0:
            raise ValueError(f"data must have shape (I, J, K, 3), got {data.shape}")
        if not np.isfinite(data).all():
            raise ValueError("data must be finite")
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-4):
            raise ValueError(f"affine must have orthogonal axes, got\n{affine}")
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of grid points along each axis."""
        return self.data.shape[:3]

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbours along each axis, shape (3,), mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def points(self) -> np.ndarray:
        """World positions of the grid points, shape (I, J, K, 3), RAS+ mm."""
        return grid_points(self.shape, self.affine)

    def displacement(self, points: np.ndarray, *, is_continued: bool = False) -> np.ndarray:
        """
        Interpolate the displacement linearly.

        Parameters
        ----------
        points : ndarray, shape (..., 3)
            Positions, RAS+ mm.
        is_continued : bool
            Whether the displacement at the border continues outside the grid. By default it is
            zero more than half a voxel beyond the outermost grid points, as in ITK.

        Returns
        -------
        ndarray, shape (..., 3)
            Displacement in RAS+ mm.
        """
        ijk = apply_affine(np.linalg.inv(self.affine), points)
        if is_continued:
            ijk = np.clip(ijk, 0, np.array(self.shape) - 1)
        return interpolate_vectors(self.data, ijk)

    def map(self, points: np.ndarray) -> np.ndarray:
        """
        Map points: ``x + disp(x)``; the identity outside the grid, as `displacement` says.

        Parameters
        ----------
        points : ndarray, shape (..., 3)
            Positions, RAS+ mm.

        Returns
        -------
        ndarray, shape (..., 3)
            Positions, RAS+ mm.
        """
        points = np.asarray(points, dtype=float)
        return points + self.displacement(points)


def invert_displacement(
    field: DisplacementField, *, tolerance_mm: float = 0.01, max_iterations: int = 60
) -> tuple[DisplacementField, float]:
    r"""
    Invert a displacement field on its own grid.

    At each grid point x, the displacement v of the inverse solves :math:`e(v) = v + d(x + v) = 0`.
    The fixed-point iteration :math:`v \leftarrow v - e(v)` (Chen et al., "A simple fixed-point
    approach to invert a deformation field", Medical Physics 35, 2008) is slow where the map
    compresses and diverges where it expands more than twofold, so that each step is multiplied by
    the inverse of the Jacobian matrix at the nearest grid point, as in Newton's method. A step
    that would not bring a point's error down is halved. Outside the grid the displacement of the
    border continues while inverting.

    Parameters
    ----------
    field : DisplacementField
        Displacement of a map without folds, at least two grid points along each axis.
    tolerance_mm : float
        Points are left alone once the error :math:`|e|` is below this.
    max_iterations : int
        Number of iterations after which the remaining points keep their best value.

    Returns
    -------
    inverse : DisplacementField
        Displacement v of the inverse map, same grid.
    residual_mm : float
        Largest error, over the grid points that the inverse keeps inside the grid (elsewhere the
        inverse rests on displacements that the field does not hold); large where the map folds.

    Raises
    ------
    ValueError
        If an axis has a single grid point.
    """
    points = field.points().reshape(-1, 3)
    preconditioner = _inverse_jacobian(field)
    inverse = -field.displacement(points)
    error = inverse + field.displacement(points + inverse, is_continued=True)
    error_mm = np.linalg.norm(error, axis=1)
    step = np.ones(len(points))
    for _ in range(max_iterations):
        active = np.flatnonzero(error_mm > tolerance_mm)
        if active.size == 0:
            break
        nearest = _nearest_voxels(field, points[active] + inverse[active])
        change = np.einsum("nde,ne->nd", preconditioner[nearest], error[active])
        trial = inverse[active] - step[active, None] * change
        trial_error = trial + field.displacement(points[active] + trial, is_continued=True)
        trial_error_mm = np.linalg.norm(trial_error, axis=1)
        is_better = trial_error_mm < error_mm[active]
        step[active] = np.where(is_better, np.minimum(2 * step[active], 1), step[active] / 2)
        better = active[is_better]
        inverse[better], error[better] = trial[is_better], trial_error[is_better]
        error_mm[better] = trial_error_mm[is_better]
    ijk = apply_affine(np.linalg.inv(field.affine), points + inverse)
    inside = ((ijk >= 0) & (ijk <= np.array(field.shape) - 1)).all(axis=1)
    residual_mm = float(error_mm[inside].max(initial=0.0))
    return DisplacementField(inverse.reshape(*field.shape, 3), field.affine), residual_mm


def jacobian_determinant(field: DisplacementField) -> np.ndarray:
    """
    Return the Jacobian determinant of the map ``x + disp(x)``.

    Parameters
    ----------
    field : DisplacementField
        At least two grid points along each axis.

    Returns
    -------
    ndarray, float32, shape (I, J, K)
        Determinant by central differences, one-sided at the border: one for the identity, not
        positive where the map folds.

    Raises
    ------
    ValueError
        If an axis has a single grid point.
    """
    return np.linalg.det(_jacobian(field))


def check_affine(affine: np.ndarray) -> np.ndarray:
    """
    Return an affine as float64, or fail if it is not an invertible (4, 4) matrix.

    Parameters
    ----------
    affine : array_like, shape (4, 4)
        Point map or voxel-to-world matrix.

    Returns
    -------
    ndarray, float64, shape (4, 4)

    Raises
    ------
    ValueError
        If the shape is wrong, a value is not finite, the last row is not (0, 0, 0, 1) or the
        determinant is zero.
    """
    matrix = np.array(affine, dtype=float)
    is_affine = matrix.shape == (4, 4) and np.isfinite(matrix).all()
    if not is_affine or (matrix[3] != (0, 0, 0, 1)).any() or np.linalg.det(matrix) == 0:
        raise ValueError(f"affine must be an invertible (4, 4) matrix, got\n{matrix}")
    return matrix


def grid_points(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """
    Return the world positions of the voxels of a grid.

    Parameters
    ----------
    shape : sequence of 3 int
        Number of voxels along each axis.
    affine : ndarray, shape (4, 4)
        Voxel to world.

    Returns
    -------
    ndarray, float64, shape (I, J, K, 3)
    """
    # Sums of three vectors by broadcasting: twenty times as fast as a product with each point.
    points = np.empty((*shape, 3))
    i, j, k = (np.arange(n, dtype=float) for n in shape)
    for axis, (a, b, c, shift) in enumerate(np.asarray(affine)[:3]):
        points[..., axis] = (a * i)[:, None, None] + (b * j)[:, None] + (c * k + shift)
    return points


def interpolate_vectors(data: np.ndarray, ijk: np.ndarray) -> np.ndarray:
    """
    Interpolate vectors linearly, zero more than half a voxel outside their grid.

    Parameters
    ----------
    data : ndarray, shape (I, J, K, 3)
        Vectors on a grid.
    ijk : ndarray, shape (..., 3)
        Voxel coordinates.

    Returns
    -------
    ndarray, shape (..., 3)
        Vectors, of the type of `data`.
    """
    return np.stack([interpolate(data[..., d], ijk, order=1) for d in range(3)], axis=-1)


def _jacobian(field: DisplacementField) -> np.ndarray:
    """Jacobian matrices of ``x + disp(x)`` in the world, shape (I, J, K, 3, 3)."""
    if min(field.shape) < 2:
        raise ValueError(f"field must have two points along each axis, got {field.shape}")
    ijk_gradient = np.stack(np.gradient(field.data, axis=(0, 1, 2)), axis=-1)
    ras2ijk = np.linalg.inv(field.affine[:3, :3]).astype(np.float32)
    return ijk_gradient @ ras2ijk + np.eye(3, dtype=np.float32)


def _inverse_jacobian(field: DisplacementField) -> np.ndarray:
    """Inverse Jacobian matrices, the identity where the map is nearly singular or folds."""
    jacobian = _jacobian(field)
    jacobian[np.linalg.det(jacobian) < 0.01] = np.eye(3)
    return np.linalg.inv(jacobian)


def _nearest_voxels(field: DisplacementField, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the indices of the grid points nearest to points of shape (N, 3)."""
    ijk = np.rint(apply_affine(np.linalg.inv(field.affine), points)).astype(int)
    return tuple(np.clip(ijk, 0, np.array(field.shape) - 1).T)
