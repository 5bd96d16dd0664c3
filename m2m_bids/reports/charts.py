"""Draw plots as SVG that stands inside an HTML page and can be read aloud."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "m2m-bids",  # the same page from the same numbers
    "text.parse_math": False,  # a name with $ in it is a name
}
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
SERIES_MARKERS = "osD^vPX"
MIN_BOX = 5  # values from which quartiles say more than the points themselves
NAME_LENGTH = 60
ROW_IN = 0.34
PANELS_IN = (11.0, 2.6)


@dataclass(frozen=True)
class Series:
    """
    A line of a plot.

    Parameters
    ----------
    name : str
        As shown in the legend.
    x, y : sequence of float
        Points, of the same number; ``None`` and NaN in `y` are gaps.
    interval : sequence of (float, float), optional
        Lower and upper bound of each point, drawn as a bar; ``None`` where not known.
    reference : float, optional
        Drawn as a dashed line across.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    interval: Sequence[tuple[float | None, float | None]] | None = None
    reference: float | None = None


def box_plot(
    groups: Mapping[str, Mapping[str, float]],
    *,
    key: str,
    description: str,
    title: str,
    x_label: str,
    colors: Mapping[str, str],
    limits: tuple[float, float] | None = None,
    width_in: float = 4.8,
) -> str:
    """
    Draw a box and its points for each group, from the top down.

    Parameters
    ----------
    groups : mapping of str to mapping of str to float
        For each group, as named on the axis, finite values by the name that a pointer on them
        shows. Boxes are drawn from `MIN_BOX` values on.
    key : str
        Unique in the page, of letters, digits and hyphens; it begins the drawing's identifiers.
    description : str
        What is seen, for readers who do not see it.
    title : str
        Above the plot.
    x_label : str
        Quantity and unit.
    colors : mapping of str to str
        Colour of each group.
    limits : tuple of float, optional
        Of the axis of values.
    width_in : float
        Width in inches of 72 px, which fixes the size of text against the plot.

    Returns
    -------
    str
        SVG element.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, axes = _new_figure(width_in, 0.75 + ROW_IN * len(groups))
        for row, (name, values) in enumerate(groups.items()):
            if row % 2 == 0:  # a band holds a name and its points together
                axes.axhspan(row - 0.62, row + 0.38, color="#f1f4f6", zorder=0)
            _draw_group(axes, row, list(values.values()), colors[name], gid=f"points-{row}")
            # Above its box rather than beside it: names are long, and the plot may be narrow.
            place = {"transform": axes.get_yaxis_transform(), "va": "bottom", "fontsize": 8}
            axes.text(0, row - 0.22, _shown(name), **place)
        axes.set(xlabel=_printable(x_label), xlim=limits, ylim=(len(groups) - 0.5, -0.7))
        axes.set_title(_shown(title), loc="left", fontweight="bold")
        axes.yaxis.set_visible(False)
        axes.spines.left.set_visible(False)
        axes.grid(axis="x", color="#e3e8ec")
        axes.set_axisbelow(True)
        hints = {
            f"points-{row}": [f"{name}: {value:.3f}" for name, value in values.items()]
            for row, values in enumerate(groups.values())
        }
        return _inline_svg(figure, key, description, hints)


def line_plot(
    series: Sequence[Series],
    *,
    key: str,
    description: str,
    x_label: str,
    y_label: str,
    x_ticks: Mapping[float, str] | None = None,
) -> str:
    """
    Draw lines against a common axis.

    Parameters
    ----------
    series : sequence of Series
        Lines; one at least.
    key, description
        As for `box_plot`.
    x_label, y_label : str
        Quantities and units.
    x_ticks : mapping of float to str, optional
        Positions on the horizontal axis and what is written there.

    Returns
    -------
    str
        SVG element.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, axes = _new_figure(4.8, 2.7 + 0.2 * len(series))
        _draw_lines(axes, series, x_label, y_label, x_ticks)
        figure.legend(loc="outside lower left")
        return _inline_svg(figure, key, description)


def line_panels(
    panels: Mapping[str, Sequence[Series]],
    *,
    key: str,
    description: str,
    x_label: str,
    x_ticks: Mapping[float, str] | None = None,
) -> str:
    """
    Draw lines of several quantities side by side, for the whole width of a page.

    Parameters
    ----------
    panels : mapping of str to sequence of Series
        Lines of each quantity, by its name and unit.
    key, description
        As for `box_plot`.
    x_label, x_ticks
        As for `line_plot`.

    Returns
    -------
    str
        SVG element.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=PANELS_IN, layout="constrained")
        plots = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (y_label, series) in zip(plots, panels.items(), strict=True):
            _draw_lines(axes, series, x_label, y_label, x_ticks)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return _inline_svg(figure, key, description)


def _draw_lines(
    axes: "Axes",
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_ticks: Mapping[float, str] | None,
) -> None:
    """Draw lines, each in a colour and with markers of its own, and name the axes."""
    for i, line in enumerate(series):
        _draw_series(axes, line, SERIES_COLORS[i % len(SERIES_COLORS)], SERIES_MARKERS[i % 7])
    axes.set(xlabel=_printable(x_label), ylabel=_printable(y_label))
    if x_ticks:
        axes.set_xticks(list(x_ticks), list(x_ticks.values()))
    axes.grid(axis="y", color="#e3e8ec")
    axes.set_axisbelow(True)


def _new_figure(width_in: float, height_in: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _draw_group(axes: "Axes", row: int, values: list[float], color: str, *, gid: str) -> None:
    """Points, spread across the row the same way in every run, over their box."""
    if len(values) >= MIN_BOX:
        axes.boxplot(
            values,
            positions=[row],
            orientation="horizontal",
            widths=0.38,
            showfliers=False,
            manage_ticks=False,
            patch_artist=True,
            boxprops={"facecolor": f"{color}40", "edgecolor": color},
            medianprops={"color": color, "linewidth": 2},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
    heights = row + np.random.default_rng(0).uniform(-0.12, 0.12, len(values))
    axes.scatter(values, heights, s=9, color=color, alpha=0.75, linewidths=0, zorder=3, gid=gid)


def _draw_series(axes: "Axes", line: Series, color: str, marker: str) -> None:
    y = np.array([np.nan if value is None else value for value in line.y], dtype=float)
    style = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4}
    axes.plot(line.x, y, label=_shown(line.name), **style)
    if line.interval is not None:
        known = [
            (x, low, high)
            for x, (low, high) in zip(line.x, line.interval, strict=True)
            if low is not None and high is not None
        ]
        if known:
            axes.vlines(*zip(*known, strict=True), color=color, linewidth=1.2)
    if line.reference is not None:
        axes.axhline(line.reference, color=color, linestyle="--", linewidth=1)


def _shown(name: str) -> str:
    """Fit a name to its place."""
    name = _printable(name)
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def _printable(text: str) -> str:
    """Replace the characters that XML does not know."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _inline_svg(
    figure: "Figure",
    key: str,
    description: str,
    hints: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """
    Turn a figure into an element for a page.

    Identifiers are made unique by `key`, since those of all drawings of a page share one space.
    `hints` holds, by the identifier of a set of points, what a pointer on each of them shows.
    """
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())  # noqa: S314 (written the line before)
    for metadata in root.findall(f"{SVG}metadata"):
        root.remove(metadata)
    for gid, texts in (hints or {}).items():
        points = root.iterfind(f".//{SVG}g[@id='{gid}']//{SVG}use")
        for point, hint in zip(points, texts, strict=True):
            ET.SubElement(point, f"{SVG}title").text = _printable(hint)
    for element in root.iter():
        _make_unique(element, key)
    size = {name: root.attrib.pop(name) for name in ("width", "height")}
    root.set("role", "img")
    root.set("aria-label", _printable(description))
    root.set("style", f"max-width: {1.75 * float(size['width'].removesuffix('pt')):.0f}px")
    ET.register_namespace("", SVG.strip("{}"))
    ET.register_namespace("xlink", LINK[1 : LINK.index("}")])
    return ET.tostring(root, encoding="unicode")


def _make_unique(element: ET.Element, key: str) -> None:
    """Begin an element's identifier, and its references to others, with a key."""
    for name, value in element.attrib.items():
        if name == "id":
            element.set(name, f"{key}-{value}")
        elif name == LINK:
            element.set(name, re.sub(r"^#", f"#{key}-", value))
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{key}-"))
