"""Timing of the frames of a PET scan, from metadata that may hold anything."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# Starts and durations may each be rounded to seconds.
_OVERLAP_S = 1.0


class FrameTiming(NamedTuple):
    """
    When the frames of a scan were acquired, as far as its metadata tell.

    Attributes
    ----------
    starts_s : ndarray, shape (T,), or None
        Starts of the frames, seconds; None where they cannot be used.
    durations_s : ndarray, shape (T,), or None
        Durations of the frames, seconds, all positive, none beyond the start of the next frame;
        None where they cannot be used.
    starts_remark, durations_remark : str
        Why they cannot be used; empty where they can.
    """

    starts_s: np.ndarray | None
    durations_s: np.ndarray | None
    starts_remark: str
    durations_remark: str


def frame_timing(sidecar: Mapping[str, Any], n_frames: int) -> FrameTiming:
    """
    Read ``FrameTimesStart`` and ``FrameDuration``; what cannot be used is told, never repaired.

    Parameters
    ----------
    sidecar : mapping
        Metadata of a PET scan; of one frame also with a number in place of a list.
    n_frames : int
        Frames of the image.

    Returns
    -------
    FrameTiming

    Examples
    --------
    >>> timing = frame_timing({"FrameDuration": [60, -1]}, 2)
    >>> timing.durations_s is None, timing.durations_remark
    (True, 'FrameDuration has a value that is not positive')
    >>> timing.starts_remark
    'FrameTimesStart is missing'
    """
    starts, starts_remark = _numbers(sidecar, "FrameTimesStart", n_frames)
    if starts is not None and not (np.diff(starts) > 0).all():
        starts, starts_remark = None, "FrameTimesStart does not increase"
    durations, durations_remark = _numbers(sidecar, "FrameDuration", n_frames)
    if durations is not None and not (durations > 0).all():
        durations = None
        durations_remark = "FrameDuration has a value that is not positive"
    if starts is not None and durations is not None:
        beyond = np.flatnonzero(starts[:-1] + durations[:-1] > starts[1:] + _OVERLAP_S)
        if beyond.size:
            index = beyond[0]
            durations_remark = (
                f"FrameDuration, {durations[index]:g} s from {starts[index]:g} s, goes beyond "
                f"the start of the next frame at {starts[index + 1]:g} s"
            )
            durations = None
    return FrameTiming(starts, durations, starts_remark, durations_remark)


def _numbers(
    sidecar: Mapping[str, Any], name: str, n_frames: int
) -> tuple[np.ndarray | None, str]:
    """Return a field as one finite number per frame, or None and the reason."""
    values = sidecar.get(name)
    if values is None:
        return None, f"{name} is missing"
    if n_frames == 1 and not isinstance(values, list | tuple):
        values = [values]
    if not isinstance(values, list | tuple):
        return None, f"{name} is no list"
    if len(values) != n_frames:
        return None, f"{name} has {len(values)} values for {n_frames} frames"
    are_numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
    if not are_numbers or not all(abs(x) < 1e9 for x in values):
        return None, f"{name} has a value that is no finite number"
    return np.array(values, dtype=float), ""
