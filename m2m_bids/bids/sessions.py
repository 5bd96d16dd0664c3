"""Choose the T1w image of a scan among those of its subject."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


def choose_t1w(session: str | None, images: Sequence[T1wImage]) -> T1wChoice | None:
    """
    Choose one T1w image for a scan of a session; None stands for "no session".

    The scan's own session comes first, then the nearest one, then images outside any session; a
    scan outside any session takes the earliest one. Within a session, the image with the fewest
    entities (no ``acq``, ``rec``, ...) and the lowest run is chosen.

    Parameters
    ----------
    session : str or None
        Session label of the scan.
    images : sequence of T1wImage
        T1w images of the scan's own subject.

    Returns
    -------
    T1wChoice or None
        None where there is no image.
    """
    if not images:
        return None
    by_session: dict[str | None, list[T1wImage]] = {}
    for image in images:
        by_session.setdefault(image.entities.get("ses"), []).append(image)
    labelled = [label for label in by_session if label is not None]
    if session in by_session:
        chosen, rule = session, "no sessions" if session is None else "same session"
    elif session is None:
        chosen = min(
            labelled, key=lambda label: (months(label) is None, months(label) or 0, label)
        )
        rule = f"first session (ses-{chosen}), the scan has none"
    elif labelled:
        chosen = nearest_session(session, labelled)
        rule = f"nearest session (ses-{chosen})"
    else:
        chosen, rule = None, "T1w outside any session"
    ranked = sorted(by_session[chosen], key=_rank)
    if len(ranked) > 1:
        rule += f", first of {len(ranked)} images"
    return T1wChoice(ranked[0], rule)


def _rank(image: T1wImage) -> tuple[int, int, bool, str]:
    """Sort plain names first, then low runs; the file name decides what is left."""
    n_special = len(set(image.entities) - {"sub", "ses", "run"})
    run = image.entities.get("run", "0")
    is_uncompressed = not image.file.name.endswith(".gz")
    return n_special, int(run) if run.isdigit() else 0, is_uncompressed, image.file.name
