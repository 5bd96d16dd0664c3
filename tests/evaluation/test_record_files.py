import pytest

from m2m_bids.evaluation.record_files import RECORD_NAME, read_record, save_record

RECORD = {"pair": "a_to_b", "method": "rigid", "status": "done", "dsc": 0.25, "reason": None}
MADE_WITH = {"scan": ["pet.nii", 12, 34], "labels": []}


def test_round_trip(tmp_path):
    (tmp_path / "image.nii").write_bytes(b"image")
    folder = tmp_path / "pairs" / "a_to_b" / "rigid"
    file = save_record(folder, RECORD, MADE_WITH, {"moved.nii": tmp_path / "image.nii"})
    assert file == folder / RECORD_NAME
    assert read_record(folder, MADE_WITH) == RECORD
    assert (folder / "moved.nii").read_bytes() == b"image"
    save_record(folder, RECORD, MADE_WITH)
    assert [path.name for path in folder.parent.iterdir()] == ["rigid"]
    assert [path.name for path in folder.iterdir()] == [RECORD_NAME]


def test_a_record_of_other_inputs_is_not_taken(tmp_path):
    save_record(tmp_path / "rigid", RECORD, MADE_WITH)
    assert read_record(tmp_path / "rigid", {**MADE_WITH, "labels": ["dseg.nii"]}) is None
    assert read_record(tmp_path / "other", MADE_WITH) is None


@pytest.mark.parametrize("content", ["", "no JSON", "{}", '{"made_with": {}}'])
def test_a_damaged_record_is_not_taken(tmp_path, content):
    (tmp_path / RECORD_NAME).write_text(content)
    assert read_record(tmp_path, {}) is None


def test_a_record_is_whole_or_as_before(tmp_path):
    save_record(tmp_path / "rigid", RECORD, MADE_WITH)
    with pytest.raises(FileNotFoundError):
        save_record(tmp_path / "rigid", {}, {}, {"moved.nii": tmp_path / "none.nii"})
    assert read_record(tmp_path / "rigid", MADE_WITH) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["rigid"]
