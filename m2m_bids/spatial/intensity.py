"""Intensity normalisation."""

import numpy as np


def normalize(
    data: np.ndarray, mask: np.ndarray | None = None, *, upper_percentile: float = 99.9
) -> np.ndarray:
    """
    Clip intensities at an upper percentile and scale them to [0, 1].

    Negative values, and values that are not finite, become zero first. Percentile and minimum are
    those of the mask, or of the whole array; values beyond them are clipped. Where so few values
    exceed the minimum that the percentile equals it, the maximum takes the percentile's place.

    Parameters
    ----------
    data : ndarray
        Intensities of any shape and real type.
    mask : ndarray, optional
        Where to take percentile and minimum, same shape, true inside.
    upper_percentile : float
        Percentile that becomes one, in (0, 100].

    Returns
    -------
    ndarray, float32, same shape
        Intensities in [0, 1].

    Raises
    ------
    ValueError
        If shapes differ, the mask is empty, the percentile is out of range, no value is positive,
        or all values are equal.

    Examples
    --------
    >>> normalize(np.array([-1.0, 0.0, 1.0, 4.0]), upper_percentile=100)
    array([0.  , 0.  , 0.25, 1.  ], dtype=float32)
    """
    if not 0 < upper_percentile <= 100:
        raise ValueError(f"upper_percentile must be in (0, 100], got {upper_percentile}")
    clean = np.nan_to_num(np.asarray(data, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    np.maximum(clean, 0, out=clean)
    values = clean
    if mask is not None:
        if np.shape(mask) != clean.shape:
            raise ValueError(f"mask must have shape {clean.shape}, got {np.shape(mask)}")
        values = clean[np.asarray(mask, dtype=bool)]
    if values.size == 0 or values.max() <= 0:
        where = "image" if mask is None else "mask"
        raise ValueError(f"no finite positive value in the {where}: nothing to normalise")
    lower, upper = values.min(), np.percentile(values, upper_percentile)
    if upper <= lower:
        upper = values.max()
    if upper <= lower:
        raise ValueError(f"all values equal {lower:g}: nothing to normalise")
    clean -= lower
    clean /= np.float32(upper - lower)
    return np.clip(clean, 0, 1, out=clean)
