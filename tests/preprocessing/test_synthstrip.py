"""
SynthStrip with weights made here, in the form of FreeSurfer's checkpoint.

The real weights are not shipped. Weights are chosen so that the network's answer is known: it
passes the image on along its first skip connection, and calls bright voxels brain.
"""

import os
import sys

import nibabel as nb
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing import anatomical, synthstrip
from m2m_bids.preprocessing.synthstrip import (
    SynthStripError,
    load_synthstrip,
    sha256_of,
    synthstrip_mask,
)
from m2m_bids.spatial.images import ImageError

model = pytest.importorskip(
    "nipreps.synthstrip.model", reason="pip install nipreps-synthstrip, of the extra synthstrip"
)

AXES = Rotation.from_euler("xyz", [15, -10, 20], degrees=True).as_matrix()
AXES = AXES[:, [2, 0, 1]] * (-1.6, 1.2, 2.0)  # another order, one axis backwards
SHAPE = (22, 28, 18)
CENTRE_MM = np.array([12.0, -30.0, 8.0])
AFFINE = from_matvec(AXES, CENTRE_MM - AXES @ ((np.array(SHAPE) - 1) / 2))
BALL_MM = CENTRE_MM + np.array([3.0, 2.0, -2.0])


@pytest.fixture
def small_grid(monkeypatch):
    """A grid of 64 mm, which takes a second; the network takes any multiple of 64."""
    monkeypatch.setattr(synthstrip, "MIN_SIZE", 64)


def checkpoint(file, state):
    """Write weights as FreeSurfer does: beside them is the state of the optimizer, and numbers."""
    optimizer = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": []}
    content = {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": optimizer}
    torch.save(content, file)
    return file


def threshold_state(offset=(0, 0, 0)):
    """Weights with which the distance is 11 - 20 times the image, at an offset of one voxel."""
    state = {
        name: torch.zeros_like(value) for name, value in model.StripModel().state_dict().items()
    }
    at = tuple(1 + o for o in offset)
    state["encoder.0.0.conv.weight"][(0, 0, *at)] = 1
    state["encoder.0.1.conv.weight"][0, 0, 1, 1, 1] = 1
    # The last level doubles 32 channels; the first encoder's 16 follow.
    state["remaining.0.conv.weight"][0, 32, 1, 1, 1] = 1
    state["remaining.1.conv.weight"][0, 0, 1, 1, 1] = 1
    state["remaining.2.conv.weight"][0, 0, 1, 1, 1] = -20
    state["remaining.2.conv.bias"][0] = 11
    return state


def points():
    return apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE, dtype=float), 0, -1))


def ball(centre, radius):
    return np.linalg.norm(points() - centre, axis=-1) < radius


@pytest.fixture
def head():
    """A bright ball with a dark hole, a smaller ball beside it, in an oblique image."""
    # More than a hundredth of the conformed grid, of which the network's scale is a percentile.
    data = np.where(ball(BALL_MM, 11), 100.0, 20.0)
    data[ball(BALL_MM, 4)] = 20
    data[ball(BALL_MM - np.array([16.0, 9.0, 0.0]), 4)] = 100
    return nb.Nifti1Image(data.astype(np.float32), AFFINE)


def test_mask_is_the_largest_part_near_the_brain(tmp_path, head, small_grid):
    file = checkpoint(tmp_path / "synthstrip.1.pt", threshold_state())
    mask = synthstrip_mask(head, file, n_threads=1)
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, AFFINE)
    found = np.asarray(mask.dataobj) > 0
    # To a voxel, of up to 2 mm, that 1 mm of the conformed grid blurs.
    assert found[ball(BALL_MM, 9)].all()
    assert not found[~ball(BALL_MM, 13)].any()


def test_network_sees_left_inferior_anterior(tmp_path, head, small_grid):
    """It takes what is one voxel to the left, below or in front: the mask goes the other way."""

    def centre(offset):
        file = checkpoint(tmp_path / "synthstrip.1.pt", threshold_state(offset))
        mask = np.asarray(synthstrip_mask(head, file).dataobj)
        return apply_affine(AFFINE, ndimage.center_of_mass(mask))

    start = centre((0, 0, 0))
    for offset, towards in (
        ((1, 0, 0), (1, 0, 0)),
        ((0, 1, 0), (0, 0, 1)),
        ((0, 0, 1), (0, -1, 0)),
    ):
        # Whole voxels of up to 2 mm are in the mask or not; another direction is off by 1.4 mm.
        assert np.linalg.norm(centre(offset) - start - towards) < 0.4


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((180, 256, 200), (192, 256, 256)),
        ((60, 60, 60), (192,) * 3),
        ((400, 200, 190), (320, 192, 256)),
    ],
)
def test_grid_is_of_the_sizes_that_the_network_knows(shape, expected):
    affine = from_matvec(np.eye(3), (-90, -126, -72))
    grid = synthstrip._conformed_grid(nb.Nifti1Image(np.zeros(shape, np.uint8), affine))
    assert grid.shape == expected
    assert nb.aff2axcodes(grid.affine) == ("L", "I", "A")
    middles = [
        apply_affine(a, (np.array(s) - 1) / 2)
        for a, s in ((affine, shape), (grid.affine, grid.shape))
    ]
    np.testing.assert_allclose(*middles)


def test_image_without_brain(tmp_path, small_grid):
    state = threshold_state()
    state["remaining.2.conv.bias"][0] = 50
    file = checkpoint(tmp_path / "synthstrip.1.pt", state)
    flat = nb.Nifti1Image(np.random.default_rng(0).random(SHAPE).astype(np.float32), AFFINE)
    flat.set_filename("sub-1_T1w.nii")
    with pytest.raises(ImageError, match=r"sub-1_T1w\.nii: SynthStrip finds no brain"):
        synthstrip_mask(flat, file)


def test_hash(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file").startswith("ba7816bf8f01cfea")


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("kind", ["missing", "text", "code", "other keys", "other network"])
def test_other_files_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pt"
    if kind == "text":
        file.write_text("no weights")
    elif kind == "code":
        torch.save({"model_state_dict": _Evil()}, file)
    elif kind == "other keys":
        torch.save({"state_dict": {}}, file)
    elif kind == "other network":
        checkpoint(file, {"encoder.0.0.conv.weight": torch.zeros(3)})
    with pytest.raises(
        SynthStripError, match=r"weights\.pt: .*expected SynthStrip's weights"
    ) as e:
        load_synthstrip(file)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "evil").exists()


def test_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nipreps.synthstrip.model", None)
    with pytest.raises(SynthStripError, match="pip install nipreps-synthstrip"):
        load_synthstrip(tmp_path / "synthstrip.1.pt")


@pytest.mark.parametrize(
    ("source", "is_stripped", "method"),
    [
        ("auto", False, "SynthStrip, weights"),
        ("auto", True, "has signal"),
        ("synthstrip", True, "SynthStrip, weights"),
    ],
)
def test_brain_extraction(monkeypatch, tmp_path, head, source, is_stripped, method):
    """The template is aligned inside of SynthStrip's mask; a stripped image keeps its outline."""
    file = tmp_path / "synthstrip.1.pt"
    file.write_bytes(b"abc")
    expected = nb.Nifti1Image(ball(BALL_MM, 11).astype(np.uint8), AFFINE)
    given = []

    def align(image, mask, *, random_seed):
        given.append(mask)
        return anatomical.BrainExtraction(mask, np.eye(4), is_stripped)

    def strip(image, model_file, *, n_threads):
        assert (model_file, n_threads) == (file, 3)
        return expected

    monkeypatch.setattr(anatomical, "align_template", align)
    monkeypatch.setattr(anatomical, "synthstrip_mask", strip)
    brain = anatomical.extract_brain(head, source=source, synthstrip_model=file, n_threads=3)
    assert np.array_equal(given[0].dataobj, expected.dataobj)
    assert method in brain.method
    is_network = "SynthStrip" in brain.method
    assert is_network == np.array_equal(brain.mask.dataobj, expected.dataobj)
    assert not is_network or sha256_of(file) in brain.method
    assert brain.is_skull_stripped is is_stripped


def test_synthstrip_needs_its_model(head):
    with pytest.raises(ValueError, match="synthstrip_model"):
        anatomical.extract_brain(head, source="synthstrip")


def test_random_weights(tmp_path, head, small_grid):
    torch.manual_seed(0)
    network = model.StripModel()
    with torch.inference_mode():
        middle = network(torch.rand(1, 1, 64, 64, 64)).median()
        network.remaining[2].conv.bias += 1 - middle  # half of it is brain
    state = network.state_dict()
    file = checkpoint(tmp_path / "synthstrip.1.pt", state)
    loaded = load_synthstrip(file).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    mask = np.asarray(synthstrip_mask(head, file).dataobj)
    assert set(np.unique(mask)) == {0, 1}
    assert ndimage.label(mask)[1] == 1
    assert np.array_equal(ndimage.binary_fill_holes(mask), mask > 0)


def test_dim_image_in_a_large_field_of_view(tmp_path, small_grid):
    """Where the 99th percentile is zero, the brightest voxel is 1."""
    data = np.zeros(SHAPE, np.float32)
    data[8:14, 10:18, 6:11] = 50
    image = nb.Nifti1Image(data, AFFINE)
    mask = synthstrip_mask(image, checkpoint(tmp_path / "w.pt", threshold_state()))
    assert np.array_equal(mask.dataobj, data > 0)


@pytest.mark.slow
def test_network_of_full_size(tmp_path, head):
    """On the grid that is used, of 192 voxels along each axis; 3.6 GB."""
    affine = from_matvec(3 * AXES, (0, 0, 0))
    large = nb.Nifti1Image(np.asarray(head.dataobj), affine)
    mask = synthstrip_mask(large, checkpoint(tmp_path / "w.pt", threshold_state()))
    found = np.asarray(mask.dataobj) > 0
    assert found[ball(BALL_MM, 10)].all()
    assert not found[~ball(BALL_MM, 12)].any()
