"""Write figures as self-contained SVG: rasters inside as JPEG, lines and text as vectors."""

from base64 import b64encode
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np

from m2m_bids.reports.mosaic import Mosaic

JPEG_QUALITY = 84
HEADER_PX = 70
TITLE = {"font_size": 25, "font_weight": "bold"}
FONT = "Helvetica, Arial, sans-serif"
WHITE, DIM = "#ffffff", "#b8c0c8"
LINE_COLORS = ("#37e0ff", "#ff7de0", "#ffe14d")  # of further outlines
BRAIN_COLOR = "#4dff4d"  # green is in neither grey nor the usual colour maps of PET


def data_uri(pixels: np.ndarray) -> str:
    """
    Encode pixels as a JPEG data URI.

    Parameters
    ----------
    pixels : ndarray, shape (height, width) or (height, width, 3), uint8
        Grey levels or red, green and blue.
    """
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def raster(pixels: np.ndarray, y_px: int, *, css_class: str = "") -> str:
    """Draw pixels at the left edge of the figure, `y_px` from its top."""
    height, width = pixels.shape[:2]
    return (
        f'<image class="{css_class}" x="0" y="{y_px}" width="{width}" height="{height}" '
        f'href="{data_uri(pixels)}"/>'
    )


def text(content: str, x_px: float, y_px: float, **attributes: str | int) -> str:
    """
    Draw a line of text; `content` is escaped, ``_`` in attribute names stands for ``-``.

    >>> text("a < b", 1, 2, fill="red")
    '<text x="1" y="2" fill="red">a &lt; b</text>'
    """
    extra = "".join(
        f' {name.replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items()
    )
    return f'<text x="{x_px}" y="{y_px}"{extra}>{escape(content)}</text>'


def contour(
    mosaic: Mosaic,
    tiles: list[np.ndarray],
    y_px: int,
    *,
    color: str,
    level: float | None = 0.5,
    width: int = 13,
    kept: int = 2,
) -> str:
    """
    Draw where sampled tiles cross a level.

    Parameters
    ----------
    mosaic : Mosaic
        Where the tiles lie.
    tiles : list of ndarray, shape (height, width)
        Sampled values: of a mask, 0 to 1.
    y_px : int
        Top of the mosaic in the figure.
    color : str
        CSS colour of the line.
    level : float or None
        Level; None for every whole number.
    width : int
        Width of the line, tenths of a pixel.
    kept : int
        Of so many vertices one is kept. There is one at each edge of a pixel that the line
        crosses, which is more than a screen shows.
    """
    from contourpy import contour_generator

    lines = []
    for tile, values in zip(mosaic.tiles, tiles, strict=True):
        origin = np.array([tile.x_px + 0.5, tile.y_px + 0.5 + y_px])
        for vertices in (
            line
            for crossed in (_whole_numbers(values) if level is None else (level,))
            for line in contour_generator(z=values).lines(crossed)
        ):
            lines.append(_path(np.vstack([vertices[:-1:kept], vertices[-1:]]) + origin))
    return (
        f'<path transform="scale(.1)" d="{"".join(lines)}" fill="none" stroke="{color}" '
        f'stroke-width="{width}" stroke-linejoin="round" stroke-opacity=".9"/>'
    )


def _whole_numbers(values: np.ndarray) -> range:
    """Whole numbers between the least and the greatest value."""
    return range(int(np.ceil(values.min())), int(np.floor(values.max())) + 1)


def _path(vertices: np.ndarray) -> str:
    """Path data of a polyline, relative, in tenths of a pixel."""
    tenths = np.rint(10 * vertices).astype(int)
    steps = np.diff(tenths, axis=0)
    moves = "".join(f"{dx} {dy} " if dy >= 0 else f"{dx}{dy} " for dx, dy in steps)
    return f"M{tenths[0, 0]} {tenths[0, 1]}l{moves.strip()}"


def slice_labels(mosaic: Mosaic, y_px: int) -> str:
    """Write sides (L, R, A, P, S, I) and positions in world millimetres on the tiles."""
    parts = []
    for tile in mosaic.tiles:
        top = y_px + tile.y_px
        right_px, bottom = tile.x_px + tile.width_px, top + tile.height_px
        position = f"{'xyz'[tile.plane.through]} = {round(tile.position_mm)}"
        parts.append(text(position, right_px - 5, bottom - 6, text_anchor="end", font_size=15))
        left, right, up, down = tile.plane.labels
        middle, centre = top + tile.height_px // 2, tile.x_px + tile.width_px // 2
        parts.append(text(left, tile.x_px + 4, middle))
        parts.append(text(right, right_px - 4, middle, text_anchor="end"))
        if tile.x_px == 0:
            parts.append(text(up, centre, top + 16, text_anchor="middle"))
            parts.append(text(down, centre, bottom - 6, text_anchor="middle"))
    # The dark rim keeps letters readable over bright tissue.
    return (
        f'<g font-size="17" font-weight="bold" fill="{WHITE}" stroke="#000" stroke-width="3" '
        f'paint-order="stroke" pointer-events="none">{"".join(parts)}</g>'
    )


def orientation_note(mosaic: Mosaic) -> str:
    """Say on which side left is, and whether the slices are tilted."""
    note = "Neurological display: the image's left is the subject's left (L). Positions in mm."
    if mosaic.obliquity_deg > 1:
        note += f" Slices follow the T1w's own axes, tilted by {mosaic.obliquity_deg:.0f}°."
    return note


def short_orientation_note(mosaic: Mosaic) -> str:
    """Say on which side left is, and whether the slices are tilted, in few words."""
    tilt = f"; slices tilted by {mosaic.obliquity_deg:.0f}°" if mosaic.obliquity_deg > 1 else ""
    return f"Neurological display: left is the subject's left{tilt}."


def write_svg(
    body: str,
    out_file: Path,
    *,
    size_px: tuple[int, int],
    description: str,
    style: str = "",
) -> Path:
    """
    Write a figure on a black ground that scales with its page.

    Parameters
    ----------
    body : str
        SVG elements.
    out_file : Path
        File to write; its folder is made.
    size_px : tuple of int
        Width and height of the drawing.
    description : str
        What it shows, for those who do not see it.
    style : str
        CSS of the figure.

    Returns
    -------
    Path
        `out_file`.
    """
    width, height = size_px
    out_file = Path(out_file)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    # The svg tag shares the first line: nireports rewrites, in place, files whose line begins
    # with it, and the file in the report would then differ from the one this wrote.
    out_file.write_text(
        '<?xml version="1.0" encoding="UTF-8"?><svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {width} {height}" font-family="{FONT}" role="figure" '
        f'aria-label="{escape(description)}">\n<style>{style}</style>\n'
        f'<rect width="{width}" height="{height}" fill="#000"/>\n{body}\n</svg>\n',
        encoding="UTF-8",
    )
    return out_file
