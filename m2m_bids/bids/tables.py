"""Read the tables of a BIDS dataset: dates of sessions, and lists of participants and sessions."""

import csv
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from m2m_bids.bids.layout import QueryError

logger = logging.getLogger(__name__)

_DATES = ("acq_time", "examination_date")
_MISSING = {"", "n/a", "nan"}
_DATE_FORMATS = ("%m/%d/%Y", "%Y/%m/%d")
_DAYS_PER_YEAR = 365.25


class SessionTimes(NamedTuple):
    """
    When the sessions of a subject were.

    Attributes
    ----------
    days : dict of str to float
        Days since an arbitrary origin, by session label.
    column : str
        Where they are from: ``acq_time``, ``examination_date`` or ``age``.
    """

    days: dict[str, float]
    column: str


def read_table(file: Path) -> list[dict[str, str]]:
    """
    Read a table of tab-separated values with a row of names.

    Raises
    ------
    ValueError
        If it cannot be read or its text is not UTF-8; the message names it.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, delimiter="\t", restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read as a table ({error})") from error


def session_times(subject_dir: Path, sessions: Sequence[str]) -> SessionTimes | None:
    """
    Find when sessions were, by one measure that all of them have.

    In this order: dates of ``sub-*_sessions.tsv`` (``acq_time``, ``examination_date``), the
    earliest ``acq_time`` of each session's ``scans.tsv``, and ``age`` in years, where no two
    sessions have the same.

    Parameters
    ----------
    subject_dir : Path
        Folder ``sub-*``.
    sessions : sequence of str
        Labels that must all have a time.

    Returns
    -------
    SessionTimes or None
        None where there is no such measure.
    """
    table = _sessions_table(subject_dir)
    for column in _DATES:
        days = {label: _days(table.get(label, {}).get(column)) for label in sessions}
        if None not in days.values():
            return SessionTimes(days, column)
    days = {label: _first_scan(subject_dir, label) for label in sessions}
    if None not in days.values():
        return SessionTimes(days, "acq_time")
    ages = {label: _age_days(table.get(label, {}).get("age")) for label in sessions}
    if None not in ages.values() and len(set(ages.values())) == len(ages):
        return SessionTimes(ages, "age")
    return None


def _sessions_table(subject_dir: Path) -> dict[str, dict[str, str]]:
    """Read ``sub-*_sessions.tsv`` by session label; a table that cannot be read has no rows."""
    rows = _rows(subject_dir / f"{subject_dir.name}_sessions.tsv")
    return {(row.get("session_id") or "").removeprefix("ses-"): row for row in rows}


def _first_scan(subject_dir: Path, label: str) -> float | None:
    """Day of the earliest scan of a session, from its ``scans.tsv``."""
    name = f"{subject_dir.name}_ses-{label}_scans.tsv"
    days = [_days(row.get("acq_time")) for row in _rows(subject_dir / f"ses-{label}" / name)]
    return min((day for day in days if day is not None), default=None)


def _rows(file: Path) -> list[dict[str, str]]:
    """Read a table that may be absent; one that is broken is told once and has no rows."""
    if not file.is_file():
        return []
    try:
        return read_table(file)
    except ValueError as error:
        logger.warning("%s: the times in it are not used", error)
        return []


def _days(text: str | None) -> float | None:
    """
    Read a date, with or without time, in days.

    Examples
    --------
    >>> _days("2010-01-03T12:00:00") - _days("01/01/2010")
    2.5
    >>> _days("n/a") is None
    True
    """
    text = (text or "").strip()
    if text.lower() in _MISSING:
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = _other_date(text)
    # Shifted dates (BIDS moves them before 1925) are as good: only differences count.
    if date is None:
        return None
    return (date.replace(tzinfo=None) - datetime.min).total_seconds() / 86400


def _other_date(text: str) -> datetime | None:
    """Read a date in one of the formats of ADNI's tables."""
    for date_format in _DATE_FORMATS:
        try:
            return datetime.strptime(text, date_format)
        except ValueError:
            continue
    return None


def _age_days(text: str | None) -> float | None:
    """Read an age in years, in days."""
    try:
        age = float(text or "nan")
    except ValueError:
        return None
    return age * _DAYS_PER_YEAR if age == age else None


def read_subjects_sessions(file: Path) -> dict[str, set[str]]:
    """
    Read a table of participants and sessions, as Clinica's ``-tsv``.

    Parameters
    ----------
    file : Path
        Table with the columns ``participant_id`` and ``session_id``.

    Returns
    -------
    dict of str to set of str
        Session labels by participant label, without prefixes.

    Raises
    ------
    QueryError
        If the table cannot be read, lacks a column, has no rows, or a row lacks a value.
    """
    try:
        rows = read_table(Path(file))
    except ValueError as error:
        raise QueryError(f"--subjects-sessions-tsv {error}") from error
    if not rows:
        raise QueryError(f"--subjects-sessions-tsv {file}: has no rows below its row of names")
    columns = ("participant_id", "session_id")
    if missing := [column for column in columns if column not in rows[0]]:
        raise QueryError(
            f"--subjects-sessions-tsv {file}: lacks the column {' and '.join(missing)}; found "
            f"{', '.join(filter(None, rows[0]))}. Columns are separated by tabs."
        )
    wanted: dict[str, set[str]] = {}
    for number, row in enumerate(rows, start=2):
        participant, session = ((row[column] or "").strip() for column in columns)
        if participant.lower() in _MISSING or session.lower() in _MISSING:
            raise QueryError(
                f"--subjects-sessions-tsv {file}: line {number} lacks participant_id or session_id"
            )
        label = participant.removeprefix("sub-")
        wanted.setdefault(label, set()).add(session.removeprefix("ses-"))
    return wanted


def absent_sessions(bids_dir: Path, wanted: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """List those of the participants' sessions that have no folder in a dataset."""
    absent = {
        label: {
            session
            for session in sessions
            if not (bids_dir / f"sub-{label}" / f"ses-{session}").is_dir()
        }
        for label, sessions in wanted.items()
    }
    return {label: sessions for label, sessions in absent.items() if sessions}
