"""Choose the T1w image of a scan among those of its subject."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from m2m_bids.bids.tables import SessionTimes

Reference = Literal["sessionwise", "first-lex", "nearest"]

_MONTHS = re.compile(r"(?:m|mo|month)0*(\d+)", re.IGNORECASE)
_BASELINE = {"bl", "baseline", "sc", "screening"}


class T1wImage(NamedTuple):
    """A T1w image and the entities of its name (short names)."""

    file: Path
    entities: dict[str, str]


class T1wChoice(NamedTuple):
    """The T1w image chosen for a scan and the rule that chose it."""

    image: T1wImage
    rule: str


def months(label: str) -> int | None:
    """
    Read the months since baseline from a session label.

    Examples
    --------
    >>> [months(label) for label in ("M000", "M06", "m120", "bl", "rescan")]
    [0, 6, 120, 0, None]
    """
    if label.lower() in _BASELINE:
        return 0
    match = _MONTHS.fullmatch(label)
    return int(match.group(1)) if match else None


def nearest_session(session: str, candidates: Sequence[str]) -> str:
    """
    Find the candidate session nearest to a session.

    Where every label gives months (``M006``, ``m12``, ``bl``), it is the one with the fewest
    months between, the earlier one of two. Other labels have an order but no distance: it is
    the last session before this one in alphabetical order, or else the first one after it.

    Examples
    --------
    >>> nearest_session("M012", ["M000", "M018"])
    'M018'
    >>> nearest_session("M012", ["M024", "bl"])
    'bl'
    >>> nearest_session("visit3", ["visit1", "visit2", "visit4"])
    'visit2'
    """
    candidates = sorted(candidates)
    month = {label: months(label) for label in [session, *candidates]}
    since_baseline = {label: value for label, value in month.items() if value is not None}
    if len(since_baseline) == len(month):
        return min(
            candidates,
            key=lambda label: (
                abs(since_baseline[label] - since_baseline[session]),
                since_baseline[label],
            ),
        )
    before = [label for label in candidates if label < session]
    return before[-1] if before else candidates[0]


def nearest_in_time(session: str, candidates: Sequence[str], days: Mapping[str, float]) -> str:
    """
    Find the candidate session nearest in time, the earlier one of two.

    Parameters
    ----------
    session : str
    candidates : sequence of str
    days : mapping of str to float
        Time of each of them.

    Examples
    --------
    >>> nearest_in_time("M012", ["M000", "M024"], {"M000": 0, "M012": 400, "M024": 700})
    'M024'
    """
    return min(
        sorted(candidates), key=lambda label: (abs(days[label] - days[session]), days[label])
    )


def choose_t1w(
    session: str | None,
    images: Sequence[T1wImage],
    *,
    reference: Reference = "nearest",
    find_times: Callable[[Sequence[str]], SessionTimes | None] | None = None,
) -> T1wChoice | None:
    """
    Choose one T1w image for a scan of a session; None stands for "no session".

    By default, the scan's own session comes first, then the nearest one, then images outside any
    session; a scan outside any session takes the earliest one. Within a session, the image with
    the fewest entities (no ``acq``, ``rec``, ...) and the lowest run is chosen.

    Parameters
    ----------
    session : str or None
        Session label of the scan.
    images : sequence of T1wImage
        T1w images of the scan's own subject.
    reference : {"nearest", "sessionwise", "first-lex"}
        As above; only the scan's own session; or the first session that has a T1w, by its label,
        for all scans.
    find_times : callable, optional
        Returns when sessions were, or None, as `m2m_bids.bids.tables.session_times`; without
        times, months in the labels tell which session is the nearest.

    Returns
    -------
    T1wChoice or None
        None where there is no such image.
    """
    by_session: dict[str | None, list[T1wImage]] = {}
    for image in images:
        by_session.setdefault(image.entities.get("ses"), []).append(image)
    if not images or (reference == "sessionwise" and session not in by_session):
        return None
    if reference == "first-lex":
        chosen = min(by_session, key=lambda label: (label is not None, label or ""))
        rule = f"first session (ses-{chosen})" if chosen else "T1w outside any session"
    elif session in by_session:
        chosen, rule = session, "no sessions" if session is None else "same session"
    else:
        labelled = [label for label in by_session if label is not None]
        chosen, rule = _other_session(session, labelled, find_times)
    ranked = sorted(by_session[chosen], key=_rank)
    if len(ranked) > 1:
        rule += f", first of {len(ranked)} images"
    return T1wChoice(ranked[0], rule)


def _other_session(
    session: str | None,
    labelled: Sequence[str],
    find_times: Callable[[Sequence[str]], SessionTimes | None] | None,
) -> tuple[str | None, str]:
    """Choose the session of the T1w for a scan whose own has none, and say by what rule."""
    if not labelled:
        return None, "T1w outside any session"
    if session is None:
        first = min(labelled, key=lambda label: (months(label) is None, months(label) or 0, label))
        return first, f"first session (ses-{first}), the scan has none"
    if len(labelled) > 1 and find_times and (times := find_times([session, *labelled])):
        nearest = nearest_in_time(session, labelled, times.days)
        return nearest, f"nearest session by {times.column} (ses-{nearest})"
    nearest = nearest_session(session, labelled)
    return nearest, f"nearest session (ses-{nearest})"


def _rank(image: T1wImage) -> tuple[int, int, bool, str]:
    """Sort plain names first, then low runs; the file name decides what is left."""
    n_special = len(set(image.entities) - {"sub", "ses", "run"})
    run = image.entities.get("run", "0")
    is_uncompressed = not image.file.name.endswith(".gz")
    return n_special, int(run) if run.isdigit() else 0, is_uncompressed, image.file.name
