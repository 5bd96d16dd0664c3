import re
from base64 import b64decode
from io import BytesIO

import nibabel as nb
import numpy as np
import pytest
from PIL import Image

from m2m_bids.reports.pictures import (
    FIXED_COLOR,
    MOVED_COLOR,
    WHITE_LEVEL,
    ExamplePair,
    MovedImage,
    draw_example,
)

SHAPE, SPACING_MM = (40, 48, 40), 4.0
EVIL = '"><script>alert(1)</script>'


def image(data):
    affine = np.diag([SPACING_MM] * 3 + [1])
    affine[:3, 3] = -SPACING_MM * (np.array(SHAPE) - 1) / 2
    return nb.Nifti1Image(np.asarray(data, dtype=np.float32), affine)


def block(center, half_width=5):
    """A cube, 1 inside."""
    data = np.zeros(SHAPE)
    data[tuple(slice(c - half_width, c + half_width) for c in center)] = 1
    return data


MASK = block((20, 24, 20), 16)
CENTER = block((20, 24, 20))


def example(moved, **keywords):
    given = {"labels": image(2 * CENTER), "structures": {"cube": (2,)}, **keywords}
    return ExamplePair("pair", "pet", image(CENTER), image(MASK), moved, **given)


def pixels(svg):
    (data,) = re.findall(r'href="data:image/jpeg;base64,([^"]+)"', svg)
    return np.asarray(Image.open(BytesIO(b64decode(data))).convert("L")).astype(float)


def outlines(svg, color):
    """Start of each closed line of a colour, in pixels."""
    paths = re.findall(rf'd="([^"]*)" fill="none" stroke="{color}"', svg)
    return [
        np.array([float(x), float(y)]) / 10
        for path in paths
        for x, y in re.findall(r"M(-?\d+) (-?\d+)l", path)
    ]


def test_fixed_and_methods_are_drawn_in_the_order_asked_for():
    moved = {name: MovedImage(image(CENTER)) for name in ("syn", "rigid", "unasked")}
    drawn = draw_example(example(moved), {"rigid": "Rigid", "syn": "SyN", "failed": "Failed"})
    assert list(drawn) == ["fixed", "rigid", "syn"]
    assert 'aria-label="pair: moved by SyN"' in drawn["syn"]
    assert all('role="img"' in svg for svg in drawn.values())


def test_same_place_in_all_pictures():
    drawn = draw_example(example({"a": MovedImage(image(CENTER))}), {"a": "A"})
    bright = [np.argwhere(pixels(svg) > WHITE_LEVEL / 2) for svg in drawn.values()]
    assert len(bright[0]) > 0
    # JPEG blurs the edge by less than a pixel on average.
    np.testing.assert_allclose(bright[0].mean(axis=0), bright[1].mean(axis=0), atol=0.5)


def test_outlines_show_where_labels_should_be_and_where_they_are():
    n_voxels = 3
    shifted = image(2 * np.roll(CENTER, n_voxels, axis=0))
    moved = {"a": MovedImage(shifted, shifted)}
    svg = draw_example(example(moved), {"a": "A"})["a"]
    fixed, own = outlines(svg, FIXED_COLOR), outlines(svg, MOVED_COLOR)
    assert len(fixed) == len(own) == 2  # axial and coronal
    # The mask and its margins of 10 mm on both sides are 240 pixels wide.
    pixel_mm = (32 * SPACING_MM + 20) / 240
    for there, here in zip(fixed, own, strict=True):
        # To the participant's right is to the right of the picture.
        np.testing.assert_allclose(here - there, [n_voxels * SPACING_MM / pixel_mm, 0], atol=0.15)


def test_results_of_a_pair_share_their_grey_levels():
    moved = {"faint": MovedImage(image(CENTER)), "bright": MovedImage(image(2 * CENTER))}
    drawn = draw_example(example(moved), {"faint": "Faint", "bright": "Bright"})
    levels = {name: np.percentile(pixels(svg), 99) for name, svg in drawn.items()}
    assert levels["bright"] == pytest.approx(WHITE_LEVEL, abs=6)
    assert levels["faint"] == pytest.approx(WHITE_LEVEL / 2, abs=6)
    assert levels["fixed"] == pytest.approx(WHITE_LEVEL, abs=6)


def test_without_labels_nothing_is_outlined():
    moved = {"a": MovedImage(image(CENTER))}
    drawn = draw_example(example(moved, labels=None), {"a": "A"})
    assert "<path" not in drawn["a"]
    drawn = draw_example(example(moved, structures={}), {"a": "A"})
    assert "<path" not in drawn["a"]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_empty_result_is_a_dark_picture(value):
    drawn = draw_example(example({"a": MovedImage(image(np.full(SHAPE, value)))}), {"a": "A"})
    assert pixels(drawn["a"]).max() < 10


def test_names_are_escaped():
    pair = ExamplePair(EVIL, "pet", image(CENTER), image(MASK), {"a": MovedImage(image(CENTER))})
    drawn = draw_example(pair, {"a": EVIL})
    assert all("<script" not in svg and "&lt;script" in svg for svg in drawn.values())


def test_empty_mask_is_refused():
    pair = ExamplePair("pair", "pet", image(CENTER), image(0 * MASK), {})
    with pytest.raises(ValueError, match="mask is empty"):
        draw_example(pair, {})
