"""Keep the table of scans, ``logs/status.tsv``."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2m_bids.bids.derivatives import write_text
from m2m_bids.bids.locks import locked

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan

Status = Literal["done", "rigid only", "skipped", "failed"]
REGISTERED = ("done", "rigid only")
"""Where there are registered images."""


@dataclass(frozen=True)
class StatusRow:
    """
    One scan of ``logs/status.tsv``.

    Attributes
    ----------
    participant_id : str
        With its prefix, as in ``participants.tsv``.
    session_id : str
        With its prefix; "n/a" without session.
    modality : str
        "pet" or "fa"; "n/a" for a session without scans.
    scan : str
        Unique name of the scan, or of a session that was asked for and has none.
    t1w : str
        File name of the T1w image; "n/a" without one.
    status : {"done", "rigid only", "skipped", "failed"}
        What became of the scan.
    reason : str
        Why it is not done; "n/a" where it is.
    seconds : str
        Wall time; "n/a" where nothing ran.
    """

    participant_id: str
    session_id: str
    modality: str
    scan: str
    t1w: str
    status: Status
    reason: str = "n/a"
    seconds: str = "n/a"


def status_row(
    scan: "Scan", status: Status, reason: str = "", seconds: float | None = None
) -> StatusRow:
    """Describe what became of a scan; a left-out scan's own reason is the default."""
    reason = " ".join((reason or scan.reason).split())
    return StatusRow(
        participant_id=f"sub-{scan.subject}",
        session_id=f"ses-{scan.session}" if scan.session else "n/a",
        modality=scan.modality,
        scan=scan.name,
        t1w=scan.t1w.name if scan.t1w else "n/a",
        status=status,
        reason=reason or "n/a",
        seconds="n/a" if seconds is None else f"{seconds:.1f}",
    )


def session_row(subject: str, session: str, reason: str) -> StatusRow:
    """Describe a session that was asked for, by labels without prefixes, and has no scan."""
    participant_id, session_id = f"sub-{subject}", f"ses-{session}"
    name = f"{participant_id}_{session_id}"
    return StatusRow(participant_id, session_id, "n/a", name, "n/a", "skipped", reason)


def read_status(out_dir: Path) -> list[StatusRow]:
    """Read ``logs/status.tsv``; empty where there is none."""
    file = out_dir / "logs" / "status.tsv"
    if not file.is_file():
        return []
    columns = [field.name for field in fields(StatusRow)]
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows: list[list[Any]] = [[row.get(key) or "n/a" for key in columns] for row in reader]
    return [StatusRow(*values) for values in rows]


def update_status(out_dir: Path, rows: Iterable[StatusRow]) -> list[StatusRow]:
    """
    Merge rows into ``logs/status.tsv``: a scan's newer row replaces its older one.

    Runs that share an output folder (one per participant on a cluster) take turns.

    Returns
    -------
    list of StatusRow
        All rows of the table, sorted by participant, session and scan.
    """
    with locked(out_dir / "logs" / ".status.lock"):
        rows = list(rows)
        # What was said of a session without scans is no longer true of one that has some.
        sessions = {(row.participant_id, row.session_id) for row in rows if row.modality != "n/a"}
        table = {
            (row.participant_id, row.scan): row
            for row in read_status(out_dir)
            if row.modality != "n/a" or (row.participant_id, row.session_id) not in sessions
        }
        for row in rows:
            older = table.get((row.participant_id, row.scan))
            if older and row.seconds == "n/a" and older.status == row.status:
                # A finished scan is not run again; it keeps its time.
                row = replace(row, seconds=older.seconds)
            table[row.participant_id, row.scan] = row
        merged = sorted(
            table.values(), key=lambda row: (row.participant_id, row.session_id, row.scan)
        )
        stream = io.StringIO()
        columns = [field.name for field in fields(StatusRow)]
        stream.write("\t".join(columns) + "\n")
        for row in merged:
            stream.write("\t".join(" ".join(str(v).split()) for v in asdict(row).values()) + "\n")
        write_text(out_dir / "logs" / "status.tsv", stream.getvalue())
    return merged
