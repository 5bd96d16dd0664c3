import errno
import os
import stat

import pytest

from m2m_bids.bids import database
from m2m_bids.bids.database import open_index
from m2m_bids.bids.layout import QueryError, find_files
from m2m_bids.bids.query import query


def add(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("image")


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "bids"
    for sub in ("1", "2"):
        for ses in ("M000", "M012"):
            stem = f"sub-{sub}_ses-{ses}"
            add(root / f"sub-{sub}/ses-{ses}", f"anat/{stem}_T1w.nii.gz",
                f"pet/{stem}_trc-18FFDG_rec-coregavg_run-1_pet.nii.gz",
                f"dwi/{stem}_FA.nii.gz")  # fmt: skip
    return root


def test_same_scans_as_without(dataset, tmp_path):
    expected = query(dataset)
    assert query(dataset, database_dir=tmp_path / "db") == expected
    assert query(dataset, database_dir=tmp_path / "db") == expected
    assert len(list((tmp_path / "db").iterdir())) == 1
    some = query(dataset, participant_labels=["2"], database_dir=tmp_path / "db")
    assert some == [scan for scan in expected if scan.subject == "2"]


def test_it_is_read_and_not_made_again(dataset, tmp_path, monkeypatch):
    open_index(dataset, tmp_path / "db")
    monkeypatch.setattr(database, "_make_database", None)
    monkeypatch.setattr("bids.layout.BIDSLayoutIndexer.__call__", None)  # nothing is walked
    assert len(find_files(open_index(dataset, tmp_path / "db"), {"suffix": "pet"})) == 4


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "new session"])
def test_changed_dataset(dataset, tmp_path, change):
    query(dataset, database_dir=tmp_path / "db")
    pet = dataset / "sub-1/ses-M000/pet"
    file = pet / "sub-1_ses-M000_trc-18FFDG_rec-coregavg_run-1_pet.nii.gz"
    if change == "added":
        add(pet, file.name.replace("run-1", "run-2"))
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(pet / file.name.replace("FDG", "FBB"))
    else:
        add(dataset / "sub-1/ses-M024/pet", "sub-1_ses-M024_pet.nii.gz")
    assert query(dataset, database_dir=tmp_path / "db") == query(dataset)
    assert len(list((tmp_path / "db").iterdir())) == 2  # another run may read the old one


def age(folder, days):
    """Let a folder have been used some days ago."""
    before = folder.stat().st_mtime - days * 24 * 3600
    os.utime(folder, (before, before))


def test_an_index_that_another_run_reads_stays(dataset, tmp_path):
    """Until it ends: also one that is old, but in use."""
    open_index(dataset, tmp_path / "db").session.close()
    (folder,) = (tmp_path / "db").iterdir()
    age(folder, 30)
    reading = open_index(dataset, tmp_path / "db")
    add(dataset / "sub-1/ses-M024/pet", "sub-1_ses-M024_pet.nii.gz")
    assert len(find_files(open_index(dataset, tmp_path / "db"), {"suffix": "pet"})) == 5
    assert folder.is_dir()
    assert len(find_files(reading, {"suffix": "pet"})) == 4


def test_what_was_not_used_for_long_is_removed(dataset, tmp_path):
    db = tmp_path / "db"
    open_index(dataset, db).session.close()
    (old,) = db.iterdir()
    other = db / "other-01234567-0123456789abcdef"
    killed, building = db / ".indexabcdefgh", db / ".indexijklmnop"
    for folder in (other, killed, building):
        (folder / "index").mkdir(parents=True)
    for folder in (old, other, killed):
        age(folder, 8)
    age(building, 1)
    add(dataset / "sub-1/ses-M024/pet", "sub-1_ses-M024_pet.nii.gz")
    open_index(dataset, db).session.close()
    left = set(db.iterdir())
    assert not {old, killed} & left
    assert {other, building} < left
    assert len(left) == 3


def test_an_index_of_another_user_is_read(dataset, tmp_path, monkeypatch):
    expected = query(dataset)
    query(dataset, database_dir=tmp_path / "db")

    def refuse(path, times=None):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(database.os, "utime", refuse)
    assert query(dataset, database_dir=tmp_path / "db") == expected


def test_two_datasets_share_a_folder(dataset, tmp_path):
    add(tmp_path / "dti", "sub-1/ses-M000/dwi/sub-1_ses-M000_param-FA_dwimap.nii.gz")
    options = {"derivatives": {"dti": tmp_path / "dti"}}
    for _ in range(2):
        assert query(dataset, database_dir=tmp_path / "db", **options) == query(dataset, **options)
    assert len(list((tmp_path / "db").iterdir())) == 2


def test_dataset_stays_untouched(dataset, tmp_path):
    before = sorted((str(path), os.stat(path).st_mtime_ns) for path in dataset.rglob("*"))
    for path in [dataset, *dataset.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    query(dataset, database_dir=tmp_path / "db")
    assert sorted((str(path), os.stat(path).st_mtime_ns) for path in dataset.rglob("*")) == before
    for path in [dataset, *dataset.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_folder_that_cannot_be_read(dataset, tmp_path, monkeypatch):
    """Whoever may read everything, as root, sees none: the system's answer is imitated."""
    locked, scandir = dataset / "sub-2/ses-M012", os.scandir

    def refuse(path):
        if os.fspath(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(locked))
        return scandir(path)

    monkeypatch.setattr(database.os, "scandir", refuse)
    with pytest.raises(QueryError, match=rf"{dataset}: cannot be indexed .*{locked}.* readable"):
        query(dataset, database_dir=tmp_path / "db")


def test_folder_that_cannot_be_made(dataset, tmp_path):
    add(tmp_path, "file")
    with pytest.raises(QueryError, match=r"--bids-database-dir .*file"):
        query(dataset, database_dir=tmp_path / "file" / "db")
