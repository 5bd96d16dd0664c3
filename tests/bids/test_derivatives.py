import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from m2m_bids import __version__
from m2m_bids.bids import derivatives
from m2m_bids.bids.derivatives import Provenance
from m2m_bids.bids.diffusion import GradientFiles
from m2m_bids.bids.naming import (
    expected_anat_outputs,
    expected_diffusivity_outputs,
    expected_outputs,
    expected_space_outputs,
    expected_template_outputs,
    output_path,
    static_outputs,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import FRAMES, MADE_FROM_FIELD, Request
from m2m_bids.bids.spaces import parse_space

T1W = {"sub": "01", "ses": "M000"}
PET = {"sub": "01", "ses": "M000", "trc": "18FFDG", "rec": "coregavg"}
M2M = Request("m2m", {"Transform": "m2m"}, {}, {})
FA = {"sub": "01", "ses": "M012", "space": "ACPC", "model": "tensor", "param": "fa"}


@pytest.fixture
def scans(tmp_path):
    bids_dir, dti = tmp_path / "bids", tmp_path / "bids/derivatives/dti"
    anat = bids_dir / "sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz"
    return [
        Scan("pet", bids_dir / "sub-01/ses-M000/pet/x_pet.nii.gz", PET, anat, T1W),
        Scan("fa", dti / "sub-01/ses-M012/dwi/x_dwimap.nii.gz", FA, anat, T1W, "dti"),
    ]


def save_image(file, dtype=np.float32):
    file.parent.mkdir(parents=True, exist_ok=True)
    nb.Nifti1Image(np.ones((4, 5, 6), dtype), np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(file)


def write_anat(out_dir, t1w_uri):
    anat = expected_anat_outputs(T1W, out_dir)
    save_image(anat["preproc"])
    save_image(anat["mask"], np.uint8)
    save_image(anat["dseg"], np.uint8)
    sidecar = derivatives.image_sidecar([t1w_uri], is_skull_stripped=False)
    derivatives.write_json(anat["preproc_json"], sidecar)
    reference = derivatives.bids_uri(anat["preproc"], out_dir, {})
    labels = derivatives.image_sidecar([reference], spatial_reference=reference)
    derivatives.write_json(anat["mask_json"], {**labels, "Type": "Brain"})
    derivatives.write_json(anat["dseg_json"], {**labels, "Manual": False})
    return reference


def write_scan(scan, out_dir, datasets, reference, fill, *, requested="m2m", used="m2m"):
    outputs = expected_outputs(scan, out_dir, used)
    sidecar = derivatives.image_sidecar(
        [derivatives.bids_uri(path, out_dir, datasets) for path in (scan.file, scan.t1w)],
        is_skull_stripped=scan.modality == "fa",
        spatial_reference=reference,
        provenance=Provenance(used, requested, weights_sha256="0" * 64, device="cpu"),
        source_metadata=scan.sidecar,
    )
    sidecar[MADE_FROM_FIELD] = {"Transform": requested}
    for key, file in outputs.items():
        if key.endswith("_json"):
            derivatives.write_json(file, sidecar)
        elif key.endswith("_xfm"):
            fill(file)
        else:
            save_image(file)
    return outputs


def write_dataset(scans, out_dir, fill):
    bids_dir = scans[0].file.parents[3]
    datasets = {"raw": bids_dir, "dti": bids_dir / "derivatives/dti"}
    derivatives.write_dataset_files(out_dir, datasets)
    reference = write_anat(out_dir, derivatives.bids_uri(scans[0].t1w, out_dir, datasets))
    for scan in scans:
        write_scan(scan, out_dir, datasets, reference, fill)
    figure = output_path(
        out_dir, PET, datatype="figures", suffix="pet", extension=".svg", desc="m2m"
    )
    derivatives.write_text(figure, "<svg/>")
    derivatives.write_text(out_dir / "logs/status.tsv", "participant_id\n")
    derivatives.write_text(out_dir / "sub-01.html", "<html/>")
    derivatives.write_text(out_dir / "sub-01/log/run/crash.txt", "Traceback")


def test_validator_finds_no_error(scans, tmp_path, fill):
    validator = shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("bids-validator-deno is not installed")
    out_dir = tmp_path / "out"
    write_dataset(scans, out_dir, fill)
    command = [validator, "--format", "json", str(out_dir)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    issues = json.loads(result.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert errors == []
    assert result.returncode == 0


def test_dataset_description(scans, tmp_path):
    out_dir = tmp_path / "out"
    derivatives.write_dataset_files(out_dir, {"raw": tmp_path / "with space"})
    content = json.loads((out_dir / "dataset_description.json").read_text())
    assert content["DatasetType"] == "derivative"
    assert content["GeneratedBy"][0]["Name"] == "m2m-bids"
    assert content["GeneratedBy"][0]["Version"] == __version__
    assert content["DatasetLinks"]["raw"] == f"file://{tmp_path}/with%20space"
    derivatives.write_dataset_files(out_dir, {"raw": tmp_path})


def test_foreign_output_folder_is_refused(tmp_path):
    description = {"Name": "x", "GeneratedBy": [{"Name": "fMRIPrep"}]}
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="made by fMRIPrep"):
        derivatives.write_dataset_files(tmp_path, {})
    assert json.loads((tmp_path / "dataset_description.json").read_text()) == description


def test_output_folder_that_nobody_can_have_described_is_refused(tmp_path):
    (tmp_path / "dataset_description.json").write_text("[" * 20000)
    with pytest.raises(ValueError, match="made by an unknown application"):
        derivatives.write_dataset_files(tmp_path, {})


def test_bids_uri_names_the_innermost_dataset(tmp_path):
    datasets = {"raw": tmp_path, "dti": tmp_path / "derivatives/dti"}
    out_dir = tmp_path.parent / "out"
    uri = derivatives.bids_uri
    assert uri(tmp_path / "sub-01/a.nii", out_dir, datasets) == "bids:raw:sub-01/a.nii"
    assert uri(datasets["dti"] / "sub-01/a.nii", out_dir, datasets) == "bids:dti:sub-01/a.nii"
    assert uri(out_dir / "sub-01/a.nii", out_dir, datasets) == "bids::sub-01/a.nii"
    with pytest.raises(ValueError, match="in none of the datasets"):
        uri(Path("/elsewhere/a.nii"), out_dir, datasets)


def test_write_text_replaces_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    derivatives.write_text(file, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(derivatives.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        derivatives.write_text(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    derivatives.write_text(file, "old")  # the same text needs no write


def test_text_is_on_the_disk_before_it_has_its_name(tmp_path, renamed):
    derivatives.write_text(tmp_path / "a.txt", "content\n")
    assert renamed == {tmp_path / "a.txt": 8}


def test_written_files_follow_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    derivatives.write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


def test_provenance_in_sidecar():
    provenance = Provenance("rigid", "m2m", fallback_reason="folds", device="cpu")
    sidecar = derivatives.image_sidecar(["bids:raw:a"], provenance=provenance)
    assert sidecar["Sources"] == ["bids:raw:a"]
    assert (sidecar["Transform"], sidecar["TransformRequested"]) == ("rigid", "m2m")
    assert sidecar["TransformFallbackReason"] == "folds"
    assert sidecar["SoftwareVersions"]["m2m-bids"] == __version__
    assert "WeightsSHA256" not in sidecar
    assert "SkullStripped" not in sidecar


def test_of_the_source_what_stays_true_is_said():
    given = {
        **{"TracerName": "FDG", "InjectedMass": 1.5, "FrameDuration": [60, 60]},
        **{"DecayCorrectionFactor": [1.1, 1.2], "SliceThickness": 4, "Resolution": "its own"},
        **{"Description": "of the source", "Sources": ["elsewhere"], "SkullStripped": True},
    }
    told = {"TracerName": "FDG", "InjectedMass": 1.5}
    frames = {"FrameDuration": [60, 60], "DecayCorrectionFactor": [1.1, 1.2]}
    sidecar = derivatives.image_sidecar(["bids:raw:a"], source_metadata=given)
    assert sidecar == {"Sources": ["bids:raw:a"], **told, **frames}
    static = derivatives.image_sidecar(
        ["bids:raw:a"],
        is_skull_stripped=False,
        source_metadata=derivatives.without_frames(given),
    )
    assert static == {"Sources": ["bids:raw:a"], "SkullStripped": False, **told}


class TestMissingOutputs:
    @pytest.fixture
    def finished(self, scans, tmp_path, fill):
        out_dir = tmp_path / "out"
        write_dataset(scans, out_dir, fill)
        return scans, out_dir

    def test_finished_scan_lacks_nothing(self, finished):
        scans, out_dir = finished
        assert [derivatives.missing_outputs(scan, out_dir, M2M) for scan in scans] == [[], []]

    @pytest.mark.parametrize("key", ["preproc", "rigid_json", "m2m_inverse_xfm"])
    def test_one_file_is_missing(self, finished, key):
        scans, out_dir = finished
        file = expected_outputs(scans[0], out_dir, "m2m")[key]
        file.unlink()
        assert derivatives.missing_outputs(scans[0], out_dir, M2M) == [file]

    @pytest.mark.parametrize("key", ["preproc", "rigid", "rigid_json", "rigid_xfm", "m2m_xfm"])
    @pytest.mark.parametrize("part", [0, 0.6])
    def test_one_file_is_cut_off(self, finished, key, part):
        scans, out_dir = finished
        file = expected_outputs(scans[0], out_dir, "m2m")[key]
        whole = file.read_bytes()
        file.write_bytes(whole[: int(part * len(whole))])
        assert derivatives.missing_outputs(scans[0], out_dir, M2M) == [file]

    def test_one_anatomical_file_is_cut_off(self, finished):
        scans, out_dir = finished
        file = expected_anat_outputs(T1W, out_dir)["preproc"]
        file.write_bytes(file.read_bytes()[:-1])
        assert [derivatives.missing_outputs(s, out_dir, M2M) for s in scans] == [[file], [file]]

    def test_anatomical_reference_is_missing(self, finished):
        scans, out_dir = finished
        file = expected_anat_outputs(T1W, out_dir)["mask"]
        file.unlink()
        assert derivatives.missing_outputs(scans[1], out_dir, M2M) == [file]

    def test_further_spaces_are_part_of_a_finished_scan(self, finished):
        scans, out_dir = finished
        space = parse_space("MNI152NLin2009aSym:res-2")
        missing = derivatives.missing_outputs(scans[0], out_dir, M2M._replace(spaces={space: {}}))
        in_space = expected_space_outputs(scans[0], out_dir, space, "m2m")
        of_t1w = expected_template_outputs(scans[0].t1w_entities, out_dir, space)
        assert missing == [*in_space.values(), *of_t1w.values()]
        assert "desc-m2m" in in_space["xfm"].name

    def test_static_images_of_dynamic_scans_are_part_of_further_spaces(self, finished, fill):
        scans, out_dir = finished
        space = parse_space("T1w:res-native")
        motion = {FRAMES: {"Reference": "auto", "MotionCorrection": False}}
        asked = M2M._replace(registration={**M2M.registration, **motion}, spaces={space: {}})
        fill(*expected_space_outputs(scans[0], out_dir, space, "m2m").values())
        assert derivatives.missing_outputs(scans[0], out_dir, asked) == []
        sidecar = {"Transform": "m2m", MADE_FROM_FIELD: asked.registration}
        outputs = expected_outputs(scans[0], out_dir, "m2m")
        derivatives.write_json(outputs["preproc_json"], sidecar)
        on_t1w, there = (static_outputs(scans[0], out_dir, place) for place in (None, space))
        missing = derivatives.missing_outputs(scans[0], out_dir, asked)
        assert missing == [*on_t1w.values(), *there.values()]
        fill(*missing)
        assert derivatives.missing_outputs(scans[0], out_dir, asked) == []

    def test_images_by_an_earlier_registration_are_made_anew(self, finished, fill):
        """As a run leaves them that was interrupted between the images of a scan."""
        scans, out_dir = finished
        fitted = replace(scans[1], gradients=GradientFiles(Path("a.bval"), Path("a.bvec")))
        space = parse_space("T1w:res-native")
        asked = M2M._replace(spaces={space: M2M.registration})
        in_space = expected_space_outputs(fitted, out_dir, space, "m2m")
        maps = [
            expected_diffusivity_outputs(fitted, out_dir, name, place)
            for place in (None, space)
            for name in ("MD", "AD", "RD")
        ]
        for files in (in_space, *maps):
            fill(files["image"])
            derivatives.write_json(files["image_json"], {MADE_FROM_FIELD: M2M.registration})
        assert derivatives.missing_outputs(fitted, out_dir, asked) == []
        derivatives.write_json(in_space["image_json"], {MADE_FROM_FIELD: {"Transform": "rigid"}})
        missing = derivatives.missing_outputs(fitted, out_dir, asked)
        assert missing[:2] == [*in_space.values()]
        derivatives.write_json(in_space["image_json"], {MADE_FROM_FIELD: M2M.registration})
        derivatives.write_json(maps[0]["image_json"], {MADE_FROM_FIELD: {"Transform": "rigid"}})
        assert derivatives.missing_outputs(fitted, out_dir, asked) == [*maps[0].values()]

    def test_rejected_deformable_step_is_finished(self, scans, tmp_path, fill):
        out_dir, bids_dir = tmp_path / "out", scans[0].file.parents[3]
        reference = write_anat(out_dir, "bids:raw:x")
        write_scan(scans[0], out_dir, {"raw": bids_dir}, reference, fill, used="rigid")
        assert derivatives.missing_outputs(scans[0], out_dir, M2M) == []

    def test_rigid_request_does_not_finish_m2m(self, scans, tmp_path, fill):
        out_dir, bids_dir = tmp_path / "out", scans[0].file.parents[3]
        reference = write_anat(out_dir, "bids:raw:x")
        datasets = {"raw": bids_dir}
        write_scan(scans[0], out_dir, datasets, reference, fill, requested="rigid", used="rigid")
        rigid = Request("rigid", {"Transform": "rigid"}, {}, {})
        assert derivatives.missing_outputs(scans[0], out_dir, rigid) == []
        expected = list(expected_outputs(scans[0], out_dir, "m2m").values())
        assert derivatives.missing_outputs(scans[0], out_dir, M2M) == expected

    def test_nothing_is_there(self, scans, tmp_path):
        expected = list(expected_outputs(scans[1], tmp_path, "m2m").values())
        assert derivatives.missing_outputs(scans[1], tmp_path, M2M) == expected
