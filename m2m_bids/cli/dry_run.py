"""What a run would do, in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan


def dry_run_table(
    scans: "Sequence[Scan]",
    settings: Settings,
    weights: Mapping[str, str] | None = None,
) -> str:
    """
    Describe, scan by scan, what would be registered to what, and what is left out.

    Parameters
    ----------
    scans : sequence of Scan
        Result of the query.
    settings : Settings
        Settings of the run.
    weights : mapping of str to str, optional
        The weights used for each modality, in words; by default what `settings` names.

    Returns
    -------
    str
        Lines for a terminal, without a newline at the end.
    """
    used = [scan for scan in scans if not scan.reason]
    left_out = [scan for scan in scans if scan.reason]
    lines = [f"m2m-bids would register {len(used)} of {len(scans)} scans."]
    for scan in used:
        lines += [
            "",
            scan.name,
            f"  {scan.modality:8s}{_shown(scan.file, settings)}",
            f"  {'T1w':8s}{_shown(scan.t1w, settings)} ({scan.t1w_choice})",
            f"  {'from':8s}{_dataset(scan.source)}{_fit(scan)}",
            f"  {'weights':8s}{_weights(scan, settings, weights or {})}",
        ]
    if anatomy := precomputed_lines(used, settings):
        lines += ["", *anatomy]
    if left_out:
        lines += ["", f"Left out: {len(left_out)}"]
        lines += [f"  {scan.name}: {scan.reason}" for scan in left_out]
    without = _participants_without_scans(scans, settings)
    if without:
        lines += ["", f"Participants without a {_kinds(settings)} scan: {', '.join(without)}"]
    return "\n".join(lines)


def precomputed_lines(scans: "Sequence[Scan]", settings: Settings) -> list[str]:
    """
    Say what derivatives of the T1w images of scans were found, missed and refused.

    Parameters
    ----------
    scans : sequence of Scan
        Scans to register.
    settings : Settings
        Settings of the run.

    Returns
    -------
    list of str
        Lines, each T1w once; none where no derivatives dataset nor FreeSurfer has any anatomy.
    """
    from m2m_bids.bids.labels import find_subject_labels
    from m2m_bids.bids.precomputed import describe_findings, find_precomputed

    entities = {scan.t1w: scan.t1w_entities for scan in scans if scan.t1w is not None}
    found = {
        t1w: find_precomputed(
            t1w,
            named,
            settings.derivative_dirs,
            find_subject_labels(settings.fs_subjects_dir, settings.bids_dir, named),
        )
        for t1w, named in entities.items()
    }
    return list(describe_findings(found))


def _shown(file: Path | None, settings: Settings) -> str:
    """Shorten a path to the part below its dataset."""
    if file is None:
        return "none"
    roots = [*settings.derivative_dirs.values(), settings.bids_dir]
    for root in roots:
        if root in file.parents:
            return file.relative_to(root).as_posix()
    return str(file)


def _dataset(source: str) -> str:
    """Name the dataset that a scan is of."""
    return "the BIDS dataset" if source == "raw" else f"derivatives dataset {source}"


def _fit(scan: "Scan") -> str:
    """Say that a map is to be fitted, and to what."""
    if scan.gradients is None:
        return ""
    if scan.source != "raw":
        return "; FA is to be fitted to this preprocessed image"
    return (
        "; FA is to be fitted to this raw image: motion is corrected, eddy currents and "
        "susceptibility distortion are not"
    )


def _weights(scan: "Scan", settings: Settings, weights: Mapping[str, str]) -> str:
    """Name the weights that a scan would be registered with."""
    if settings.transform == "rigid":
        return "none (rigid only)"
    default = str(settings.weights) if settings.weights else "default of m2m-bids"
    refined = f", {settings.refine} steps of refinement" if settings.refine else ""
    return weights.get(scan.modality, default) + refined


def _participants_without_scans(scans: "Sequence[Scan]", settings: Settings) -> list[str]:
    """List selected participants of whom there is no scan at all."""
    folders = sorted(path for path in settings.bids_dir.glob("sub-*") if path.is_dir())
    labels = [folder.name.removeprefix("sub-") for folder in folders]
    selected = [label for label in labels if label in (settings.participant_label or labels)]
    found = {scan.subject for scan in scans}
    return [label for label in selected if label not in found]


def _kinds(settings: Settings) -> str:
    """Name the requested modalities."""
    return " or ".join(modality.upper() for modality in settings.modalities)
