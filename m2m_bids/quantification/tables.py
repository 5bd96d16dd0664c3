"""Tables of regions, as PETPrep and its kind name their columns."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from m2m_bids.quantification.statistics import RegionStatistics

TACS_COLUMNS = {
    "frame_start": {"Description": "Start of the frame after TimeZero.", "Units": "s"},
    "frame_end": {"Description": "End of the frame after TimeZero.", "Units": "s"},
}
STAT_COLUMNS = {
    "region": {"Description": "Name of the region."},
    "index": {"Description": "Its number in the label image."},
    "mean": {"Description": "Mean of its voxels in the field of view of the scan."},
    "median": {"Description": "Their median."},
    "sd": {"Description": "Their standard deviation."},
    "volume_mm3": {"Description": "Volume of the whole region.", "Units": "mm3"},
    "n_voxels": {"Description": "Voxels of the whole region, on the grid of the T1w."},
    "coverage": {"Description": "Share of the region in the field of view of the scan."},
}
"""Descriptions of the columns, for sidecars."""


def write_tacs(
    file: Path,
    regions: Sequence[str],
    means: np.ndarray,
    times: tuple[Sequence[float], Sequence[float]] | None,
) -> Path:
    """
    Write time-activity curves: a row for each frame, a column for each region.

    Parameters
    ----------
    file : Path
        Destination, ``.tsv``.
    regions : sequence of str, length R
        Names.
    means : ndarray, shape (T, R)
        Not a number is written as ``n/a``.
    times : tuple of two sequences of length T, or None
        Starts and ends of the frames, s; None where they are not known.

    Returns
    -------
    Path
    """
    nowhere = [math.nan] * len(means)
    starts, ends = times or (nowhere, nowhere)
    rows = ([start, end, *row] for start, end, row in zip(starts, ends, means, strict=True))
    return _write(file, [*TACS_COLUMNS, *regions], rows)


def write_statistics(file: Path, statistics: Sequence[RegionStatistics]) -> Path:
    """
    Write statistics: a row for each region.

    Parameters
    ----------
    file : Path
        Destination, ``.tsv``.
    statistics : sequence of RegionStatistics

    Returns
    -------
    Path
    """
    return _write(file, list(STAT_COLUMNS), (asdict(row).values() for row in statistics))


def _write(file: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
    return file


def _cell(value: object) -> object:
    """Write a number so that it is read back to seven digits, and ``n/a`` for none."""
    if not isinstance(value, float):
        return value
    return f"{value:.7g}" if math.isfinite(value) else "n/a"
