"""Which pairs and labels an evaluation takes, from the files of a cohort."""

import json
import shutil

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.bids.labels import LabelFile
from m2m_bids.bids.query import query
from m2m_bids.cli.evaluation_plan import (
    OWN_LABELS,
    choose_labels,
    choose_pairs,
    find_references,
)
from m2m_bids.settings import Settings
from m2m_bids.simulation.cohort import TRUTH_FOLDER, TRUTH_XFM

SUBJECTS = ("01", "02", "03")


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("image")


def write_images(*files, affine=None):
    """Write small images, all on one grid by default."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = nb.MGHImage if file.suffix == ".mgz" else nb.Nifti1Image
        affine = np.diag([-1.0, 2, 3, 1]) if affine is None else affine
        nb.save(kind(np.ones((3, 4, 5), np.uint8), affine), file)


@pytest.fixture
def bids_dir(tmp_path):
    """PET of three participants and FA of two; only the files of their T1w are not empty."""
    root = tmp_path / "bids"
    for subject in SUBJECTS:
        stem = f"sub-{subject}_ses-M000"
        folder = root / f"sub-{subject}" / "ses-M000"
        write_images(folder / f"anat/{stem}_T1w.nii.gz")
        touch(folder / f"pet/{stem}_trc-FDG_pet.nii.gz")
        if subject != "03":
            touch(folder / f"dwi/{stem}_FA.nii.gz")
    content = {"Name": "Test", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def settings(bids_dir, tmp_path):
    def make(**changes):
        return Settings(
            bids_dir=bids_dir,
            output_dir=tmp_path / "out",
            work_dir=tmp_path / "work",
            analysis_level="evaluate",
            **changes,
        )

    return make


@pytest.fixture
def scans(bids_dir):
    return query(bids_dir)


@pytest.fixture
def truth(bids_dir, scans):
    """Add what a simulated cohort knows of its scans."""
    for scan in scans:
        folder = bids_dir / TRUTH_FOLDER / scan.file.name.removesuffix(".nii.gz")
        touch(folder / "landmarks.tsv", folder / TRUTH_XFM, folder / "dseg.nii.gz")
        touch(bids_dir / TRUTH_FOLDER / scan.t1w.name.removesuffix(".nii.gz") / "dseg.nii.gz")
    return bids_dir / TRUTH_FOLDER


@pytest.fixture
def dataset(tmp_path):
    """Add a derivatives dataset with labels of the same kind for participants."""

    def make(subjects, desc="", name="smriprep"):
        for subject in subjects:
            stem = f"sub-{subject}_ses-M000"
            file = f"sub-{subject}/ses-M000/anat/{stem}{desc}_dseg.nii.gz"
            write_images(tmp_path / name / file)
        return (name, tmp_path / name)

    return make


def subjects_with_labels(labels):
    return sorted(t1w.name.split("_")[0].removeprefix("sub-") for t1w in labels.of_t1w)


def test_freesurfer_comes_first(settings, scans, truth, dataset, tmp_path):
    for subject in ("01", "02"):
        folder = tmp_path / f"fs/sub-{subject}_ses-M000/mri"
        write_images(folder / "aparc+aseg.mgz", folder / "orig.mgz")
    given = settings(fs_subjects_dir=tmp_path / "fs", derivatives=(dataset(SUBJECTS),))
    labels = choose_labels(given, scans)
    assert subjects_with_labels(labels) == ["01", "02"]
    assert {label.scheme for label in labels.of_t1w.values()} == {"freesurfer"}
    assert [scan.subject for scan in scans if labels.objection(scan)] == ["03"]
    assert "FreeSurfer labels in" in labels.description
    assert not labels.of_scan


def test_a_freesurfer_folder_of_others_is_refused(settings, scans, tmp_path):
    touch(tmp_path / "fs/sub-99/mri/aparc+aseg.mgz")
    with pytest.raises(ValueError, match=r"such files as sub-01_ses-M000/mri/aparc\+aseg.mgz"):
        choose_labels(settings(fs_subjects_dir=tmp_path / "fs"), scans)


def test_labels_of_one_kind_are_taken_from_derivatives(settings, scans, truth, dataset):
    derivatives = (
        dataset((), name="empty"),
        dataset(["01", "02"], "_desc-aseg"),
        dataset(SUBJECTS, name="later"),
    )
    dataset(SUBJECTS)
    derivatives[0][1].mkdir()
    labels = choose_labels(settings(derivatives=derivatives), scans)
    assert subjects_with_labels(labels) == ["01", "02"]
    assert {label.scheme for label in labels.of_t1w.values()} == {"freesurfer"}
    assert labels.description == "FreeSurfer labels (dseg) of the derivatives dataset smriprep"
    shutil.rmtree(derivatives[1][1])
    derivatives[1][1].mkdir()
    labels = choose_labels(settings(derivatives=derivatives), scans)
    assert labels.description == "tissues (dseg) of the derivatives dataset later"


@pytest.mark.parametrize("kind", ["FreeSurfer", "dataset"])
def test_labels_of_another_image_are_refused(settings, scans, dataset, tmp_path, caplog, kind):
    """The T1w of one of two participants has been moved since by 20 mm."""
    for subject in ("01", "02"):
        folder = tmp_path / f"fs/sub-{subject}_ses-M000/mri"
        write_images(*(folder / f"{name}.mgz" for name in ("aparc+aseg", "orig", "rawavg")))
    given = {"derivatives": (dataset(["01", "02"], "_desc-aseg"),)}
    if kind == "FreeSurfer":
        given = {"fs_subjects_dir": tmp_path / "fs"}
    moved = np.diag([-1.0, 2, 3, 1])
    moved[2, 3] = 20
    write_images(next(scan.t1w for scan in scans if scan.subject == "02"), affine=moved)
    assert subjects_with_labels(choose_labels(settings(**given), scans)) == ["01"]
    assert "sub-02_ses-M000_T1w.nii.gz: " in caplog.text
    assert "corners are up to 20 mm" in caplog.text


def test_simulated_scans_have_labels_of_their_own(settings, scans, truth):
    labels = choose_labels(settings(), scans)
    assert subjects_with_labels(labels) == list(SUBJECTS)
    for scan in scans:
        file = truth / scan.file.name.removesuffix(".nii.gz") / "dseg.nii.gz"
        assert labels.of_scan[scan.name] == LabelFile(file, "simulated")


def test_own_tissues_are_named_as_such(settings, scans):
    labels = choose_labels(settings(), scans)
    assert labels.description == OWN_LABELS
    assert "the software under test" in labels.description
    assert not any(labels.objection(scan) for scan in scans)


def test_pairs_of_all_kinds(settings, scans, truth):
    given = settings(n_pairs=2)
    pairs = choose_pairs(given, scans, choose_labels(given, scans))
    found = [(pair.moving.modality, pair.kind) for pair in pairs]
    expected = [("pet", "between"), ("pet", "within"), ("fa", "between"), ("fa", "within")]
    assert found == [kind for kind in expected for _ in range(2)]
    for pair in pairs:
        assert (pair.reference.landmarks is not None) is (pair.kind == "within")


def test_scans_without_labels_are_not_drawn(settings, scans, dataset, caplog):
    given = settings(derivatives=(dataset(["01", "03"]),))
    with caplog.at_level("INFO"):
        pairs = choose_pairs(given, scans, choose_labels(given, scans))
    assert {(pair.moving.subject, pair.fixed.subject) for pair in pairs} == {
        ("01", "03"),
        ("03", "01"),
    }
    assert "left out: sub-02_ses-M000_trc-FDG_pet: its T1w has no labels" in caplog.text


def test_the_only_scan_of_its_kind_goes_to_others(settings, scans):
    own = [scan for scan in scans if scan.modality == "fa" or scan.subject == "03"]
    pairs = choose_pairs(settings(n_pairs=9), own, choose_labels(settings(), own))
    found = sorted(
        (pair.moving.modality, pair.moving.subject, pair.fixed.subject) for pair in pairs
    )
    assert found == [
        ("fa", "01", "02"), ("fa", "02", "01"), ("pet", "03", "01"), ("pet", "03", "02"),
    ]  # fmt: skip


def test_no_pair_is_an_error(settings, scans):
    own = [scan for scan in scans if scan.subject == "01"]
    with pytest.raises(ValueError, match="no pair to evaluate: 2 scans of 1 participants"):
        choose_pairs(settings(), own, choose_labels(settings(), own))


def test_a_table_of_pairs_is_checked_for_labels(settings, scans, dataset, tmp_path):
    (tmp_path / "pairs.tsv").write_text("moving\tfixed\tmodality\n01\t02\tpet\n01\t03\tpet\n")
    given = settings(pairs=tmp_path / "pairs.tsv", derivatives=(dataset(["01", "02"]),))
    labels = choose_labels(given, scans)
    with pytest.raises(ValueError, match=r"line 3: fixed sub-03\S+: its T1w has no labels"):
        choose_pairs(given, scans, labels)


def test_references(bids_dir, scans, truth):
    (truth / scans[0].file.name.removesuffix(".nii.gz") / "landmarks.tsv").unlink()
    shutil.rmtree(truth / scans[1].file.name.removesuffix(".nii.gz"))
    references = find_references(bids_dir, scans)
    assert set(references) == {scan.name for scan in scans} - {scans[1].name}
    first, third = (references[scans[i].name] for i in (0, 2))
    assert first.landmarks is None
    assert first.reference_xfm.name == TRUTH_XFM
    assert third.landmarks.parent.name == scans[2].file.name.removesuffix(".nii.gz")
