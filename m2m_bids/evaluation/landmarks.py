"""Distances between landmarks that a transform should bring together."""

from collections.abc import Sequence

import numpy as np

from m2m_bids.spatial.transforms import Transform, map_points


def landmark_errors(
    transforms: Transform | Sequence[Transform],
    fixed_points: np.ndarray,
    moving_points: np.ndarray,
) -> np.ndarray:
    """
    Measure how far from its counterpart a transform brings each landmark.

    Parameters
    ----------
    transforms : Transform or sequence of Transform
        Chain from points of the fixed image to points of the moving image, outermost first, as
        in the files that carry images from moving to fixed. An empty one compares headers.
    fixed_points : ndarray, shape (N, 3)
        Landmarks in the fixed image's world, RAS+ mm.
    moving_points : ndarray, shape (N, 3)
        The same landmarks in the moving image's world, RAS+ mm.

    Returns
    -------
    ndarray, shape (N,)
        Distances in the moving image's world, mm.

    Raises
    ------
    ValueError
        If the points are not (N, 3) with N of at least one, are not as many, or are not finite.

    Examples
    --------
    >>> landmark_errors((), np.zeros((1, 3)), np.array([[3.0, 4.0, 0.0]]))
    array([5.])
    """
    fixed_points = np.asarray(fixed_points, dtype=float)
    moving_points = np.asarray(moving_points, dtype=float)
    if (
        fixed_points.shape != moving_points.shape
        or fixed_points.ndim != 2
        or fixed_points.shape[1] != 3
        or len(fixed_points) == 0
    ):
        raise ValueError(
            "landmarks must be two arrays of shape (N, 3), got "
            f"{fixed_points.shape} and {moving_points.shape}"
        )
    if not (np.isfinite(fixed_points).all() and np.isfinite(moving_points).all()):
        raise ValueError("landmarks must be finite")
    return np.linalg.norm(map_points(transforms, fixed_points) - moving_points, axis=1)
