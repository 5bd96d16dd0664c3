"""Files of earlier runs: those of this scan and of this app, and no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m2m_bids.bids.diffusion import GradientFiles
from m2m_bids.bids.naming import expected_outputs
from m2m_bids.bids.obsolete import obsolete_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.bids.spaces import parse_space

PET = Scan(
    "pet",
    Path("/data/sub-1/ses-A/pet/sub-1_ses-A_trc-FDG_pet.nii.gz"),
    {"sub": "1", "ses": "A", "trc": "FDG"},
    Path("/data/sub-1/ses-A/anat/sub-1_ses-A_T1w.nii.gz"),
    {"sub": "1", "ses": "A"},
)
FA = replace(PET, modality="fa", entities={"sub": "1", "ses": "A", "param": "FA"})
ASKED = Request(
    "m2m", {"Weights": "b"}, {"Segmentation": "tissues", "PartialVolumeCorrection": "none"}, {}
)
REGISTERED = (
    "space-T1w_desc-preproc_pet.nii.gz",
    "space-T1w_desc-rigid_pet.json",
    "from-petref_to-T1w_mode-image_desc-m2m_xfm.h5",
    "space-T1w_petref.nii.gz",
    "desc-confounds_timeseries.tsv",
    "seg-tissues_desc-preproc_stat.tsv",
    "space-T1w_desc-preprocSUVR_pet.nii.gz",
)
OLDER = (
    "space-MNI152NLin2009aSym_desc-preproc_pet.nii.gz",
    "space-MNI152NLin2009aSym_desc-affine_pet.json",
    "from-petref_to-MNI152NLin2009aSym_mode-image_desc-affine_xfm.txt",
    "space-MNI152NLin2009aSym_petref.nii.gz",
)
MEASURED = (
    "seg-aparcaseg_desc-preproc_stat.tsv",
    "seg-aparcaseg_desc-preproc_tacs.json",
    "seg-tissues_pvc-gtm_desc-preproc_tacs.tsv",
    "space-T1w_pvc-rbv_desc-preprocSUVRSmoothed8_pet.nii.gz",
    "space-T1w_desc-preprocSmoothed_pet.nii.gz",
)
FOREIGN = (
    "space-T1w_desc-mine_pet.nii.gz",
    "desc-brain_mask.nii.gz",
    "space-T1w_dseg.nii.gz",
    "desc-preproc_pet.nii.gz",
    "run-2_space-MNI152NLin2009aSym_desc-preproc_pet.nii.gz",
)


@pytest.fixture
def folder(tmp_path):
    """Everything side by side, of an earlier run with other weights."""
    folder = tmp_path / "sub-1/ses-A/pet"
    folder.mkdir(parents=True)
    for name in (*REGISTERED, *OLDER, *MEASURED, *FOREIGN):
        (folder / f"sub-1_ses-A_trc-FDG_{name}").touch()
    (folder / "sub-1_ses-A_trc-AV45_seg-aparcaseg_desc-preproc_stat.tsv").touch()
    (folder / "notes.txt").touch()
    return folder


def mark(out_dir, record):
    file = expected_outputs(PET, out_dir, "m2m")["preproc_json"]
    file.write_text(json.dumps({MADE_FROM_FIELD: record}))


def found(scan, out_dir, request=ASKED):
    stem = "sub-1_ses-A_trc-FDG_"
    return {file.name.removeprefix(stem) for file in obsolete_outputs(scan, out_dir, request)}


def test_a_scan_made_anew_keeps_nothing_that_is_not_written(folder, tmp_path):
    mark(tmp_path, {"Weights": "a"})
    assert found(PET, tmp_path) == {*OLDER, *MEASURED}


def test_images_in_further_spaces_stay_where_the_registration_does(folder, tmp_path):
    mark(tmp_path, {"Weights": "b"})
    assert found(PET, tmp_path) == set(MEASURED)


def test_what_is_written_again_is_not_obsolete(folder, tmp_path):
    measured = {"Segmentation": "aparcaseg", "PartialVolumeCorrection": "rbv"}
    space = parse_space("MNI152NLin2009aSym")
    asked = ASKED._replace(quantification=measured, spaces={space: {}})
    assert found(PET, tmp_path, asked) == {
        *(OLDER[1:3]),
        "seg-tissues_desc-preproc_stat.tsv",
        "seg-tissues_pvc-gtm_desc-preproc_tacs.tsv",
        *MEASURED[3:],
    }


def test_copies_smoothed_by_other_widths_are_obsolete(folder, tmp_path):
    mark(tmp_path, {"Weights": "b"})
    names = [f"space-T1w_desc-preproc{end}_pet.json" for end in ("Smoothed5p5", "SUVRSmoothed8")]
    for name in names:
        (folder / f"sub-1_ses-A_trc-FDG_{name}").touch()
    measured = {**ASKED.quantification, "SmoothingFullWidthHalfMaximum": [6.0, 8.0]}
    asked = ASKED._replace(quantification=measured)
    assert found(PET, tmp_path, asked) == {*MEASURED, names[0]}
    assert found(PET, tmp_path) == {*MEASURED, *names}


def test_a_scan_at_a_template_keeps_nothing_in_the_t1w_space(folder, tmp_path):
    at_template = replace(PET, t1w=None, t1w_entities={}, template="MNI152NLin2009aSym")
    kept = {*OLDER, "desc-confounds_timeseries.tsv"}
    assert found(at_template, tmp_path) == {*REGISTERED, *MEASURED} - kept


def test_static_images_of_dynamic_scans_stay_beside_their_frames(folder, tmp_path):
    asked = ASKED._replace(spaces={parse_space("MNI152NLin2009aSym"): {}})
    assert found(PET, tmp_path, asked) == {*OLDER[1:3], *MEASURED}


def test_other_maps_of_a_tensor_go_with_fa(tmp_path):
    folder = tmp_path / "sub-1/ses-A/dwi"
    folder.mkdir(parents=True)
    names = [f"sub-1_ses-A_space-T1w_param-{p}_desc-preproc_dwimap.nii.gz" for p in ("MD", "FA")]
    for name in names:
        (folder / name).touch()
    assert [file.name for file in obsolete_outputs(FA, tmp_path, ASKED)] == names[:1]


def test_other_maps_of_a_tensor_are_kept_in_the_spaces_that_are_asked_for(tmp_path):
    folder = tmp_path / "sub-1/ses-A/dwi"
    folder.mkdir(parents=True)
    fitted = replace(FA, gradients=GradientFiles(Path("a.bval"), Path("a.bvec")))
    names = [
        f"sub-1_ses-A_space-MNI152NLin2009aSym_res-{number}_param-MD_desc-preproc_dwimap.json"
        for number in (1, 2)
    ]
    for name in names:
        (folder / name).touch()
    asked = ASKED._replace(spaces={parse_space("MNI152NLin2009aSym:res-2"): {}})
    assert [file.name for file in obsolete_outputs(fitted, tmp_path, asked)] == names[:1]


def test_nothing_is_there(tmp_path):
    assert obsolete_outputs(PET, tmp_path, ASKED) == []
