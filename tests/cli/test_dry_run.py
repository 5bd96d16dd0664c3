import json
from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.bids.query import query
from m2m_bids.cli.dry_run import dry_run_table
from m2m_bids.settings import Settings


def cohort(tmp_path):
    bids_dir, dti = tmp_path / "bids", tmp_path / "dti"
    for file in (
        bids_dir / "sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz",
        bids_dir / "sub-1/ses-M000/pet/sub-1_ses-M000_trc-FDG_pet.nii.gz",
        bids_dir / "sub-2/pet/sub-2_pet.nii.gz",
        bids_dir / "sub-3/anat/sub-3_T1w.nii.gz",
        dti / "sub-1/ses-M012/dwi/sub-1_ses-M012_param-FA_dwimap.nii.gz",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("image")
    return {"bids_dir": bids_dir, "output_dir": tmp_path / "out", "derivatives": (("dti", dti),)}


def table(settings, weights=None):
    scans = query(settings.bids_dir, derivatives=settings.derivative_dirs)
    return dry_run_table(scans, settings, weights)


def test_table(tmp_path):
    text = table(Settings(**cohort(tmp_path), refine=9))
    assert text.splitlines() == [
        "m2m-bids would register 2 of 3 scans.",
        "",
        "sub-1_ses-M000_trc-FDG_pet",
        "  pet     sub-1/ses-M000/pet/sub-1_ses-M000_trc-FDG_pet.nii.gz",
        "  T1w     sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz (same session)",
        "  from    PET image of the BIDS dataset",
        "  spaces  T1w",
        "  regions tissues of the T1w (seg-tissues)",
        (
            "  SUV     none: no body weight: neither PatientWeight in the PET sidecar nor a "
            "column weight in sessions.tsv or participants.tsv"
        ),
        "  SUVR    none: there are no FreeSurfer labels of the T1w to find a region in",
        "  weights default of m2m-bids, 9 steps of refinement",
        "",
        "sub-1_ses-M012_param-FA_dwimap",
        "  fa      sub-1/ses-M012/dwi/sub-1_ses-M012_param-FA_dwimap.nii.gz",
        "  T1w     sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz (nearest session (ses-M000))",
        "  from    FA map of derivatives dataset dti",
        "  spaces  T1w",
        "  regions tissues of the T1w (seg-tissues)",
        "  weights default of m2m-bids, 9 steps of refinement",
        "",
        "Left out: 1",
        (f"  sub-2_pet: no T1w image (anat/*_T1w.nii[.gz]) of its subject in {tmp_path / 'bids'}"),
        (
            "  Without a T1w image there is --no-t1w register-to-template (level participant), "
            "or a T1w of another session with --subject-anatomical-reference nearest."
        ),
        "",
        "Participants without a PET or FA scan: 3",
    ]


def test_weights(tmp_path):
    options = cohort(tmp_path)
    (tmp_path / "w").mkdir()
    assert f"weights {tmp_path / 'w'}" in table(Settings(**options, weights=tmp_path / "w"))
    assert "none (rigid only)" in table(Settings(**options, transform="rigid"))
    text = table(Settings(**options, refine=0), {"pet": "t1w-pet, SHA-256 abc"})
    assert "weights t1w-pet, SHA-256 abc\n" in text
    assert "weights default of m2m-bids\n" in text


def test_only_selected_participants_are_missed(tmp_path):
    settings = Settings(**cohort(tmp_path), participant_label=("1",))
    assert "Participants without" not in table(settings)


def test_derivatives_of_the_anatomy(tmp_path):
    options = cohort(tmp_path)
    image = nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4))
    image.to_filename(tmp_path / "bids/sub-1/ses-M000/anat/sub-1_ses-M000_T1w.nii.gz")
    folder = tmp_path / "fmriprep/sub-1/ses-M000/anat"
    folder.mkdir(parents=True)
    image.to_filename(folder / "sub-1_ses-M000_desc-brain_mask.nii.gz")
    image.slicer[:2].to_filename(folder / "sub-1_ses-M000_dseg.nii.gz")
    options["derivatives"] += (("fmriprep", tmp_path / "fmriprep"),)
    lines = table(Settings(**options)).splitlines()
    start = lines.index("Derivatives of sub-1_ses-M000_T1w.nii.gz:")
    stem = f"{folder}/sub-1_ses-M000"
    other = "its shape 2 x 4 x 5 is not that of sub-1_ses-M000_T1w.nii.gz, 3 x 4 x 5"
    assert lines[start + 1 : start + 8] == [
        f"  fmriprep: t1w: missed: no {stem}_desc-preproc_T1w.nii.gz",
        f"  fmriprep: mask: {stem}_desc-brain_mask.nii.gz",
        f"  fmriprep: dseg: refused: {stem}_dseg.nii.gz: {other}",
        f"  fmriprep: probseg: missed: no {stem}_label-GM_probseg.nii.gz",
        f"  fmriprep: aparcaseg: missed: no {stem}_desc-aparcaseg_dseg.nii.gz",
        f"  fmriprep: aseg: missed: no {stem}_desc-aseg_dseg.nii.gz",
        f"  fmriprep: xfm: missed: no {stem}_from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.h5",
    ]
    assert sum(line.startswith("Derivatives of") for line in lines) == 1  # two scans, one T1w
    assert lines[start + 8 : start + 10] == ["", "Left out: 1"]


def test_transforms_are_told_for_each_template_asked_for(tmp_path):
    options = cohort(tmp_path)
    folder = tmp_path / "fmriprep/sub-1/ses-M000/anat"
    folder.mkdir(parents=True)
    stem = folder / "sub-1_ses-M000"
    pair = [
        Path(f"{stem}_from-{start}_to-{end}_mode-image_xfm.h5")
        for start, end in (("T1w", "MNI152Lin"), ("MNI152Lin", "T1w"))
    ]
    for file in pair:
        file.touch()
    options["derivatives"] += (("fmriprep", tmp_path / "fmriprep"),)
    spaces = ("MNI152Lin:res-2", "MNI152Lin:res-native", "T1w:res-2", "MNI152NLin2009aSym")
    lines = table(Settings(**options, output_spaces=spaces)).splitlines()
    assert [line for line in lines if " xfm to " in line] == [
        f"  fmriprep: xfm to MNI152Lin: {pair[0]}, {pair[1]}",
        (
            "  fmriprep: xfm to MNI152NLin2009aSym: missed: no "
            f"{stem}_from-T1w_to-MNI152NLin2009aSym_mode-image_xfm.h5"
        ),
    ]


def test_fits_are_told(tmp_path):
    options = cohort(tmp_path)
    for root, stem in (
        (options["bids_dir"], "sub-3/dwi/sub-3_dwi"),
        (tmp_path / "dti", "sub-1/ses-M000/dwi/sub-1_ses-M000_desc-preproc_dwi"),
    ):
        contents = {
            ".nii.gz": "an image",
            ".bval": "0 1000 1000 1000 1000 1000 1000",
            ".bvec": "0 1 0 0 1 1 0\n0 0 1 0 1 0 1\n0 0 0 1 0 1 1",
        }
        for end, content in contents.items():
            file = root / f"{stem}{end}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    text = table(Settings(**options))
    raw = "eddy currents and susceptibility distortion are not"
    assert f"raw DWI of the BIDS dataset; FA is to be fitted: motion is corrected, {raw}" in text
    assert "preprocessed DWI of derivatives dataset dti; FA is to be fitted\n" in text


def test_quantities_are_told(tmp_path):
    """With labels, a body weight and metadata there are SUV, SUVR and a correction."""
    options = cohort(tmp_path)
    labels = tmp_path / "fs/sub-1_ses-M000/mri/aparc+aseg.mgz"
    labels.parent.mkdir(parents=True)
    for file in (labels, labels.with_name("orig.mgz")):
        file.touch()  # only what the T1w is compared with is read
    sidecar = options["bids_dir"] / "sub-1/ses-M000/pet/sub-1_ses-M000_trc-FDG_pet.json"
    metadata = {
        **{"Units": "Bq/mL", "InjectedRadioactivity": 100, "InjectedRadioactivityUnits": "MBq"},
        **{"InjectionStart": 0, "ImageDecayCorrected": True, "ImageDecayCorrectionTime": 0},
        "PatientWeight": 50,
    }
    sidecar.write_text(json.dumps(metadata))
    asked = {"fs_subjects_dir": tmp_path / "fs", "pvc": "rbv", "psf_fwhm_mm": (6.0,)}
    lines = table(Settings(**options, **asked)).splitlines()
    start = lines.index("sub-1_ses-M000_trc-FDG_pet")
    assert lines[start + 5 : start + 9] == [
        "  regions sub-1_ses-M000/mri/aparc+aseg.mgz (seg-aparcaseg)",
        "  SUV     with the body weight (PatientWeight in the PET sidecar)",
        "  SUVR    reference brainstem",
        "  PVC     rbv, 6 mm",
    ]
    frames = {"FrameTimesStart": [0, 60, 120], "FrameDuration": [60, 60, 60]}
    sidecar.write_text(json.dumps({**metadata, **frames}))
    dynamic = "  from    PET image, 3 frames by its sidecar, of the BIDS dataset\n"
    text = table(Settings(**options, **asked))
    assert dynamic in text
    assert "timing" not in text
    overlapping = {**frames, "FrameDuration": [60, 120, 180]}
    sidecar.write_text(json.dumps({**metadata, **overlapping}))
    remark = "120 s from 60 s, goes beyond the start of the next frame at 120 s"
    assert f"  timing  not used: FrameDuration, {remark}" in table(Settings(**options, **asked))
    sidecar.write_text(json.dumps({**metadata, "Units": "counts"}))
    assert "  SUV     none: Units 'counts' is not" in table(Settings(**options, **asked))


def test_template_in_place_of_a_t1w_is_told(tmp_path):
    spaces = ("MNI152NLin2009aSym:res-2", "T1w:res-native")
    settings = Settings(
        **cohort(tmp_path), output_spaces=spaces, pvc="gtm", psf_fwhm_mm=(6.0,), transform="rigid"
    )
    scans = query(settings.bids_dir, template="MNI152NLin2009aSym")
    lines = dry_run_table(scans, settings).splitlines()
    assert lines[0] == "m2m-bids would register 2 of 2 scans."
    start = lines.index("sub-2_pet")
    assert lines[start + 2].startswith("  T1w     no T1w image")
    assert lines[start + 2].endswith("registered to the template MNI152NLin2009aSym instead")
    assert lines[start + 4] == (
        "  spaces  MNI152NLin2009aSym, MNI152NLin2009aSym:res-2 (not T1w:res-native: takes a T1w)"
    )
    assert lines[start + 5].endswith("need the deformable step")
    assert all(line.split()[1] == "none:" for line in lines[start + 5 : start + 9])
