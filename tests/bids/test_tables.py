import logging

import pytest

from m2m_bids.bids.layout import QueryError
from m2m_bids.bids.tables import (
    absent_sessions,
    read_subjects_sessions,
    session_times,
)


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def sessions_table(tmp_path, text):
    write(tmp_path / "sub-1/sub-1_sessions.tsv", text)
    return tmp_path / "sub-1"


@pytest.mark.parametrize(
    ("table", "column", "days"),
    [
        ("session_id\tacq_time\nses-a\t2010-01-01\nses-b\t2010-01-03T12:00:00\n", "acq_time", 2.5),
        ("session_id\texamination_date\nses-a\t2010-01-31\nses-b\t2010-02-01\n",
         "examination_date", 1),
        ("session_id\texamination_date\nses-a\t12/31/2010\nses-b\t2011/01/02\n",
         "examination_date", 2),
        ("session_id\tage\nses-a\t70.5\nses-b\t71.5\n", "age", 365.25),
        ("session_id\tage\tacq_time\nses-a\t70.5\t2010-01-01\nses-b\t71.5\tn/a\n", "age", 365.25),
    ],
)  # fmt: skip
def test_sessions_table(tmp_path, table, column, days):
    times = session_times(sessions_table(tmp_path, table), ["a", "b"])
    assert times.column == column
    assert times.days["b"] - times.days["a"] == pytest.approx(days)


@pytest.mark.parametrize(
    "table",
    [
        "session_id\tage\nses-a\t70\nses-b\t70\n",  # whole years do not tell them apart
        "session_id\tage\nses-a\t70\nses-b\tn/a\n",
        "session_id\tage\nses-a\t70\n",
        "session_id\tacq_time\nses-a\tsoon\nses-b\tlater\n",
        "session\tage\nses-a\t70\nses-b\t71\n",
        "",
    ],
)
def test_no_common_measure(tmp_path, table):
    assert session_times(sessions_table(tmp_path, table), ["a", "b"]) is None


def test_no_table(tmp_path):
    assert session_times(tmp_path / "sub-1", ["a", "b"]) is None


def test_unreadable_table_is_told(tmp_path, caplog):
    (tmp_path / "sub-1").mkdir()
    (tmp_path / "sub-1/sub-1_sessions.tsv").write_bytes(b"session_id\tage\n\xff\xfe")
    with caplog.at_level(logging.WARNING):
        assert session_times(tmp_path / "sub-1", ["a"]) is None
    assert "sub-1_sessions.tsv" in caplog.text


def test_scans_table_gives_the_earliest_scan(tmp_path):
    sessions_table(tmp_path, "session_id\tage\nses-a\t70\nses-b\t71\n")
    for label, rows in (("a", "x\t2010-01-05\ny\t2010-01-02\n"), ("b", "x\t2010-01-09\nz\t\n")):
        file = tmp_path / f"sub-1/ses-{label}/sub-1_ses-{label}_scans.tsv"
        write(file, f"filename\tacq_time\n{rows}")
    times = session_times(tmp_path / "sub-1", ["a", "b"])
    assert (times.column, times.days["b"] - times.days["a"]) == ("acq_time", 7)


def test_subjects_sessions(tmp_path):
    text = "participant_id\tsession_id\tage\nsub-1\tses-a\t3\n2\tb\t4\nsub-1\tses-c\t5\n"
    file = write(tmp_path / "x.tsv", f"\ufeff{text}")  # as Excel saves it
    assert read_subjects_sessions(file) == {"1": {"a", "c"}, "2": {"b"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("participant_id\tsession_id\n", "no rows"),
        ("", "no rows"),
        ("participant_id\tvisit\nsub-1\tses-a\n", "lacks the column session_id; found .*visit"),
        ("participant_id,session_id\nsub-1,ses-a\n", "participant_id and session_id.*tabs"),
        ("participant_id\tsession_id\nsub-1\tses-a\nsub-2\n", "line 3 lacks"),
        ("participant_id\tsession_id\nsub-1\tn/a\n", "line 2 lacks"),
    ],
)
def test_bad_table(tmp_path, text, message):
    file = write(tmp_path / "x.tsv", text)
    with pytest.raises(QueryError, match=rf"--subjects-sessions-tsv .*x\.tsv: .*{message}"):
        read_subjects_sessions(file)


def test_rows_without_folder(tmp_path):
    (tmp_path / "sub-1/ses-a").mkdir(parents=True)
    assert absent_sessions(tmp_path, {"1": {"a"}}) == {}
    wanted = {"1": {"b", "a"}, "2": {"a"}}
    assert absent_sessions(tmp_path, wanted) == {"1": {"b"}, "2": {"a"}}
