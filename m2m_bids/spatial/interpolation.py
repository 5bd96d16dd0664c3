"""Interpolation of volumes at voxel coordinates, with the border rule of ITK."""

import numpy as np
from scipy import ndimage


def interpolate(
    data: np.ndarray,
    ijk: np.ndarray,
    *,
    order: int,
    cval: float = 0.0,
    is_prefiltered: bool = False,
) -> np.ndarray:
    """
    Interpolate a volume at voxel coordinates.

    As in ITK, a voxel reaches half its width beyond its centre: coordinates from ``-0.5`` to
    ``n - 0.5`` are inside. Beyond the outermost centres the volume is continued by its value
    there, or mirrored above order 1.

    Parameters
    ----------
    data : ndarray, shape (I, J, K)
        Volume, or its spline coefficients by `prefilter`.
    ijk : ndarray, shape (..., 3)
        Voxel coordinates.
    order : int
        Order of the spline: 0 nearest voxel, 1 linear, 3 cubic.
    cval : float
        Value outside the volume.
    is_prefiltered : bool
        Whether `data` are spline coefficients already; without effect below order 2.

    Returns
    -------
    ndarray, shape (...)
        Interpolated values, of the type of `data`.
    """
    if order > 1 and not is_prefiltered:
        data = prefilter(data, order)
    coordinates = np.reshape(ijk, (-1, 3)).T
    sizes = np.reshape(data.shape, (3, 1))
    inside = ((coordinates >= -0.5) & (coordinates < sizes - 0.5)).all(axis=0)
    if order < 2:
        coordinates = np.clip(coordinates, 0, sizes - 1)
    values = ndimage.map_coordinates(
        data, coordinates, order=order, mode="mirror", prefilter=False
    )
    values[~inside] = cval
    return values.reshape(ijk.shape[:-1])


def prefilter(data: np.ndarray, order: int) -> np.ndarray:
    """
    Return the B-spline coefficients of a volume, mirrored at its borders.

    Parameters
    ----------
    data : ndarray, shape (I, J, K)
        Volume of finite values.
    order : int
        Order of the spline; the volume itself is returned below 2.

    Returns
    -------
    ndarray, shape (I, J, K)
        Coefficients, float32 where they differ from the volume.
    """
    if order < 2:
        return data
    return ndimage.spline_filter(data, order=order, output=np.float32, mode="mirror")
