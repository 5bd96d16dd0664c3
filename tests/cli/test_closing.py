import re
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from m2m_bids.bids.status import StatusRow
from m2m_bids.cli.closing import closing_text
from m2m_bids.settings import Settings


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "bids").mkdir()
    begin = datetime.now() - timedelta(hours=1, minutes=2, seconds=3)
    return Settings(
        bids_dir=tmp_path / "bids",
        output_dir=tmp_path / "out",
        work_dir=tmp_path / "w",
        run_uuid=f"{begin:%Y%m%d-%H%M%S}_{uuid4()}",
    )


def row(subject, status, reason="n/a"):
    scan = f"sub-{subject}_pet"
    return StatusRow(f"sub-{subject}", "n/a", "pet", scan, "T1w.nii.gz", status, reason)


def test_every_scan_that_is_not_done_is_named(settings, tmp_path):
    out = tmp_path / "out"
    crashed = out / "sub-2/log" / settings.run_uuid
    crashed.mkdir(parents=True)
    (crashed / "crash-1.txt").touch()
    (out / "sub-1/log/an-earlier-run").mkdir(parents=True)
    (out / "sub-1/log/an-earlier-run/crash-1.txt").touch()
    rows = [row(2, "failed", "torn"), row(1, "done"), row(3, "rigid only", "folds"),
            row(4, "skipped", "no T1w")]  # fmt: skip
    reports = [out / f"sub-{n}.html" for n in (1, 2)]
    lines = closing_text(settings, rows, reports).splitlines()
    assert re.fullmatch(r"Time: 1:02:\d\d", lines.pop(-2))
    assert lines == [
        "1 done, 1 rigid only, 1 skipped, 1 failed",
        "  rigid only: sub-3_pet: folds",
        "  skipped: sub-4_pet: no T1w",
        "  failed: sub-2_pet: torn",
        f"Report: {out}/sub-1.html",
        f"Report: {out}/sub-2.html",
        f"Images and transforms: {out}/sub-*",
        f"Text to cite: {out}/logs/CITATION.md",
        f"Status: {out}/logs/status.tsv",
        f"Crash files: {crashed}",
        "The same command, given again, runs only what is not finished.",
    ]


def test_many_subjects_take_few_lines(settings, tmp_path):
    out = tmp_path / "out"
    for number in range(40):
        folder = out / f"sub-{number}/log" / settings.run_uuid
        folder.mkdir(parents=True)
        (folder / "crash-1.txt").touch()
    rows = [row(number, "done") for number in range(40)]
    text = closing_text(settings, rows, [Path(f"sub-{n}.html") for n in range(40)])
    assert f"Reports: {out}/sub-*.html (40)" in text
    assert f"Crash files: {out}/sub-*/log/{settings.run_uuid}" in text
    assert len(text.splitlines()) == 7


def test_reports_alone_run_nothing_when_given_again(settings):
    text = closing_text(replace(settings, reports_only=True), [row(1, "failed", "torn")], [])
    assert text.endswith("given again without --reports-only, runs only what is not finished.")


def test_nothing_done(settings):
    text = closing_text(settings, [row(1, "skipped", "no T1w")], [])
    assert "Images" not in text
    assert "again" not in text
