"""Plans of quantification: which labels, which reference region, and why there is none."""

from dataclasses import replace

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.bids.naming import quantification_outputs
from m2m_bids.bids.quantification import QuantificationOptions, plan_quantification
from m2m_bids.bids.query import Scan

AFFINE = nb.affines.from_matvec(np.diag([-1.0, 2, 3]), (5, -20, 7))


def write_image(file, offset_mm=0):
    """Write a small image, on the grid of the T1w or shifted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = nb.MGHImage if file.suffix == ".mgz" else nb.Nifti1Image
    affine = nb.affines.from_matvec(np.eye(3), [0, 0, offset_mm]) @ AFFINE
    nb.save(kind(np.ones((3, 4, 5), np.uint8), affine), file)
    return file


@pytest.fixture
def scan(tmp_path):
    t1w = tmp_path / "bids/sub-1/ses-A/anat/sub-1_ses-A_T1w.nii.gz"
    write_image(t1w)
    entities = {"sub": "1", "ses": "A"}
    file = tmp_path / "bids/sub-1/ses-A/pet/sub-1_ses-A_trc-18FFDG_pet.nii.gz"
    return Scan("pet", file, {**entities, "trc": "18FFDG"}, t1w=t1w, t1w_entities=entities)


@pytest.fixture
def plan(scan, tmp_path):
    def make(**changes):
        of_scan = changes.pop("scan", scan)
        return plan_quantification(of_scan, tmp_path / "bids", QuantificationOptions(**changes))

    return make


def label_file(folder, name, offset_mm=0):
    """Write labels, and if they are FreeSurfer's the images that they are told by."""
    file = folder / name
    if file.suffix == ".mgz":
        for beside in ("orig.mgz", "rawavg.mgz"):
            write_image(file.with_name(beside), offset_mm)
    return write_image(file, offset_mm)


def test_freesurfer_comes_first(plan, tmp_path):
    own = label_file(tmp_path / "fs", "sub-1_ses-A/mri/aseg.mgz")
    other = label_file(
        tmp_path / "deriv", "sub-1/ses-A/anat/sub-1_ses-A_desc-aparcaseg_dseg.nii.gz"
    )
    derivatives = {"fmriprep": tmp_path / "deriv"}
    both = plan(fs_subjects_dir=tmp_path / "fs", derivatives=derivatives)
    assert (both.labels.file, both.segmentation, both.scheme) == (own, "aseg", "freesurfer")
    one = plan(derivatives=derivatives)
    assert (one.labels.file, one.segmentation, one.scheme) == (other, "aparcaseg", "freesurfer")


@pytest.mark.parametrize("folder", ["fs", "deriv"])
def test_labels_of_another_image_are_not_measured_in(plan, tmp_path, folder):
    """They are refused for the mask, and for regions and the reference as well."""
    names = {
        "fs": "sub-1_ses-A/mri/aparc+aseg.mgz",
        "deriv": "sub-1/ses-A/anat/sub-1_ses-A_desc-aparcaseg_dseg.nii.gz",
    }
    given = {
        "fs": {"fs_subjects_dir": tmp_path / "fs"},
        "deriv": {"derivatives": {"f": tmp_path / "deriv"}},
    }[folder]
    label_file(tmp_path / folder, names[folder], offset_mm=20)
    found = plan(**given)
    assert (found.labels, found.segmentation, found.suvr_region) == (None, "tissues", None)
    label_file(tmp_path / folder, names[folder])
    assert plan(**given).segmentation == "aparcaseg"


def test_labels_are_looked_for_in_all_datasets_before_tissues(plan, tmp_path):
    stem = "sub-1/ses-A/anat/sub-1_ses-A"
    label_file(tmp_path / "a", f"{stem}_dseg.nii.gz")
    labels = label_file(tmp_path / "b", f"{stem}_desc-aparcaseg_dseg.nii.gz")
    found = plan(derivatives={"a": tmp_path / "a", "b": tmp_path / "b"})
    assert (found.labels.file, found.segmentation) == (labels, "aparcaseg")
    assert found.suvr_region == "brainstem"


def test_labels_without_session_are_of_an_only_t1w(plan, scan, tmp_path):
    own = label_file(tmp_path / "fs", "sub-1/mri/aparc+aseg.mgz")
    assert plan(fs_subjects_dir=tmp_path / "fs").labels.file == own
    later = tmp_path / "bids/sub-1/ses-B/anat/sub-1_ses-B_T1w.nii.gz"
    later.parent.mkdir(parents=True)
    later.touch()
    assert plan(fs_subjects_dir=tmp_path / "fs").labels is None


def test_tissues_of_derivatives_are_taken_without_a_reference(plan, tmp_path):
    label_file(tmp_path / "deriv", "sub-1/ses-A/anat/sub-1_ses-A_dseg.nii.gz")
    found = plan(derivatives={"x": tmp_path / "deriv"})
    assert (found.segmentation, found.scheme, found.suvr_region) == ("tissues", "tissues", None)
    assert "no FreeSurfer labels" in found.suvr_reason
    assert plan(suvr_region="eroded-white-matter").suvr_region == "eroded-white-matter"


@pytest.mark.parametrize(
    ("tracer", "region"),
    [
        ("18FFDG", "brainstem"),
        ("11CPIB", "whole-cerebellum"),
        ("18FAV45", "whole-cerebellum"),
        ("18FFBB", "whole-cerebellum"),
        ("AV1451", "cerebellar-grey"),
        ("18FMK6240", "cerebellar-grey"),
        ("11CDASB", None),
    ],
)
def test_auto_goes_by_the_tracer(plan, scan, tmp_path, tracer, region):
    label_file(tmp_path / "fs", "sub-1_ses-A/mri/aparc+aseg.mgz")
    traced = replace(scan, entities={**scan.entities, "trc": tracer})
    found = plan(scan=traced, fs_subjects_dir=tmp_path / "fs")
    assert found.suvr_region == region
    assert (tracer in found.suvr_reason) is (region is None)
    nameless = replace(scan, entities=scan.t1w_entities, sidecar={"TracerName": tracer})
    assert plan(scan=nameless, fs_subjects_dir=tmp_path / "fs").suvr_region == region
    assert (
        plan(scan=traced, fs_subjects_dir=tmp_path / "fs", suvr_region="none").suvr_region is None
    )


@pytest.mark.parametrize(
    ("entities", "name", "region"),
    [
        ({"acq": "dynamic"}, "PIB", "whole-cerebellum"),
        ({"acq": "fdg"}, None, "brainstem"),
        ({"trc": "blinded"}, "[18F]AV-1451", "cerebellar-grey"),
        ({"acq": "dynamic"}, None, None),
        ({"trc": "11CDASB"}, "DASB", None),
    ],
)
def test_any_name_of_the_tracer_tells_the_region(plan, scan, tmp_path, entities, name, region):
    label_file(tmp_path / "fs", "sub-1_ses-A/mri/aparc+aseg.mgz")
    named = replace(
        scan,
        entities={**scan.t1w_entities, **entities},
        sidecar={"TracerName": name} if name else {},
    )
    found = plan(scan=named, fs_subjects_dir=tmp_path / "fs")
    assert found.suvr_region == region
    assert "dynamic" not in found.suvr_reason


def test_masks_are_found_by_the_labels_of_the_t1w(plan, tmp_path):
    pattern = str(tmp_path / "masks/sub-{sub}_ses-{ses}_mask.nii.gz")
    missing = plan(suvr_mask=pattern)
    assert (missing.suvr_mask, missing.suvr_region) == (None, None)
    assert "sub-1_ses-A_mask.nii.gz is not a file" in missing.suvr_reason
    file = label_file(tmp_path / "masks", "sub-1_ses-A_mask.nii.gz")
    assert plan(suvr_mask=pattern).suvr_mask == file


def test_pons_is_taken_where_it_has_a_label(plan, tmp_path):
    label_file(tmp_path / "fs", "sub-1_ses-A/mri/aparc+aseg.mgz")
    assert plan(fs_subjects_dir=tmp_path / "fs").suvr_mask is None
    pons = tmp_path / "fs/sub-1_ses-A/mri/brainstemSsLabels.v13.FSvoxelSpace.mgz"
    pons.touch()
    found = plan(fs_subjects_dir=tmp_path / "fs")
    assert (found.suvr_mask, found.suvr_mask_label, found.suvr_region) == (pons, 174, None)
    other = plan(fs_subjects_dir=tmp_path / "fs", suvr_region="whole-cerebellum")
    assert (other.suvr_mask, other.suvr_region) == (None, "whole-cerebellum")


def test_fa_has_no_reference(plan, scan):
    assert plan(scan=replace(scan, modality="fa"), suvr_region="brainstem").suvr_region is None


def test_names_follow_bids(scan, tmp_path):
    outputs = quantification_outputs(scan, tmp_path, "aseg", pvc="rbv")
    stem = "sub-1_ses-A_trc-18FFDG"
    names = {key: file.name for key, file in outputs.items() if not key.endswith("_json")}
    assert names["tacs"] == f"{stem}_seg-aseg_pvc-rbv_desc-preproc_tacs.tsv"
    assert names["preproc"] == f"{stem}_space-T1w_pvc-rbv_desc-preproc_pet.nii.gz"
    assert "preproc" not in quantification_outputs(scan, tmp_path, "aseg")
    assert len(set(outputs.values())) == len(outputs)
    assert {file.parent for file in outputs.values()} == {tmp_path / "sub-1/ses-A/pet"}
