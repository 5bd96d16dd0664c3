"""What the level ``evaluate`` is to do: which pairs, with which labels, by which methods."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.bids.labels import LabelFile
from m2m_bids.bids.precomputed import Precomputed, find_anatomy
from m2m_bids.evaluation.pairs import (
    Pair,
    Reference,
    read_pairs,
    sample_own_pairs,
    sample_pairs,
)
from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.baselines.base import Method
    from m2m_bids.bids.query import Scan

LOGGER = logging.getLogger("m2m_bids")
OWN_LABELS = "grey matter, white matter and fluid, found by m2m-bids, the software under test"


@dataclass(frozen=True)
class PlannedMethod:
    """
    A method, and how it is run.

    Parameters
    ----------
    method : Method
    title : str
        Name as shown.
    missing : mapping of str to str or None
        What is missing to run it, and how to get it, by the kind of the moving scan.
    weights : Path or None
        Weights folder of M2M-Reg.
    weights_sha256 : str
        Hash on its card.
    n_refine : int
        Steps of instance optimisation of M2M-Reg.
    """

    method: "Method"
    title: str
    missing: Mapping[str, str | None]
    weights: Path | None = None
    weights_sha256: str = ""
    n_refine: int = 0

    @property
    def key(self) -> str:
        """Name in the records."""
        return self.method.key


def choose_methods(settings: Settings) -> list[PlannedMethod]:
    """
    Choose the methods to compare.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    list of PlannedMethod
        In the order of tables: those without weights, M2M-Reg with the weights of the run, further
        weights. Their programs may be missing. Weights of a conventional objective are run without
        refinement, which would be M2M-Reg.

    Raises
    ------
    ValueError
        If a method is unknown, or weights cannot be used.
    """
    from m2m_bids.api import DEFAULT_WEIGHTS
    from m2m_bids.baselines.methods import METHODS

    known = [*METHODS, "m2m"]
    wanted = settings.methods or known
    if unknown := [key for key in wanted if key not in known]:
        raise ValueError(
            f"--methods: {unknown[0]!r} is unknown; known are {', '.join(known)}. Further weights"
            " are compared with --compare NAME=PATH."
        )
    methods = [
        PlannedMethod(method, method.title, _missing(method, settings))
        for key, method in METHODS.items()
        if key in wanted
    ]
    folders = dict(settings.compare)
    if "m2m" in wanted:
        own = settings.weights or DEFAULT_WEIGHTS
        name = "default" if own == DEFAULT_WEIGHTS else _weights_name(own)
        if name in folders:
            raise ValueError(
                f"--compare: the name {name!r} is that of --weights; give another one"
            )
        folders = {name: own, **folders}
    methods += [_weighted_method(name, folder, settings) for name, folder in folders.items()]
    alike: dict[str, str] = {}
    for method in methods:
        other = alike.setdefault(re.sub(r"\W", "_", method.key), method.key)
        if other != method.key:
            raise ValueError(f"--compare: {other} and {method.key} are too alike; rename one")
    return methods


def _weights_name(folder: Path) -> str:
    """Name a weights folder; those of a training have the name of its folder."""
    return folder.parent.name if folder.name == "weights" else folder.name


def _missing(method: "Method", settings: Settings) -> dict[str, str | None]:
    return {modality: method.missing(modality) for modality in settings.modalities}


def _weighted_method(name: str, folder: Path, settings: Settings) -> PlannedMethod:
    from m2m_bids.api import check_weights
    from m2m_bids.baselines.methods import OWN_PREFIX, find_method
    from m2m_bids.registration.weights import read_card

    sha256 = check_weights(folder, [])
    objective = read_card(folder).details.get("objective", {})
    method = find_method(f"{OWN_PREFIX}{name}", folder)
    is_m2m = objective.get("is_m2m", True)
    # Refined by M2M-Reg, a conventional network would no longer be one.
    is_alone = not is_m2m or (settings.networks_alone and (name, folder) in settings.compare)
    title = method.title if is_m2m else f"{name} (without M2M-Reg)"
    return PlannedMethod(
        method,
        f"{title}, network alone" if is_m2m and is_alone else title,
        _missing(method, settings),
        weights=folder,
        weights_sha256=sha256,
        n_refine=0 if is_alone else settings.refine,
    )


@dataclass(frozen=True)
class Labels:
    """
    Labels of a cohort, all of one kind, so that pairs compare.

    Parameters
    ----------
    description : str
        What they are.
    of_t1w : mapping of Path to LabelFile, or None
        Labels by T1w image; None for the tissues that m2m-bids finds, which every T1w has.
    of_scan : mapping of str to LabelFile
        Labels of scans themselves, by their name, where those are known.
    """

    description: str
    of_t1w: Mapping[Path, LabelFile] | None = None
    of_scan: Mapping[str, LabelFile] = field(default_factory=dict)

    def objection(self, scan: "Scan") -> str:
        """Say why a scan cannot be evaluated; nothing if it can."""
        if self.of_t1w is None or scan.t1w in self.of_t1w:
            return ""
        return f"its T1w has no labels among the {self.description}"


def choose_labels(settings: Settings, scans: "Sequence[Scan]") -> Labels:
    """
    Choose the labels that a cohort is evaluated with.

    Parameters
    ----------
    settings : Settings
    scans : sequence of Scan
        Scans with their T1w.

    Returns
    -------
    Labels
        FreeSurfer's, if its folder is given; otherwise those of the first derivatives dataset that
        has any, those of a simulated cohort, or tissues that m2m-bids finds.

    Raises
    ------
    ValueError
        If FreeSurfer's folder is given and has labels of none.
    """
    if settings.fs_subjects_dir:
        return _freesurfer_labels(settings.fs_subjects_dir, settings.bids_dir, scans)
    for name, folder in settings.derivatives:
        found = _find(settings.bids_dir, scans, {name: folder})
        labels = {t1w: given.labels for t1w, given in found.items() if given.labels}
        tissues = {
            t1w: LabelFile(given.dseg[0], "tissues")
            for t1w, given in found.items()
            if len(given.dseg) == 1
        }
        if kept := labels or tissues:
            what = "FreeSurfer labels" if labels else "tissues"
            return Labels(f"{what} (dseg) of the derivatives dataset {name}", kept)
    return _simulated_labels(settings.bids_dir, scans) or Labels(OWN_LABELS)


def _find(
    bids_dir: Path,
    scans: "Sequence[Scan]",
    derivatives: Mapping[str, Path],
    fs_subjects_dir: Path | None = None,
) -> dict[Path, Precomputed]:
    """Find the anatomy of T1w images; what is refused is logged."""
    of_t1w = {scan.t1w: scan for scan in scans if scan.t1w is not None}
    found = {
        t1w: find_anatomy(scan, bids_dir, derivatives, fs_subjects_dir)
        for t1w, scan in of_t1w.items()
    }
    for t1w, given in found.items():
        for finding in given.findings:
            if ": refused: " in finding:
                LOGGER.warning("%s: %s", t1w.name, finding)
    return found


def _freesurfer_labels(subjects_dir: Path, bids_dir: Path, scans: "Sequence[Scan]") -> Labels:
    anatomies = _find(bids_dir, scans, {}, subjects_dir)
    found = {t1w: given.labels for t1w, given in anatomies.items() if given.labels}
    if not found:
        one = scans[0].t1w_entities
        name = "_".join(f"{key}-{one[key]}" for key in ("sub", "ses") if one.get(key))
        raise ValueError(
            f"--fs-subjects-dir: {subjects_dir} has labels of none of the {len(scans)} scans;"
            f" expected such files as {name}/mri/aparc+aseg.mgz, with orig.mgz, of this T1w"
        )
    return Labels(f"FreeSurfer labels in {subjects_dir}", found)


def _simulated_labels(bids_dir: Path, scans: "Sequence[Scan]") -> Labels | None:
    of_t1w, of_scan = {}, {}
    for scan in scans:
        for stem, files, key in (
            (_stem(scan.t1w), of_t1w, scan.t1w),
            (_stem(scan.file), of_scan, scan.name),
        ):
            file = _truth_dir(bids_dir) / stem / "dseg.nii.gz"
            if file.is_file():
                files[key] = LabelFile(file, "simulated")
    if not of_t1w:
        return None
    return Labels("true tissues of the simulated cohort, of its scans too", of_t1w, of_scan)


def find_references(bids_dir: Path, scans: "Iterable[Scan]") -> dict[str, Reference]:
    """
    Find the true transforms of a simulated cohort.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    scans : iterable of Scan

    Returns
    -------
    dict of str to Reference
        By the name of the scan; none where the dataset is not simulated.
    """
    from m2m_bids.simulation.cohort import TRUTH_XFM

    references = {}
    for scan in scans:
        folder = _truth_dir(bids_dir) / _stem(scan.file)
        files = (folder / name for name in ("landmarks.tsv", TRUTH_XFM))
        landmarks, xfm = (file if file.is_file() else None for file in files)
        if landmarks or xfm:
            references[scan.name] = Reference(landmarks, xfm)
    return references


def choose_pairs(settings: Settings, scans: "Sequence[Scan]", labels: Labels) -> list[Pair]:
    """
    Read or draw the pairs to register.

    Parameters
    ----------
    settings : Settings
    scans : sequence of Scan
        Scans with their T1w.
    labels : Labels

    Returns
    -------
    list of Pair

    Raises
    ------
    ValueError
        If there is none, or the table of pairs cannot be used.
    """
    references = find_references(settings.bids_dir, scans)
    usable = [scan for scan in scans if not labels.objection(scan)]
    if settings.pairs:
        return read_pairs(settings.pairs, scans, references=references, objection=labels.objection)
    for scan in scans:
        if why := labels.objection(scan):
            LOGGER.info("left out: %s: %s", scan.name, why)
    pairs, n_pairs, seed = [], settings.n_pairs, settings.random_seed
    for modality in settings.modalities:
        own = [scan for scan in usable if scan.modality == modality]
        is_of_several = len({scan.subject for scan in own}) > 1
        # A single participant with such a scan is paired with those who have others.
        fixed_scans = own if is_of_several else usable
        pairs += sample_pairs(own, n_pairs, fixed_scans=fixed_scans, seed=seed)
        pairs += sample_own_pairs(own, references, n_pairs, seed=seed)
    if not pairs:
        raise ValueError(
            f"there is no pair to evaluate: {len(scans)} scans of"
            f" {len({scan.subject for scan in scans})} participants; expected scans with labels of"
            " two participants, or a table with a known transform (--pairs)"
        )
    return pairs


def _truth_dir(bids_dir: Path) -> Path:
    from m2m_bids.simulation.cohort import TRUTH_FOLDER

    return bids_dir / TRUTH_FOLDER


def _stem(file: Path | None) -> str:
    return Path(file or "none").name.partition(".")[0]
