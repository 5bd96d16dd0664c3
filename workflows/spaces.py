"""Outputs in other spaces: other grids of the T1w's space, and templates."""

from pathlib import Path
from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.derivatives import bids_uri
from m2m_bids.bids.naming import (
    expected_space_outputs,
    expected_template_outputs,
    static_outputs,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.spaces import OutputSpace
from m2m_bids.interfaces.outputs import SaveInSpace, SaveTemplate
from m2m_bids.interfaces.registration import ResampleFrames, ResampleImage
from m2m_bids.interfaces.spaces import (
    ComposeTransforms,
    MakeGrid,
    NormalizeT1w,
    TakeTemplate,
    TakeTransforms,
)
from m2m_bids.workflows.diffusion import MAPS, init_diffusivities_wf
from m2m_bids.workflows.outputs import placement
from m2m_bids.workflows.registration import RegistrationOptions

_REGISTERED = "Registered to the template, affinely and with SyN (ANTs)."
_GIVEN = "Brought to the template by the transform that another program has made, see Sources."


def init_template_target_wf(*, name: str = "template_target_wf") -> Workflow:
    """
    Let the embedded template stand for the T1w of a person who has none.

    Parameters
    ----------
    name : str
        Name of the workflow.

    Outputs
    -------
    t1w_file, mask_file, dseg_file, template2anat
        As `init_anatomical_wf` gives them.
    """
    workflow = Workflow(name=name)
    outputnode = pe.Node(
        niu.IdentityInterface(fields=["t1w_file", "mask_file", "dseg_file", "template2anat"]),
        name="outputnode",
    )
    take_template = pe.Node(TakeTemplate(), name="take_template", mem_gb=1)
    fields = ("t1w_file", "mask_file", "dseg_file", "template2anat")
    workflow.connect([(take_template, outputnode, [(field, field) for field in fields])])
    return workflow


def init_template_wf(
    *,
    space: OutputSpace,
    t1w_file: Path,
    t1w_entities: dict[str, str],
    templateflow_home: Path,
    output_dir: Path,
    datasets: dict[str, Path],
    options: RegistrationOptions,
    given_xfms: tuple[Path, Path] | None = None,
    name: str = "template_wf",
) -> Workflow:
    """
    Register a T1w to a template, unless that is done, and write it there and the transforms.

    Parameters
    ----------
    space : OutputSpace
        The template.
    t1w_file : Path
        T1w image as it came.
    t1w_entities : dict
        Entities of its name.
    templateflow_home : Path
        Folder of the TemplateFlow archive.
    output_dir : Path
        Root of the output dataset.
    datasets : dict of str to Path
        Datasets that sources are in, by the name in BIDS URIs.
    options : RegistrationOptions
        Seed and threads.
    given_xfms : tuple of Path, optional
        Transforms to the template and back that another program has made, to be used instead.
    name : str
        Name of the workflow.

    Inputs
    ------
    t1w_file, mask_file, template2anat, is_skull_stripped
        As `init_anatomical_wf` gives them.

    Outputs
    -------
    xfm, inverse_xfm
        ITK composites: ``xfm`` carries images from the T1w to the template.
    """
    workflow = Workflow(name=name)
    found = (
        "The transform between the T1w and"
        if given_xfms
        else "By an affine transform and SyN with ANTs [@avants2008], both by mutual information, "
        "the brain of the T1w was registered to"
    )
    precomputed = " was precomputed" if given_xfms else ""
    workflow.__desc__ = f"""\
#### Template

{found} the template {space.template}{precomputed}. Images, of dynamic scans
all frames, were brought there by the composite of all transforms.
"""
    inputnode = pe.Node(
        niu.IdentityInterface(
            fields=["t1w_file", "mask_file", "template2anat", "is_skull_stripped"]
        ),
        name="inputnode",
    )
    outputnode = pe.Node(niu.IdentityInterface(fields=["xfm", "inverse_xfm"]), name="outputnode")
    source = _template_inputs(space, templateflow_home)
    xfm_buffer = pe.Node(niu.IdentityInterface(fields=["xfm", "inverse_xfm"]), name="xfm_buffer")
    make_grid = pe.Node(MakeGrid(**source), name="make_grid", mem_gb=1)
    resample_t1w = pe.Node(ResampleImage(), name="resample_t1w", mem_gb=1.5)
    files = expected_template_outputs(t1w_entities, output_dir, space)
    save_template = pe.Node(
        SaveTemplate(
            outputs={key: str(file) for key, file in files.items()},
            sources=[
                bids_uri(file, output_dir, datasets)
                for file in (t1w_file, *(given_xfms or ())[:1])
            ],
            description=_GIVEN if given_xfms else _REGISTERED,
        ),
        name="save_template",
    )
    workflow.connect([
        (inputnode, make_grid, [("t1w_file", "native_file")]),
        (inputnode, resample_t1w, [("t1w_file", "in_file")]),
        (make_grid, resample_t1w, [("out_file", "reference_file")]),
        (xfm_buffer, resample_t1w, [("xfm", "xfm")]),
        (inputnode, save_template, [("is_skull_stripped", "is_skull_stripped")]),
        (resample_t1w, save_template, [("out_file", "image")]),
        (xfm_buffer, save_template, [("xfm", "xfm"), ("inverse_xfm", "inverse_xfm")]),
        (xfm_buffer, outputnode, [("xfm", "xfm"), ("inverse_xfm", "inverse_xfm")]),
    ])  # fmt: skip
    if given_xfms:
        xfm, inverse_xfm = map(str, given_xfms)
        interface = TakeTransforms(xfm_file=xfm, inverse_xfm_file=inverse_xfm, **source)
        make_xfms = pe.Node(interface, name="take_xfms", mem_gb=2)
        fields: tuple[str, ...] = ("mask_file",)
    else:
        interface = NormalizeT1w(random_seed=options.random_seed, **source)
        make_xfms = pe.Node(interface, name="normalize_t1w", mem_gb=2)
        fields = ("t1w_file", "mask_file", "template2anat")
    workflow.connect([
        (inputnode, make_xfms, [(field, field) for field in fields]),
        (make_xfms, xfm_buffer, [("xfm", "xfm"), ("inverse_xfm", "inverse_xfm")]),
    ])  # fmt: skip
    return workflow


def init_scan_space_wf(
    *,
    space: OutputSpace,
    scan: Scan,
    templateflow_home: Path,
    output_dir: Path,
    datasets: dict[str, Path],
    options: RegistrationOptions,
    given_xfms: tuple[Path, Path] | None = None,
    has_xfms: bool = True,
    made_from: dict[str, Any] | None = None,
    name: str = "space_wf",
) -> Workflow:
    """
    Bring a scan into a space, from its own grid in one interpolation, and write it.

    The frames of a dynamic scan, each by its motion too, and the diffusivities of an FA scan go
    with it.

    Parameters
    ----------
    space : OutputSpace
        The space.
    scan : Scan
        PET or FA scan.
    templateflow_home : Path
        Folder of the TemplateFlow archive.
    output_dir : Path
        Root of the output dataset.
    datasets : dict of str to Path
        Datasets that sources are in, by the name in BIDS URIs.
    options : RegistrationOptions
        How the scan was registered.
    given_xfms : tuple of Path, optional
        As `init_template_wf` takes them: what is there is a source of the image.
    has_xfms : bool
        Whether the composites to and from a template are written too: they are the same for all
        of its grids.
    made_from : dict, optional
        What the images depend on, which their sidecars keep.
    name : str
        Name of the workflow.

    Inputs
    ------
    moving_file, best_xfm, best_inverse_xfm, m2m_xfms
        As `init_registration_wf` takes and gives them.
    t1w_file
        As `init_anatomical_wf` gives it.
    md_file, ad_file, rd_file
        As `init_fa_fit_wf` gives them; maps that the scan has as files need none.
    frames_file, frame_xfms, reference_method
        As `init_pet_reference_wf` gives them, the last as ``method``; of FA scans none.
    template_xfm, template_inverse_xfm
        As `init_template_wf` gives them, for a template that is not the scan's target.
    """
    workflow = Workflow(name=name)
    inputnode = pe.Node(
        niu.IdentityInterface(
            fields=[
                *("moving_file", "t1w_file", "best_xfm", "best_inverse_xfm", "m2m_xfms"),
                *("template_xfm", "template_inverse_xfm"),
                *("frames_file", "frame_xfms", "reference_method", *MAPS),
            ]
        ),
        name="inputnode",
    )
    target = pe.Node(niu.IdentityInterface(fields=["reference_file", "xfm"]), name="target")
    make_grid = pe.Node(MakeGrid(), name="make_grid", mem_gb=1)
    if space.resolution:
        make_grid.inputs.resolution = space.resolution
    resample_scan = pe.Node(ResampleImage(), name="resample_scan", mem_gb=1.5)
    used_xfms = (given_xfms or ())[:1]
    save_in_space = pe.Node(
        _saver(
            *(space, scan, output_dir, datasets, options, made_from),
            used=(*scan.sources, *used_xfms),
            has_xfms=has_xfms,
        ),
        name="save_in_space",
    )
    workflow.connect([
        (inputnode, make_grid, [("moving_file", "native_file")]),
        (make_grid, target, [("out_file", "reference_file")]),
        (inputnode, resample_scan, [("moving_file", "in_file")]),
        (target, resample_scan, [("reference_file", "reference_file"), ("xfm", "xfm")]),
        (inputnode, save_in_space, [("m2m_xfms", "m2m_xfms")]),
    ])  # fmt: skip
    if scan.modality == "pet":
        _add_frames(workflow)
    else:
        workflow.connect(resample_scan, "out_file", save_in_space, "image")
    if scan.diffusivities:
        diffusivities_wf = init_diffusivities_wf(
            scan=scan,
            output_dir=output_dir,
            datasets=datasets,
            options=options,
            space=space,
            given_xfms=used_xfms,
            made_from=made_from,
            name="diffusivities_wf",
        )
        fitted = MAPS if scan.gradients is not None else ()
        workflow.connect([
            (target, diffusivities_wf, [
                ("reference_file", "inputnode.reference_file"), ("xfm", "inputnode.xfm"),
            ]),
            (inputnode, diffusivities_wf, [
                (field, f"inputnode.{field}") for field in ("m2m_xfms", *fitted)
            ]),
        ])  # fmt: skip
    if not space.is_template:
        workflow.connect([
            (inputnode, make_grid, [("t1w_file", "t1w_file")]),
            (inputnode, target, [("best_xfm", "xfm")]),
        ])  # fmt: skip
        return workflow
    make_grid.inputs.trait_set(**_template_inputs(space, templateflow_home))
    if space.name == scan.template:
        workflow.connect(inputnode, "best_xfm", target, "xfm")
        return workflow
    # Outermost first: points go from the template to the T1w, and from there to the scan.
    list_xfms = pe.Node(niu.Merge(2), name="list_xfms")
    workflow.connect([
        (inputnode, list_xfms, [("best_xfm", "in1"), ("template_xfm", "in2")]),
        (list_xfms, target, [("out", "xfm")]),
    ])  # fmt: skip
    if has_xfms:
        _add_composites(workflow)
    return workflow


def _add_frames(workflow: Workflow) -> None:
    """Bring all frames of a dynamic scan along; of a 3-D scan there is the static image alone."""
    inputnode, target, resample_scan, save_in_space = (
        workflow.get_node(name)
        for name in ("inputnode", "target", "resample_scan", "save_in_space")
    )
    resample_frames = pe.Node(ResampleFrames(), name="resample_frames", mem_gb=2)
    workflow.connect([
        (inputnode, resample_frames, [("frames_file", "in_file"), ("frame_xfms", "frame_xfms")]),
        (target, resample_frames, [("reference_file", "reference_file"), ("xfm", "xfm")]),
        (resample_scan, resample_frames, [("out_file", "static_file")]),
        (inputnode, save_in_space, [("reference_method", "reference_method")]),
        (resample_frames, save_in_space, [("out_file", "image"), ("static_file", "static")]),
    ])  # fmt: skip


def _add_composites(workflow: Workflow) -> None:
    """Write the transforms between a scan and a template."""
    inputnode, list_xfms, save_in_space = (
        workflow.get_node(name) for name in ("inputnode", "list_xfms", "save_in_space")
    )
    list_inverse_xfms = pe.Node(niu.Merge(2), name="list_inverse_xfms")
    compose_xfms = pe.Node(ComposeTransforms(), name="compose_xfms", mem_gb=1)
    compose_inverse_xfms = pe.Node(ComposeTransforms(), name="compose_inverse_xfms", mem_gb=1)
    workflow.connect([
        (inputnode, list_inverse_xfms, [
            ("template_inverse_xfm", "in1"), ("best_inverse_xfm", "in2"),
        ]),
        (list_xfms, compose_xfms, [("out", "xfm")]),
        (list_inverse_xfms, compose_inverse_xfms, [("out", "xfm")]),
        (compose_xfms, save_in_space, [("out_file", "xfm")]),
        (compose_inverse_xfms, save_in_space, [("out_file", "inverse_xfm")]),
    ])  # fmt: skip


def _template_inputs(space: OutputSpace, templateflow_home: Path) -> dict[str, str]:
    """Name a template for an interface that loads it."""
    inputs = {"template": space.name, "templateflow_home": str(templateflow_home)}
    return {**inputs, "cohort": space.cohort} if space.cohort else inputs


def _saver(
    space: OutputSpace,
    scan: Scan,
    output_dir: Path,
    datasets: dict[str, Path],
    options: RegistrationOptions,
    made_from: dict[str, Any] | None,
    *,
    used: tuple[Path, ...],
    has_xfms: bool,
) -> SaveInSpace:
    """Make the interface that writes a scan in a space."""
    static = static_outputs(scan, output_dir, space) if scan.modality == "pet" else {}
    outputs = {
        transform: {
            key: str(file)
            for key, file in {
                **expected_space_outputs(scan, output_dir, space, transform),
                **static,
            }.items()
            if has_xfms or not key.endswith("xfm")
        }
        for transform in ("m2m", "rigid")
    }
    sidecar = {
        "sources": [bids_uri(file, output_dir, datasets) for file in used],
        "is_skull_stripped": scan.modality == "fa",
        "source_metadata": dict(scan.sidecar),
        "description": f"In the space {space}.",
        **placement(scan, output_dir, datasets, space),
    }
    return SaveInSpace(
        outputs=outputs,
        sidecar=sidecar,
        provenance=options.provenance,
        linear=scan.linear,
        made_from=made_from or {},
    )
