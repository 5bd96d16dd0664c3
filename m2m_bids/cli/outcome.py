"""What became of a scan: the one place that says so, from its files and what is known of runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from m2m_bids.bids.derivatives import NO_PVC_FIELD, NO_STATISTICS_FIELD, missing_outputs
from m2m_bids.bids.earlier import AsMade, as_made, registered_sidecar
from m2m_bids.bids.naming import expected_outputs, quantification_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import SEGMENTATION, Request, made_from
from m2m_bids.bids.status import REGISTERED, Status, StatusRow, status_row
from m2m_bids.cli.dry_run import target_note
from m2m_bids.json_files import read_json
from m2m_bids.settings import Settings


def read_sidecar(scan: Scan, settings: Settings) -> dict[str, Any]:
    """Read the sidecar of a scan's registered image; empty if there is none, or a damaged one."""
    return read_json(expected_outputs(scan, settings.output_dir, "rigid")["preproc_json"])


def status_of(
    scan: Scan,
    settings: Settings,
    request: Request | None,
    *,
    earlier: StatusRow | None = None,
    failure: str = "",
    seconds: float | None = None,
) -> StatusRow:
    """
    Say what became of a scan.

    Where nothing is run (`Settings.reports_only`) its files count, whatever options they were made
    with: what is asked for now makes no finished scan a failed one.

    Parameters
    ----------
    scan : Scan
    settings : Settings
    request : Request or None
        What its outputs are to be made from; None for a scan that is left out.
    earlier : StatusRow, optional
        What an earlier run said of it. Where nothing was run for it now, the reason for which it
        had failed and the time stay.
    failure : str
        Why it failed, where it did.
    seconds : float, optional
        Wall time; None where nothing was run.

    Returns
    -------
    StatusRow
    """
    if scan.reason or request is None:
        return _left_out(scan, settings, earlier)
    if failure:
        return status_row(scan, "failed", failure, seconds)
    made = as_made(scan, settings.output_dir, request)
    if not settings.reports_only:
        made = made._replace(request=request)
    row = _judge(scan, settings, made, seconds)
    if seconds is not None or earlier is None:
        return row
    # What failed when it was made with other options has not succeeded since.
    if earlier.status == "failed" and (row.status == "failed" or made.changed):
        row = status_row(scan, "failed", earlier.reason)
    return replace(row, seconds=earlier.seconds) if row.status == earlier.status else row


def _left_out(scan: Scan, settings: Settings, earlier: StatusRow | None) -> StatusRow:
    """Say that a scan is left out; where nothing is run, what there is of it still counts."""
    skipped = status_row(scan, "skipped")
    if not settings.reports_only or earlier is None or earlier.status not in REGISTERED:
        return skipped
    return earlier if registered_sidecar(scan.name, settings.output_dir) else skipped


def _judge(scan: Scan, settings: Settings, made: AsMade, seconds: float | None) -> StatusRow:
    """Say what a scan's files are, and what there is to know of them."""
    missing = missing_outputs(scan, settings.output_dir, made.request)
    if "Files" in made.changed:
        # It is not known of which T1w and which further maps there are outputs.
        own = set(expected_outputs(scan, settings.output_dir, "m2m").values())
        missing = [file for file in missing if file in own]
    if missing:
        return status_row(scan, "failed", _fault(missing[0], scan, settings, made), seconds)
    sidecar = read_sidecar(scan, settings)
    notes = notes_of(scan, settings, made.request)
    if made.changed:
        notes.append(f"made with other options: {', '.join(made.changed)}")
    is_rejected = made.request.transform == "m2m" and sidecar.get("Transform") != "m2m"
    if is_rejected:
        notes.insert(0, str(sidecar.get("TransformFallbackReason", "")))
    status: Status = "rigid only" if is_rejected else "done"
    return status_row(scan, status, "; ".join(filter(None, notes)), seconds)


def _fault(file: Path, scan: Scan, settings: Settings, made: AsMade) -> str:
    """Say what is wrong with an output that counts as missing."""
    sidecar = expected_outputs(scan, settings.output_dir, "rigid")["preproc_json"]
    if file.is_file() and not made_from(sidecar):
        file = sidecar
    if not file.is_file():
        return f"{file.name} {'is not there' if settings.reports_only else 'was not written'}"
    if made.changed:
        return f"{file.name} was not made anew; other options now: {', '.join(made.changed)}"
    return f"{file.name} is damaged: run the scan again"


def notes_of(scan: Scan, settings: Settings, request: Request) -> list[str]:
    """
    List what there is to know of a finished scan.

    Parameters
    ----------
    scan : Scan
    settings : Settings
    request : Request
        What its outputs are made from.
    """
    notes = [target_note(scan, settings.further_spaces)] if scan.template else []
    segmentation = request.quantification[SEGMENTATION]
    stat = quantification_outputs(scan, settings.output_dir, segmentation)["stat_json"]
    said = read_json(stat)
    if reason := said.get(NO_STATISTICS_FIELD):
        notes.append(f"no values of regions: {reason}")
    if (other := said.get(NO_PVC_FIELD)) and other != reason:
        notes.append(f"no partial volume correction: {other}")
    return notes
