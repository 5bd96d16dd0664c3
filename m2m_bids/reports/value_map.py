"""Draw values inside a brain as a map with their histogram and some numbers."""

from dataclasses import dataclass
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
    raster,
    short_orientation_note,
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
SMALLEST = 2.0**-10  # values at or below 0 have no logarithm


@dataclass(frozen=True)
class Scale:
    """
    Colours of values, and the axis of their histogram.

    Parameters
    ----------
    color_map : str
        Matplotlib colour map.
    lower, upper : float
        Ends of the axis; values beyond have the colours of the ends. With `is_log2`, logarithms.
    is_log2 : bool
        Whether the axis is logarithmic; values at or below 0 are then magenta.
    """

    color_map: str
    lower: float
    upper: float
    is_log2: bool = False

    def position(self, values: np.ndarray) -> np.ndarray:
        """Place values on the axis, 0 to 1."""
        scaled = np.log2(np.maximum(values, SMALLEST)) if self.is_log2 else values
        return np.clip((scaled - self.lower) / (self.upper - self.lower), 0, 1)

    def value(self, position: np.ndarray) -> np.ndarray:
        """Give the values at positions of the axis."""
        scaled = self.lower + np.asarray(position) * (self.upper - self.lower)
        return 2.0**scaled if self.is_log2 else scaled

    def colors(self, values: np.ndarray) -> np.ndarray:
        """Colour values, uint8 with a last axis of 3."""
        from matplotlib import colormaps

        pixels = colormaps[self.color_map](self.position(values))[..., :3]
        pixels = np.rint(255 * pixels).astype(np.uint8)
        if self.is_log2:
            pixels[values <= 0] = FOLD_COLOR
        return pixels


@dataclass(frozen=True)
class Words:
    """What is written on a map: title, note below it, over the histogram, rows of numbers."""

    title: str
    note: str
    histogram: str
    numbers: tuple[tuple[str, str], ...]


def draw_map(
    image: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    out_file: Path,
    *,
    scale: Scale,
    words: Words,
    background: nb.Nifti1Image | None = None,
    cval: float = 0.0,
) -> Path:
    """
    Draw a map with its histogram.

    Parameters
    ----------
    image : Nifti1Image
        3-D, in the world of the mask; its grid may be coarser.
    mask : Nifti1Image
        Brain mask; only values inside are drawn and counted.
    out_file : Path
        SVG file to write.
    scale : Scale
    words : Words
    background : Nifti1Image, optional
        T1w, drawn dimmed outside the mask.
    cval : float
        Value outside the image.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty or lies outside the image's grid.
    """
    values = values_in_mask(image, mask)
    mosaic = make_mosaic(mask, n_slices=N_SLICES)
    size_px = (mosaic.width_px + PANEL_PX, mosaic.height_px + HEADER_PX)
    pixels = _colored(mosaic, image, mask, scale, background, cval)
    note_style = {"font_size": 17, "fill": DIM}
    body = (
        text(words.title, 12, 30, fill=WHITE, **TITLE)
        + text(words.note, 12, 57, **note_style)
        + raster(pixels, HEADER_PX)
        + contour(mosaic, mosaic.sample(mask), HEADER_PX, color=BRAIN_COLOR)
        + slice_labels(mosaic, HEADER_PX)
        + f'<g transform="translate({mosaic.width_px + 50},{HEADER_PX + 20})" font-size="17" '
        f'fill="{WHITE}">{_histogram(values, scale, words.histogram)}{_numbers(words.numbers)}</g>'
        + text(
            short_orientation_note(mosaic), size_px[0] - 12, 30, text_anchor="end", **note_style
        )
    )
    said = "; ".join(f"{name.lower()} {value}" for name, value in words.numbers)
    return write_svg(body, Path(out_file), size_px=size_px, description=f"{words.title}: {said}.")


def values_in_mask(image: nb.Nifti1Image, mask: nb.Nifti1Image) -> np.ndarray:
    """
    Take the finite values at those voxels of an image's own grid that lie in a mask.

    Parameters
    ----------
    image : Nifti1Image
        3-D; of a large one a regular subset is taken.
    mask : Nifti1Image
        In its world, on any grid.

    Returns
    -------
    ndarray, shape (N,)

    Raises
    ------
    ValueError
        If there are none.
    """
    from scipy.ndimage import map_coordinates

    step = max(1, int(np.ceil((np.prod(image.shape) / MAX_VALUES) ** (1 / 3))))
    data = np.asanyarray(image.dataobj)[::step, ::step, ::step]
    ijk = step * np.indices(data.shape).reshape(3, -1)
    to_mask = np.linalg.inv(mask.affine) @ image.affine
    voxels = to_mask[:3, :3] @ ijk + to_mask[:3, 3:]
    is_in_brain = (np.asanyarray(mask.dataobj) > 0).astype(np.uint8)
    inside = map_coordinates(is_in_brain, voxels, order=0, mode="constant", cval=0) > 0
    values = data.reshape(-1)[inside]
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("image has no finite value inside the mask")
    return values


def _colored(mosaic: Mosaic, image, mask, scale: Scale, background, cval: float) -> np.ndarray:
    """Canvas with colours inside the mask and the dimmed background outside."""
    inside = mosaic.canvas([(t > 0.5).astype(np.uint8) for t in mosaic.sample(mask)]) > 0
    tiles = mosaic.sample(image, cval=cval)
    page = mosaic.canvas([scale.colors(tile) for tile in tiles])
    page[~inside] = 0
    if background is not None:
        page[~inside] = dimmed(mosaic, background)[~inside, None]
    return page


def dimmed(mosaic: Mosaic, background: nb.Nifti1Image) -> np.ndarray:
    """Draw an image in dark grey, to have something else over it: a canvas, uint8."""
    grey = mosaic.sample(background)
    upper = max(float(np.percentile(np.concatenate([t.ravel() for t in grey]), 99)), 1e-9)
    return mosaic.canvas([(110 * np.clip(t / upper, 0, 1)).astype(np.uint8) for t in grey])


def _histogram(values: np.ndarray, scale: Scale, title: str) -> str:
    """Histogram over the colour scale; its ends collect what is beyond."""
    width, height = PLOT_PX
    edges = np.linspace(0, 1, N_BINS + 1)
    counts = np.histogram(scale.position(values), edges)[0] / values.size
    colors = scale.colors(scale.value((edges[:-1] + edges[1:]) / 2))
    bar_px = width / N_BINS
    parts = [text(title, 0, 0, fill=DIM)]
    for i, (share, color) in enumerate(zip(counts, colors, strict=True)):
        bar = (height - 25) * share / counts.max()
        fill = "#{:02x}{:02x}{:02x}".format(*color)
        parts.append(
            f'<rect x="{i * bar_px:.1f}" y="{height - bar:.1f}" width="{bar_px:.1f}" '
            f'height="{bar:.1f}" fill="{fill}"/>'
            f'<rect x="{i * bar_px:.1f}" y="{height + 3}" width="{bar_px + 0.3:.1f}" '
            f'height="14" fill="{fill}"/>'
        )
    for tick in np.linspace(0, 1, 5):
        label = f"{scale.value(tick):.2f}"
        parts.append(text(label, round(width * tick), height + 37, text_anchor="middle"))
    if scale.is_log2:  # no change
        x_px = width * float(scale.position(np.ones(1))[0])
        parts.append(f'<path d="M{x_px:g} 15V{height}" stroke="{DIM}" stroke-dasharray="4 4"/>')
    return "".join(parts)


def _numbers(rows: tuple[tuple[str, str], ...]) -> str:
    """Rows of numbers below the histogram."""
    return "".join(
        text(name, 0, PLOT_PX[1] + 90 + 32 * i, fill=DIM)
        + text(value, PLOT_PX[0], PLOT_PX[1] + 90 + 32 * i, text_anchor="end")
        for i, (name, value) in enumerate(rows)
    )
