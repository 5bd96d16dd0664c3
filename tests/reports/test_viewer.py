"""The viewer's page: what it holds, without a browser."""

import base64
import io
import json
import re

import nibabel as nb
import numpy as np
import pytest
from PIL import Image

from m2m_bids.reports import viewer
from m2m_bids.reports.viewer import viewer_grid, write_viewer


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def volume(data, uri):
    """Take an atlas apart as the page does."""
    atlas = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    n_i, n_j, n_k = data["shape"]
    columns = data["columns"]
    tiles = [atlas[k // columns * n_j :][:n_j, k % columns * n_i :][:, :n_i].T for k in range(n_k)]
    return np.stack(tiles, axis=-1)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(viewer, "SPACING_MM", 4.0)


@pytest.fixture
def page(brain, image_of, tmp_path):
    """A T1w that is brighter to the right, and scans that are so upwards and to the front."""
    t1w = image_of(lambda points: points[..., 0] + 100, brain)
    inside = np.asarray(brain.dataobj)
    tissues = image_of(lambda points: np.where(points[..., 2] > 5, 2, 1), brain)
    dseg = nb.Nifti1Image((tissues.get_fdata() * inside).astype(np.uint8), brain.affine)
    states = {
        "rigid": image_of(lambda points: np.maximum(points[..., 2] + 60, 0), brain),
        "a < b": image_of(lambda points: np.maximum(points[..., 1] + 100, 0), brain),
    }
    file = write_viewer(t1w, brain, dseg, states, tmp_path / "v.html", label="</script><b>")
    return file.read_text()


def test_images_lie_where_the_affine_says(page, brain):
    data = data_of(page)
    affine = np.array(data["affine"])
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(zooms, zooms[0])
    assert np.array_equal(nb.aff2axcodes(affine), ("R", "A", "S"))
    labels = volume(data, data["labels"])
    ijk = np.argwhere(labels > 0)
    points = ijk @ affine[:3, :3].T + affine[:3, 3]
    # The ellipsoid's centre, to the half of a voxel of the coarsest axis.
    np.testing.assert_allclose(points.mean(axis=0), (0, -10, 5), atol=3)
    upper = points[labels[labels > 0] == 2]
    lower = points[labels[labels > 0] == 1]
    assert upper[:, 2].min() > -2
    assert lower[:, 2].max() < 12
    for uri, axis in (
        (data["t1w"], 0),
        (data["states"][0]["image"], 2),
        (data["states"][1]["image"], 1),
    ):
        values = volume(data, uri)[labels > 0].astype(float)
        slopes = np.linalg.lstsq(
            np.column_stack([points, np.ones(len(points))]), values, rcond=None
        )
        assert np.argmax(slopes[0][:3]) == axis
        # JPEG changes grey levels a little, and the window cuts what is brightest.
        assert np.corrcoef(values, points[:, axis])[0, 1] > 0.98


def test_nothing_in_it_is_code(page):
    assert page.count("<script") == page.count("</script>") == 2
    assert "&lt;/script&gt;&lt;b&gt; over the T1w" in page
    assert data_of(page)["label"] == "</script><b>"
    assert data_of(page)["states"][1]["title"] == "a < b"
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def test_tilt_is_told(page, brain):
    is_tilted = bool(abs(nb.as_closest_canonical(brain).affine[0, 1]) > 0.1)
    assert ("tilted by 17°" in page) is is_tilted


def test_grid_covers_the_brain_and_is_limited(brain, monkeypatch):
    monkeypatch.setattr(viewer, "SPACING_MM", 0.1)
    shape, affine = viewer_grid(brain)
    assert np.prod(shape) == pytest.approx(viewer.MAX_VOXELS, rel=0.05)
    inside = np.argwhere(np.asarray(brain.dataobj) > 0)
    points = inside @ brain.affine[:3, :3].T + brain.affine[:3, 3]
    ijk = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert (ijk > 0).all()
    assert (ijk < np.array(shape) - 1).all()


def test_a_large_noisy_head_stays_below_the_limit(tmp_path, rng, monkeypatch):
    """Noise is what compresses worst: a page of four images of the most voxels is below 5 MB."""
    monkeypatch.setattr(viewer, "SPACING_MM", 1.5)
    monkeypatch.setattr(viewer, "MARGIN_MM", 0.0)
    shape = (65, 80, 65)
    affine = np.diag([3.0, 3, 3, 1])
    mask = nb.Nifti1Image(np.ones(shape, np.uint8), affine)
    noise = nb.Nifti1Image(rng.random(shape).astype(np.float32), affine)
    states = dict.fromkeys(("initial", "rigid", "m2m"), noise)
    assert np.prod(viewer_grid(mask)[0]) == pytest.approx(viewer.MAX_VOXELS, rel=0.1)
    file = write_viewer(noise, mask, mask, states, tmp_path / "v.html")
    assert file.stat().st_size < 5e6


def test_without_images_there_is_no_page(brain, tmp_path):
    with pytest.raises(ValueError, match="states is empty"):
        write_viewer(brain, brain, brain, {}, tmp_path / "v.html")
    nothing = nb.Nifti1Image(np.zeros(brain.shape, np.uint8), brain.affine)
    with pytest.raises(ValueError, match="mask is empty"):
        write_viewer(brain, nothing, nothing, {"rigid": brain}, tmp_path / "v.html")
