"""Wrappers of the figures: which are drawn, and under which names."""

import re
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.interfaces.reports import (
    AnatomicalFigure,
    MotionFigure,
    RegistrationFigures,
    SUVRFigure,
)
from m2m_bids.reports import mosaic, viewer
from m2m_bids.workflows.outputs import REGISTRATION_FIGURES

AFFINE = np.diag([8.0, 8, 8, 1])
AFFINE[:3, 3] = (-80, -100, -70)
MAP = ("grid", "jacobian", "cycle")


@pytest.fixture
def files(tmp_path, monkeypatch, rng):
    """A ball of brain, its tissues and images of it; what is drawn of them is small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mosaic, "TILE_WIDTH_PX", 40)
    monkeypatch.setattr(viewer, "SPACING_MM", 8.0)
    ijk = np.indices((20, 24, 18)).T - (10, 12, 9)
    radius = np.linalg.norm(ijk, axis=-1).T
    arrays = {
        "t1w_file": (100 * rng.random(radius.shape)).astype(np.float32),
        "mask_file": (radius < 7).astype(np.uint8),
        "dseg_file": np.select([radius < 4, radius < 7], [2, 1]).astype(np.uint8),
        "native_file": rng.random(radius.shape).astype(np.float32),
        "rigid_file": rng.random(radius.shape).astype(np.float32),
        "final_file": rng.random(radius.shape).astype(np.float32),
        "displacement_file": rng.uniform(-2, 2, (*radius.shape, 3)).astype(np.float32),
        "jacobian_file": rng.uniform(0.8, 1.2, radius.shape).astype(np.float32),
        "cycle_error_file": rng.uniform(0, 2, radius.shape).astype(np.float32),
    }
    for name, data in arrays.items():
        nb.Nifti1Image(data, AFFINE).to_filename(tmp_path / f"{name}.nii")
    return {name: str(tmp_path / f"{name}.nii") for name in arrays}


def stems(outputs):
    assert all(Path(file).is_file() for file in outputs.out_files)
    return [Path(file).stem for file in outputs.out_files]


def test_anatomical_figure(files):
    names = ("t1w_file", "mask_file", "dseg_file")
    outputs = AnatomicalFigure(**{name: files[name] for name in names}).run().outputs
    assert stems(outputs) == ["anatomical"]


@pytest.mark.parametrize(
    ("objections", "expected"),
    [
        ([], ["native", "initial", "rigid", "m2m", "viewer", *MAP]),
        (["it folds"], ["native", "initial", "rigid", "viewer", *MAP]),
    ],
)
def test_rejected_step_has_its_map_but_no_image(files, objections, expected):
    """The map that was rejected is shown, so that its folds can be seen."""
    outputs = RegistrationFigures(**files, objections=objections, modality="pet").run().outputs
    assert stems(outputs) == expected
    assert set(expected) <= set(REGISTRATION_FIGURES)
    page = Path(outputs.out_files[expected.index("viewer")]).read_text()
    assert ("After M2M-Reg" in page) is (not objections)


def test_rigid_run_draws_two_states(files):
    for name in ("final_file", "displacement_file", "jacobian_file", "cycle_error_file"):
        del files[name]
    outputs = RegistrationFigures(**files, modality="fa").run().outputs
    assert stems(outputs) == ["native", "initial", "rigid", "viewer"]
    assert "FA" in Path(outputs.out_files[0]).read_text()


def test_template_is_not_called_a_t1w_nor_an_affine_transform_rigid(files):
    outputs = RegistrationFigures(**files, template="MNI", modality="pet").run().outputs
    assert stems(outputs) == ["native", "initial", "affine", "m2m", "viewer", *MAP]
    assert {file.stem for file in map(Path, outputs.out_files)} <= set(REGISTRATION_FIGURES)
    for file in outputs.out_files:
        shown = re.sub(r"<script>.*?</script>|data:[^\"]*", "", Path(file).read_text(), flags=re.S)
        assert not re.search(r"T1w|rigid", shown), file
    assert "the PET and the template by turns" in Path(outputs.out_files[2]).read_text()


def test_suvr_is_drawn_where_there_is_one(files):
    masks = {name: files[name] for name in ("mask_file", "dseg_file")}
    facts = {"preprocSUVR": {"ReferenceRegion": "pons & <more>"}}
    outputs = SUVRFigure(files={"stat": "a.tsv"}, facts={"stat": {}}, **masks).run().outputs
    assert outputs.out_files == []
    measured = {"preprocSUVR": files["final_file"]}
    outputs = SUVRFigure(files=measured, facts=facts, **masks).run().outputs
    assert stems(outputs) == ["suvr"]
    assert "Reference region: pons &amp; &lt;more&gt;" in Path(outputs.out_files[0]).read_text()


def test_motion_is_plotted_where_there_are_frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MotionFigure().run().outputs.out_files == []
    table = tmp_path / "motion.tsv"
    table.write_text("trans_x\ttrans_y\ttrans_z\trot_x\trot_y\trot_z\n0\t3\t-4\t0\t0.1\t0\n")
    outputs = MotionFigure(motion_file=str(table)).run().outputs
    assert stems(outputs) == ["motion"]
    text = Path(outputs.out_files[0]).read_text()
    assert "the largest shift is 5.0 mm, the largest rotation about an axis 5.7 degrees" in text
    assert all(label in text for label in ("shift (mm)", "rotation (degrees)"))
    assert all(f">{line}<" in text for line in ("z, upwards", "about z"))
