import base64
import io
import re
from xml.dom import minidom

import nibabel as nb
import numpy as np
import pytest
from PIL import Image

from m2m_bids.reports.figures import (
    anatomical_figure,
    flicker,
    native_figure,
    quantity_figure,
    select_labels,
)
from m2m_bids.reports.jacobian import jacobian_figure
from m2m_bids.reports.mosaic import TILE_WIDTH_PX, make_mosaic
from m2m_bids.reports.svg import HEADER_PX


@pytest.fixture
def plain_mask(brain_on):
    return brain_on("RAS")


def ramp(mask, axis):
    """World coordinate along an axis as an image."""
    ijk = np.moveaxis(np.indices(mask.shape), 0, -1)
    points = ijk @ mask.affine[:3, :3].T + mask.affine[:3, 3]
    return nb.Nifti1Image(points[..., axis].astype(np.float32), mask.affine)


def well_formed(content):
    """Raise unless the text, which this test's own code wrote, is XML."""
    minidom.parseString(content)  # noqa: S318


def rasters(file):
    """Decode the large images of a figure."""
    data = re.findall(r'<image class[^>]*base64,([^"]+)"', file.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(d)))).astype(float) for d in data]


# --- mosaic ----------------------------------------------------------------------------------


def test_sides_are_on_the_labelled_edges(brain):
    mosaic = make_mosaic(brain)
    low = {"L": 0, "P": 1, "I": 2}
    high = {"R": 0, "A": 1, "S": 2}
    sampled = {axis: mosaic.sample(ramp(brain, axis)) for axis in range(3)}
    for i, tile in enumerate(mosaic.tiles):
        left, right, top, bottom = tile.plane.labels
        across, up = low[left], high[top]
        assert (high[right], low[bottom]) == (across, up)
        half = tile.height_px // 2
        row, column = sampled[across][i][half], sampled[up][i][:, TILE_WIDTH_PX // 2]
        # The middle of the tile lies in the image's field of view on every grid.
        quarter = TILE_WIDTH_PX // 4
        assert row[3 * quarter] > row[quarter] + 20
        assert column[half - 30] > column[half + 30] + 20


def test_voxels_are_drawn_in_true_proportions(brain):
    for tile in make_mosaic(brain).tiles:
        across = np.linalg.norm(tile.points[10, 11] - tile.points[10, 10])
        up = np.linalg.norm(tile.points[11, 10] - tile.points[10, 10])
        np.testing.assert_allclose(across, up, rtol=1e-6)


def test_slices_lie_within_the_brain_and_tiles_fill_the_canvas(brain):
    mosaic = make_mosaic(brain)
    assert len(mosaic.tiles) == 21
    for tile, values in zip(mosaic.tiles, mosaic.sample(brain), strict=True):
        assert values.max() > 0.9
        border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        assert border.max() == 0  # the margin shows all of the brain
        assert tile.points.shape == (tile.height_px, TILE_WIDTH_PX, 3)
    assert mosaic.height_px == sum(tile.height_px for tile in mosaic.tiles[::7])


def test_obliquity_is_told(plain_mask, brain_on):
    assert make_mosaic(plain_mask).obliquity_deg == pytest.approx(0, abs=1e-4)
    assert make_mosaic(brain_on("oblique")).obliquity_deg == pytest.approx(17)


def test_sampling_matches_a_linear_function_on_another_grid(plain_mask, brain_on):
    mosaic = make_mosaic(plain_mask)
    weights = mosaic.sample(plain_mask)
    for axis in range(3):
        image = ramp(brain_on("oblique"), axis)
        for tile, values, weight in zip(mosaic.tiles, mosaic.sample(image), weights, strict=True):
            inside = weight > 0.5
            # float32 of coordinates below 128
            np.testing.assert_allclose(values[inside], tile.points[inside][:, axis], atol=1e-3)


@pytest.mark.parametrize("data", [np.zeros((4, 4, 4)), np.ones((4, 4, 4, 2))])
def test_bad_mask_is_refused(data):
    with pytest.raises(ValueError, match="mask"):
        make_mosaic(nb.Nifti1Image(data.astype(np.uint8), np.eye(4)))


# --- flicker ---------------------------------------------------------------------------------


@pytest.fixture
def states(plain_mask):
    rigid = np.asarray(plain_mask.dataobj) * np.float32(5)
    moved = plain_mask.affine.copy()
    moved[0, 3] += 25
    return {
        "initial": nb.Nifti1Image(rigid, moved),
        "m2m": nb.Nifti1Image(rigid, plain_mask.affine),
    }


def test_flicker_writes_comparable_animated_figures(tmp_path, plain_mask, states):
    files = flicker(ramp(plain_mask, 1), plain_mask, states, tmp_path, label="PET <b>")
    assert {name: file.name for name, file in files.items()} == {
        "initial": "initial.svg",
        "m2m": "m2m.svg",
    }
    (fixed, moving), (fixed_m2m, moving_m2m) = (rasters(files[name]) for name in states)
    np.testing.assert_array_equal(fixed, fixed_m2m)
    assert np.abs(moving - moving_m2m).max() > 100  # the displaced image differs
    assert moving_m2m.shape[:2] == fixed.shape[:2]
    for file in files.values():
        content = file.read_text()
        well_formed(content)
        assert "@keyframes" in content
        assert "<script" not in content
        assert "http" not in content.replace("http://www.w3.org/2000/svg", "")
        assert "PET &lt;b&gt;" in content
        assert file.stat().st_size < 1.5e6


def test_displacement_shows_on_the_right_side(tmp_path, plain_mask, states):
    """An image moved to the subject's right appears farther right on axial tiles."""
    files = flicker(ramp(plain_mask, 1), plain_mask, states, tmp_path)
    centres = []
    for name in ("initial", "m2m"):
        tile = rasters(files[name])[1].sum(-1)[:, 3 * TILE_WIDTH_PX : 4 * TILE_WIDTH_PX][:200]
        centres.append((tile.sum(0) @ np.arange(TILE_WIDTH_PX)) / tile.sum())
    assert centres[0] > centres[1] + 10


def test_contours_lie_on_the_mask_boundary(tmp_path, plain_mask, states):
    file = flicker(ramp(plain_mask, 1), plain_mask, states, tmp_path)["m2m"]
    path = re.search(r'<path transform="scale\(.1\)" d="([^"]+)"', file.read_text())[1]
    mosaic = make_mosaic(plain_mask)
    inside = mosaic.canvas([(t > 0.5).astype(np.uint8) for t in mosaic.sample(plain_mask)]) > 0
    edge = inside & ~(
        np.roll(inside, 1, 0)
        & np.roll(inside, -1, 0)
        & np.roll(inside, 1, 1)
        & np.roll(inside, -1, 1)
    )
    near = np.argwhere(edge)[:, ::-1]
    for polyline in path.split("M")[1:]:
        numbers = [int(n) for n in re.findall(r"-?\d+", polyline)]
        points = np.cumsum(np.array(numbers).reshape(-1, 2), axis=0) / 10 - [0.5, HEADER_PX + 0.5]
        for point in points[::10]:
            assert np.abs(near - point).max(1).min() <= 1.01


def test_image_outside_the_brain_is_said(tmp_path, plain_mask, states):
    far = states["m2m"].affine.copy()
    far[2, 3] += 500
    away = nb.Nifti1Image(np.asarray(states["m2m"].dataobj), far)
    files = flicker(ramp(plain_mask, 1), plain_mask, {**states, "initial": away}, tmp_path)
    assert "no signal in the brain mask" in files["initial"].read_text()
    assert "no signal in the brain mask" not in files["m2m"].read_text()


def test_nan_outside_is_no_obstacle(tmp_path, plain_mask, states):
    data = np.asarray(states["m2m"].dataobj).copy()
    data[data == 0] = np.nan
    image = nb.Nifti1Image(data, plain_mask.affine)
    moving = rasters(flicker(image, plain_mask, {"m2m": image}, tmp_path)["m2m"])[1]
    assert moving.max() > 200


def test_no_state_is_refused(tmp_path, plain_mask):
    with pytest.raises(ValueError, match="states"):
        flicker(plain_mask, plain_mask, {}, tmp_path)


# --- Jacobian, anatomy -----------------------------------------------------------------------


def test_jacobian_numbers_and_folds(tmp_path, plain_mask):
    data = np.full(plain_mask.shape, 1.5, np.float32)
    i, j, k = np.argwhere(np.asarray(plain_mask.dataobj))[1000]
    data[i, j, k] = -0.25
    # Outside the mask nothing counts.
    data[np.asarray(plain_mask.dataobj) == 0] = 77
    image = nb.Nifti1Image(data, plain_mask.affine)
    content = jacobian_figure(image, plain_mask, tmp_path / "j.svg").read_text()
    well_formed(content)
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", content)
    numbers = {name: shown[shown.index(name) + 1] for name in ("Minimum", "Median", "Maximum")}
    assert numbers == {"Minimum": "-0.25", "Median": "1.50", "Maximum": "1.50"}
    share = 100 / np.count_nonzero(plain_mask.dataobj)
    assert f"{share:.4f} %" in shown


def test_jacobian_colors_are_centred_at_one(tmp_path, plain_mask):
    def colour(value):
        image = nb.Nifti1Image(np.full(plain_mask.shape, value, np.float32), plain_mask.affine)
        page = rasters(jacobian_figure(image, plain_mask, tmp_path / "j.svg"))[0]
        return page[115, TILE_WIDTH_PX // 2 + 2 * TILE_WIDTH_PX]

    np.testing.assert_allclose(colour(1.0), 247, atol=4)  # white of the colour map, JPEG
    red, blue, magenta = colour(1.25), colour(0.8), colour(-1.0)
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    np.testing.assert_allclose(magenta, (255, 0, 255), atol=6)


def test_jacobian_on_a_coarser_grid(tmp_path, plain_mask, brain_on):
    affine = brain_on((np.diag([9.0, 9, 9]), (20, 22, 18))).affine
    image = nb.Nifti1Image(np.full((20, 22, 18), 0.5, np.float32), affine)
    shown = jacobian_figure(image, plain_mask, tmp_path / "j.svg").read_text()
    assert ">0.50<" in shown
    far = affine.copy()
    far[0, 3] += 1000
    with pytest.raises(ValueError, match="inside the mask"):
        jacobian_figure(nb.Nifti1Image(image.get_fdata(), far), plain_mask, tmp_path / "k.svg")


def test_anatomical_figure_outlines_three_masks(tmp_path, plain_mask, brain_on):
    small = brain_on("RAS", radii_mm=(40, 50, 35))
    dseg = np.asarray(plain_mask.dataobj) + np.asarray(small.dataobj)
    image = nb.Nifti1Image(dseg, plain_mask.affine)
    np.testing.assert_array_equal(select_labels(image, 2).dataobj, small.dataobj)
    file = anatomical_figure(ramp(plain_mask, 0), plain_mask, image, tmp_path / "a.svg")
    content = file.read_text()
    well_formed(content)
    assert content.count('<path transform="scale(.1)"') == 3


@pytest.mark.slow
def test_full_size_is_modest(tmp_path, rng, brain_on):
    """Figures of a noisy 1 mm head stay below 1.5 MB each."""
    mask = brain_on((np.eye(3), (170, 256, 256)))
    noise = 0.05 * rng.standard_normal(mask.shape, dtype=np.float32)
    image = nb.Nifti1Image(1 + np.asarray(mask.dataobj) + noise, mask.affine)
    file = flicker(image, mask, {"m2m": image}, tmp_path)["m2m"]
    assert 1e5 < file.stat().st_size < 1.5e6


# --- still images ----------------------------------------------------------------------------


def test_native_image_shows_its_voxels(tmp_path, brain_on):
    """Along the long axis of voxels of 2 x 6 x 3 mm neighbours in a picture are alike."""
    like = brain_on("permuted")
    noise = np.random.default_rng(0).random(like.shape).astype(np.float32)
    file = native_figure(nb.Nifti1Image(noise, like.affine), tmp_path / "native.svg", label="<FA>")
    text = file.read_text()
    assert "80 x 30 x 64 voxels of 2 x 6 x 3 mm" in text
    assert "&lt;FA&gt;" in text
    (pixels,) = rasters(file)
    row = pixels[100, :240].sum(axis=-1)
    # 30 voxels across 240 pixels: steps at their edges only.
    assert np.mean(np.abs(np.diff(row)) > 60) < 0.2


@pytest.mark.parametrize("value", [0.0, np.nan, -1.0])
def test_native_image_without_signal_is_drawn(tmp_path, plain_mask, value):
    data = np.full(plain_mask.shape, value, np.float32)
    file = native_figure(nb.Nifti1Image(data, plain_mask.affine), tmp_path / "native.svg")
    well_formed(file.read_text())


def test_quantity_of_a_dynamic_scan_is_the_mean_of_its_frames(tmp_path, plain_mask):
    inside = np.asarray(plain_mask.dataobj)
    # A frame without values does not count.
    frames = np.stack([inside, np.full(inside.shape, np.nan), 3 * inside], -1).astype(np.float32)
    frames = nb.Nifti1Image(frames, plain_mask.affine)
    file = quantity_figure(
        frames, plain_mask, tmp_path / "suvr.svg", title="SUVR & <b>", note="To <c>."
    )
    text = file.read_text()
    well_formed(text)
    assert 'aria-label="SUVR &amp; &lt;b&gt;, mean of 2 frames. To &lt;c&gt;."' in text
    assert ">To &lt;c&gt;. Neurological display" in text
    assert ">2</text>" in text  # upper end of the colour bar


def test_figures_tell_what_they_show(tmp_path, plain_mask):
    files = flicker(plain_mask, plain_mask, {"rigid": plain_mask}, tmp_path, label="P<E>T")
    assert (
        'aria-label="After rigid alignment: the P&lt;E&gt;T and the T1w'
        in files["rigid"].read_text()
    )
