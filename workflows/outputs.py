"""Everything that writes into the output dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.derivatives import bids_uri, image_sidecar
from m2m_bids.bids.labels import LabelFile
from m2m_bids.bids.naming import (
    expected_anat_outputs,
    expected_class_outputs,
    expected_outputs,
    figure_names,
    figures_of_scan,
    frame_outputs,
)
from m2m_bids.bids.precomputed import Precomputed
from m2m_bids.bids.query import Scan
from m2m_bids.bids.spaces import OutputSpace
from m2m_bids.interfaces.bids import DerivativesDataSink
from m2m_bids.interfaces.labels import PrepareLabels
from m2m_bids.interfaces.outputs import (
    DescribeMask,
    DescribeT1w,
    SaveClasses,
    SaveFigures,
    SaveProbabilities,
    SaveScan,
)
from m2m_bids.workflows.registration import OUTPUTS, RegistrationOptions

_NO_CLASSES = (
    " The 11 classes of the M2M-Reg paper (seg-m2m11) were not written: no labels of FreeSurfer "
    "were found that are of this T1w."
)
ANATOMY = (
    "t1w_file",
    "mask_file",
    "dseg_file",
    "probability_files",
    "is_skull_stripped",
    "mask_method",
    "figures",
)
# What is drawn of a scan before it is measured: by `RegistrationFigures` and `MotionFigure`.
REGISTRATION_FIGURES = (
    "native",
    "initial",
    "rigid",
    "affine",
    "m2m",
    "viewer",
    "grid",
    "jacobian",
    "cycle",
    "motion",
)
FRAME_INPUTS = ("static", "motion_file", "motion_description", "frame_xfms")


def init_anatomical_outputs_wf(
    *,
    t1w_file: Path,
    t1w_entities: dict[str, str],
    output_dir: Path,
    datasets: dict[str, Path],
    precomputed: Precomputed | None = None,
    name: str = "outputs_wf",
) -> Workflow:
    """
    Write the outputs of a T1w reference.

    Parameters
    ----------
    t1w_file : Path
        T1w image as it came.
    t1w_entities : dict
        Entities of its name.
    output_dir : Path
        Root of the output dataset.
    datasets : dict of str to Path
        Datasets that sources are in, by the name in BIDS URIs.
    precomputed : Precomputed, optional
        Files of other programs that were used; they are sources of what they stand for. Of its
        labels the 11 classes are written.
    name : str
        Name of the workflow.

    Inputs
    ------
    t1w_file, mask_file, dseg_file, probability_files, is_skull_stripped, mask_method, figures
        As `init_anatomical_wf` gives them.
    """
    workflow = Workflow(name=name)
    inputnode = pe.Node(niu.IdentityInterface(fields=list(ANATOMY)), name="inputnode")
    given = precomputed or Precomputed()

    def sources(*files: Path | None) -> list[str]:
        return [bids_uri(file, output_dir, datasets) for file in (t1w_file, *files) if file]

    common = {
        "base_directory": str(output_dir),
        "source_file": str(t1w_file),
        "compress": True,
        # As in `bids.naming.output_entities`: the outputs are in the T1w's own space.
        "dismiss_entities": ["space"],
    }
    ds_t1w = pe.Node(
        DerivativesDataSink(desc="preproc", suffix="T1w", **common),
        name="ds_t1w",
    )
    describe_t1w = pe.Node(
        DescribeT1w(sources=sources(given.t1w), is_precomputed=bool(given.t1w)),
        name="describe_t1w",
    )
    ds_mask = pe.Node(
        DerivativesDataSink(desc="brain", suffix="mask", **common),
        name="ds_mask",
    )
    describe_mask = pe.Node(DescribeMask(sources=sources(*given.mask_files)), name="describe_mask")
    ds_dseg = pe.Node(
        DerivativesDataSink(
            suffix="dseg",
            meta_dict=image_sidecar(
                sources(*dict.fromkeys((*given.mask_files, *given.tissue_files))),
                description="1 grey matter, 2 white matter, 3 cerebrospinal fluid."
                + ("" if given.labels else _NO_CLASSES),
            ),
            **common,
        ),
        name="ds_dseg",
    )
    files = expected_anat_outputs(t1w_entities, output_dir)
    save_probabilities = pe.Node(
        SaveProbabilities(
            outputs={key: str(file) for key, file in files.items()},
            sources=sources(*given.mask_files),
        ),
        name="save_probabilities",
    )
    save_figures = pe.Node(
        SaveFigures(drawn=["anatomical"], **figure_names(t1w_entities, "T1w", output_dir)),
        name="save_figures",
    )
    workflow.connect([
        (inputnode, describe_t1w, [("is_skull_stripped", "is_skull_stripped")]),
        (inputnode, ds_t1w, [("t1w_file", "in_file")]),
        (describe_t1w, ds_t1w, [("sidecar", "meta_dict")]),
        (inputnode, ds_mask, [("mask_file", "in_file")]),
        (inputnode, describe_mask, [("mask_method", "method")]),
        (describe_mask, ds_mask, [("sidecar", "meta_dict")]),
        (inputnode, ds_dseg, [("dseg_file", "in_file")]),
        (inputnode, save_probabilities, [("probability_files", "in_files")]),
        (inputnode, save_figures, [("figures", "in_files")]),
    ])  # fmt: skip
    if given.labels is not None:
        classes = expected_class_outputs(t1w_entities, output_dir)
        _add_classes(workflow, given.labels, classes, sources(given.labels.file))
    return workflow


def _add_classes(
    workflow: Workflow, labels: LabelFile, files: dict[str, Path], sources: list[str]
) -> None:
    """Write the 11 classes that FreeSurfer's labels have, in the T1w's space."""
    inputnode = workflow.get_node("inputnode")
    prepare_labels = pe.Node(
        PrepareLabels(**labels.inputs, scheme=labels.scheme),
        name="prepare_labels",
        mem_gb=1,
    )
    save_classes = pe.Node(
        SaveClasses(outputs={key: str(file) for key, file in files.items()}, sources=sources),
        name="save_classes",
    )
    workflow.connect([
        (inputnode, prepare_labels, [("t1w_file", "t1w_file"), ("mask_file", "mask_file")]),
        (prepare_labels, save_classes, [("out_file", "image")]),
    ])  # fmt: skip


def init_scan_outputs_wf(
    *,
    scan: Scan,
    output_dir: Path,
    datasets: dict[str, Path],
    options: RegistrationOptions,
    made_from: dict[str, Any] | None = None,
    obsolete: Sequence[Path] = (),
    name: str = "outputs_wf",
) -> Workflow:
    """
    Write the outputs of a registered scan.

    Parameters
    ----------
    scan : Scan
        PET or FA scan.
    output_dir : Path
        Root of the output dataset.
    datasets : dict of str to Path
        Datasets that sources are in, by the name in BIDS URIs.
    options : RegistrationOptions
        How it was registered.
    made_from : dict, optional
        What the outputs depend on, which their sidecar keeps.
    obsolete : sequence of Path
        Files of an earlier run to be removed.
    name : str
        Name of the workflow.

    Inputs
    ------
    reference_method
        How the static image was made.
    static, motion_file, motion_description, frame_xfms
        Registered static image and motion of a dynamic scan (`init_pet_frames_wf`,
        `init_pet_reference_wf`); undefined for others.
    preproc, rigid, rigid_xfm, rigid_inverse_xfm, rigid_score, rigid_start, m2m_xfms, quality, \
    objections, device_used, sha256, measures, figures
        As `init_registration_wf` gives them.
    """
    workflow = Workflow(name=name)
    inputnode = pe.Node(
        niu.IdentityInterface(fields=["reference_method", *FRAME_INPUTS, *OUTPUTS]),
        name="inputnode",
    )
    save_scan = pe.Node(
        SaveScan(
            outputs={
                key: str(file) for key, file in expected_outputs(scan, output_dir, "m2m").items()
            },
            sidecar={
                "sources": [bids_uri(file, output_dir, datasets) for file in scan.sources],
                **placement(scan, output_dir, datasets),
                "is_skull_stripped": scan.modality == "fa",
                "source_metadata": dict(scan.sidecar),
                "description": description_of(scan),
            },
            provenance=options.provenance,
            template=scan.template,
            made_from=made_from or {},
            obsolete_files=[str(file) for file in obsolete],
        ),
        name="save_scan",
    )
    save_figures = pe.Node(
        SaveFigures(drawn=list(REGISTRATION_FIGURES), **figures_of_scan(scan, output_dir)),
        name="save_figures",
    )
    if scan.modality == "pet":
        files = frame_outputs(scan, output_dir)
        save_scan.inputs.frame_outputs = {key: str(file) for key, file in files.items()}
    saved = ["reference_method", *FRAME_INPUTS, *(name for name in OUTPUTS if name != "figures")]
    workflow.connect([
        (inputnode, save_scan, [(field, field) for field in saved]),
        (inputnode, save_figures, [("figures", "in_files")]),
    ])  # fmt: skip
    return workflow


def spatial_reference(scan: Scan, output_dir: Path, datasets: dict[str, Path]) -> str | None:
    """Name the prepared T1w that a scan is registered to; a template's space needs no name."""
    if scan.t1w is None:
        return None
    reference = expected_anat_outputs(scan.t1w_entities, output_dir)["preproc"]
    return bids_uri(reference, output_dir, datasets)


def placement(
    scan: Scan, output_dir: Path, datasets: dict[str, Path], space: OutputSpace | None = None
) -> dict[str, str | None]:
    """Say where an image is, at its target or in a space, as `image_sidecar` takes it."""
    if space is None:
        return {"spatial_reference": spatial_reference(scan, output_dir, datasets)}
    placed = {}
    if space.resolution == "native":
        placed["resolution"] = "Voxels of the size of the scan's own."
    elif space.resolution:
        kind = "The template's resolution number" if space.is_template else "Voxels of, in mm,"
        placed["resolution"] = f"{kind} {space.resolution}."
    if not space.is_template:
        placed["spatial_reference"] = spatial_reference(scan, output_dir, datasets)
    return placed


def description_of(scan: Scan) -> str | None:
    """Say that a registered scan is in the space of a template, if it is, and why."""
    if not scan.template:
        return None
    return f"Registered to the template {scan.template} itself: {scan.t1w_choice}."
