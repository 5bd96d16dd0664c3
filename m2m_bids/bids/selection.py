"""Which scans are kept: by participants, sessions, tracers, reconstructions and runs."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.bids.layout import QueryError, list_participants
from m2m_bids.bids.tables import absent_sessions, read_subjects_sessions
from m2m_bids.bids.tracers import is_same_tracer

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """
    What is asked for of a dataset; see `m2m_bids.bids.query.query` for how labels are compared.

    Attributes
    ----------
    participants, sessions, tracers, reconstructions, runs : tuple of str
        Labels to keep, with or without their prefix; all by default.
    pairs_file : Path or None
        Table of the participants and sessions to keep.
    """

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    tracers: tuple[str, ...] = ()
    reconstructions: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    pairs_file: Path | None = None

    def find_participants(self, bids_dir: Path) -> dict[str, set[str] | None]:
        """
        List the participants to keep; none of them for all.

        Parameters
        ----------
        bids_dir : Path
            The raw dataset.

        Returns
        -------
        dict of str to set of str, or None
            Labels without prefix; of each the sessions that the table has, None without a table.

        Raises
        ------
        QueryError
            If a participant does not exist, or the table cannot be used.
        """
        labels = [label.removeprefix("sub-") for label in self.participants]
        _check_participants(bids_dir, labels)
        if self.pairs_file is None:
            return dict.fromkeys(labels)
        return _read_pairs(bids_dir, self.pairs_file, labels)

    def of(
        self, scans: "Sequence[Scan]", participants: Mapping[str, set[str] | None]
    ) -> "list[Scan]":
        """
        Keep what is asked for.

        Parameters
        ----------
        scans : sequence of Scan
            Scans of the participants.
        participants : mapping
            As `find_participants` gives them.

        Returns
        -------
        list of Scan

        Raises
        ------
        QueryError
            If labels match nothing.
        """
        kept = list(scans)
        if self.pairs_file is not None:
            kept = _select_pairs(kept, participants, self.pairs_file)
        kept = _select_sessions(kept, [label.removeprefix("ses-") for label in self.sessions])
        is_cohort = not self.participants
        tracers = [label.removeprefix("trc-") for label in self.tracers]
        kept = _select_tracers(kept, tracers, is_cohort=is_cohort)
        kept = _select_entity(kept, "rec", self.reconstructions, is_cohort=is_cohort)
        return _select_entity(kept, "run", self.runs, is_cohort=is_cohort)


def listed(labels: Iterable[str], n_shown: int = 20) -> str:
    """Join labels for a message, and only count those beyond the first."""
    labels = list(labels)
    rest = f" and {len(labels) - n_shown} more" if len(labels) > n_shown else ""
    return ", ".join(labels[:n_shown]) + rest


def _check_participants(bids_dir: Path, labels: Sequence[str]) -> None:
    """Raise QueryError, with the labels there are, if one of `labels` has no folder."""
    available = list_participants(bids_dir)
    if missing := [label for label in labels if label not in available]:
        close = get_close_matches(missing[0], available, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise QueryError(
            f"{bids_dir}: no participant {listed(missing)}.{hint} "
            f"The dataset has: {listed(available)}."
        )


def _read_pairs(bids_dir: Path, file: Path, labels: Sequence[str]) -> dict[str, set[str] | None]:
    """
    Read the sessions of each participant from a table, those of `labels` if there are any.

    Rows of sessions that are not there are told; they stop nothing while others are left.
    """
    pairs = read_subjects_sessions(file)
    if labels:
        pairs = {label: pairs[label] for label in pairs if label in labels}
    if not pairs:
        raise QueryError(f"--subjects-sessions-tsv {file}: has no row of sub-{listed(labels)}")
    absent = absent_sessions(bids_dir, pairs)
    present = {label: pairs[label] - absent.get(label, set()) for label in sorted(pairs)}
    present = {label: sessions for label, sessions in present.items() if sessions}
    if absent:
        names = _session_names(absent)
        message = f"--subjects-sessions-tsv {file}: {bids_dir} has no {listed(names)}"
        if not present:
            raise QueryError(f"{message}. Give the table of this dataset.")
        logger.warning("%s: left out.", message)
    return present


def _session_names(pairs: Mapping[str, set[str]]) -> list[str]:
    """Name sessions as their folders."""
    return [f"sub-{label}/ses-{session}" for label in sorted(pairs)
            for session in sorted(pairs[label])]  # fmt: skip


def _select_pairs(
    scans: "Sequence[Scan]", pairs: Mapping[str, set[str] | None], file: Path
) -> "list[Scan]":
    """Keep the scans of the listed sessions of each participant."""
    kept = [scan for scan in scans if scan.session in pairs.get(scan.subject, ())]
    found = {(scan.subject, scan.session) for scan in kept}
    without = _session_names(
        {
            label: {session for session in sessions if (label, session) not in found}
            for label, sessions in pairs.items()
        }
    )
    if not kept:
        raise QueryError(f"--subjects-sessions-tsv {file}: no scan in {listed(without)}")
    if without:
        logger.warning("%s: no scan in %s.", file, listed(without))
    return kept


def _select_sessions(scans: "list[Scan]", labels: Sequence[str]) -> "list[Scan]":
    """Keep the scans of the requested sessions."""
    if not labels:
        return scans
    found = {scan.session for scan in scans if scan.session}
    missing = [label for label in labels if label not in found]
    has = f"The scans have sessions: {listed(sorted(found))}." if found else "They have none."
    if len(missing) == len(labels):
        raise QueryError(f"No scan of session {listed(missing)} was found. {has}")
    if missing:
        logger.warning("No scan of session %s was found. %s", listed(missing), has)
    return [scan for scan in scans if scan.session in labels]


def _select_tracers(scans: "list[Scan]", labels: Sequence[str], is_cohort: bool) -> "list[Scan]":
    """
    Keep the PET scans of the requested tracers, and every scan that is not PET.

    In a whole cohort, tracers none of which exists are a mistake; a single participant may well
    lack them and still have FA.
    """
    if not labels:
        return scans
    found = {name for scan in scans for name in scan.tracers}
    matches = {label: [t for t in found if is_same_tracer(t, label)] for label in labels}
    wanted = {tracer for tracers in matches.values() for tracer in tracers}
    kept = [scan for scan in scans if scan.modality != "pet" or wanted & {*scan.tracers}]
    if missing := [label for label in labels if not matches[label]]:
        has = f"Those found have: {listed(sorted(found))}." if found else "None has a tracer."
        message = f"No PET scan of tracer {listed(missing)} was found. {has}"
        if not kept or (is_cohort and not wanted):
            raise QueryError(message)
        logger.warning(message)
    return kept


def _select_entity(
    scans: "list[Scan]", key: str, labels: Sequence[str], is_cohort: bool
) -> "list[Scan]":
    """
    Keep scans by an entity: ``rec`` of PET, or ``run`` of all.

    Labels none of which exist are a mistake in a whole cohort; of several participants run one by
    one, some may lack them.
    """
    if not labels:
        return scans

    def label_of(scan: "Scan") -> str | None:
        label = scan.entities.get(key)
        return label if label is None or key != "run" else (label.lstrip("0") or "0")

    wanted = {label.removeprefix(f"{key}-") for label in labels}
    wanted = {label.lstrip("0") or "0" for label in wanted} if key == "run" else wanted
    others = [scan for scan in scans if key == "rec" and scan.modality != "pet"]
    concerned = [scan for scan in scans if key == "run" or scan.modality == "pet"]
    found = {label for scan in concerned if (label := label_of(scan)) is not None}
    kept = others + [scan for scan in concerned if label_of(scan) in wanted]
    if missing := sorted(wanted - found):
        has = f"Those found have: {listed(sorted(found))}." if found else f"None has {key}-."
        message = f"No scan of {key}-{listed(missing)} was found. {has}"
        if not kept or (is_cohort and not wanted & found):
            raise QueryError(message)
        logger.warning(message)
    return kept
