"""Pairs of images to register: read from a table, or drawn from a cohort in a balanced way."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from m2m_bids.spatial.itk import read_affine, read_composite
from m2m_bids.spatial.landmarks import read_landmarks

COLUMNS = ("moving", "fixed")
OPTIONAL_COLUMNS = ("modality", "landmarks", "reference_xfm")
_READERS = {".txt": read_affine, ".h5": read_composite}
N_SHOWN_ERRORS = 3

_LABEL = "[a-zA-Z0-9+]+"
_SESSION = re.compile(rf"(?:sub-)?({_LABEL})(?:(?:/(?:ses-)?|_ses-)({_LABEL}))?")


class CohortScan(Protocol):
    """What a pair needs to know of a scan, as `m2m_bids.bids.query.Scan` has it."""

    @property
    def name(self) -> str:
        """BIDS stem."""

    @property
    def subject(self) -> str:
        """Participant label."""

    @property
    def session(self) -> str | None:
        """Session label."""

    @property
    def modality(self) -> Literal["pet", "fa"]:
        """Kind of image."""

    @property
    def t1w(self) -> Path | None:
        """T1w image of the same participant."""

    @property
    def t1w_entities(self) -> Mapping[str, str]:
        """Entities of its name."""


class Reference(NamedTuple):
    """
    What is known of the true transform of a pair; None for what is not.

    Parameters
    ----------
    landmarks : Path or None
        Table of points in both images.
    reference_xfm : Path or None
        ITK transform from points of the fixed image to points of the moving image.
    """

    landmarks: Path | None = None
    reference_xfm: Path | None = None


UNKNOWN = Reference()


@dataclass(frozen=True)
class Pair:
    """
    A moving scan and the T1w image that it is registered to.

    Parameters
    ----------
    moving : CohortScan
        PET or FA scan.
    fixed : CohortScan
        A scan whose T1w is the fixed image.
    reference : Reference
        What is known of the truth.
    """

    moving: CohortScan
    fixed: CohortScan
    reference: Reference = UNKNOWN

    @property
    def fixed_name(self) -> str:
        """BIDS stem of the fixed T1w."""
        return t1w_name(self.fixed)

    @property
    def name(self) -> str:
        """Name of the pair, which no other pair has."""
        return f"{self.moving.name}_to_{self.fixed_name}"

    @property
    def kind(self) -> Literal["between", "within"]:
        """Whether both images are of one participant."""
        return "within" if self.moving.subject == self.fixed.subject else "between"


class PairsError(ValueError):
    """A table of pairs that cannot be used; the message names the file, the lines and why."""


def t1w_name(scan: CohortScan) -> str:
    """Return the BIDS stem of a scan's T1w image."""
    return Path(scan.t1w or "none").name.partition(".")[0]


def sample_pairs(
    scans: Sequence[CohortScan],
    n_pairs: int,
    *,
    fixed_scans: Sequence[CohortScan] | None = None,
    seed: int = 0,
) -> list[Pair]:
    """
    Draw pairs of different participants, each about as often moving as fixed.

    The participants are put in a circle, in random order. All the pairs that are the same number
    of places apart have each participant once as moving and once as fixed, so that these numbers
    differ by one at most between participants. A larger sample holds a smaller one of one seed.

    Parameters
    ----------
    scans : sequence of CohortScan
        Moving scans, of one kind.
    n_pairs : int
        Number of pairs; where there are not so many, each two participants are a pair in both
        directions.
    fixed_scans : sequence of CohortScan, optional
        Scans whose T1w images are the fixed ones; by default the same. If they are of others, all
        are still about as often moving, but not as often fixed.
    seed : int

    Returns
    -------
    list of Pair
        Different pairs. The scans, and the T1w images, of a participant take turns.
    """
    moving_turns = {subject: cycle(own) for subject, own in _by_subject(scans).items()}
    fixed_turns = {
        # The first scan of each T1w.
        subject: cycle(list({scan.t1w: scan for scan in reversed(own)}.values())[::-1])
        for subject, own in _by_subject(scans if fixed_scans is None else fixed_scans).items()
    }
    subjects = sorted(moving_turns | fixed_turns)
    rng = np.random.default_rng(seed)
    circle = [subjects[i] for i in rng.permutation(len(subjects))]
    pairs: list[Pair] = []
    for distance in 1 + rng.permutation(max(len(circle) - 1, 0)):
        for start in rng.permutation(len(circle)):
            moving, fixed = circle[start], circle[(start + distance) % len(circle)]
            if moving in moving_turns and fixed in fixed_turns:
                if len(pairs) == n_pairs:
                    return pairs
                pairs.append(Pair(next(moving_turns[moving]), next(fixed_turns[fixed])))
    return pairs


def sample_own_pairs(
    scans: Iterable[CohortScan],
    references: Mapping[str, Reference],
    n_pairs: int,
    *,
    seed: int = 0,
) -> list[Pair]:
    """
    Draw scans whose true transform to the T1w of the same participant is known.

    Parameters
    ----------
    scans : iterable of CohortScan
    references : mapping of str to Reference
        The truth, by the name of the scan.
    n_pairs : int
        Number of pairs, at most.
    seed : int

    Returns
    -------
    list of Pair
    """
    known = sorted((scan for scan in scans if scan.name in references), key=lambda s: s.name)
    chosen = np.random.default_rng(seed).permutation(len(known))[:n_pairs]
    return [Pair(known[i], known[i], references[known[i].name]) for i in chosen]


def read_pairs(
    file: Path,
    scans: Sequence[CohortScan],
    *,
    references: Mapping[str, Reference] | None = None,
    objection: Callable[[CohortScan], str] = lambda scan: "",
) -> list[Pair]:
    """
    Read a table of pairs, and check all of it.

    Parameters
    ----------
    file : Path
        Tab-separated, with the columns ``moving`` and ``fixed`` and, optional, ``modality``,
        ``landmarks`` and ``reference_xfm``. An image is named by the name of its scan, by
        ``participant/session`` or, where that is enough, ``participant``; the fixed image, which
        is the T1w, also by the T1w's own name. Paths are relative to the folder of the table.
    scans : sequence of CohortScan
        Scans of the cohort, each with its T1w.
    references : mapping of str to Reference, optional
        The truth of scans to the T1w of the same participant, where the table has none.
    objection : callable
        Says why a scan, or its T1w, cannot be evaluated; nothing if it can.

    Returns
    -------
    list of Pair
        In the order of the table.

    Raises
    ------
    PairsError
        If the file cannot be read, lacks a column or holds no pair; if a name is unknown or has
        several meanings, a file is missing, a pair is there twice, or is of one participant
        without a truth to compare with. The message names the lines.
    """
    found = _Names(scans)
    pairs: dict[str, tuple[int, Pair]] = {}
    errors = []
    for number, row in _rows(file):
        try:
            pair = found.pair(row)
            reference = _reference(row, file.parent)
            if reference == UNKNOWN and pair.moving.t1w == pair.fixed.t1w:
                reference = (references or {}).get(pair.moving.name, reference)
            pair = Pair(pair.moving, pair.fixed, reference)
            _check_pair(pair, objection)
            if pair.name in pairs:
                raise ValueError(f"the same pair as in line {pairs[pair.name][0]}: remove one")
            pairs[pair.name] = (number, pair)
        except ValueError as error:
            errors.append(f"line {number}: {error}")
    if errors:
        more = len(errors) - N_SHOWN_ERRORS
        end = f"; and {more} more lines" if more > 0 else ""
        raise PairsError(f"{file}: " + "; ".join(errors[:N_SHOWN_ERRORS]) + end)
    if not pairs:
        raise PairsError(f"{file}: holds no pair below its header")
    return [pair for _, pair in pairs.values()]


def _by_subject(scans: Iterable[CohortScan]) -> dict[str, list[CohortScan]]:
    by_subject: dict[str, list[CohortScan]] = {}
    for scan in sorted(scans, key=lambda scan: scan.name):
        by_subject.setdefault(scan.subject, []).append(scan)
    return by_subject


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line numbers and rows without the values that are empty or ``n/a``."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"{file}: cannot be read as a table ({error})") from error
    header, *rows = csv.reader(lines or [""], delimiter="\t", quoting=csv.QUOTE_NONE)
    header = [name.strip() for name in header]
    known = (*COLUMNS, *OPTIONAL_COLUMNS)
    missing = [name for name in COLUMNS if name not in header]
    unknown = [name for name in header if name not in known]
    if missing or unknown or len(set(header)) < len(header):
        raise PairsError(
            f"{file}: line 1: the columns are {', '.join(header) or 'none'}; expected, separated"
            f" by tabs, {' and '.join(COLUMNS)} and, optional, {', '.join(OPTIONAL_COLUMNS)}"
        )
    for number, values in enumerate(rows, start=2):
        cells = [value.strip() for value in values]
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise PairsError(
                f"{file}: line {number}: {len(cells)} values for {len(header)} columns; separate"
                " them by tabs, and write n/a where there is none"
            )
        row = dict(zip(header, cells, strict=True))
        yield number, {name: value for name, value in row.items() if value not in ("", "n/a")}


class _Names:
    """Scans of a cohort by what a table of pairs may call them."""

    def __init__(self, scans: Sequence[CohortScan]):
        self.scans = sorted(scans, key=lambda scan: scan.name)

    def pair(self, row: Mapping[str, str]) -> Pair:
        """Find moving and fixed image of a row."""
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"{missing[0]} is empty: name a scan")
        modality = row.get("modality")
        if modality not in (None, "pet", "fa"):
            raise ValueError(f"modality {modality!r} is unknown: expected pet or fa")
        moving = self._moving(row["moving"], modality)
        return Pair(moving, self._fixed(row["fixed"], moving))

    def _moving(self, name: str, modality: str | None) -> CohortScan:
        named = [scan for scan in self.scans if scan.name == name]
        found = named or self._of_session(name, lambda scan: scan.session)
        if not found:
            raise ValueError(self._unknown("moving", name, [scan.name for scan in self.scans]))
        kept = [scan for scan in found if modality in (None, scan.modality)]
        if not kept:
            raise ValueError(f"moving {name!r} is {found[0].modality}, not {modality}")
        if len(kept) > 1:
            names = ", ".join(scan.name for scan in kept)
            raise ValueError(f"moving {name!r} may be {names}: name one, or fill in modality")
        return kept[0]

    def _fixed(self, name: str, moving: CohortScan) -> CohortScan:
        named = [scan for scan in self.scans if name in (scan.name, t1w_name(scan))]
        found = named or self._of_session(name, lambda scan: scan.t1w_entities.get("ses"))
        if not found:
            known = [*(scan.name for scan in self.scans), *map(t1w_name, self.scans)]
            raise ValueError(self._unknown("fixed", name, known))
        names = sorted({t1w_name(scan) for scan in found})
        if len(names) > 1:
            raise ValueError(f"fixed {name!r} may be any of {', '.join(names)}: name one")
        return min(found, key=lambda scan: scan.modality != moving.modality)

    def _of_session(
        self, name: str, session_of: Callable[[CohortScan], str | None]
    ) -> list[CohortScan]:
        match = _SESSION.fullmatch(name)
        if match is None:
            return []
        subject, session = match.groups()
        return [
            scan
            for scan in self.scans
            if scan.subject == subject and session in (None, session_of(scan))
        ]

    def _unknown(self, role: str, name: str, known: Iterable[str]) -> str:
        close = get_close_matches(name, sorted(set(known)), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        return (
            f"{role} {name!r} is no scan that can be evaluated: expected the name of a scan or"
            f" participant/session{hint}"
        )


def _reference(row: Mapping[str, str], folder: Path) -> Reference:
    """Find the files of a row."""
    files: dict[str, Path | None] = {"landmarks": None, "reference_xfm": None}
    for column in files:
        if value := row.get(column):
            file = folder / Path(value).expanduser()
            if not file.is_file():
                raise ValueError(f"{column}: {file} is not a file")
            files[column] = file.absolute()
    if points := files["landmarks"]:
        read_landmarks(points)
    xfm = files["reference_xfm"]
    if xfm is not None and xfm.suffix not in _READERS:
        raise ValueError(
            f"reference_xfm: {xfm} must be an ITK transform: an affine (.txt) or a composite (.h5)"
        )
    if xfm is not None:
        _READERS[xfm.suffix](xfm)
    return Reference(**files)


def _check_pair(pair: Pair, objection: Callable[[CohortScan], str]) -> None:
    if pair.kind == "within" and pair.reference == UNKNOWN:
        raise ValueError(
            f"moving and fixed are of the same participant {pair.moving.subject}: fill in"
            " landmarks or reference_xfm, or name another participant"
        )
    for role, scan in (("moving", pair.moving), ("fixed", pair.fixed)):
        if why := objection(scan):
            raise ValueError(f"{role} {scan.name}: {why}")
