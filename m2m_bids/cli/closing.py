"""The summary at the end of a run: what became of the scans, and where everything is."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from m2m_bids.bids.status import StatusRow
from m2m_bids.cli.durations import clock
from m2m_bids.settings import Settings

STATUSES = ("done", "rigid only", "skipped", "failed")
# More reports than these are named by a pattern.
_MOST_REPORTS = 5


def closing_text(settings: Settings, rows: Sequence[StatusRow], reports: Sequence[Path]) -> str:
    """
    Say what is to be known of each scan, and where reports, images and crash files are.

    Parameters
    ----------
    settings : Settings
    rows : sequence of StatusRow
        All scans of the run.
    reports : sequence of Path
        The subjects' reports.

    Returns
    -------
    str
        Lines, the first of them the counts, without a newline at the end.
    """
    counts = Counter(row.status for row in rows)
    lines = [
        ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name]) or "no scans"
    ]
    for row in sorted(rows, key=lambda row: STATUSES.index(row.status)):
        if row.status != "done" or row.reason != "n/a":
            lines.append(f"  {row.status}: {row.scan}: {row.reason}")
    out_dir = settings.output_dir
    if len(reports) > _MOST_REPORTS:
        lines.append(f"Reports: {out_dir / 'sub-*.html'} ({len(reports)})")
    else:
        lines += [f"Report: {report}" for report in reports]
    if counts["done"] or counts["rigid only"]:
        lines.append(f"Images and transforms: {out_dir / 'sub-*'}")
        lines.append(f"Text to cite: {out_dir / 'logs' / 'CITATION.md'}")
    lines.append(f"Status: {out_dir / 'logs' / 'status.tsv'}")
    lines += [f"Crash files: {folder}" for folder in _crash_dirs(settings)]
    lines.append(f"Time: {clock(_elapsed_s(settings))}")
    if counts["failed"]:
        without = " without --reports-only" if settings.reports_only else ""
        lines.append(f"The same command, given again{without}, runs only what is not finished.")
    return "\n".join(lines)


def _crash_dirs(settings: Settings) -> list[Path]:
    """Folders with crash files of this run, or one pattern for many."""
    found = settings.output_dir.glob(f"sub-*/log/{settings.run_uuid}/crash-*.txt")
    folders = sorted({file.parent for file in found})
    if len(folders) > _MOST_REPORTS:
        return [settings.output_dir / "sub-*" / "log" / settings.run_uuid]
    return folders


def _elapsed_s(settings: Settings) -> float:
    """Wall time of the run, whose name begins with its start."""
    begin = datetime.strptime(settings.run_uuid.partition("_")[0], "%Y%m%d-%H%M%S")
    return (datetime.now() - begin).total_seconds()
