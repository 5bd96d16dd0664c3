"""Find the weight of a participant at a scan."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from m2m_bids.bids.tables import read_table
from m2m_bids.json_files import read_json_object

COLUMNS = ("weight", "body_weight")
_MISSING = (None, "", "n/a", "N/A", "NaN", "nan")
_TOLERANCE = 0.1


class BodyWeight(NamedTuple):
    """
    A weight as a dataset gives it.

    Attributes
    ----------
    value, units : Any
        As they are written; None where they are not given.
    source : str
        File and field that they are of, or, without a value, the reason why there is none.
    """

    value: Any
    units: Any
    source: str


def find_body_weight(
    bids_dir: Path, entities: Mapping[str, str], metadata: Mapping[str, Any]
) -> BodyWeight:
    """
    Find the body weight of a scan's participant.

    What is nearest to the scan counts: its sidecar (``PatientWeight``, which dcm2niix writes in
    kg, or ``BodyWeight`` with ``BodyWeightUnits``), the row of its session in
    ``sub-*_sessions.tsv``, the participant's row in ``participants.tsv``. In tables the column is
    ``weight`` or ``body_weight``, with its ``Units`` in the JSON file of the table.

    Parameters
    ----------
    bids_dir : Path
        The raw dataset.
    entities : mapping of str to str
        Entities of the scan.
    metadata : mapping
        Fields of its sidecar.

    Returns
    -------
    BodyWeight
        Without a value where none is found, or the sidecar and the session's row differ by more
        than a tenth.
    """
    of_scan = list(_in_sidecar(metadata))
    label = entities["sub"]
    if session := entities.get("ses"):
        file = bids_dir / f"sub-{label}" / f"sub-{label}_sessions.tsv"
        described = (file.with_suffix(".json"), bids_dir / "sessions.json")
        of_scan += _in_table(file, "session_id", session, described)
    if contradiction := _contradiction(of_scan):
        return BodyWeight(None, None, contradiction)
    file = bids_dir / "participants.tsv"
    found = of_scan or list(_in_table(file, "participant_id", label, (file.with_suffix(".json"),)))
    if found:
        return found[0]
    return BodyWeight(
        None,
        None,
        "no body weight: neither PatientWeight in the PET sidecar nor a column weight in "
        "sessions.tsv or participants.tsv",
    )


def _in_sidecar(metadata: Mapping[str, Any]) -> Iterator[BodyWeight]:
    for name, units in (
        ("PatientWeight", "kg"),  # as DICOM's
        ("BodyWeight", metadata.get("BodyWeightUnits")),
    ):
        if metadata.get(name) not in _MISSING:
            yield BodyWeight(metadata[name], units, f"{name} in the PET sidecar")


def _in_table(
    file: Path, key: str, label: str, described: tuple[Path, ...]
) -> Iterator[BodyWeight]:
    """Yield what the row of a label gives; a table that cannot be read gives nothing."""
    try:
        rows = [row for row in read_table(file) if _without_prefix(row.get(key)) == label]
    except ValueError:
        return
    for column in COLUMNS:
        values = [row[column] for row in rows if row.get(column) not in _MISSING]
        if values:
            yield BodyWeight(values[0], _units(described, column), f"{column} in {file.name}")


def _without_prefix(label: str | None) -> str:
    """Take ``sub-`` or ``ses-`` off a label, which tables have with or without."""
    return (label or "").strip().removeprefix("sub-").removeprefix("ses-")


def _units(files: tuple[Path, ...], column: str) -> Any:
    """Read the unit of a column from the first description that has it."""
    for file in files:
        try:
            return read_json_object(file)[column]["Units"]
        except (ValueError, LookupError, TypeError):
            continue
    return None


def _contradiction(found: list[BodyWeight]) -> str:
    """Say which of the weights of one scan differ, as far as they can be compared."""
    for one, other in pairwise(found):
        try:
            values = float(one.value), float(other.value)
        except (TypeError, ValueError):
            continue
        is_near = abs(values[0] - values[1]) <= _TOLERANCE * max(values)
        if one.units == other.units and not is_near:
            return (
                f"contradictory body weights: {one.value} ({one.source}) and {other.value} "
                f"({other.source})"
            )
    return ""
