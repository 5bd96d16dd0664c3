"""The level ``group``: tables, a page and mean images of all scans that were registered."""

import logging
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2m_bids.bids.derivatives import (
    software_versions,
    write_dataset_files,
    write_json,
    write_text,
)
from m2m_bids.bids.locks import hold_level, remove_all_unfinished
from m2m_bids.bids.naming import output_entities, output_path, parse_name, qc_file
from m2m_bids.bids.status import REGISTERED, StatusRow, read_status
from m2m_bids.bids.tracers import common_spellings, tracer_label, tracer_names
from m2m_bids.cli.cohort_images import (
    SUFFIXES,
    UNKNOWN_TRACER,
    average_scans,
    remove_averages,
)
from m2m_bids.json_files import read_json_object
from m2m_bids.quality.cohort import outliers
from m2m_bids.quality.limits import (
    column_names,
    definitions,
    is_within_its_error,
    warnings_of,
)
from m2m_bids.reports.group import write_group_report
from m2m_bids.reports.html import anchor_of
from m2m_bids.settings import MODALITIES, Settings

LOGGER = logging.getLogger("m2m_bids")
STATES = {
    "initial": "before registration",
    "rigid": "after rigid alignment (to a template, affine)",
    "used": "by the transform that was used",
    "native": "of the scan as it came",
    "deformable": "of the deformable step, used or not",
}
FIXED_COLUMNS = {
    "participant_id": "Participant.",
    "session_id": "Session; n/a where there is none.",
    "scan": "Unique name of the scan.",
    "t1w": "T1w image that it was registered to.",
    "status": "done, rigid only, skipped or failed.",
    "reason": "Why it is not done.",
    "seconds": "Wall time.",
    "decision": "Transform that was used: m2m, rigid, or affine to a template.",
    "kind": "Scans that it is compared with: modality, tracer, template where there was no T1w.",
}
# Options that choose scans of the raw dataset, which this level does not look into.
NOT_FOR_GROUP = (
    "session_label",
    "tracer_label",
    "rec_label",
    "run_label",
    "subjects_sessions_tsv",
    "bids_filter_file",
)
FLAGS = "Why the scan should be looked at, separated by semicolons."


def run_group(settings: Settings) -> int:
    """
    Collect all scans of an output dataset.

    Parameters
    ----------
    settings : Settings
        Of the participants and modalities that it selects.

    Returns
    -------
    int
        0.

    Raises
    ------
    ValueError
        If no scan is in ``logs/status.tsv``, or scans are chosen in a way that this level has not.
    """
    if unused := [name for name in NOT_FOR_GROUP if getattr(settings, name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ValueError(
            f"{options}: the level 'group' chooses scans by --participant-label and --modalities"
            " only; leave it out"
        )
    _selected_rows(settings)  # before a folder is made for the lock
    with hold_level("group", [settings.output_dir]):
        for folder in settings.output_dir.glob("group*/"):
            remove_all_unfinished(folder)
        rows = _selected_rows(settings)
        found = {row.participant_id.removeprefix("sub-") for row in rows}
        if missing := [label for label in settings.participant_label if label not in found]:
            LOGGER.warning("No scan of participants %s is in the table.", ", ".join(missing))
        _collect(rows, settings)
    return 0


def _selected_rows(settings: Settings) -> list[StatusRow]:
    rows = [row for row in read_status(settings.output_dir) if _is_selected(row, settings)]
    if not rows:
        raise ValueError(
            f"{settings.output_dir / 'logs' / 'status.tsv'}: no scan of the selected participants"
            " is in it; run the level 'participant' first"
        )
    return rows


def _part_of(rows: Sequence[StatusRow], settings: Settings) -> str:
    """Say which part of all scans is selected; empty of all of them."""
    if len(rows) == sum(row.modality in MODALITIES for row in read_status(settings.output_dir)):
        return ""
    labels = ", ".join(settings.participant_label)
    people = f"participants {labels}" if labels else "all participants"
    return f"{people}; {', '.join(settings.modalities)}. The page of all scans is group.html."


def _collect(rows: Sequence[StatusRow], settings: Settings) -> None:
    """Write tables, mean images and the page, those of a part beside those of all scans."""
    part = _part_of(rows, settings)
    stem = "group_part" if part else "group"
    remove_averages(settings.output_dir / stem)
    write_dataset_files(settings.output_dir, settings.datasets)
    scans = [_scan(row, settings.output_dir) for row in rows]
    _name_kinds(scans)
    _add_outliers(scans)
    written = [
        file
        for modality in MODALITIES
        if (file := _write_table(scans, modality, settings.output_dir / f"{stem}_{modality}.tsv"))
    ]
    averages = list(average_scans(scans, settings, settings.output_dir / stem))
    counts = Counter(scan["status"] for scan in scans)
    n_flagged = sum(bool(scan["flags"]) for scan in scans)
    page = write_group_report(
        settings.output_dir / f"{stem}.html",
        scans,
        _shown_columns(),
        averages=averages,
        averages_note="There are no images in a template's space. Run the level 'participant'"
        " with --output-spaces MNI152NLin2009aSym:res-2 to have them.",
        facts={
            **({"A part of the dataset": part} if part else {}),
            "Scans": ", ".join(f"{number} {status}" for status, number in counts.items()),
            "To look at": f"{n_flagged} of {len(scans)}",
            "Participants": len({scan["participant_id"] for scan in scans}),
            "Tables": [file.name for file in written],
        },
        software=software_versions(),
        command=shlex.join(["m2m-bids", *sys.argv[1:]]),
    )
    lines = [f"{len(scans)} scans, {n_flagged} to look at"]
    lines += [f"Table: {file}" for file in written]
    sys.stdout.write("\n".join([*lines, f"Page: {page}"]) + "\n")


def _is_selected(row: StatusRow, settings: Settings) -> bool:
    labels = settings.participant_label
    is_wanted = not labels or row.participant_id.removeprefix("sub-") in labels
    return is_wanted and row.modality in settings.modalities


def _scan(row: StatusRow, output_dir: Path) -> dict[str, Any]:
    """Say all that is known of a scan; nothing is left out, whatever is missing of it."""
    scan: dict[str, Any] = {
        **{name: getattr(row, name) for name in FIXED_COLUMNS if hasattr(row, name)},
        "modality": row.modality,
        "kind": row.modality.upper(),
        "reason": "" if row.reason == "n/a" else row.reason,
        "decision": "n/a",
        "entities": None,
        "tracer": "",
        "target": "T1w",
        "report": _report_link(row, output_dir),
        "flags": [],
        "odd": [],
        "numbers": {},
    }
    if row.status not in REGISTERED:
        scan["flags"] = [row.reason] if row.status == "failed" else []
        return scan
    try:
        content = read_json_object(qc_file(row.scan, output_dir))
        scan["entities"] = parse_name(row.scan).entities
        scan["numbers"] = {name: _finite(content.get(name)) for name in column_names()}
        scan["decision"] = str(content["decision"])
        scan["target"] = content.get("target", "T1w")
        if row.modality == "pet":
            scan["tracer"] = _tracer_of(scan["entities"], scan["target"], output_dir)
        found = warnings_of(scan["numbers"], is_same_person=scan["target"] == "T1w")
        is_rejected = row.status == "rigid only" and not is_within_its_error(scan["numbers"])
        rejected = [f"rigid only: {scan['reason'] or 'no reason is known'}"] if is_rejected else []
        scan["flags"], scan["odd"] = [*rejected, *found.values()], list(found)
    except (ValueError, KeyError, TypeError) as error:
        LOGGER.debug("", exc_info=True)
        scan["flags"] = [f"its numbers cannot be read ({type(error).__name__}): run it again"]
    return scan


def _name_kinds(scans: Sequence[dict[str, Any]]) -> None:
    """Say what each scan is compared with; one spelling stands for all of a tracer."""
    spellings = common_spellings(scan["tracer"] for scan in scans if scan["tracer"])
    for scan in scans:
        if not scan["numbers"]:
            continue
        scan["tracer"] = spellings.get(scan["tracer"], "")
        if scan["modality"] == "pet":
            scan["kind"] += f" {scan['tracer'] or UNKNOWN_TRACER}"
        if scan["target"] != "T1w":
            scan["kind"] += f" at {scan['target']}"


def _tracer_of(entities: Mapping[str, str], target: str, output_dir: Path) -> str:
    """Return the tracer's label: of the name, else of the registered image's sidecar; or none."""
    if named := tracer_names(entities, {}):
        return named[0]
    own = output_entities(entities)
    file = output_path(
        output_dir, own, datatype="pet", suffix="pet", extension=".json",
        space=target, desc="preproc",
    )  # fmt: skip
    try:
        return tracer_label(read_json_object(file).get("TracerName"))
    except ValueError as error:
        LOGGER.warning("%s; its tracer is unknown", error)
        return ""


def _report_link(row: StatusRow, output_dir: Path) -> str | None:
    """Link to the scan's part of its participant's report; None where there is no report."""
    report = output_dir / f"{row.participant_id}.html"
    if not report.is_file():
        return None
    try:
        entities = output_entities(parse_name(row.scan).entities)
    except ValueError:
        return report.name
    scan = [(key, label) for key, label in entities.items() if key != "sub"]
    return f"{report.name}#{anchor_of(scan, 'summary', SUFFIXES[row.modality])}"


def _finite(value: Any) -> float | None:
    """Return a number that a float can hold, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def _add_outliers(scans: Sequence[dict[str, Any]]) -> None:
    """Flag what is far from the other scans of its kind."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for scan in scans:
        kinds[scan["kind"]].append(scan)
    for own in kinds.values():
        for scan, found in zip(own, outliers([scan["numbers"] for scan in own]), strict=True):
            new = {name: text for name, text in found.items() if name not in scan["odd"]}
            scan["flags"] += new.values()
            scan["odd"] += new


def _write_table(scans: Sequence[Mapping[str, Any]], modality: str, file: Path) -> Path | None:
    """Write the table of a modality and the description of its columns; without scans, none."""
    own = [scan for scan in scans if scan["modality"] == modality]
    if not own:
        for older in (file, file.with_suffix(".json")):
            older.unlink(missing_ok=True)
        return None
    columns = column_names()
    lines = ["\t".join([*FIXED_COLUMNS, *columns, "flags"])]
    for scan in own:
        numbers = [scan["numbers"].get(name) for name in columns]
        cells = [
            *(_cell(scan[name]) for name in FIXED_COLUMNS),
            *("n/a" if number is None else f"{number:.6g}" for number in numbers),
            _cell("; ".join(scan["flags"])),
        ]
        lines.append("\t".join(cells))
    write_text(file, "\n".join(lines) + "\n")
    described: dict[str, dict[str, str]] = {
        name: {"Description": text} for name, text in FIXED_COLUMNS.items()
    }
    for column, name in columns.items():
        definition = definitions()[name]
        unit = {"Units": definition.unit} if definition.unit else {}
        described[column] = {
            "LongName": _title(column, name),
            "Description": f"{definition.meaning} Good: {definition.good}"
            f" When to worry: {definition.worry} Flagged: {definition.flagged}.",
            **unit,
        }
    write_json(file.with_suffix(".json"), {**described, "flags": {"Description": FLAGS}})
    return file


def _cell(value: object) -> str:
    """Write a text in one cell, whatever is in it."""
    return " ".join(str(value).split()) or "n/a"


def _title(column: str, name: str) -> str:
    """Title of a column: of its number, and of the state that it is of."""
    definition = definitions()[name]
    state = column.removeprefix(name).lstrip("_")
    return f"{definition.title}, {STATES[state]}" if state else definition.title


def _shown_columns() -> list[dict[str, str]]:
    """Describe the numbers of the page; the tables have those before registration too."""
    return [
        {
            "name": column,
            **{
                field: getattr(definitions()[name], field)
                for field in ("title", "unit", "meaning", "good", "worry", "flagged")
            },
            "limits": [*definitions()[name].limits.values(), *definitions()[name].between],
        }
        for column, name in column_names(are_final=True).items()
    ]
