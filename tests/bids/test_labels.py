import pytest

from m2m_bids.bids.labels import (
    LabelFile,
    find_class_labels,
    find_dseg,
    find_freesurfer_labels,
    find_subject_labels,
)

ENTITIES = {"sub": "01", "ses": "M000"}


@pytest.fixture
def add(tmp_path):
    """Make empty files below a folder."""

    def make(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    return make


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["sub-01_ses-M000/mri/aseg.mgz"], "sub-01_ses-M000/mri/aseg.mgz"),
        (
            ["sub-01_ses-M000/mri/aseg.mgz", "sub-01_ses-M000/mri/aparc+aseg.mgz"],
            "sub-01_ses-M000/mri/aparc+aseg.mgz",
        ),
        (
            ["sub-01/mri/aparc+aseg.mgz", "sub-01_ses-M000/mri/aseg.mgz"],
            "sub-01_ses-M000/mri/aseg.mgz",
        ),
        (["sub-01/mri/aparc+aseg.mgz"], "sub-01/mri/aparc+aseg.mgz"),
        (["sub-01_ses-M012/mri/aparc+aseg.mgz", "sub-011/mri/aseg.mgz"], None),
        (["sub-01_ses-M000/mri/T1.mgz"], None),
    ],
)
def test_freesurfer(add, tmp_path, files, found):
    add(*files)
    expected = LabelFile(tmp_path / found, "freesurfer") if found else None
    assert find_freesurfer_labels(tmp_path, ENTITIES) == expected


def test_a_subject_without_session_may_be_of_any_of_several(add, tmp_path):
    add("sub-01/mri/aseg.mgz")
    assert find_freesurfer_labels(tmp_path, ENTITIES, is_only_t1w=False) is None
    assert find_freesurfer_labels(tmp_path, {"sub": "01"}, is_only_t1w=False) is not None


STEM = "sub-01/ses-M000/anat/sub-01_ses-M000"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([f"{STEM}_dseg.nii.gz"], (f"{STEM}_dseg.nii.gz", "tissues")),
        (
            [f"{STEM}_dseg.nii.gz", f"{STEM}_desc-aseg_dseg.nii.gz"],
            (f"{STEM}_desc-aseg_dseg.nii.gz", "freesurfer"),
        ),
        (
            [f"{STEM}_desc-aseg_dseg.nii.gz", f"{STEM}_desc-aparcaseg_dseg.nii.gz"],
            (f"{STEM}_desc-aparcaseg_dseg.nii.gz", "freesurfer"),
        ),
        ([f"{STEM}_space-T1w_dseg.nii.gz"], (f"{STEM}_space-T1w_dseg.nii.gz", "tissues")),
        # In another space, of another image, of several sessions, of an atlas; no dseg.
        ([f"{STEM}_space-MNI152NLin2009cAsym_dseg.nii.gz"], None),
        ([f"{STEM}_acq-hires_dseg.nii.gz"], None),
        (["sub-01/anat/sub-01_dseg.nii.gz"], None),
        ([f"{STEM}_desc-atlas_dseg.nii.gz"], None),
        ([f"{STEM}_label-GM_probseg.nii.gz", "sub-01/ses-M000/anat/odd_dseg.nii.gz"], None),
    ],
)
def test_dseg(add, tmp_path, names, found):
    add(*names)
    expected = LabelFile(tmp_path / found[0], found[1]) if found else None
    assert find_dseg(tmp_path, ENTITIES) == expected


def test_dseg_of_a_participant_without_sessions(add, tmp_path):
    add("sub-01/anat/sub-01_dseg.nii.gz")
    found = find_dseg(tmp_path, {"sub": "01"})
    assert found == LabelFile(tmp_path / "sub-01/anat/sub-01_dseg.nii.gz", "tissues")


def test_labels_of_a_participant_are_of_its_only_session(add, tmp_path):
    add("freesurfer/sub-01/mri/aseg.mgz", "bids/sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz")
    arguments = tmp_path / "freesurfer", tmp_path / "bids", ENTITIES
    assert find_subject_labels(*arguments).file == tmp_path / "freesurfer/sub-01/mri/aseg.mgz"
    assert find_subject_labels(None, *arguments[1:]) is None
    add("bids/sub-01/ses-M012/anat/sub-01_ses-M012_T1w.nii.gz")
    assert find_subject_labels(*arguments) is None


def test_classes_are_of_freesurfer_then_of_the_first_dataset_that_has_them(add, tmp_path):
    stem = "sub-01/ses-M000/anat/sub-01_ses-M000"
    add(f"a/{stem}_dseg.nii.gz", f"b/{stem}_desc-aseg_dseg.nii.gz")
    datasets = {name: tmp_path / name for name in "ab"}
    label = LabelFile(tmp_path / "aseg.mgz", "freesurfer")
    assert find_class_labels(label, datasets, ENTITIES) == label
    found = find_class_labels(None, datasets, ENTITIES)
    assert found == LabelFile(tmp_path / f"b/{stem}_desc-aseg_dseg.nii.gz", "freesurfer")
    assert find_class_labels(None, {"a": tmp_path / "a"}, ENTITIES) is None
