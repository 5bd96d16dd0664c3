import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from m2m_bids.reports.charts import MIN_BOX, Series, box_plot, line_plot

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '<script>alert("x")</script> $\\frac{1}$ \x0b&amp;'


COLOR = "#123456"


def draw(groups, key="plot", **keywords):
    given = {"description": "d", "title": "t", "x_label": "DSC", "colors": {}, **keywords}
    given["colors"] = given["colors"] or dict.fromkeys(groups, COLOR)
    return box_plot(groups, key=key, **given)


def parse(svg):
    return ET.fromstring(svg)  # noqa: S314 (drawn here)


def elements(svg, name):
    return parse(svg).iter(f"{SVG}{name}")


def points(svg):
    """Horizontal position of each point, by what a pointer on it shows."""
    found = elements(svg, "use")
    hinted = ((use, use.find(f"{SVG}title")) for use in found)
    return {hint.text: float(use.get("x")) for use, hint in hinted if hint is not None}


def boxes(svg):
    """Closed outlines in the colour of the group."""
    return [
        element
        for element in elements(svg, "path")
        if f"stroke: {COLOR}" in (element.get("style") or "") and "z" in element.get("d")
    ]


def ids(svg):
    return [element.get("id") for element in parse(svg).iter() if element.get("id")]


def test_points_lie_at_their_values_and_name_their_pair():
    values = {f"pair {i}": value for i, value in enumerate((0.2, 0.9, 0.35, 0.5, 0.61))}
    at = points(draw({"SyN": values, "rigid": {"pair 9": 0.4}}))
    assert set(at) == {f"{name}: {value:.3f}" for name, value in values.items()} | {
        "pair 9: 0.400"
    }
    shown = np.array([float(hint.split(": ")[1]) for hint in at])
    slope, intercept = np.polyfit(shown, list(at.values()), 1)
    assert slope > 0
    # The hints are exact here, and the positions are written to a millionth of a point.
    np.testing.assert_allclose(slope * shown + intercept, list(at.values()), atol=1e-4)


def test_box_ends_at_the_quartiles():
    values = {str(i): value for i, value in enumerate((0.1, 0.2, 0.4, 0.7, 0.9))}
    svg = draw({"SyN": values})
    at = points(svg)
    place = dict(zip(values.values(), at.values(), strict=True))
    (box,) = boxes(svg)
    ends = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", box.get("d"))]
    # Quartiles of five values are the second and the fourth.
    assert min(ends) == pytest.approx(place[0.2], abs=1e-3)
    assert max(ends) == pytest.approx(place[0.7], abs=1e-3)


@pytest.mark.parametrize(("n", "n_boxes"), [(1, 0), (MIN_BOX - 1, 0), (MIN_BOX, 1)])
def test_few_values_have_no_box(n, n_boxes):
    svg = draw({"SyN": {str(i): 0.1 * i for i in range(n)}})
    assert len(points(svg)) == n
    assert len(boxes(svg)) == n_boxes


def test_limits_are_common():
    positions = [
        points(draw({"a": {"p": 0.5, "q": q}}, limits=(0, 1)))["p: 0.500"] for q in (0.1, 0.9)
    ]
    assert positions[0] == positions[1]


def test_names_are_text_and_odd_characters_harmless():
    svg = draw({EVIL: {EVIL: 0.5}}, description=EVIL, title=EVIL, x_label=EVIL)
    root = parse(svg)
    assert not list(root.iter(f"{SVG}script"))
    assert "<script" not in svg
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert any(text.startswith('<script>alert("x")</script> $\\frac{1}$ �&amp;') for text in texts)
    assert root.get("role") == "img"
    assert root.get("aria-label").startswith("<script>")


def test_plots_of_a_page_share_no_identifier_and_refer_to_their_own():
    groups = {"a": {str(i): i / 10 for i in range(9)}}
    one, two = draw(groups, "one"), draw(groups, "two")
    assert len(set(ids(one))) == len(ids(one))
    assert not set(ids(one)) & set(ids(two))
    for svg in (one, two):
        targets = set(re.findall(r'href="#([^"]+)"', svg)) | set(
            re.findall(r"url\(#([^)]+)\)", svg)
        )
        assert targets
        assert targets <= set(ids(svg))


def test_same_numbers_same_drawing():
    groups = {"a": {str(i): i / 10 for i in range(9)}}
    assert draw(groups) == draw(groups)


def plot(*series, **keywords):
    return line_plot(series, key="k", description="d", x_label="x", y_label="y", **keywords)


def vertices(svg, color):
    """Moves and lines of the paths of a colour."""
    return [
        re.findall(r"([ML]) ([\d.]+) ([\d.]+)", element.get("d"))
        for element in elements(svg, "path")
        if f"fill: none; stroke: {color}" in (element.get("style") or "")
    ]


def test_unknown_values_are_gaps():
    whole = vertices(plot(Series("a", [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4])), "#0072b2")[0]
    gap = vertices(plot(Series("a", [0, 1, 2, 3], [0.1, 0.2, None, 0.4])), "#0072b2")[0]
    assert [kind for kind, *_ in whole] == list("MLLL")
    assert [kind for kind, *_ in gap] == list("MLM")


def test_intervals_stand_over_their_points_and_reach_their_bounds():
    series = Series(
        "a", [0, 1, 2], [0.5, 0.6, 0.7], interval=[(0.4, 0.6), (None, None), (0.6, 0.8)]
    )
    line, *bars = [v for v in vertices(plot(series), "#0072b2") if v]
    points_at = [(float(x), float(y)) for _, x, y in line]
    assert len(bars) == 3  # two bars, and the line in the legend
    step = points_at[0][1] - points_at[1][1]  # 0.1 of the axis, in points
    for bar, (x, y) in zip(bars[:2], (points_at[0], points_at[2]), strict=True):
        assert [float(v[1]) for v in bar] == pytest.approx([x, x])
        assert [float(v[2]) for v in bar] == pytest.approx([y + step, y - step], abs=1e-3)


def test_ticks_and_reference():
    svg = plot(Series("a", [0, 1], [0.5, 0.6], reference=0.55), x_ticks={0: "0", 1: "25 %"})
    texts = [element.text for element in elements(svg, "text")]
    assert {"25 %", "a", "x", "y"} <= set(texts)
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in plot(Series("a", [0, 1], [0.5, 0.6]))
