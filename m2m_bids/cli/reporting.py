"""Status table, citation and subject reports of a run, from what is in the output dataset."""

import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from m2m_bids import __version__
from m2m_bids.bids.earlier import registered_sidecar
from m2m_bids.bids.query import Scan
from m2m_bids.bids.status import StatusRow, read_status, session_row, update_status
from m2m_bids.bids.tables import read_subjects_sessions
from m2m_bids.cli.citations import citation_of, versions_of, write_citation
from m2m_bids.cli.crashes import crash_files
from m2m_bids.cli.dry_run import target_note
from m2m_bids.cli.outcome import read_sidecar
from m2m_bids.cli.scan_facts import read_quality, write_scan_fragments, write_t1w_fragment
from m2m_bids.reports.html import write_subject_report
from m2m_bids.settings import Settings

LOGGER = logging.getLogger("m2m_bids")
# What files hold that are damaged, or were changed by hand.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class Reported(NamedTuple):
    """
    A scan of a report.

    Attributes
    ----------
    row : StatusRow
        What became of it.
    scan : Scan or None
        None if it is not of this run.
    sidecar, quality : dict
        What its registered image and its numbers for quality control say; empty if there is none.
    """

    row: StatusRow
    scan: Scan | None
    sidecar: Mapping[str, Any]
    quality: Mapping[str, Any]


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


def write_reports(
    settings: Settings,
    scans: Sequence[Scan],
    rows: Sequence[StatusRow],
    *,
    is_new: bool = True,
) -> list[Path]:
    """
    Write the status table, the text to cite, and the report of each subject.

    A report tells of all scans of its subject, those of earlier runs too. A second run of the same
    command leaves reports as they are.

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
    earlier = set(read_status(settings.output_dir))
    merged = update_status(settings.output_dir, rows)
    with _damage_told(settings.output_dir / "logs" / "CITATION.md"):
        write_citation(settings.output_dir)
    scan_of = {(row.participant_id, row.scan): s for s, row in zip(scans, rows, strict=True)}
    reports = []
    for participant in dict.fromkeys(row.participant_id for row in rows):
        own = [row for row in merged if row.participant_id == participant]
        report = settings.output_dir / f"{participant}.html"
        if not is_new and report.is_file() and earlier.issuperset(own):
            reports.append(report)
            continue
        with _damage_told(report):
            reports.append(_write_report(list(_reported(own, scan_of, settings)), settings))
    return reports


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    """Go on with other files where one cannot be written for what it is to be written from."""
    try:
        yield
    except _DAMAGE as error:
        LOGGER.debug("", exc_info=True)
        LOGGER.warning(
            "%s was not written, for an output that it tells of is damaged (%s: %s); -vv says"
            " where it was read",
            *(file, type(error).__name__, error),
        )


def _reported(
    rows: Iterable[StatusRow],
    scan_of: Mapping[tuple[str, str], Scan],
    settings: Settings,
) -> Iterator[Reported]:
    """Collect what is known of each scan, of this run or of an earlier one."""
    for row in rows:
        scan = scan_of.get((row.participant_id, row.scan))
        if row.status == "skipped":
            sidecar = {}
        elif scan is None or scan.reason:
            sidecar = registered_sidecar(row.scan, settings.output_dir)
        else:
            sidecar = read_sidecar(scan, settings)
        quality = read_quality(row.scan, settings.output_dir) if sidecar else {}
        yield Reported(row, scan, sidecar, quality)


def _write_report(reported: Sequence[Reported], settings: Settings) -> Path:
    """Write the report of a subject."""
    rows = [one.row for one in reported]
    for row, scan, sidecar, _ in reported:
        if scan is not None and not scan.reason:
            write_scan_fragments(scan, row, sidecar, settings)
            if scan.t1w is not None:
                write_t1w_fragment(scan, settings)
    sidecars = [one.sidecar for one in reported if one.sidecar]
    return write_subject_report(
        settings.output_dir,
        rows[0].participant_id,
        settings.run_uuid,
        rows=_table(reported),
        facts=_facts(reported),
        about={**(versions_of(sidecars)), "This page": f"of m2m-bids {__version__}"},
        weights=_weights_cards(sidecars, settings),
        command=shlex.join(["m2m-bids", *sys.argv[1:]]),
        citation=citation_of(rows, settings.output_dir),
        crash_files=crash_files(rows, settings.output_dir, settings.run_uuid),
    )


def _table(reported: Sequence[Reported]) -> list[dict[str, object]]:
    """Make the table of a subject's scans; where some are of earlier runs, it says which."""
    is_mixed = any(one.scan is None for one in reported)
    runs = {True: "an earlier one", False: "this one"}
    return [
        {
            "scan": one.row.scan,
            **({"run": runs[one.scan is None]} if is_mixed else {}),
            **_table_cells(one),
        }
        for one in reported
    ]


def _table_cells(one: Reported) -> dict[str, object]:
    row, scan, sidecar, quality = one
    check = sidecar.get("DeformableQuality", {})
    choice = scan.t1w_choice if scan else ""
    t1w = "" if row.t1w == "n/a" else row.t1w
    return {
        "status": row.status,
        "reason": None if row.reason == "n/a" else row.reason,
        "to be looked at": "; ".join(quality.get("warnings", [])) or None,
        "T1w": (f"{t1w} ({choice})" if t1w and choice else t1w or choice) or None,
        "linear MI (nats)": sidecar.get("LinearScore"),
        "folding (%)": check.get("folding_percent"),
        "forward-backward (mm)": check.get("disagreement_mm"),
        "similarity": check.get("similarity"),
        "similarity gain": check.get("similarity_gain"),
        "displacement, mean (mm)": check.get("mean_displacement_mm"),
        "displacement, max (mm)": check.get("max_displacement_mm"),
        "seconds": None if row.seconds == "n/a" else row.seconds,
    }


def _facts(reported: Sequence[Reported]) -> dict[str, object]:
    """Say what the subject's scans were registered with, by what their sidecars keep."""

    def values(name: str) -> list[str]:
        found = (one.sidecar[name] for one in reported if name in one.sidecar)
        return list(dict.fromkeys(map(str, found)))

    facts = {
        "Scans": [f"{one.row.scan}: {_source(one)}" for one in reported],
        "T1w images": list(dict.fromkeys(filter(None, map(_target, reported)))),
        "Transform asked for": values("TransformRequested"),
        "SHA-256 of the weights": values("WeightsSHA256"),
        "Steps of refinement": values("RefinementSteps"),
        "Device": values("Device"),
    }
    return {name: said for name, said in facts.items() if said}


def _source(one: Reported) -> str:
    """Name the file of a scan."""
    if one.scan is not None:
        return str(one.scan.file)
    sources = one.sidecar.get("Sources")
    return str(sources[0]) if isinstance(sources, list) and sources else "of an earlier run"


def _target(one: Reported) -> str:
    """Name the T1w of a scan, or the template."""
    if one.row.t1w != "n/a":
        return one.row.t1w
    return target_note(one.scan) if one.scan is not None and one.scan.template else ""


def _weights_cards(sidecars: Sequence[Mapping[str, Any]], settings: Settings) -> dict[str, object]:
    """Say what the weights are that images were made with, as far as their cards are at hand."""
    used = list(dict.fromkeys(str(s["WeightsSHA256"]) for s in sidecars if "WeightsSHA256" in s))
    if not used:
        return {}
    from m2m_bids.api import DEFAULT_WEIGHTS
    from m2m_bids.registration.weights import read_card

    folders = dict.fromkeys(filter(None, (settings.weights, DEFAULT_WEIGHTS)))
    cards = {card.sha256: (folder, card) for folder in folders if (card := read_card(folder))}
    if len(used) > 1 or used[0] not in cards:
        return {"SHA-256": used, "Card": "neither m2m-bids nor --weights has these now"}
    folder, card = cards[used[0]]
    return {
        "Folder": str(folder),
        "SHA-256": card.sha256,
        "Network": card.network,
        "Grid": f"{card.grid_size} voxels of {card.spacing_mm:g} mm along each axis",
        "Kinds of images": list(card.modalities),
        "Trained on": card.training_data,
        "Trained by": card.training_command,
    }
