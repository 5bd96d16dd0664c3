"""Draw a deformable map: a grid that it bends, and how far it disagrees with the way back."""

from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.reports.mosaic import Tile, make_mosaic
from m2m_bids.reports.svg import (
    BRAIN_COLOR,
    DIM,
    HEADER_PX,
    TITLE,
    WHITE,
    contour,
    raster,
    short_orientation_note,
    slice_labels,
    text,
    write_svg,
)
from m2m_bids.reports.value_map import (
    N_SLICES,
    Scale,
    Words,
    dimmed,
    draw_map,
    values_in_mask,
)

GRID_MM = 10.0
GRID_COLOR = "#ffd23c"
KEPT_VERTICES = 4  # of the lines of a grid every fourth: they are smooth
LEAST_LIMIT_MM = 1.0  # of the colours, so that a good map is dark


def grid_figure(
    displacement: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    out_file: Path,
    *,
    background: nb.Nifti1Image,
    label: str = "moving image",
) -> Path:
    """
    Draw what becomes of a straight grid of the rigidly aligned image.

    Parameters
    ----------
    displacement : Nifti1Image, shape (I, J, K, 3)
        Displacement from T1w points to points of the rigidly aligned image, RAS+ mm, in the T1w's
        world.
    mask : Nifti1Image
        Brain mask on the T1w.
    out_file : Path
        SVG file to write.
    background : Nifti1Image
        T1w, drawn dimmed.
    label : str
        What the moving image is, as shown: PET, FA.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    mosaic = make_mosaic(mask, n_slices=N_SLICES)
    data = np.asanyarray(displacement.dataobj)
    offsets = [
        mosaic.sample(nb.Nifti1Image(data[..., axis], displacement.affine)) for axis in range(3)
    ]
    moved = [
        tile.points + np.stack(components, axis=-1)
        for tile, *components in zip(mosaic.tiles, *offsets, strict=True)
    ]
    lines = "".join(
        contour(
            mosaic,
            [_along(tile, points, axis) for tile, points in zip(mosaic.tiles, moved, strict=True)],
            HEADER_PX,
            color=GRID_COLOR,
            level=None,
            width=9,
            kept=KEPT_VERTICES,
        )
        for axis in ("across", "up")
    )
    title = f"Deformation of the {label}: a grid of {GRID_MM:g} mm"
    note = "Lines are straight before this step. Only the shift within a slice shows."
    body = (
        text(title, 12, 30, fill=WHITE, **TITLE)
        + text(f"{note} {short_orientation_note(mosaic)}", 12, 57, font_size=17, fill=DIM)
        + raster(dimmed(mosaic, background), HEADER_PX)
        + lines
        + contour(mosaic, mosaic.sample(mask), HEADER_PX, color=BRAIN_COLOR)
        + slice_labels(mosaic, HEADER_PX)
    )
    size_px = (mosaic.width_px, mosaic.height_px + HEADER_PX)
    return write_svg(body, Path(out_file), size_px=size_px, description=f"{title}. {note}")


def cycle_figure(
    error_mm: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    out_file: Path,
    *,
    background: nb.Nifti1Image | None = None,
    label: str = "moving image",
    target: str = "T1w",
) -> Path:
    """
    Draw how far points come to lie from where they were, forward and back through the bridge.

    Parameters
    ----------
    error_mm : Nifti1Image
        Distance, 3-D, in the T1w's world; its grid may be coarser than the mask's.
    mask : Nifti1Image
        Brain mask on the T1w; only values inside are drawn and counted.
    out_file : Path
        SVG file to write.
    background : Nifti1Image, optional
        T1w, drawn dimmed outside the mask.
    label : str
        What the moving image is, as shown: PET, FA.
    target : str
        What it is registered to, as shown: T1w, or template.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty or lies outside the image's grid.
    """
    values = values_in_mask(error_mm, mask)
    median, high, higher = np.percentile(values, (50, 95, 99))
    words = Words(
        title=f"Cycle error, {target} to {label} and back (mm)",
        note="How far a point comes back from itself. Bright: forward and backward maps disagree.",
        histogram="Share of brain voxels by cycle error (mm)",
        numbers=(
            ("Mean (mm)", f"{values.mean():.2f}"),
            ("Median (mm)", f"{median:.2f}"),
            ("95th percentile (mm)", f"{high:.2f}"),
            ("99th percentile (mm)", f"{higher:.2f}"),
            ("Maximum (mm)", f"{values.max():.2f}"),
        ),
    )
    scale = Scale("magma", 0.0, max(float(higher), LEAST_LIMIT_MM))
    return draw_map(error_mm, mask, out_file, scale=scale, words=words, background=background)


def _along(tile: Tile, points: np.ndarray, axis: str) -> np.ndarray:
    """Positions along an edge of a tile from its centre, in steps of the grid."""
    height, width = tile.points.shape[:2]
    centre = tile.points[height // 2, width // 2]
    beside = tile.points[height // 2 - (axis == "up"), width // 2 + (axis == "across")]
    direction = (beside - centre) / np.linalg.norm(beside - centre)
    return (points - centre) @ direction / GRID_MM
