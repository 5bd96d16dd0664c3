"""Points of one anatomy in two images, and their tables."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2m_bids.whole_files import replacing

_COLUMNS = ("t1w_x", "t1w_y", "t1w_z", "scan_x", "scan_y", "scan_z")


class Landmarks(NamedTuple):
    """Points of the fixed and of the moving image that belong together, (N, 3), RAS+ mm."""

    fixed: np.ndarray
    moving: np.ndarray


def write_landmarks(landmarks: Landmarks, file: Path) -> Path:
    """Write landmarks as a table: ``t1w_x`` to ``scan_z``, mm, the fixed image being the T1w."""
    with replacing(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in np.hstack(landmarks):
            writer.writerow([f"{value:.4f}" for value in row])
    return file


def read_landmarks(file: Path) -> Landmarks:
    """
    Read a table of landmarks.

    Parameters
    ----------
    file : Path
        Tab-separated, with the columns ``t1w_x``, ``t1w_y`` and ``t1w_z``, points of the fixed
        image, and ``scan_x``, ``scan_y`` and ``scan_z``, the same points of the moving image, RAS+
        mm in the worlds of both images.

    Returns
    -------
    Landmarks

    Raises
    ------
    ValueError
        If the file is missing, or is no such table.
    """
    try:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        table = np.array([[float(row[column]) for column in _COLUMNS] for row in rows])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: not a table of landmarks with the columns {', '.join(_COLUMNS)}, separated"
            f" by tabs ({error!r})"
        ) from error
    if not len(table):
        raise ValueError(f"{file}: holds no landmarks")
    return Landmarks(table[:, :3], table[:, 3:])
