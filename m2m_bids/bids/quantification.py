"""What is measured in a scan: with which labels, which reference region, which body weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2m_bids.bids.body_weight import BodyWeight, find_body_weight
from m2m_bids.bids.labels import PONS, LabelFile, find_pons
from m2m_bids.bids.naming import parse_name
from m2m_bids.bids.precomputed import find_anatomy
from m2m_bids.bids.request import SEGMENTATION, SMOOTHING
from m2m_bids.bids.tracers import reference_region_of

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan

_NO_REGIONS = "no T1w was there, and the regions of a template are not this person's"


@dataclass(frozen=True)
class QuantificationOptions:
    """
    How scans are quantified, the same for all of a run.

    Parameters
    ----------
    fs_subjects_dir : Path or None
        FreeSurfer's folder of subjects.
    derivatives : mapping of str to Path
        Derivatives datasets that may have FreeSurfer's labels (dseg).
    suvr_region : str
        "auto", "none", or the name of a reference region.
    suvr_mask : str
        Path of a mask in the T1w's space, with ``{sub}`` and ``{ses}`` for labels; or nothing.
    pvc : {"none", "gtm", "rbv"}
        Correction for partial volume effects.
    psf_fwhm_mm : tuple of float
        One width of the point spread function, or three; none without correction.
    smooth_fwhm_mm : tuple of float
        Widths of the kernels that copies of images are smoothed with.
    """

    fs_subjects_dir: Path | None = None
    derivatives: Mapping[str, Path] = field(default_factory=dict)
    suvr_region: str = "auto"
    suvr_mask: str = ""
    pvc: Literal["none", "gtm", "rbv"] = "none"
    psf_fwhm_mm: tuple[float, ...] = ()
    smooth_fwhm_mm: tuple[float, ...] = ()


@dataclass(frozen=True)
class QuantificationPlan:
    """
    What is measured in one scan.

    Parameters
    ----------
    segmentation : str
        Label of the ``seg`` entity: "aparcaseg", "aseg" or "tissues".
    labels : LabelFile or None
        FreeSurfer's labels of its T1w; None for the tissues of the T1w.
    weight : BodyWeight
        Of the participant.
    suvr_region : str or None
        Name of the reference region, or None.
    suvr_mask : Path or None
        Mask of it, instead of a name.
    suvr_mask_label : int or None
        Its label in that mask; None for all that is in the mask.
    suvr_reason : str
        Why there is no SUVR, where that is known beforehand.
    pvc : {"none", "gtm", "rbv"}
        Correction for partial volume effects.
    pvc_reason : str
        Why there is none, where it is asked for.
    """

    segmentation: str
    labels: LabelFile | None
    weight: BodyWeight
    suvr_region: str | None = None
    suvr_mask: Path | None = None
    suvr_mask_label: int | None = None
    suvr_reason: str = ""
    pvc: Literal["none", "gtm", "rbv"] = "none"
    pvc_reason: str = ""

    @property
    def files(self) -> list[Path]:
        """Files that are used beside the scan and what is made of its T1w."""
        return [file for file in (self.labels and self.labels.file, self.suvr_mask) if file]

    @property
    def scheme(self) -> Literal["freesurfer", "tissues"]:
        """What the labels mean."""
        return "tissues" if self.segmentation == "tissues" else "freesurfer"


def plan_quantification(
    scan: "Scan", bids_dir: Path, options: QuantificationOptions
) -> QuantificationPlan:
    """
    Find what a scan can be quantified with.

    Parameters
    ----------
    scan : Scan
        A scan with its T1w.
    bids_dir : Path
        The raw dataset.
    options : QuantificationOptions

    Returns
    -------
    QuantificationPlan
        Labels are those that `m2m_bids.bids.precomputed.find_precomputed` takes.
    """
    weight = find_body_weight(bids_dir, scan.entities, scan.sidecar)
    is_corrected = options.pvc != "none" and scan.modality == "pet"
    if scan.template:
        # The borders of a template's tissues lie millimetres from this person's: neither a
        # reference region nor a correction at borders is to be had from them.
        return QuantificationPlan(
            *("tissues", None, weight),
            suvr_reason=_NO_REGIONS if scan.modality == "pet" else "not a PET scan",
            pvc_reason=_NO_REGIONS if is_corrected else "",
        )
    labels = find_anatomy(scan, bids_dir, options.derivatives, options.fs_subjects_dir).labels
    segmentation = _segmentation(labels)
    region, mask, reason = _reference(scan, segmentation, options)
    label = None
    if region == "brainstem" and labels and (pons := find_pons(labels)):
        region, mask, label = None, pons, PONS
    return QuantificationPlan(
        *(segmentation, labels, weight, region, mask, label, reason),
        pvc=options.pvc if is_corrected else "none",
    )


def quantification_record(
    plan: QuantificationPlan, options: QuantificationOptions, files: Mapping[str, str]
) -> dict[str, Any]:
    """
    Spell what a quantification is made from; one made otherwise is made anew.

    Parameters
    ----------
    plan : QuantificationPlan
    options : QuantificationOptions
    files : mapping of str to str
        Names and fingerprints of the plan's files.

    Returns
    -------
    dict
        JSON object.
    """
    record = {
        SEGMENTATION: plan.segmentation,
        "Files": dict(files),
        "SUVRRegion": plan.suvr_region,
        "SUVRMaskLabel": plan.suvr_mask_label,
        "BodyWeight": str(plan.weight.value),
        "BodyWeightUnits": str(plan.weight.units),
        "PartialVolumeCorrection": plan.pvc,
        "PSFFullWidthHalfMaximum": list(options.psf_fwhm_mm) if plan.pvc != "none" else None,
        SMOOTHING: sorted(options.smooth_fwhm_mm) or None,
    }
    return {name: value for name, value in record.items() if value not in (None, "None")}


def _segmentation(labels: LabelFile | None) -> str:
    """Name labels for the ``seg`` entity."""
    if labels is None:
        return "tissues"
    name = labels.file.name
    described = parse_name(name).entities.get("desc") if name.startswith("sub-") else None
    return described or ("aparcaseg" if name.startswith("aparc") else "aseg")


def _reference(
    scan: "Scan", segmentation: str, options: QuantificationOptions
) -> tuple[str | None, Path | None, str]:
    """Choose the reference region: its name, or a mask, or the reason why there is none."""
    if scan.modality != "pet":
        return None, None, "not a PET scan"
    if options.suvr_mask:
        labels = {key: scan.t1w_entities.get(key, "") for key in ("sub", "ses")}
        file = Path(options.suvr_mask.format(**labels)).expanduser().absolute()
        if file.is_file():
            return None, file, ""
        return None, None, f"--suvr-mask: {file} is not a file"
    if options.suvr_region == "none":
        return None, None, "not asked for"
    if options.suvr_region != "auto":
        return options.suvr_region, None, ""
    if segmentation == "tissues":
        return None, None, "there are no FreeSurfer labels of the T1w to find a region in"
    if region := next(filter(None, map(reference_region_of, scan.tracers)), None):
        return region, None, ""
    named = f"tracer {' or '.join(scan.tracers)}" if scan.tracers else "a scan without a tracer"
    return None, None, f"no reference region is known for {named}; name one with --suvr-region"
