"""Draw images: flicker before and after a registration, anatomy, native image, quantities."""

from collections.abc import Mapping
from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.reports.mosaic import Mosaic, make_mosaic
from m2m_bids.reports.svg import (
    BRAIN_COLOR,
    DIM,
    HEADER_PX,
    LINE_COLORS,
    TITLE,
    WHITE,
    contour,
    data_uri,
    orientation_note,
    raster,
    short_orientation_note,
    slice_labels,
    text,
    write_svg,
)

STATE_TITLES = {
    "initial": "Before registration: positions as in the headers",
    "rigid": "After rigid alignment",
    "affine": "After affine alignment to the template",
    "m2m": "After M2M-Reg",
}
SHOWN_SHARE = 0.05  # of the window: darker voxels do not count for where an image's slices lie
PERIOD_S = 2.6
# The moving image is opaque for half of the period, so that both are seen for the same time.
FLICKER_STYLE = f"""
@keyframes flicker {{0%, 44% {{opacity: 1}} 50%, 94% {{opacity: 0}} 100% {{opacity: 1}}}}
.moving {{animation: flicker {PERIOD_S}s linear infinite}}
.fixed {{animation: flicker {PERIOD_S}s linear -{PERIOD_S / 2}s infinite}}
.stage:hover .moving {{animation-play-state: paused}}
.name {{cursor: pointer; pointer-events: all}}
.name:focus-visible {{outline: 3px solid #ffd23c}}
.name-fixed:is(:hover, :focus) ~ .stage .moving {{animation: none; opacity: 0}}
.name-moving:is(:hover, :focus) ~ .stage .moving {{animation: none; opacity: 1}}
.name-lines:is(:hover, :focus) ~ .stage .lines {{display: none}}
@media (prefers-reduced-motion: reduce) {{.moving, .fixed {{animation: none}}}}
"""


def flicker(
    background: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    states: Mapping[str, nb.Nifti1Image],
    out_dir: Path,
    *,
    contours: Mapping[str, nb.Nifti1Image] | None = None,
    label: str = "PET",
    target: str = "T1w",
    color_map: str = "inferno",
) -> dict[str, Path]:
    """
    Draw one animated figure per state, alternating the T1w and the moving image.

    All figures show the same slices, in the same windows, so that states can be compared: the
    slices follow from the mask, the moving image's window from the pooled values of all states.

    Parameters
    ----------
    background : Nifti1Image
        T1w, 3-D.
    mask : Nifti1Image
        Brain mask in the T1w's world; its outline is drawn.
    states : mapping of str to Nifti1Image
        Moving image at each stage, 3-D, in the T1w's world (on its grid or another one), not
        smoothed. Names ``initial``, ``rigid``, ``affine`` and ``m2m`` get a title of their own;
        any other name is the title.
    out_dir : Path
        Folder for the files ``<name>.svg``.
    contours : mapping of str to Nifti1Image
        Further masks to outline, such as white matter, by the name shown in the legend.
    label : str
        What the moving image is, as shown: PET, FA.
    target : str
        What it is registered to, as shown: T1w, or template.
    color_map : str
        Matplotlib colour map of the moving image.

    Returns
    -------
    dict of str to Path
        File of each state.

    Raises
    ------
    ValueError
        If there is no state, or the mask is empty.
    """
    if not states:
        raise ValueError("states is empty: expected the moving image at one stage at least")
    mosaic = make_mosaic(mask)
    inside = [tile > 0.5 for tile in mosaic.sample(mask)]
    fixed = _grey(mosaic, background, inside)
    sampled = {name: mosaic.sample(image) for name, image in states.items()}
    window = intensity_window([v for tiles in sampled.values() for v in _within(tiles, inside)])
    outlines = {"brain": mask, **(contours or {})}
    lines = _outlines(mosaic, outlines)
    files = {}
    for name, tiles in sampled.items():
        moving = color_table(color_map)[mosaic.canvas([levels(tile, window) for tile in tiles])]
        is_visible = any(values.any() for values in _within(tiles, inside))
        title = STATE_TITLES.get(name, name)
        body = _flicker_header(title, (target, label), outlines, mosaic)
        body += _color_bar(color_map, window, mosaic.width_px)
        body += f'<g class="stage">{raster(fixed, HEADER_PX)}'
        body += raster(moving, HEADER_PX, css_class="moving")
        body += f'<g class="lines">{lines}</g>{slice_labels(mosaic, HEADER_PX)}'
        body += (
            "" if is_visible else _warning(f"The {label} has no signal in the brain mask", mosaic)
        )
        body += "</g>"
        files[name] = _write(
            body,
            Path(out_dir) / f"{name}.svg",
            mosaic,
            description=f"{title}: the {label} and the {target} by turns on {len(tiles)} slices, "
            f"with outlines of the {target}'s {', '.join(outlines)}.",
            style=FLICKER_STYLE,
        )
    return files


def anatomical_figure(
    t1w: nb.Nifti1Image, mask: nb.Nifti1Image, dseg: nb.Nifti1Image, out_file: Path
) -> Path:
    """
    Draw the T1w with the outlines of the brain mask, the cortex and the white matter.

    Parameters
    ----------
    t1w, mask, dseg : Nifti1Image
        T1w, brain mask and tissue classes (1 grey matter, 2 white matter, 3 CSF), 3-D, one world.
    out_file : Path
        SVG file to write.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    mosaic = make_mosaic(mask)
    outlines = {
        "brain": mask,
        "white matter": select_labels(dseg, 2),
        "grey matter": select_labels(dseg, 1, 2),
    }
    inside = [tile > 0.5 for tile in mosaic.sample(mask)]
    body = text("T1w, brain mask and tissue", 12, 30, fill=WHITE, **TITLE)
    body += text(orientation_note(mosaic), 12, 57, font_size=17, fill=DIM)
    body += _legend(outlines, mosaic.width_px - 12)
    body += raster(_grey(mosaic, t1w, inside), HEADER_PX) + _outlines(mosaic, outlines)
    return _write(
        body + slice_labels(mosaic, HEADER_PX),
        Path(out_file),
        mosaic,
        description=f"T1w on {len(mosaic.tiles)} slices with outlines of {', '.join(outlines)}.",
    )


def native_figure(
    image: nb.Nifti1Image, out_file: Path, *, label: str = "PET", color_map: str = "inferno"
) -> Path:
    """
    Draw an image on its own grid, its voxels as they are.

    Parameters
    ----------
    image : Nifti1Image
        3-D.
    out_file : Path
        SVG file to write.
    label : str
        What the image is, as shown: PET, FA.
    color_map : str
        Matplotlib colour map.

    Returns
    -------
    Path
        `out_file`.
    """
    data = np.nan_to_num(np.asanyarray(image.dataobj).astype(np.float32), posinf=0, neginf=0)
    window = intensity_window([data])
    shown = data > SHOWN_SHARE * window[1]
    # Of an image without signal all of its field of view is shown.
    box = nb.Nifti1Image(
        (shown if shown.any() else np.ones_like(shown)).astype(np.uint8), image.affine
    )
    mosaic = make_mosaic(box)
    zooms = " x ".join(f"{zoom:.3g}" for zoom in np.linalg.norm(image.affine[:3, :3], axis=0))
    size = " x ".join(str(n) for n in image.shape)
    title = f"{label} on its own grid: {size} voxels of {zooms} mm"
    tiles = mosaic.sample(nb.Nifti1Image(data, image.affine), order=0)
    return _still(mosaic, tiles, out_file, title=title, color_map=color_map, window=window)


def quantity_figure(
    image: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    out_file: Path,
    *,
    title: str,
    note: str = "",
    contours: Mapping[str, nb.Nifti1Image] | None = None,
    color_map: str = "inferno",
) -> Path:
    """
    Draw an image of a quantity, such as SUVR, on the slices of the T1w's other figures.

    Parameters
    ----------
    image : Nifti1Image
        In the T1w's world; of a dynamic one the mean of the frames that have values is drawn.
    mask : Nifti1Image
        Brain mask, which gives slices and window; its outline is drawn.
    out_file : Path
        SVG file to write.
    title : str
        What the quantity is.
    note : str
        A sentence that says more of it.
    contours : mapping of str to Nifti1Image
        Further masks to outline, by the name shown in the legend.
    color_map : str
        Matplotlib colour map.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    data = np.asanyarray(image.dataobj)
    if data.ndim == 4:
        frames = [one for one in np.moveaxis(data, 3, 0) if np.isfinite(one).any()]
        title = f"{title}, mean of {len(frames)} frames"
        image = nb.Nifti1Image(np.float32(sum(frames) / len(frames)), image.affine)
    mosaic = make_mosaic(mask)
    tiles = mosaic.sample(image)
    inside = [tile > 0.5 for tile in mosaic.sample(mask)]
    outlines = {"brain": mask, **(contours or {})}
    return _still(
        mosaic,
        tiles,
        out_file,
        title=title,
        color_map=color_map,
        window=intensity_window(_within(tiles, inside)),
        note=note,
        outlines=outlines,
    )


def _still(
    mosaic: Mosaic,
    tiles: list[np.ndarray],
    out_file: Path,
    *,
    title: str,
    color_map: str,
    window: tuple[float, float],
    note: str = "",
    outlines: Mapping[str, nb.Nifti1Image] | None = None,
) -> Path:
    """Draw sampled tiles in colour, with a colour bar and outlines."""
    pixels = color_table(color_map)[mosaic.canvas([levels(tile, window) for tile in tiles])]
    body = text(title, 12, 30, fill=WHITE, **TITLE)
    notes = f"{note} {orientation_note(mosaic)}".strip()
    body += text(notes, 12, 57, font_size=17, fill=DIM)
    body += _color_bar(color_map, window, mosaic.width_px) + raster(pixels, HEADER_PX)
    if outlines:
        body += _legend(outlines, mosaic.width_px - 12) + _outlines(mosaic, outlines)
    description = f"{title}. {note}".strip()
    return _write(
        body + slice_labels(mosaic, HEADER_PX), Path(out_file), mosaic, description=description
    )


def select_labels(dseg: nb.Nifti1Image, *labels: int) -> nb.Nifti1Image:
    """
    Take classes of a label image as a mask.

    Parameters
    ----------
    dseg : Nifti1Image
        Integer labels; in BIDS 1 is grey matter, 2 white matter, 3 CSF.
    *labels : int
        Classes that belong to the mask.

    Returns
    -------
    Nifti1Image
        Mask, uint8.
    """
    is_member = np.isin(np.rint(np.asanyarray(dseg.dataobj)), labels)
    return nb.Nifti1Image(is_member.astype(np.uint8), dseg.affine)


def _write(
    body: str, out_file: Path, mosaic: Mosaic, *, description: str, style: str = ""
) -> Path:
    """Write a figure with a header above a mosaic."""
    size_px = (mosaic.width_px, mosaic.height_px + HEADER_PX)
    return write_svg(body, out_file, size_px=size_px, description=description, style=style)


def intensity_window(values: list[np.ndarray]) -> tuple[float, float]:
    """
    Choose a window of grey levels: 0 (0.5th percentile if negative) to the 99.5th percentile.

    Parameters
    ----------
    values : list of ndarray
        Values to show, of any shape; those that are zero or not finite do not count.

    Returns
    -------
    tuple of float
        Lower and upper limit.
    """
    pooled = np.concatenate(values)
    pooled = pooled[np.isfinite(pooled) & (pooled != 0)]
    if not pooled.size:
        return 0.0, 1.0
    lower, upper = np.percentile(pooled, (0.5, 99.5))
    lower = min(float(lower), 0.0)
    return lower, float(upper) if upper > lower else lower + 1.0


def levels(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map values in a window to 0 ... 255, uint8; those outside to its ends."""
    lower, upper = window
    return np.rint(255 * np.clip((values - lower) / (upper - lower), 0, 1)).astype(np.uint8)


def _within(tiles: list[np.ndarray], inside: list[np.ndarray]) -> list[np.ndarray]:
    """Values of each tile in the mask."""
    return [tile[selected] for tile, selected in zip(tiles, inside, strict=True)]


def _grey(mosaic: Mosaic, image: nb.Nifti1Image, inside: list[np.ndarray]) -> np.ndarray:
    """Canvas of an image in grey, windowed on the values in the mask."""
    tiles = mosaic.sample(image)
    window = intensity_window(_within(tiles, inside))
    return mosaic.canvas([levels(tile, window) for tile in tiles])


def color_table(name: str) -> np.ndarray:
    """Look a Matplotlib colour map up: 256 colours, shape (256, 3), uint8."""
    from matplotlib import colormaps

    return np.rint(255 * colormaps[name](np.arange(256))[:, :3]).astype(np.uint8)


def _colors(outlines: Mapping[str, nb.Nifti1Image]) -> dict[str, str]:
    """Colour of each outline: the brain's, then one after the other."""
    colors = (BRAIN_COLOR, *LINE_COLORS)
    return {name: colors[i % len(colors)] for i, name in enumerate(outlines)}


def _outlines(mosaic: Mosaic, outlines: Mapping[str, nb.Nifti1Image]) -> str:
    """Draw the outlines of masks over the mosaic."""
    return "".join(
        contour(mosaic, mosaic.sample(outlines[name]), HEADER_PX, color=color)
        for name, color in _colors(outlines).items()
    )


def _legend(outlines: Mapping[str, nb.Nifti1Image], right_px: int) -> str:
    """Name the outlines in their colours, ending at `right_px`."""
    parts, x_px = [], right_px
    for name, color in reversed(_colors(outlines).items()):
        parts.append(text(f"— {name}", x_px, 30, font_size=19, fill=color, text_anchor="end"))
        x_px -= 11 * len(name) + 36
    return f'<g class="name name-lines" tabindex="0">{"".join(parts)}</g>'


def _name(which: str) -> dict[str, str]:
    """Attributes of a name that holds its image while it has the pointer or the focus."""
    return {"class": f"name name-{which}", "tabindex": "0"}


def _flicker_header(title: str, names: tuple[str, str], outlines: Mapping, mosaic: Mosaic) -> str:
    """Title, note and the names, fixed and moving, that hold one image under the pointer."""
    note = (
        f"{short_orientation_note(mosaic)} Point at the images to hold them; point at a name, "
        "or go there with Tab, to see it alone."
    )
    fixed, moving = names
    x_px = 760
    moving_px = x_px + 45 + 12 * len(fixed)
    return (
        text(title, 12, 30, fill=WHITE, **TITLE)
        + text(note, 12, 57, font_size=17, fill=DIM)
        + text(fixed, x_px, 30, fill="#555", **TITLE, **_name("fixed"))
        + text(moving, moving_px, 30, fill="#555", **TITLE, **_name("moving"))
        + '<g pointer-events="none">'
        + text(fixed, x_px, 30, fill=WHITE, **TITLE, **{"class": "fixed"})
        + text(moving, moving_px, 30, fill="#ffd23c", **TITLE, **{"class": "moving"})
        + "</g>"
        + _legend(outlines, mosaic.width_px - 12)
    )


def _color_bar(color_map: str, window: tuple[float, float], right_px: int) -> str:
    """Colour bar with its limits, below the legend."""
    bar = np.broadcast_to(color_table(color_map)[None], (1, 256, 3)).copy()
    lower, upper = (f"{v:.0f}" if abs(v) >= 1000 else f"{v:.3g}" for v in window)
    style = {"font_size": 17, "fill": DIM, "text_anchor": "end"}
    x_px = right_px - 22 - 10 * len(upper)
    return (
        text(lower, x_px - 158, 57, **style)
        + f'<image x="{x_px - 150}" y="43" width="150" height="15" '
        f'preserveAspectRatio="none" href="{data_uri(bar)}"/>'
        + text(upper, right_px - 12, 57, **style)
    )


def _warning(message: str, mosaic: Mosaic) -> str:
    """Write a message across the mosaic."""
    x_px, y_px = mosaic.width_px // 2, HEADER_PX + mosaic.height_px // 2
    return text(
        message, x_px, y_px, text_anchor="middle", font_size=44, font_weight="bold", fill="#ff5050"
    )
