"""Regional tables, SUV, SUVR and correction for partial volume effects of a registered scan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.derivatives import file_uri, image_sidecar
from m2m_bids.bids.naming import (
    expected_anat_outputs,
    figures_of_scan,
    quantification_outputs,
)
from m2m_bids.bids.quantification import QuantificationOptions, QuantificationPlan
from m2m_bids.bids.query import Scan
from m2m_bids.interfaces.outputs import SaveFigures, SaveQuantification
from m2m_bids.interfaces.quantification import (
    CorrectPartialVolume,
    PlaceLabels,
    QuantifyScan,
    ResampleCorrected,
)
from m2m_bids.interfaces.registration import ResampleFrames
from m2m_bids.interfaces.reports import SUVRFigure

INPUTS = (
    "preproc",
    "native_file",
    "frames_file",
    "frame_xfms",
    "t1w_file",
    "mask_file",
    "dseg_file",
    "best_xfm",
    "best_inverse_xfm",
    "m2m_xfms",
)


def init_quantification_wf(
    *,
    scan: Scan,
    plan: QuantificationPlan,
    options: QuantificationOptions,
    output_dir: Path,
    datasets: dict[str, Path],
    made_from: dict[str, Any] | None = None,
    obsolete: Sequence[Path] = (),
    name: str = "quantification_wf",
) -> Workflow:
    """
    Measure a registered scan in the regions of its T1w, and write what is found.

    Parameters
    ----------
    scan : Scan
        PET or FA scan.
    plan : QuantificationPlan
        What is measured.
    options : QuantificationOptions
        How.
    output_dir : Path
        Root of the output dataset.
    datasets : dict of str to Path
        Datasets that sources are in, by the name in BIDS URIs.
    made_from : dict, optional
        What the tables depend on, which their sidecar keeps.
    obsolete : sequence of Path
        Files of an earlier run to be removed.
    name : str
        Name of the workflow.

    Inputs
    ------
    preproc
        Scan on the grid of the T1w, 3-D or 4-D.
    native_file
        Static image on the native grid.
    frames_file, frame_xfms
        As `init_pet_reference_wf` gives them, for a correction for partial volume effects.
    t1w_file, mask_file, dseg_file
        As `init_anatomical_wf` gives them.
    best_xfm, best_inverse_xfm, m2m_xfms
        As `init_registration_wf` gives them.

    Outputs
    -------
    out_files
        Files of the output dataset.
    """
    workflow = Workflow(name=name)
    workflow.__desc__ = _methods(scan, plan, options)
    inputnode = pe.Node(niu.IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=["out_files"]), name="outputnode")
    place_labels = pe.Node(
        PlaceLabels(needs_m2m=bool(scan.template)), name="place_labels", mem_gb=1
    )
    quantify_scan = _quantify_node(scan, plan, options, name="quantify_scan")
    save_quantification = pe.Node(
        SaveQuantification(
            made_from=made_from or {},
            obsolete_files=[str(file) for file in obsolete],
            pvc_reason=plan.pvc_reason,
            **_saved(scan, plan, options, output_dir, datasets),
        ),
        name="save_quantification",
    )
    workflow.connect([
        (inputnode, place_labels, [
            ("t1w_file", "t1w_file"), ("mask_file", "mask_file"), ("m2m_xfms", "m2m_xfms"),
        ]),
        (inputnode, quantify_scan, [
            ("preproc", "in_file"), ("native_file", "native_file"), ("best_xfm", "xfm"),
        ]),
        (place_labels, quantify_scan, [("out_file", "label_file"), ("reason", "labels_reason")]),
        (quantify_scan, save_quantification, [("files", "files"), ("facts", "facts")]),
        (save_quantification, outputnode, [("out_files", "out_files")]),
    ])  # fmt: skip
    if plan.labels is None:
        workflow.connect(inputnode, "dseg_file", place_labels, "label_file")
    else:
        place_labels.inputs.trait_set(**plan.labels.inputs)
    if scan.modality == "pet":
        _add_figure(workflow, scan, output_dir)
    if plan.pvc != "none":
        _add_correction(workflow, scan, plan, options, output_dir, datasets)
    return workflow


def _add_figure(workflow: Workflow, scan: Scan, output_dir: Path) -> None:
    """Draw SUVR, where there is any, and remove the figure of an earlier run where not."""
    inputnode, quantify_scan = (workflow.get_node(n) for n in ("inputnode", "quantify_scan"))
    draw_suvr = pe.Node(SUVRFigure(), name="draw_suvr", mem_gb=1.5)
    save_figures = pe.Node(
        SaveFigures(drawn=["suvr"], **figures_of_scan(scan, output_dir)), name="save_figures"
    )
    workflow.connect([
        (inputnode, draw_suvr, [("mask_file", "mask_file"), ("dseg_file", "dseg_file")]),
        (quantify_scan, draw_suvr, [("files", "files"), ("facts", "facts")]),
        (draw_suvr, save_figures, [("out_files", "in_files")]),
    ])  # fmt: skip


def _add_correction(
    workflow: Workflow,
    scan: Scan,
    plan: QuantificationPlan,
    options: QuantificationOptions,
    output_dir: Path,
    datasets: dict[str, Path],
) -> None:
    """Correct all frames for partial volume effects on the native grid; measure them too."""
    inputnode, place_labels, save_quantification = (
        workflow.get_node(name) for name in ("inputnode", "place_labels", "save_quantification")
    )
    # Like resample_frames of the scan, but on its own grid; of a 3-D scan it is the static image.
    align_frames = pe.Node(ResampleFrames(), name="align_frames", mem_gb=2)
    correct_pv = pe.Node(
        CorrectPartialVolume(
            scheme=plan.scheme,
            method=plan.pvc,
            psf_fwhm_mm=list(options.psf_fwhm_mm),
            metadata=dict(scan.sidecar),
        ),
        name="correct_pv",
        mem_gb=3,
    )
    save_corrected = pe.Node(
        SaveQuantification(**_saved(scan, plan, options, output_dir, datasets, pvc=plan.pvc)),
        name="save_corrected",
    )
    workflow.connect([
        (inputnode, align_frames, [
            ("frames_file", "in_file"),
            ("frame_xfms", "frame_xfms"),
            ("native_file", "static_file"),
            ("native_file", "reference_file"),
        ]),
        (inputnode, correct_pv, [("best_inverse_xfm", "inverse_xfm")]),
        (align_frames, correct_pv, [("out_file", "in_file")]),
        (place_labels, correct_pv, [("out_file", "label_file"), ("reason", "labels_reason")]),
        (correct_pv, save_quantification, [("reason", "pvc_reason")]),
        (save_corrected, save_quantification, [("out_files", "waits_for")]),
    ])  # fmt: skip
    if plan.pvc == "gtm":
        workflow.connect(correct_pv, "tacs_file", save_corrected, "tacs_file")
        return
    resample_corrected = pe.Node(ResampleCorrected(), name="resample_corrected", mem_gb=1.5)
    quantify_corrected = _quantify_node(scan, plan, options, name="quantify_corrected")
    workflow.connect([
        (inputnode, resample_corrected, [("t1w_file", "reference_file"), ("best_xfm", "xfm")]),
        (inputnode, quantify_corrected, [("native_file", "native_file"), ("best_xfm", "xfm")]),
        (place_labels, quantify_corrected, [
            ("out_file", "label_file"), ("reason", "labels_reason"),
        ]),
        (correct_pv, resample_corrected, [("out_file", "in_file")]),
        (resample_corrected, quantify_corrected, [("out_file", "in_file")]),
        (resample_corrected, save_corrected, [("out_file", "preproc")]),
        (quantify_corrected, save_corrected, [("files", "files"), ("facts", "facts")]),
    ])  # fmt: skip


def _quantify_node(
    scan: Scan, plan: QuantificationPlan, options: QuantificationOptions, *, name: str
) -> pe.Node:
    node = pe.Node(
        QuantifyScan(
            scan={
                "scheme": plan.scheme,
                "metadata": dict(scan.sidecar),
                "is_pet": scan.modality == "pet",
                "weight": plan.weight.value,
                "weight_units": plan.weight.units,
                "weight_source": plan.weight.source,
                "suvr_region": plan.suvr_region,
                "suvr_mask_label": plan.suvr_mask_label,
                "suvr_reason": plan.suvr_reason,
                "smooth_fwhm_mm": list(options.smooth_fwhm_mm),
            }
        ),
        name=name,
        mem_gb=2,
    )
    if plan.suvr_mask:
        node.inputs.suvr_mask_file = str(plan.suvr_mask)
    return node


def _saved(
    scan: Scan,
    plan: QuantificationPlan,
    options: QuantificationOptions,
    output_dir: Path,
    datasets: dict[str, Path],
    *,
    pvc: str | None = None,
) -> dict[str, dict]:
    """Where outputs go, and what their sidecars say whatever is found."""
    used, reference, labels = [scan.file, *plan.files], None, f"tissues of {scan.template}"
    if scan.t1w is not None:
        anatomy = expected_anat_outputs(scan.t1w_entities, output_dir)
        label_file = plan.labels.file if plan.labels else anatomy["dseg"]
        used = list(dict.fromkeys([scan.file, label_file, *plan.files]))
        labels = file_uri(label_file, output_dir, datasets)
        reference = file_uri(anatomy["preproc"], output_dir, datasets)
    sources = [file_uri(file, output_dir, datasets) for file in used]
    said = {"Segmentation": plan.segmentation, "LabelFile": labels}
    if pvc:
        said["PartialVolumeCorrection"] = pvc
        said["PSFFullWidthHalfMaximum"] = list(options.psf_fwhm_mm)
    return {
        "outputs": {
            key: str(file)
            for key, file in quantification_outputs(
                scan,
                output_dir,
                plan.segmentation,
                pvc=pvc,
                smooth_fwhm_mm=options.smooth_fwhm_mm,
            ).items()
        },
        "image_sidecar": {
            **image_sidecar(
                sources,
                is_skull_stripped=scan.modality == "fa",
                spatial_reference=reference,
                source_metadata=dict(scan.sidecar),
            ),
            **said,
        },
        "table_sidecar": {
            **image_sidecar(sources, source_metadata=dict(scan.sidecar)),
            **said,
        },
    }


def _methods(scan: Scan, plan: QuantificationPlan, options: QuantificationOptions) -> str:
    """Say what was done, for the methods section: a paragraph for each fact."""
    labels = "FreeSurfer labels [@fischl2012] of the T1w"
    if plan.scheme == "tissues":
        labels = f"tissue labels of {scan.template or 'the T1w'}"
    text = f"""\
#### Quantification

Registered images were averaged over {labels}, within the scans' field of view.
"""
    if scan.modality == "pet" and plan.weight.value is not None:
        text += """
SUV is the activity concentration relative to the injected activity, corrected for decay, per body
weight; it was computed where the metadata of a scan had all of these.
"""
    if scan.modality == "pet" and (plan.suvr_region or plan.suvr_mask):
        text += """
SUVR is the ratio to the mean of a reference region, which the sidecars name.
"""
    if options.smooth_fwhm_mm:
        *others, width = (f"{width:g}" for width in options.smooth_fwhm_mm)
        widths = f"{', '.join(others)} and {width}" if others else width
        kernels = "Gaussian kernels" if others else "a Gaussian kernel"
        text += f"""
Copies of registered images, and of what was computed from them, were smoothed with
{kernels} of {widths} mm full width at half maximum.
"""
    if plan.pvc != "none":
        width = " x ".join(f"{value:g}" for value in options.psf_fwhm_mm)
        method = {
            "gtm": "the geometric transfer matrix [@rousset1998]",
            "rbv": "region-based voxelwise correction [@thomas2011]",
        }[plan.pvc]
        text += f"""
Partial volume effects were corrected by {method} on the native grid, in every frame of a dynamic
scan after its alignment, with labels carried there as fractions of voxels, and a Gaussian point
spread function of {width} mm.
"""
    return text
