"""Plot of the motion of the head between the frames of a scan."""

from pathlib import Path

import numpy as np

from m2m_bids.reports.charts import Series, line_plot


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
    series = [
        Series(f"{kind} {axis} ({unit})", frames, values[:, index].tolist())
        for kind, unit, values in (("shift", "mm", parameters), ("rotation", "degrees", degrees))
        for index, axis in enumerate("xyz")
    ]
    shift_mm = np.linalg.norm(parameters[:, :3], axis=1).max()
    svg = line_plot(
        series,
        key=file.stem,
        description=f"Motion of the head over {len(frames)} frames; the largest shift is "
        f"{shift_mm:.1f} mm, the largest rotation about an axis {np.abs(degrees).max():.1f} "
        "degrees.",
        x_label="frame, from 0",
        y_label="mm or degrees",
        x_ticks={index: str(index) for index in frames[:: max(1, len(frames) // 10)]},
    )
    file.write_text(svg, encoding="utf-8")
    return file
