"""Status table, citation and subject reports of a run, from what is in the output dataset."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2m_bids import __version__
from m2m_bids.bids.derivatives import (
    NO_PVC_FIELD,
    NO_STATISTICS_FIELD,
    missing_outputs,
    software_versions,
    write_text,
)
from m2m_bids.bids.naming import expected_outputs, qc_file, quantification_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import SEGMENTATION, Request, read_json
from m2m_bids.bids.status import (
    StatusRow,
    read_status,
    session_row,
    status_row,
    update_status,
)
from m2m_bids.bids.tables import read_subjects_sessions
from m2m_bids.cli.dry_run import target_note
from m2m_bids.cli.scan_facts import write_scan_fragments, write_t1w_fragment
from m2m_bids.reports.citation import cite
from m2m_bids.reports.html import write_subject_report
from m2m_bids.settings import Settings


def write_citation(settings: Settings, methods: str) -> Path:
    """
    Write ``logs/CITATION.md``, ``.html`` and ``.bib``.

    Parameters
    ----------
    settings : Settings
    methods : str
        What the workflow says of itself, Markdown with ``[@key]`` for references.

    Returns
    -------
    Path
        The first.
    """
    folder = settings.output_dir / "logs"
    citation = cite(version=__version__, methods=methods, software=software_versions())
    write_text(folder / "CITATION.md", citation.markdown)
    write_text(folder / "CITATION.html", citation.html)
    write_text(folder / "CITATION.bib", citation.bibtex)
    return folder / "CITATION.md"


def read_sidecar(scan: Scan, settings: Settings) -> dict[str, Any]:
    """Read the sidecar of a scan's registered image; empty if there is none."""
    file = expected_outputs(scan, settings.output_dir, settings.transform)["preproc_json"]
    return json.loads(file.read_text()) if file.is_file() else {}


def status_of(
    scan: Scan,
    settings: Settings,
    request: Request | None,
    *,
    failure: str = "",
    seconds: float | None = None,
) -> StatusRow:
    """
    Say what became of a scan.

    Parameters
    ----------
    scan : Scan
    settings : Settings
    request : Request or None
        What its outputs are to be made from; None for a scan that is left out.
    failure : str
        Why it failed, where it did.
    seconds : float, optional
        Wall time.

    Returns
    -------
    StatusRow
    """
    if scan.reason or request is None:
        return status_row(scan, "skipped")
    missing = missing_outputs(scan, settings.output_dir, request)
    if failure or missing:
        reason = failure or f"{missing[0].name} was not written"
        return status_row(scan, "failed", reason, seconds)
    sidecar = read_sidecar(scan, settings)
    notes = notes_of(scan, settings, request)
    if sidecar["Transform"] != "m2m" and settings.transform == "m2m":
        notes.insert(0, sidecar.get("TransformFallbackReason", ""))
        return status_row(scan, "rigid only", "; ".join(filter(None, notes)), seconds)
    return status_row(scan, "done", "; ".join(notes), seconds)


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


def rows_without_scans(settings: Settings, scans: Iterable[Scan]) -> list[StatusRow]:
    """
    Say of which sessions in ``--subjects-sessions-tsv`` there is nothing to register.

    Parameters
    ----------
    settings : Settings
    scans : iterable of Scan
        All scans of the run.

    Returns
    -------
    list of StatusRow
        Sorted by participant and session, without those that other options leave out.
    """
    if settings.subjects_sessions_tsv is None:
        return []
    table = settings.subjects_sessions_tsv
    found = {(scan.subject, scan.session) for scan in scans}
    wanted = read_subjects_sessions(table)
    rows = []
    for label in sorted(wanted.keys() & set(settings.participant_label or wanted)):
        for session in sorted(wanted[label] & set(settings.session_label or wanted[label])):
            folder = settings.bids_dir / f"sub-{label}" / f"ses-{session}"
            if (label, session) not in found:
                why = "no scan that is asked for was found there"
                if not folder.is_dir():
                    why = f"{settings.bids_dir} has no such session"
                rows.append(session_row(label, session, f"listed in {table}, but {why}"))
    return rows


def as_before(row: StatusRow, earlier: Iterable[StatusRow]) -> StatusRow:
    """
    Keep what an earlier run knows of a scan that nothing was run for.

    Parameters
    ----------
    row : StatusRow
        What this run says of the scan.
    earlier : iterable of StatusRow
        Rows of the status table.

    Returns
    -------
    StatusRow
        With the reason and the time of the earlier row, if that has the same status and a time.
    """
    for other in earlier:
        is_same = (other.participant_id, other.scan) == (row.participant_id, row.scan)
        if is_same and other.status == row.status and other.seconds != "n/a":
            return replace(row, reason=other.reason, seconds=other.seconds)
    return row


def write_reports(
    settings: Settings,
    scans: Sequence[Scan],
    rows: Sequence[StatusRow],
    *,
    is_new: bool = True,
) -> list[Path]:
    """
    Write the status table and the report of each subject.

    A second run of the same command leaves reports as they are.

    Parameters
    ----------
    settings : Settings
    scans : sequence of Scan
        All scans of the run, those left out too.
    rows : sequence of StatusRow
        What became of each, in the same order.
    is_new : bool
        Whether anything was run; otherwise a report is written only if there is none, or if
        something else has become of a scan.

    Returns
    -------
    list of Path
        The reports.
    """
    earlier = read_status(settings.output_dir)
    update_status(settings.output_dir, rows)
    weights = _weights_card(settings)
    reports = []
    for subject in dict.fromkeys(scan.subject for scan in scans):
        own = [(s, row) for s, row in zip(scans, rows, strict=True) if s.subject == subject]
        report = settings.output_dir / f"sub-{subject}.html"
        if not is_new and report.is_file() and all(row in earlier for _, row in own):
            reports.append(report)
            continue
        for scan, row in own:
            if not scan.reason:
                write_scan_fragments(scan, row, read_sidecar(scan, settings), settings)
                if scan.t1w is not None:
                    write_t1w_fragment(scan, settings)
        table = [_table_row(scan, row, settings) for scan, row in own]
        reports.append(
            write_subject_report(
                settings.output_dir,
                subject,
                settings.run_uuid,
                rows=table,
                facts=_facts([scan for scan, _ in own], settings),
                about=software_versions(),
                weights=weights,
                command=" ".join(sys.argv),
            )
        )
    return reports


def _table_row(scan: Scan, row: StatusRow, settings: Settings) -> dict[str, object]:
    sidecar = read_sidecar(scan, settings) if not scan.reason else {}
    quality = read_json(qc_file(scan.name, settings.output_dir)) if sidecar else {}
    check = sidecar.get("DeformableQuality", {})
    return {
        "scan": scan.name,
        "status": row.status,
        "reason": None if row.reason == "n/a" else row.reason,
        "to be looked at": "; ".join(quality.get("warnings", [])) or None,
        "T1w": f"{row.t1w} ({scan.t1w_choice})" if scan.t1w else scan.t1w_choice or None,
        "linear MI (nats)": sidecar.get("LinearScore"),
        "folding (%)": check.get("folding_percent"),
        "forward-backward (mm)": check.get("disagreement_mm"),
        "similarity": check.get("similarity"),
        "similarity gain": check.get("similarity_gain"),
        "displacement, mean (mm)": check.get("mean_displacement_mm"),
        "displacement, max (mm)": check.get("max_displacement_mm"),
        "seconds": None if row.seconds == "n/a" else row.seconds,
    }


def _facts(scans: Sequence[Scan], settings: Settings) -> dict[str, object]:
    """Say what the subject's scans were registered with."""
    sidecars = [read_sidecar(scan, settings) for scan in scans if not scan.reason]

    def values(name: str) -> list[str]:
        return list(dict.fromkeys(str(sidecar[name]) for sidecar in sidecars if name in sidecar))

    return {
        "Scans": [f"{scan.name}: {scan.file}" for scan in scans],
        "T1w images": list(
            dict.fromkeys(
                str(scan.t1w or target_note(scan)) for scan in scans if scan.t1w or scan.template
            )
        ),
        "Transform asked for": settings.transform,
        "Output spaces": list(settings.output_spaces),
        "Weights": str(settings.weights or "default of m2m-bids"),
        "SHA-256 of the weights": values("WeightsSHA256"),
        "Steps of refinement": values("RefinementSteps"),
        "Device": values("Device"),
    }


def _weights_card(settings: Settings) -> dict[str, object]:
    """Say what the weights are, as their card does; nothing of a rigid run."""
    if settings.transform == "rigid":
        return {}
    from m2m_bids.api import DEFAULT_WEIGHTS
    from m2m_bids.registration.weights import read_card

    folder = settings.weights or DEFAULT_WEIGHTS
    card = read_card(folder)
    return {
        "Folder": str(folder),
        "SHA-256": card.sha256,
        "Network": card.network,
        "Grid": f"{card.grid_size} voxels of {card.spacing_mm:g} mm along each axis",
        "Kinds of images": list(card.modalities),
        "Trained on": card.training_data,
        "Trained by": card.training_command,
    }
