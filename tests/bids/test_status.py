from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from m2m_bids.bids import locks
from m2m_bids.bids.query import Scan
from m2m_bids.bids.status import read_status, status_row, update_status

COLUMNS = "participant_id\tsession_id\tmodality\tscan\tt1w\tstatus\treason\tseconds"


def scan(sub="01", reason=""):
    file = Path(f"sub-{sub}_trc-FDG_pet.nii.gz")
    t1w = Path(f"sub-{sub}_T1w.nii.gz")
    return Scan("pet", file, {"sub": sub, "trc": "FDG"}, t1w, {"sub": sub}, reason=reason)


def test_table(tmp_path):
    update_status(tmp_path, [status_row(scan("02"), "failed", "a\nb\tc", 3.14159)])
    update_status(tmp_path, [status_row(scan("01"), "done", seconds=60)])
    assert (tmp_path / "logs/status.tsv").read_text().splitlines() == [
        COLUMNS,
        "sub-01\tn/a\tpet\tsub-01_trc-FDG_pet\tsub-01_T1w.nii.gz\tdone\tn/a\t60.0",
        "sub-02\tn/a\tpet\tsub-02_trc-FDG_pet\tsub-02_T1w.nii.gz\tfailed\ta b c\t3.1",
    ]


def test_newer_row_replaces_the_older(tmp_path):
    update_status(
        tmp_path, [status_row(scan("01"), "failed", "x"), status_row(scan("02"), "done")]
    )
    rows = update_status(tmp_path, [status_row(scan("01"), "rigid only", "folds", 1)])
    assert [(row.participant_id, row.status) for row in rows] == [
        ("sub-01", "rigid only"),
        ("sub-02", "done"),
    ]
    assert read_status(tmp_path) == rows


def test_left_out_scan_brings_its_reason():
    row = status_row(scan(reason="no T1w"), "skipped")
    assert (row.status, row.reason, row.seconds) == ("skipped", "no T1w", "n/a")


def test_quotes_survive(tmp_path):
    update_status(tmp_path, [status_row(scan(), "failed", 'cannot read "x')])
    assert read_status(tmp_path)[0].reason == 'cannot read "x'


def test_no_table(tmp_path):
    assert read_status(tmp_path) == []


def add(arguments):
    out_dir, sub = arguments
    update_status(out_dir, [status_row(scan(sub), "done")])


def test_runs_at_once_lose_no_row(tmp_path):
    labels = [f"{i:02d}" for i in range(20)]
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(add, [(tmp_path, sub) for sub in labels]))
    assert [row.participant_id for row in read_status(tmp_path)] == [f"sub-{i}" for i in labels]


def test_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    update_status(tmp_path, [status_row(scan(), "done")])
    assert "cannot be locked" in caplog.text
    assert len(read_status(tmp_path)) == 1
