import pytest

from m2m_bids.bids.labels import LabelFile, find_freesurfer_labels, find_subject_labels

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


def test_labels_of_a_participant_are_of_its_only_session(add, tmp_path):
    add("freesurfer/sub-01/mri/aseg.mgz", "bids/sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz")
    arguments = tmp_path / "freesurfer", tmp_path / "bids", ENTITIES
    assert find_subject_labels(*arguments).file == tmp_path / "freesurfer/sub-01/mri/aseg.mgz"
    assert find_subject_labels(None, *arguments[1:]) is None
    add("bids/sub-01/ses-M012/anat/sub-01_ses-M012_T1w.nii.gz")
    assert find_subject_labels(*arguments) is None
