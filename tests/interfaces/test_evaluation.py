"""Wrappers of registration by a method, and of its measurement."""

import json

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nipype.interfaces.base import isdefined
from nipype.pipeline import engine as pe
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from m2m_bids.evaluation.measures import measure_registration
from m2m_bids.interfaces.evaluation import MeasureRegistration, RegisterByMethod
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.itk import read_affine, read_composite, write_affine, write_composite
from m2m_bids.spatial.landmarks import Landmarks
from m2m_bids.spatial.transforms import map_points

RIGID = from_matvec(Rotation.from_euler("xz", [25, -60], degrees=True).as_matrix(), [12, -45, 8])
GRID = from_matvec(np.eye(3) * 6.0, [-80, -90, -70])
SHAPE = (28, 30, 26)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Interfaces write where they run."""
    monkeypatch.chdir(tmp_path)


def brain_like(rng, n_labels):
    """Smooth labels from 21 on in a ball, 0 outside."""
    noise = gaussian_filter(rng.normal(size=(n_labels, *SHAPE)), (0, 2, 2, 2))
    ijk = np.indices(SHAPE) - np.array([13.5, 14.5, 12.5])[:, None, None, None]
    return np.where((ijk**2).sum(0) < 100, 21 + noise.argmax(0), 0).astype(np.uint8)


@pytest.fixture
def labels(rng):
    return brain_like(rng, 3)


@pytest.fixture
def pair(labels, tmp_path):
    """Inputs of `RegisterByMethod`: a phantom, moved away by the rigid map."""
    intensity = gaussian_filter(np.array([0, 3, 2, 1])[np.maximum(labels, 20) - 20] * 100.0, 0.5)
    images = {
        "moving_file": (intensity, RIGID @ GRID),
        "fixed_file": (intensity, GRID),
        "mask_file": (labels > 0, GRID),
    }
    inputs = {"modality": "fa", "device": "cpu", "n_threads": 1, "spacing_mm": 12.0}
    for name, (data, affine) in images.items():
        inputs[name] = str(tmp_path / f"{name}.nii")
        nb.Nifti1Image(data.astype(np.float32), affine).to_filename(inputs[name])
    inputs["rigid_xfm"] = str(write_affine(RIGID, tmp_path / "rigid.txt"))
    inputs["template2anat"] = str(write_affine(np.eye(4), tmp_path / "template2anat.txt"))
    return inputs


@pytest.fixture
def label_files(labels, tmp_path):
    """Inputs of `MeasureRegistration` that are always there, and the moving labels."""
    files = {}
    for name, data, affine in (
        ("mask_file", labels > 0, GRID),
        ("fixed_labels", labels, GRID),
        ("moving_labels", labels, RIGID @ GRID),
    ):
        files[name] = str(tmp_path / f"{name}.nii.gz")
        nb.Nifti1Image(data.astype(np.uint8), affine).to_filename(files[name])
    return files


def test_registration_is_written_and_reported(pair, tmp_path):
    outputs = RegisterByMethod(method="syn-mi", **pair).run().outputs
    assert outputs.xfm == str(tmp_path / "xfm.h5")
    assert json.loads((tmp_path / "report.json").read_text()) == outputs.fields
    assert set(outputs.fields) == {"status", "reason", "seconds", "peak_memory_gb"}
    assert (outputs.fields["status"], outputs.fields["reason"]) == ("done", None)
    assert outputs.fields["seconds"] > 0
    # The images are equal: nothing is to be done but the rigid map.
    points = np.random.default_rng(1).uniform(-30, 30, (50, 3))
    found = map_points(read_composite(outputs.xfm), points)
    assert np.linalg.norm(found - map_points(RIGID, points), axis=1).mean() < 2


def test_given_transforms(pair):
    for method, expected in (("initial", np.eye(4)), ("rigid", RIGID)):
        outputs = RegisterByMethod(method=method, **pair).run().outputs
        np.testing.assert_allclose(read_affine(outputs.xfm), expected, atol=1e-6)
        assert outputs.fields["seconds"] is None


def test_missing_program_is_reported(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    outputs = RegisterByMethod(method="niftyreg-lncc", **pair).run().outputs
    assert outputs.fields["status"] == "missing"
    assert "conda install" in outputs.fields["reason"]
    assert not isdefined(outputs.xfm)


def test_missing_weights_are_reported(pair, tmp_path):
    (tmp_path / "weights").mkdir()
    outputs = (
        RegisterByMethod(method="m2m:mine", weights=str(tmp_path / "weights"), **pair)
        .run()
        .outputs
    )
    assert outputs.fields["status"] == "missing"
    assert str(tmp_path / "weights") in outputs.fields["reason"]


def test_failure_is_reported_and_others_go_on(pair, label_files, tmp_path):
    """Registration and measurement as nodes: what failed is measured as nothing."""
    away = write_affine(from_matvec(np.eye(3), [1000, 0, 0]), tmp_path / "away.txt")
    workflow = pe.Workflow(name="wf", base_dir=str(tmp_path / "work"))
    workflow.config["execution"] = {"remove_unnecessary_outputs": "false"}
    for method, rigid in (("syn-mi", str(away)), ("rigid", pair["rigid_xfm"])):
        inputs = {**pair, "rigid_xfm": rigid}
        name = method.partition("-")[0]
        register = pe.Node(RegisterByMethod(method=method, **inputs), name=f"register_{name}")
        measure = pe.Node(MeasureRegistration(**label_files), name=f"measure_{name}")
        workflow.connect(register, "xfm", measure, "xfm")
    nodes = {node.name: node.result.outputs for node in workflow.run().nodes()}
    failed = nodes["register_syn"]
    assert failed.fields["status"] == "failed"
    assert "do not overlap" in failed.fields["reason"]
    assert not isdefined(failed.xfm)
    assert nodes["measure_syn"].fields == {}
    assert nodes["register_rigid"].fields["status"] == "done"
    assert nodes["measure_rigid"].fields["dsc"] == 1


def test_only_what_changes_results_changes_the_hash():
    def hash_of(**inputs):
        return RegisterByMethod(**inputs).inputs.get_hashval()[1]

    plain = hash_of(method="rigid")
    assert hash_of(method="rigid", device="cpu", use_gpu=True, n_threads=4) == plain
    others = {"n_refine": 5}, {"weights_sha256": "a"}, {"spacing_mm": 3.0}, {"random_seed": 1}
    assert len({plain, *(hash_of(method="rigid", **inputs) for inputs in others)}) == 5


def test_registration_is_measured(label_files, labels, tmp_path, rng):
    noise = gaussian_filter(rng.normal(size=(*SHAPE, 3)), (2, 2, 2, 0))
    chain = (RIGID, DisplacementField(15 * noise / np.abs(noise).max(), GRID))
    xfm = write_composite(chain, tmp_path / "xfm.h5")
    outputs = MeasureRegistration(xfm=str(xfm), **label_files).run().outputs
    images = {name: nb.load(file) for name, file in label_files.items()}
    mask = images.pop("mask_file")
    assert outputs.fields == measure_registration(read_composite(xfm), mask, **images)
    assert 0.3 < outputs.fields["dsc"] < 0.99
    assert "landmark_error_mm" not in outputs.fields
    del label_files["moving_labels"]
    outputs = MeasureRegistration(xfm=str(xfm), **label_files).run().outputs
    assert set(outputs.fields) == {"folding_percent", "folding_percent_paper"}


def test_truth_is_that_of_the_landmarks_or_else_of_the_reference(label_files, tmp_path):
    shifts = {"xfm": 0, "reference_xfm": 3, "landmarks": 5}
    affines = {name: from_matvec(np.eye(3), [0, 0, shift]) for name, shift in shifts.items()}
    files = {
        name: str(write_affine(affines[name], tmp_path / f"{name}.txt"))
        for name in ("xfm", "reference_xfm")
    }
    points = np.array([[1.0, 2, 3], [4, 5, 6]])
    landmarks = Landmarks(points, map_points(affines["landmarks"], points))
    table = tmp_path / "landmarks.tsv"
    header = "t1w_x\tt1w_y\tt1w_z\tscan_x\tscan_y\tscan_z"
    np.savetxt(table, np.hstack(landmarks), delimiter="\t", header=header, comments="")
    outputs = MeasureRegistration(**files, **label_files).run().outputs
    assert outputs.fields["landmark_error_mm"] == pytest.approx(3)
    composite = write_composite(affines["reference_xfm"], tmp_path / "reference.h5")
    files["reference_xfm"] = str(composite)
    outputs = MeasureRegistration(**files, **label_files).run().outputs
    assert outputs.fields["landmark_error_mm"] == pytest.approx(3)
    outputs = MeasureRegistration(**files, landmarks=str(table), **label_files).run().outputs
    assert outputs.fields["landmark_error_mm"] == pytest.approx(5)
