"""Files of a finished scan: all there or not marked as there, and none left from before."""

import json
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from nitransforms.io.itk import ITKLinearTransformArray

from m2m_bids.bids.derivatives import missing_outputs
from m2m_bids.bids.naming import expected_anat_outputs, expected_outputs, frame_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.interfaces import outputs as module
from m2m_bids.interfaces.outputs import DescribeMask, DescribeT1w, SaveFigures, SaveScan
from m2m_bids.spatial.itk import write_affine

SCAN = Scan(
    "pet",
    Path("/data/sub-01/ses-1/pet/sub-01_ses-1_trc-FDG_run-02_pet.nii.gz"),
    {"sub": "01", "ses": "1", "trc": "FDG", "run": "02"},
    Path("/data/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"),
    {"sub": "01", "ses": "1"},
)
ASKED = Request("m2m", {}, {}, {})
SIDECAR = {
    "sources": ["bids:raw:a"],
    "spatial_reference": "bids::b",
    "is_skull_stripped": False,
    "source_metadata": {"TracerName": "FDG", "FrameDuration": [60]},
}
QUALITY = {"folding_percent": 0.0, "similarity_gain": 0.3}


@pytest.fixture
def expected(tmp_path):
    """Paths of the outputs, by what they are."""
    return expected_outputs(SCAN, tmp_path / "out", "m2m")


@pytest.fixture
def save(tmp_path, expected, monkeypatch, fill):
    """Run `SaveScan` on files that hold their own names."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def file(name):
        fill(work / name)
        return str(work / name)

    def run(m2m_xfms=(), **inputs):
        interface = SaveScan(
            preproc=file("preproc.nii.gz"),
            rigid=file("rigid.nii.gz"),
            rigid_xfm=file("rigid.txt"),
            rigid_inverse_xfm=file("rigid_inverse.txt"),
            rigid_score=0.6,
            rigid_start="header",
            measures={"decision": "m2m", "nmi": 1.1, "side_gap": None, "warnings": []},
            reference_method="3-D image",
            m2m_xfms=[file(name) for name in m2m_xfms],
            outputs={key: str(path) for key, path in expected.items()},
            sidecar=inputs.pop("sidecar", SIDECAR),
            provenance={"transform_requested": "m2m", "refine_steps": 10, "random_seed": 1},
            **inputs,
        )
        return interface.run().outputs

    return run


def accepted(save):
    return save(
        ["m2m.h5", "m2m_inverse.h5"],
        quality=QUALITY,
        objections=[],
        device_used="cpu",
        sha256="abc",
    )


def files_of(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_accepted_scan_is_complete(save, expected, tmp_path):
    outputs = accepted(save)
    assert files_of(tmp_path / "out") == set(expected.values())
    assert set(outputs.out_files) == {str(path) for path in expected.values()}
    contents = {key: path.read_bytes() for key, path in expected.items() if "json" not in key}
    made = {
        "preproc": "preproc.nii.gz",
        "rigid": "rigid.nii.gz",
        "rigid_xfm": "rigid.txt",
        "rigid_inverse_xfm": "rigid_inverse.txt",
        "m2m_xfm": "m2m.h5",
        "m2m_inverse_xfm": "m2m_inverse.h5",
    }
    assert contents == {key: (tmp_path / "work" / name).read_bytes() for key, name in made.items()}


def test_numbers_for_quality_control(save, expected):
    accepted(save)
    numbers = json.loads(expected["qc_json"].read_text())
    assert numbers == {"decision": "m2m", "nmi": 1.1, "side_gap": None, "warnings": []}


def test_sidecars(save, expected):
    accepted(save)
    final = json.loads(expected["preproc_json"].read_text())
    assert (
        final.items()
        >= {
            "Sources": ["bids:raw:a"],
            "SpatialReference": "bids::b",
            "SkullStripped": False,
            "TracerName": "FDG",
            "Transform": "m2m",
            "TransformRequested": "m2m",
            "WeightsSHA256": "abc",
            "RefinementSteps": 10,
            "Device": "cpu",
            "RandomSeed": 1,
            "StaticReference": "3-D image",
            "LinearScore": 0.6,
            "LinearStart": "header",
            "DeformableQuality": QUALITY,
        }.items()
    )
    assert "TransformFallbackReason" not in final
    rigid = json.loads(expected["rigid_json"].read_text())
    assert rigid["Transform"] == "rigid"
    assert not {"WeightsSHA256", "DeformableQuality"} & rigid.keys()


@pytest.mark.parametrize(("times", "is_kept"), [([0], True), ([0, 300], False)])
def test_a_volume_has_no_times_of_several_frames(save, expected, times, is_kept):
    """The mean of frames that keeps the sidecar of the frames."""
    metadata = {"TracerName": "FDG", "FrameTimesStart": times, "ImageDecayCorrected": True}
    sidecar = {"sources": [], "spatial_reference": "bids::b", "source_metadata": metadata}
    save(sidecar=sidecar)
    for key in ("preproc_json", "rigid_json"):
        written = json.loads(expected[key].read_text())
        assert written["TracerName"] == "FDG"
        assert written["ImageDecayCorrected"] is True
        assert written.get("FrameTimesStart") == (times if is_kept else None)


def test_dynamic_scan_has_a_static_image_and_its_motion(save, expected, tmp_path, fill):
    frames = frame_outputs(SCAN, tmp_path / "out")
    stem = "sub-01_ses-1_trc-FDG_run-02"
    assert [file.name for file in frames.values()] == [
        f"{stem}_space-T1w_petref.nii.gz",
        f"{stem}_space-T1w_petref.json",
        f"{stem}_desc-confounds_timeseries.tsv",
        f"{stem}_desc-confounds_timeseries.json",
        f"{stem}_from-orig_to-petref_mode-image_desc-hmc_xfm.txt",
    ]
    outputs = {key: str(file) for key, file in frames.items()}
    request = {"Reference": "auto", "MotionCorrection": True}
    fill(tmp_path / "work/static.nii.gz", tmp_path / "work/motion.tsv")
    moved, turned = np.eye(4), from_matvec(euler2mat(0.1, -0.2, 0.3), [5, -6, 7])
    moved[:3, 3] = 1, 2, 3
    xfms = [
        str(write_affine(matrix, tmp_path / f"work/{name}.txt"))
        for name, matrix in (("moved", moved), ("turned", turned))
    ]
    save(
        frame_outputs=outputs,
        made_from={"Frames": request, "Target": "T1w"},
        frame_xfms=xfms,
        static=str(tmp_path / "work/static.nii.gz"),
        motion_file=str(tmp_path / "work/motion.tsv"),
        motion_description={"trans_x": {"Units": "mm"}},
    )
    assert set(frames.values()) <= files_of(tmp_path / "out")
    static = (tmp_path / "work/static.nii.gz").read_bytes()
    assert frames["static"].read_bytes() == static
    assert frames["motion"].read_text() == "motion.tsv\n"
    array = ITKLinearTransformArray.from_filename(frames["motion_xfm"])
    np.testing.assert_allclose(array.to_ras(), [moved, turned], atol=1e-12)
    motion = json.loads(frames["motion_json"].read_text())
    assert motion == {"trans_x": {"Units": "mm"}, "Sources": ["bids:raw:a"]}
    # Only what has frames tells of their times.
    assert json.loads(expected["preproc_json"].read_text())["FrameDuration"] == [60]
    for file in (frames["static_json"], expected["rigid_json"]):
        sidecar = json.loads(file.read_text())
        assert sidecar["TracerName"] == "FDG"
        assert "FrameDuration" not in sidecar
    fill(*expected_anat_outputs(SCAN.t1w_entities, tmp_path / "out").values())

    def missing(request):
        asked = ASKED._replace(registration={"Frames": request, "Target": "T1w"})
        return missing_outputs(SCAN, tmp_path / "out", asked)

    assert missing({**request, "Reference": "sum"})
    assert not missing(request)
    frames["motion"].unlink()
    assert missing(request) == [frames["motion"]]
    # Of the same scan with one frame only, or without motion correction, nothing is left over.
    save(frame_outputs=outputs, made_from={"Frames": request, "Target": "T1w"})
    made_from = json.loads(expected["preproc_json"].read_text())[MADE_FROM_FIELD]
    assert made_from == {"Target": "T1w"}
    assert not set(frames.values()) & files_of(tmp_path / "out")
    assert not missing({**request, "Reference": "sum"})
    assert json.loads(expected["rigid_json"].read_text())["FrameDuration"] == [60]


def test_rejected_scan_keeps_no_older_deformable_transform(save, expected, tmp_path):
    accepted(save)
    save(quality=QUALITY, objections=["it folds", "it disagrees"], device_used="cpu", sha256="abc")
    final = json.loads(expected["preproc_json"].read_text())
    assert final["Transform"] == "rigid"
    assert final["TransformFallbackReason"] == "it folds; it disagrees"
    without = {path for key, path in expected.items() if not key.startswith("m2m")}
    assert files_of(tmp_path / "out") == without


def test_rigid_run_has_no_deformable_fields(save, expected):
    save()
    final = json.loads(expected["preproc_json"].read_text())
    assert final["Transform"] == "rigid"
    absent = {"DeformableQuality", "Device", "WeightsSHA256", "TransformFallbackReason"}
    assert not absent & final.keys()


def test_interrupted_copy_is_no_finished_scan(save, expected, tmp_path, monkeypatch, fill):
    accepted(save)
    fill(*expected_anat_outputs(SCAN.t1w_entities, tmp_path / "out").values())
    assert not missing_outputs(SCAN, tmp_path / "out", ASKED)
    copy = module._copy

    def full_disk(file, destination):
        if destination == expected["rigid_xfm"]:
            raise OSError(28, "No space left on device")
        return copy(file, destination)

    monkeypatch.setattr(module, "_copy", full_disk)
    with pytest.raises(OSError, match="No space"):
        accepted(save)
    assert not expected["preproc_json"].exists()
    assert missing_outputs(SCAN, tmp_path / "out", ASKED)


def test_failed_copy_leaves_the_older_file(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError):
        module._copy(str(tmp_path / "absent.txt"), tmp_path / "old.txt")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_figures_replace_those_of_their_kind_and_scan_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = tmp_path / "out/sub-01/figures"
    figures.mkdir(parents=True)
    kept = [
        "sub-01_run-1_desc-m2m_pet.svg",
        "sub-01_desc-m2m_dwimap.svg",
        "sub-01_desc-suvr_pet.svg",
        "sub-01_notes.txt",
    ]
    for name in (*kept, "sub-01_desc-m2m_pet.svg", "sub-01_desc-rigid_pet.svg"):
        (figures / name).write_text("old")
    sources = [tmp_path / "initial.svg", tmp_path / "rigid.svg", tmp_path / "viewer.html"]
    for source in sources:
        source.write_text("new")
    outputs = (
        SaveFigures(
            in_files=[str(source) for source in sources],
            drawn=["initial", "rigid", "m2m", "viewer"],
            figures_dir=str(figures),
            stem="sub-01",
            suffix="pet",
        )
        .run()
        .outputs
    )
    names = [
        "sub-01_desc-initial_pet.svg",
        "sub-01_desc-rigid_pet.svg",
        "sub-01_desc-viewer_pet.html",
    ]
    assert [Path(file).name for file in outputs.out_files] == names
    assert {path.name: path.read_text() for path in figures.iterdir()} == {
        **dict.fromkeys(kept, "old"),
        **dict.fromkeys(names, "new"),
    }


@pytest.mark.parametrize("is_skull_stripped", [True, False])
def test_t1w_sidecar(tmp_path, monkeypatch, is_skull_stripped):
    monkeypatch.chdir(tmp_path)
    outputs = (
        DescribeT1w(sources=["bids:raw:a"], is_skull_stripped=is_skull_stripped).run().outputs
    )
    assert outputs.sidecar["SkullStripped"] is is_skull_stripped
    assert outputs.sidecar["Sources"] == ["bids:raw:a"]


def test_outputs_are_written_even_if_the_cache_holds_them():
    """A user may delete outputs and keep the work folder."""
    assert SaveScan._always_run
    assert SaveFigures._always_run


def test_images_can_be_read_after_the_copy(save, expected, tmp_path):
    image = nb.Nifti1Image(np.ones((2, 3, 4), np.float32), np.eye(4))
    image.to_filename(tmp_path / "work/real.nii.gz")
    assert module._copy(str(tmp_path / "work/real.nii.gz"), expected["preproc"])
    assert nb.load(expected["preproc"]).shape == (2, 3, 4)


def test_sidecar_of_a_mask_says_how_it_was_found():
    found = DescribeMask(sources=["bids:raw:a"], method="By hand.").run().outputs.sidecar
    assert found == {"Description": "By hand.", "Sources": ["bids:raw:a"], "Type": "Brain"}
