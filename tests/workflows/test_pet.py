"""The PET reference workflow on small phantoms, run by Nipype."""

import json
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from nipype.interfaces.base import isdefined
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing.pet_motion import PARAMETERS
from m2m_bids.spatial.itk import read_affine, write_affine
from m2m_bids.workflows.pet import init_pet_frames_wf, init_pet_reference_wf

SHAPE = (26, 30, 22)
AFFINE = from_matvec(
    Rotation.from_euler("xyz", [8, -6, 10], degrees=True).as_matrix() @ np.diag([-6.0, 6.5, 7.0])
)
AFFINE[:3, 3] = -AFFINE[:3, :3] @ (np.array(SHAPE) - 1) / 2
# Maps points of the head to points of the second frame.
MOVED = from_matvec(Rotation.from_euler("z", 6, degrees=True).as_matrix(), [4.0, -3.0, 2.0])
TIMING = {"FrameTimesStart": [0, 300], "FrameDuration": [300, 600]}


def activity(points, shape=SHAPE):
    """Blobs in an ellipsoid."""
    unit = points / (60.0, 75.0, 55.0)
    values = 1 / (1 + np.exp(12 * (np.linalg.norm(unit, axis=1) - 1)))
    places = np.random.default_rng(2).uniform(-0.6, 0.6, (25, 3))
    for place in places:
        values += np.exp(-((unit - place) ** 2).sum(axis=1) / 0.03)
    return values.reshape(shape).astype(np.float32)


@pytest.fixture(scope="module")
def frames():
    """A still frame, and one that has moved."""
    points = apply_affine(AFFINE, np.indices(SHAPE).reshape(3, -1).T)
    still, moved = activity(points), activity(apply_affine(np.linalg.inv(MOVED), points))
    return np.stack([still, moved], axis=-1) * 1000


@pytest.fixture
def run(tmp_path):
    """Run the workflow on voxels; return the outputs of its nodes."""

    def run(data, sidecar, **options):
        file = tmp_path / "sub-01_trc-FDG_pet.nii.gz"
        nb.Nifti1Image(data, AFFINE).to_filename(file)
        workflow = init_pet_reference_wf(sidecar=sidecar, **options)
        workflow.base_dir = tmp_path / "work"
        workflow.inputs.inputnode.in_file = str(file)
        nodes = {node.name: node for node in workflow.run().nodes}
        return {name: node.result.outputs for name, node in nodes.items() if node.result}

    return run


def test_dynamic_scan_is_aligned_and_averaged(run, frames):
    outputs = run(frames, {**TIMING, "FrameTimesStart": [0, "soon"]})
    motion, static = outputs["estimate_motion"], outputs["static_reference"]
    first, second = (read_affine(file) for file in motion.frame_xfms)
    np.testing.assert_array_equal(second, np.eye(4))  # the longer one is the reference
    points = np.random.default_rng(0).uniform(-40, 40, (50, 3))
    error = apply_affine(first, points) - apply_affine(np.linalg.inv(MOVED), points)
    assert np.linalg.norm(error, axis=1).mean() < 0.3
    assert static.method == "mean of 2 frames, weighted by duration, aligned"
    found = nb.load(static.out_file)
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)
    # Without alignment the mean differs by several times as much from the frame it stands for.
    inside = frames[..., 1] > 700
    aligned = np.abs(found.get_fdata() - frames[..., 1])[inside].mean()
    unaligned = np.abs(frames @ np.array([1 / 3, 2 / 3]) - frames[..., 1])[inside].mean()
    assert aligned < 0.25 * unaligned
    rows = [line.split("\t") for line in Path(motion.motion_file).read_text().splitlines()]
    assert rows[0] == list(PARAMETERS)
    assert np.rad2deg(float(rows[1][5])) == pytest.approx(-6, abs=0.3)
    assert [float(value) for value in rows[2]] == [0.0] * 6
    description = json.loads(json.dumps(motion.description))
    assert description["ReferenceFrame"] == 1
    assert description["TimingRemarks"] == ["FrameTimesStart has a value that is no finite number"]


@pytest.mark.parametrize("options", [{}, {"has_motion_correction": False}])
def test_volume_is_left_as_it_is(run, frames, options):
    outputs = run(frames[..., 0], {"FrameDuration": "n/a"}, kind="frame:5", **options)
    assert outputs["static_reference"].method == "3-D image"
    image = nb.load(outputs["static_reference"].out_file)
    np.testing.assert_array_equal(image.get_fdata(), frames[..., 0])
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    if not options:
        assert outputs["estimate_motion"].frame_xfms == []
        assert not isdefined(outputs["estimate_motion"].motion_file)


def test_without_motion_correction_frames_stay_where_they_are(run, frames):
    outputs = run(frames, TIMING, kind="sum", has_motion_correction=False)
    static = outputs["static_reference"]
    assert static.method == "mean of 2 frames, weighted by duration; registered by their sum"
    registered = nb.load(static.registered_file).get_fdata()
    np.testing.assert_allclose(registered, frames.sum(axis=-1), rtol=1e-5)
    mean = frames @ np.array([1 / 3, 2 / 3])
    np.testing.assert_allclose(nb.load(static.out_file).get_fdata(), mean, rtol=1e-5)


def test_negative_voxels_are_kept_but_not_registered(run, frames):
    noisy = frames[..., 0] - 300
    static = run(noisy, {})["static_reference"]
    np.testing.assert_array_equal(nb.load(static.out_file).get_fdata(), noisy)
    registered = nb.load(static.registered_file).get_fdata()
    np.testing.assert_array_equal(registered, np.maximum(noisy, 0))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("auto", "weighted by their duration where that"),
        ("twa", "weighted by their duration"),
        ("sum", "and, for registration, summed"),
        ("frame:3", "frame 3, counted from 0"),
    ],
)
def test_methods_tell_the_options(kind, text):
    assert text in " ".join(init_pet_reference_wf(sidecar={}, kind=kind).__desc__.split())


# The T1w's grid, and the map of its points to those of the static image.
T1W_SHAPE = (24, 25, 26)
T1W_AFFINE = from_matvec(np.diag([5.0, 5.5, 5.0]), [-58.0, -66.0, -60.0])
BEST = from_matvec(Rotation.from_euler("xyz", [20, -5, 10], degrees=True).as_matrix(), [3, -8, 5])


@pytest.fixture
def run_frames(tmp_path):
    """Run the workflow of the frames; return the outputs of its nodes."""

    def run(data, frame_xfms, **inputs):
        files = {
            name: tmp_path / f"{name}.nii.gz" for name in ("frames_file", "preproc", "t1w_file")
        }
        nb.Nifti1Image(data, AFFINE).to_filename(files["frames_file"])
        grid = nb.Nifti1Image(np.ones(T1W_SHAPE, np.float32), T1W_AFFINE)
        for name in ("preproc", "t1w_file"):
            grid.to_filename(files[name])
        (tmp_path / "rigid.svg").write_text("<svg/>")
        workflow = init_pet_frames_wf()
        workflow.base_dir = tmp_path / "work"
        workflow.inputs.inputnode.trait_set(
            **{name: str(file) for name, file in files.items()},
            best_xfm=str(write_affine(BEST, tmp_path / "best.txt")),
            frame_xfms=[
                str(write_affine(xfm, tmp_path / f"{index}.txt"))
                for index, xfm in enumerate(frame_xfms)
            ],
            figures=[str(tmp_path / "rigid.svg")],
            **inputs,
        )
        nodes = {node.name: node for node in workflow.run().nodes}
        return {name: node.result.outputs for name, node in nodes.items() if node.result}

    return run


def test_frames_go_through_motion_and_registration_at_once(run_frames, frames, tmp_path):
    # Far enough that both orders differ by centimetres.
    moved = from_matvec(Rotation.from_euler("z", 35, degrees=True).as_matrix(), [9.0, -12.0, 6.0])
    points = apply_affine(AFFINE, np.indices(SHAPE).reshape(3, -1).T)
    frames = frames.copy()
    frames[..., 1] = activity(apply_affine(np.linalg.inv(moved), points)) * 1000
    (tmp_path / "motion.tsv").write_text("\t".join(PARAMETERS) + "\n" + 2 * "1\t2\t3\t0\t0\t0.1\n")
    outputs = run_frames(frames, [np.eye(4), moved], motion_file=str(tmp_path / "motion.tsv"))
    image = nb.load(outputs["resample_frames"].out_file)
    assert image.shape == (*T1W_SHAPE, 2)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, T1W_AFFINE, atol=1e-5)
    # The registration turns points before the motion does; both frames then show the same head.
    points = apply_affine(BEST @ T1W_AFFINE, np.indices(T1W_SHAPE).reshape(3, -1).T)
    expected = activity(points, T1W_SHAPE) * 1000
    seen = apply_affine(np.linalg.inv(AFFINE) @ moved, points).reshape(*T1W_SHAPE, 3)
    inside = ((seen > 2) & (seen < np.array(SHAPE) - 3)).all(axis=-1)
    for index in range(2):
        error = np.abs(image.get_fdata()[..., index] - expected)[inside]
        # The error of splines at the edge of the head, 5 mm wide, on voxels of 6 to 7 mm.
        assert error.mean() < 0.002 * expected.max()
    assert outputs["resample_frames"].static_file.endswith("preproc.nii.gz")
    figures = outputs["list_figures"].out
    assert [Path(file).name for file in figures] == ["rigid.svg", "motion.svg"]
    text = Path(figures[1]).read_text()
    assert "<svg" in text
    assert "rotation (degrees)" in text
    assert "5.7 degrees" in text


@pytest.mark.parametrize("shape", [(*SHAPE,), (*SHAPE, 1)])
def test_volume_stays_a_volume(run_frames, frames, shape):
    outputs = run_frames(frames[..., 0].reshape(shape), [])
    assert outputs["resample_frames"].out_file.endswith("preproc.nii.gz")
    assert not isdefined(outputs["resample_frames"].static_file)
    assert [Path(file).name for file in outputs["list_figures"].out] == ["rigid.svg"]


def test_frames_without_motion_correction_are_registered_too(run_frames, frames):
    still = np.stack([frames[..., 0]] * 2, axis=-1)
    image = nb.load(run_frames(still, [])["resample_frames"].out_file).get_fdata()
    np.testing.assert_array_equal(image[..., 0], image[..., 1])
    assert image.max() > 900
