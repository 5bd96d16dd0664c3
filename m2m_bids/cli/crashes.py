"""Find the crash files of scans, of this run or of an earlier one."""

from collections.abc import Sequence
from pathlib import Path

from m2m_bids.bids.status import StatusRow
from m2m_bids.cli.progress import node_of


def crash_files(rows: Sequence[StatusRow], out_dir: Path, run_uuid: str) -> list[Path]:
    """
    Find the crash files that a participant's report shows.

    Parameters
    ----------
    rows : sequence of StatusRow
        All scans of one participant.
    out_dir : Path
        Root of the output dataset.
    run_uuid : str
        Identifier of the run.

    Returns
    -------
    list of Path
        Those of this run, and for each scan that has failed those of the newest run that has any
        of it or of its T1w.
    """
    log_dir = out_dir / rows[0].participant_id / "log"
    found = dict.fromkeys(_crash_files_in(log_dir / run_uuid))
    # Their names begin with the time at which the run began.
    folders = sorted((path for path in log_dir.glob("*") if path.is_dir()), reverse=True)
    for row in rows:
        if row.status != "failed":
            continue
        by_run = ([file for file in _crash_files_in(one) if _is_of(file, row)] for one in folders)
        found |= dict.fromkeys(next(filter(None, by_run), []))
    return list(found)


def _crash_files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("crash*"))


def _is_of(file: Path, row: StatusRow) -> bool:
    """Tell whether a step of a scan, or of what it is registered to, has failed."""
    from m2m_bids.workflows.base import identifier

    if file.suffix != ".txt":
        return False
    parts = node_of(file.read_text(errors="replace").splitlines()).split(".")
    target = "target_" if row.t1w == "n/a" else f"{identifier(row.t1w.split('.')[0])}_"
    return f"{identifier(row.scan)}_wf" in parts or any(p.startswith(target) for p in parts)
