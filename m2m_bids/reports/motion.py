"""Plot of the motion of the head between the frames of a scan."""

from pathlib import Path

import numpy as np

from m2m_bids.reports.charts import Series, line_panels

SHIFTS = ("x, to the right", "y, to the front", "z, upwards")
ROTATIONS = ("about x", "about y", "about z")


def motion_figure(parameters: np.ndarray, file: Path) -> Path:
    """
    Draw motion parameters against the frames.

    Parameters
    ----------
    parameters : ndarray, shape (T, 6)
        Shifts along x, y and z (mm), and rotations about them (radians), of each frame.
    file : Path
        Destination, ``.svg``; its stem is the key of the drawing's identifiers.

    Returns
    -------
    Path
        The destination.
    """
    frames = list(range(len(parameters)))
    degrees = np.rad2deg(parameters[:, 3:])
    panels = {
        label: [Series(name, frames, values[:, i].tolist()) for i, name in enumerate(names)]
        for label, names, values in (
            ("shift (mm)", SHIFTS, parameters),
            ("rotation (degrees)", ROTATIONS, degrees),
        )
    }
    shift_mm = np.linalg.norm(parameters[:, :3], axis=1).max()
    svg = line_panels(
        panels,
        key=file.stem,
        description=f"Motion of the head over {len(frames)} frames; the largest shift is "
        f"{shift_mm:.1f} mm, the largest rotation about an axis {np.abs(degrees).max():.1f} "
        "degrees.",
        x_label="frame, from 0",
        x_ticks={index: str(index) for index in frames[:: max(1, len(frames) // 10)]},
    )
    file.write_text(svg, encoding="utf-8")
    return file
