"""Draw how a transform changes volumes: map, histogram and numbers of the Jacobian determinant."""

from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.reports.mosaic import Mosaic, make_mosaic
from m2m_bids.reports.svg import (
    BRAIN_COLOR,
    DIM,
    HEADER_PX,
    TITLE,
    WHITE,
    contour,
    orientation_note,
    raster,
    slice_labels,
    text,
    write_svg,
)

N_SLICES = 5
N_BINS = 60
PANEL_PX = 480
PLOT_PX = (400, 300)
MAX_VALUES = 500_000  # values in the histogram; a regular subset of larger images
FOLD_COLOR = (255, 0, 255)
# Colour limits, log2: never so tight that noise looks like a deformation, never beyond fourfold.
LIMITS_LOG2 = (np.log2(1.25), 2.0)
SMALLEST = 2.0**-10  # determinants at or below 0 have no logarithm


def jacobian_figure(
    determinant: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    out_file: Path,
    *,
    background: nb.Nifti1Image | None = None,
    label: str = "moving image",
) -> Path:
    """
    Draw a map of the Jacobian determinant with its histogram and numbers.

    Parameters
    ----------
    determinant : Nifti1Image
        Determinant of the map from T1w points to points of the moving image, 3-D, in the T1w's
        world; its grid may be coarser than the mask's.
    mask : Nifti1Image
        Brain mask on the T1w; only values inside are drawn and counted.
    out_file : Path
        SVG file to write.
    background : Nifti1Image, optional
        T1w, drawn dimmed outside the mask.
    label : str
        What the moving image is, as shown: PET, FA.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty or lies outside the determinant's grid.
    """
    values = _values_in_mask(determinant, mask)
    spread = np.percentile(np.abs(np.log2(np.maximum(values, SMALLEST))), 99.5)
    limit_log2 = float(np.clip(spread, *LIMITS_LOG2))
    mosaic = make_mosaic(mask, n_slices=N_SLICES)
    note = f"Red: the {label} is compressed there to fit the T1w; blue: stretched; magenta: folded"
    size_px = (mosaic.width_px + PANEL_PX, mosaic.height_px + HEADER_PX)
    body = (
        text(f"Local volume change, {label} to T1w (Jacobian)", 12, 30, fill=WHITE, **TITLE)
        + text(f"{note} (≤ 0).", 12, 57, font_size=17, fill=DIM)
        + raster(_map(mosaic, determinant, mask, background, limit_log2), HEADER_PX)
        + contour(mosaic, mosaic.sample(mask), HEADER_PX, color=BRAIN_COLOR)
        + slice_labels(mosaic, HEADER_PX)
        + f'<g transform="translate({mosaic.width_px + 50},{HEADER_PX + 20})" font-size="17" '
        f'fill="{WHITE}">{_histogram(values, limit_log2)}{_numbers(values)}</g>'
        + text(
            orientation_note(mosaic).split(":")[0] + ".",
            size_px[0] - 12,
            57,
            font_size=17,
            fill=DIM,
            text_anchor="end",
        )
    )
    return write_svg(body, Path(out_file), size_px=size_px)


def _values_in_mask(determinant: nb.Nifti1Image, mask: nb.Nifti1Image) -> np.ndarray:
    """Finite determinants at those voxels of their own grid that lie in the mask."""
    from scipy.ndimage import map_coordinates

    step = max(1, int(np.ceil((np.prod(determinant.shape) / MAX_VALUES) ** (1 / 3))))
    data = np.asanyarray(determinant.dataobj)[::step, ::step, ::step]
    ijk = step * np.indices(data.shape).reshape(3, -1)
    to_mask = np.linalg.inv(mask.affine) @ determinant.affine
    voxels = to_mask[:3, :3] @ ijk + to_mask[:3, 3:]
    is_in_brain = (np.asanyarray(mask.dataobj) > 0).astype(np.uint8)
    inside = map_coordinates(is_in_brain, voxels, order=0, mode="constant", cval=0) > 0
    values = data.reshape(-1)[inside]
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("determinant has no finite value inside the mask")
    return values


def _colors(values: np.ndarray, limit_log2: float) -> np.ndarray:
    """Colours of determinants, uint8 with a last axis of 3."""
    from matplotlib import colormaps

    log2 = np.log2(np.maximum(values, SMALLEST))
    pixels = colormaps["RdBu_r"]((log2 / limit_log2 + 1) / 2)[..., :3]
    pixels = np.rint(255 * pixels).astype(np.uint8)
    pixels[values <= 0] = FOLD_COLOR
    return pixels


def _map(mosaic: Mosaic, determinant, mask, background, limit_log2: float) -> np.ndarray:
    """Canvas with determinants inside the mask and the dimmed background outside."""
    inside = mosaic.canvas([(t > 0.5).astype(np.uint8) for t in mosaic.sample(mask)]) > 0
    tiles = mosaic.sample(determinant, cval=1.0)
    page = mosaic.canvas([_colors(tile, limit_log2) for tile in tiles])
    page[~inside] = 0
    if background is not None:
        grey = mosaic.sample(background)
        upper = max(float(np.percentile(np.concatenate([t.ravel() for t in grey]), 99)), 1e-9)
        dimmed = mosaic.canvas([(110 * np.clip(t / upper, 0, 1)).astype(np.uint8) for t in grey])
        page[~inside] = dimmed[~inside, None]
    return page


def _histogram(values: np.ndarray, limit_log2: float) -> str:
    """Histogram on a logarithmic axis that is also the colour scale; ends collect the rest."""
    width, height = PLOT_PX
    edges = np.linspace(-limit_log2, limit_log2, N_BINS + 1)
    log2 = np.clip(np.log2(np.maximum(values, SMALLEST)), -limit_log2, limit_log2)
    counts = np.histogram(log2, edges)[0] / values.size
    colors = _colors(2 ** ((edges[:-1] + edges[1:]) / 2), limit_log2)
    bar_px = width / N_BINS
    parts = [text("Share of brain voxels by determinant", 0, 0, fill=DIM)]
    for i, (share, color) in enumerate(zip(counts, colors, strict=True)):
        bar = (height - 25) * share / counts.max()
        fill = "#{:02x}{:02x}{:02x}".format(*color)
        parts.append(
            f'<rect x="{i * bar_px:.1f}" y="{height - bar:.1f}" width="{bar_px:.1f}" '
            f'height="{bar:.1f}" fill="{fill}"/>'
            f'<rect x="{i * bar_px:.1f}" y="{height + 3}" width="{bar_px + 0.3:.1f}" '
            f'height="14" fill="{fill}"/>'
        )
    for tick in np.linspace(-limit_log2, limit_log2, 5):
        x_px = width * (tick / limit_log2 + 1) / 2
        parts.append(text(f"{2**tick:.2f}", round(x_px), height + 37, text_anchor="middle"))
    parts.append(f'<path d="M{width / 2} 15V{height}" stroke="{DIM}" stroke-dasharray="4 4"/>')
    return "".join(parts)


def _numbers(values: np.ndarray) -> str:
    """Range, percentiles and folds below the histogram."""
    low, median, high = np.percentile(values, (1, 50, 99))
    folded = float(np.mean(values <= 0))
    rows = (
        ("Minimum", f"{values.min():.2f}"),
        ("1st percentile", f"{low:.2f}"),
        ("Median", f"{median:.2f}"),
        ("99th percentile", f"{high:.2f}"),
        ("Maximum", f"{values.max():.2f}"),
        ("Folded (determinant ≤ 0)", f"{100 * folded:.4f} %"),
    )
    return "".join(
        text(name, 0, PLOT_PX[1] + 90 + 32 * i, fill=DIM)
        + text(value, PLOT_PX[0], PLOT_PX[1] + 90 + 32 * i, text_anchor="end")
        for i, (name, value) in enumerate(rows)
    )
