"""What is left of the work folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from m2m_bids.cli.purge import purge_finished
from m2m_bids.settings import Settings


@pytest.fixture
def work(tmp_path):
    """A work folder with results of three participants."""
    folder = tmp_path / "work"
    for name in ("m2m_bids_wf/sub_1_wf/a", "m2m_bids_wf/sub_2plus_wf/a", "m2m_bids_wf/sub_3_wf",
                 "caches/xdg"):  # fmt: skip
        (folder / name).mkdir(parents=True)
    return folder


def test_only_held_participants_without_failure_are_purged(work, tmp_path):
    """No scan of the third was to be registered: another run may be at work on it."""
    (tmp_path / "bids").mkdir()
    settings = Settings(bids_dir=tmp_path / "bids", output_dir=tmp_path / "out", work_dir=work)
    became = [
        ("1", "done"),
        ("1", "failed"),
        ("2+", "rigid only"),
        ("2+", "skipped"),
        ("3", "skipped"),
        ("4", "done"),
    ]
    scans = [SimpleNamespace(subject=subject) for subject, _ in became]
    rows = [SimpleNamespace(status=status) for _, status in became]
    purge_finished(settings, scans, rows, {"1", "2+", "4"})
    left = {file.relative_to(work).as_posix() for file in Path(work).glob("*/*")}
    assert left == {"m2m_bids_wf/sub_1_wf", "m2m_bids_wf/sub_3_wf", "caches/xdg"}
