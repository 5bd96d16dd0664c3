"""What a run would do, in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.bids.spaces import spaces_from, unreachable_spaces
from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.bids.quantification import QuantificationPlan
    from m2m_bids.bids.query import Scan
    from m2m_bids.bids.request import Request
    from m2m_bids.bids.spaces import OutputSpace

_WITHOUT_T1W = (
    "Without a T1w image there is --no-t1w register-to-template (level participant), or a T1w of "
    "another session with --subject-anatomical-reference nearest."
)


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
        described = {
            scan.modality: _shown(scan.file, settings),
            "T1w": f"{_shown(scan.t1w, settings)} ({scan.t1w_choice})",
            "from": f"{_kind(scan)} of {_dataset(scan.source)}{_fit(scan)}",
            "spaces": _spaces(scan, settings),
            **quantities(scan, settings),
            "weights": _weights(scan, settings, weights or {}),
        }
        if scan.template:
            described["T1w"] = target_note(scan)
        lines += ["", scan.name, *(f"  {name:8s}{text}" for name, text in described.items())]
    if anatomy := precomputed_lines(used, settings):
        lines += ["", *anatomy]
    if left_out:
        lines += ["", f"Left out: {len(left_out)}"]
        lines += [f"  {scan.name}: {scan.reason}" for scan in left_out]
        if any(scan.t1w is None and not scan.is_alternative for scan in left_out):
            lines.append(f"  {_WITHOUT_T1W}")
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
    from m2m_bids.bids.precomputed import describe_findings, find_anatomy

    of_t1w = {scan.t1w: scan for scan in scans if scan.t1w is not None}
    found = {t1w: find_anatomy(scan, *settings.anatomy_sources) for t1w, scan in of_t1w.items()}
    return list(describe_findings(found))


def target_note(scan: "Scan", spaces: "Sequence[OutputSpace]" = ()) -> str:
    """
    Say that a scan goes to a template, why, and in which output spaces it cannot be.

    Parameters
    ----------
    scan : Scan
        A scan without a T1w.
    spaces : sequence of OutputSpace
        Spaces that are asked for.
    """
    note = f"{scan.t1w_choice}; registered to the template {scan.template} instead"
    if unreachable := unreachable_spaces(scan.space, spaces):
        note += f", and not in {', '.join(map(str, unreachable))}, which takes a T1w"
    return note


def target_lines(scans: "Sequence[Scan]", settings: Settings) -> list[str]:
    """Say which scans go to a template, a line for each."""
    return [
        f"{scan.name}: {target_note(scan, settings.further_spaces)}"
        for scan in scans
        if scan.template
    ]


def changed_lines(
    scans: "Sequence[Scan]", output_dir: Path, requests: "Mapping[str, Request]"
) -> list[str]:
    """
    Say why finished scans are made anew.

    Parameters
    ----------
    scans : sequence of Scan
        Scans to register.
    output_dir : Path
        Root of the output dataset.
    requests : mapping of str to Request
        What they are to be made from, by name.
    """
    from m2m_bids.bids.derivatives import missing_outputs
    from m2m_bids.bids.earlier import as_made
    from m2m_bids.bids.naming import expected_outputs
    from m2m_bids.bids.request import made_from
    from m2m_bids.spatial.whole import is_whole

    lines = []
    for scan in scans:
        if not made_from(expected_outputs(scan, output_dir, "rigid")["preproc_json"]):
            continue
        request = requests[scan.name]
        if changed := as_made(scan, output_dir, request).changed:
            lines.append(f"{scan.name} is made anew: changed is {', '.join(changed)}")
            continue
        there = [file for file in missing_outputs(scan, output_dir, request) if file.is_file()]
        for file in there:
            fault = "of another registration" if is_whole(file) else "empty or cut off"
            lines.append(f"{scan.name} is made anew: {file} is {fault}")
    return lines


def quantities(scan: "Scan", settings: Settings) -> dict[str, str]:
    """
    Say what would be measured in a scan, and why not what is not.

    Parameters
    ----------
    scan : Scan
        A scan with its target.
    settings : Settings

    Returns
    -------
    dict of str to str
        Texts under "regions" and, of PET, "SUV", "SUVR", if it is asked for "PVC", and "timing"
        where the times of frames cannot be used as they are given.
    """
    from m2m_bids.bids.quantification import plan_quantification

    plan = plan_quantification(scan, settings.bids_dir, settings.quantification_options)
    if plan.labels:
        regions = f"{_shown(plan.labels.file, settings)} (seg-{plan.segmentation})"
    elif scan.template:
        regions = f"tissues of {scan.template}, if the deformable step is used (seg-tissues)"
        if settings.transform == "rigid":
            regions = f"none: tissues of {scan.template} need the deformable step"
    else:
        regions = "tissues of the T1w (seg-tissues)"
    described = {"regions": regions}
    if scan.modality != "pet":
        return described
    described["SUV"] = _suv(scan, plan)
    reference = plan.suvr_region
    if plan.suvr_mask:
        label = f", label {plan.suvr_mask_label}" if plan.suvr_mask_label else ""
        reference = f"{_shown(plan.suvr_mask, settings)}{label}"
    described["SUVR"] = f"reference {reference}" if reference else f"none: {plan.suvr_reason}"
    if settings.pvc != "none":
        widths = " x ".join(f"{width:g}" for width in settings.psf_fwhm_mm)
        described["PVC"] = f"{plan.pvc}, {widths} mm"
        if plan.pvc_reason:
            described["PVC"] = f"none: {plan.pvc_reason}"
    if remarks := _timing_remarks(scan):
        described["timing"] = f"not used: {remarks}"
    return described


def _timing_remarks(scan: "Scan") -> str:
    """Say what of the times of frames that the sidecar gives cannot be used."""
    from m2m_bids.quantification.statistics import acquired_timing

    timing = acquired_timing(scan.sidecar, n_frames=1)
    remarks = {
        "FrameTimesStart": timing.starts_remark,
        "FrameDuration": timing.durations_remark,
    }
    return "; ".join(text for name, text in remarks.items() if text and name in scan.sidecar)


def _suv(scan: "Scan", plan: "QuantificationPlan") -> str:
    """Say whether there will be SUV, and by which weight."""
    from m2m_bids.quantification.scan import Quantification, suv_factors
    from m2m_bids.quantification.suv import NoSUVError

    durations = scan.sidecar.get("FrameDuration")
    known = Quantification(
        plan.scheme,
        metadata=scan.sidecar,
        weight=plan.weight.value,
        weight_units=plan.weight.units,
        weight_source=plan.weight.source,
    )
    try:
        suv_factors(known, len(durations) if isinstance(durations, list) else 1)
    except NoSUVError as error:
        return f"none: {error}"
    return f"with the body weight ({plan.weight.source})"


def _spaces(scan: "Scan", settings: Settings) -> str:
    """Name the spaces that a scan would be written in, and those that it cannot be."""
    spaces = settings.further_spaces
    text = ", ".join([scan.space, *map(str, spaces_from(scan.space, spaces))])
    if unreachable := unreachable_spaces(scan.space, spaces):
        text += f" (not {', '.join(map(str, unreachable))}: takes a T1w)"
    return text


def _kind(scan: "Scan") -> str:
    """Say what an image is: of PET, whether it is dynamic; of FA, whether it is a map already."""
    if scan.modality == "pet":
        starts = scan.sidecar.get("FrameTimesStart")
        n_frames = len(starts) if isinstance(starts, list) else 1
        return f"PET image, {n_frames} frames by its sidecar," if n_frames > 1 else "PET image"
    if scan.gradients is None:
        return "FA map"
    return "raw DWI" if scan.source == "raw" else "preprocessed DWI"


def _shown(file: Path | None, settings: Settings) -> str:
    """Shorten a path to the part below its dataset."""
    if file is None:
        return "none"
    roots = [
        *settings.derivative_dirs.values(),
        *filter(None, [settings.fs_subjects_dir]),
        settings.bids_dir,
    ]
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
        mask = f" in the mask {scan.mask.name}" if scan.mask else ""
        return f"; FA is to be fitted{mask}"
    return (
        "; FA is to be fitted: motion is corrected, eddy currents and susceptibility distortion "
        "are not"
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
