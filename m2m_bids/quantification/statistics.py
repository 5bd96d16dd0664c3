"""Statistics of images in regions, and time-activity curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.pet_timing import FrameTiming, frame_timing


@dataclass(frozen=True)
class RegionStatistics:
    """
    What an image shows in a region.

    Attributes
    ----------
    region : str
        Its name.
    index : int
        Its label.
    mean, median, sd : float
        Over its voxels in the field of view, of the mean over time of a 4-D image; the standard
        deviation is that of these voxels (divided by their number). Not a number without any.
    volume_mm3, n_voxels : float, int
        Of the whole region, on the grid of the labels.
    coverage : float
        Share of the region in the field of view.
    """

    region: str
    index: int
    mean: float
    median: float
    sd: float
    volume_mm3: float
    n_voxels: int
    coverage: float


@dataclass(frozen=True, eq=False)
class Regional:
    """
    An image by regions.

    Attributes
    ----------
    statistics : tuple of RegionStatistics
        By label, ascending.
    frame_means : ndarray, shape (T, R)
        Mean of each frame in each region, over its voxels in the field of view.
    """

    statistics: tuple[RegionStatistics, ...]
    frame_means: np.ndarray


def regional(
    image: nb.Nifti1Image,
    labels: nb.Nifti1Image,
    names: Mapping[int, str],
    *,
    is_seen: np.ndarray | None = None,
    frame_weights: Sequence[float] | None = None,
) -> Regional:
    """
    Measure an image in the regions of a label map.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        Image on the grid of the labels.
    labels : Nifti1Image, shape (I, J, K)
        Whole numbers; 0 is no region.
    names : mapping of int to str
        Name of each label.
    is_seen : ndarray of bool, shape (I, J, K), optional
        Voxels in the field of view of the scan; all by default. Voxels where a frame is not finite
        count as not seen.
    frame_weights : sequence of float, length T, optional
        Weights of the frames in the mean over time, such as their durations; equal by default.

    Returns
    -------
    Regional

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
    if image.shape[:3] != labels.shape:
        raise ValueError(f"image {image.shape} and labels {labels.shape} must have one grid")
    numbers = np.asanyarray(labels.dataobj).ravel()
    data = np.asanyarray(image.dataobj).reshape(len(numbers), -1)
    is_used = np.isfinite(data).all(axis=1)
    if is_seen is not None:
        is_used &= is_seen.ravel()
    voxel_mm3 = float(abs(np.linalg.det(labels.affine[:3, :3])))
    weights = np.ones(data.shape[1]) if frame_weights is None else np.asarray(frame_weights, float)
    weights = weights / weights.sum()
    labels_sorted = sorted(names)
    means = np.full((data.shape[1], len(names)), np.nan)
    order, bounds = _grouped(numbers, labels_sorted)
    rows = []
    for column, label in enumerate(labels_sorted):
        voxels = order[bounds[column] : bounds[column + 1]]
        values = data[voxels[is_used[voxels]]].astype(float)
        if len(values):
            means[:, column] = values.mean(axis=0)
        rows.append(_statistics(names[label], label, values @ weights, len(voxels), voxel_mm3))
    return Regional(tuple(rows), means)


def acquired_timing(metadata: Mapping[str, Any], n_frames: int) -> FrameTiming:
    """
    Read the timing of the frames that an image was acquired in.

    Parameters
    ----------
    metadata : mapping
        BIDS fields of the scan, with ``FrameTimesStart`` and ``FrameDuration``.
    n_frames : int
        Frames of the image. One volume may be of a scan of several, as the metadata have it.

    Returns
    -------
    FrameTiming
    """
    if n_frames == 1:
        given = (metadata.get(name) for name in ("FrameTimesStart", "FrameDuration"))
        n_frames = max([1, *(len(values) for values in given if isinstance(values, list | tuple))])
    return frame_timing(metadata, n_frames)


def frame_times(
    metadata: Mapping[str, Any], n_frames: int
) -> tuple[list[float], list[float]] | None:
    """
    Read when the frames of an image start and end, seconds after ``TimeZero``.

    Parameters
    ----------
    metadata : mapping
        BIDS fields of the scan, with ``FrameTimesStart`` and ``FrameDuration``.
    n_frames : int
        Frames of the image. One volume of a scan of several goes from the start of the first to
        the end of the last.

    Returns
    -------
    tuple of two lists of float, or None
        Starts and ends; None where they are not known for each frame.

    Examples
    --------
    >>> scan = {"FrameTimesStart": [0, 60], "FrameDuration": [60, 120]}
    >>> frame_times(scan, 2), frame_times(scan, 1), frame_times(scan, 3)
    (([0.0, 60.0], [60.0, 180.0]), ([0.0], [180.0]), None)
    """
    timing = acquired_timing(metadata, n_frames)
    if timing.starts_s is None or timing.durations_s is None:
        return None
    starts, ends = timing.starts_s, timing.starts_s + timing.durations_s
    if n_frames == 1:
        starts, ends = starts[:1], ends[-1:]
    return starts.tolist(), ends.tolist()


def _statistics(
    name: str, label: int, values: np.ndarray, n_voxels: int, voxel_mm3: float
) -> RegionStatistics:
    """Statistics of the values of a region that has `n_voxels`, not all of which have one."""
    summaries = (np.mean, np.median, np.std)
    mean, median, sd = (float(f(values)) if len(values) else np.nan for f in summaries)
    coverage = len(values) / n_voxels if n_voxels else np.nan
    return RegionStatistics(
        name, label, mean, median, sd, n_voxels * voxel_mm3, n_voxels, coverage
    )


def _grouped(numbers: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels sorted by label, and where the voxels of each label begin and the last end."""
    voxels = np.flatnonzero(np.isin(numbers, labels))
    order = voxels[np.argsort(numbers[voxels], kind="stable")]
    bounds = np.searchsorted(numbers[order], labels, side="left")
    return order, np.append(bounds, len(order))
