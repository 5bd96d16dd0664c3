"""The workflow of a run: the only builders that take Settings."""

import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import networkx as nx
from nipype.pipeline.engine.utils import topological_sort
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.fingerprints import fingerprints
from m2m_bids.bids.methods import merge_methods, methods_markdown, read_description
from m2m_bids.bids.obsolete import obsolete_outputs
from m2m_bids.bids.precomputed import Precomputed, find_anatomy
from m2m_bids.bids.quantification import (
    plan_quantification,
    quantification_record,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import FRAMES, TEMPLATE_TRANSFORMS, Request
from m2m_bids.bids.spaces import OutputSpace, spaces_from
from m2m_bids.settings import Settings
from m2m_bids.workflows.anatomical import init_anatomical_wf
from m2m_bids.workflows.cohort import EvaluationImages, TrainingImages, init_images_wf
from m2m_bids.workflows.diffusion import (
    MAPS,
    init_diffusivities_wf,
    init_fa_fit_wf,
    init_fa_reference_wf,
)
from m2m_bids.workflows.memory import declare_memory
from m2m_bids.workflows.outputs import (
    ANATOMY,
    init_anatomical_outputs_wf,
    init_scan_outputs_wf,
)
from m2m_bids.workflows.pet import init_pet_frames_wf, init_pet_reference_wf
from m2m_bids.workflows.quantification import init_quantification_wf
from m2m_bids.workflows.registration import OUTPUTS, RegistrationOptions, init_registration_wf
from m2m_bids.workflows.spaces import (
    init_scan_space_wf,
    init_template_target_wf,
    init_template_wf,
)

WORKFLOW_NAME = "m2m_bids_wf"


def init_m2m_bids_wf(
    settings: Settings,
    scans: Sequence[Scan],
    options: RegistrationOptions,
    *,
    images: TrainingImages | EvaluationImages | None = None,
    name: str = WORKFLOW_NAME,
) -> Workflow:
    """
    Build the workflow of a run.

    Parameters
    ----------
    settings : Settings
        Settings of the run.
    scans : sequence of Scan
        Scans to register, each with its T1w.
    options : RegistrationOptions
        How they are registered.
    images : TrainingImages or EvaluationImages, optional
        Images to train on, or to evaluate, that are written instead of derivatives.
    name : str
        Name of the workflow.

    Returns
    -------
    Workflow
        One workflow per subject in it.
    """
    workflow = Workflow(name=name, base_dir=str(settings.work_dir))
    for subject in dict.fromkeys(scan.subject for scan in scans):
        own = [scan for scan in scans if scan.subject == subject]
        single_subject_wf = init_single_subject_wf(
            settings, own, options, images=images, name=single_subject_wf_name(subject)
        )
        crash_dir = settings.output_dir / f"sub-{subject}" / "log" / settings.run_uuid
        single_subject_wf.config["execution"]["crashdump_dir"] = str(crash_dir)
        for node in single_subject_wf._get_all_nodes():
            node.config = deepcopy(single_subject_wf.config)
        declare_memory(
            single_subject_wf,
            {scan.t1w for scan in own if scan.t1w},
            {scan_wf_name(scan): scan.file for scan in own},
        )
        workflow.add_nodes([single_subject_wf])
    return workflow


def init_single_subject_wf(
    settings: Settings,
    scans: Sequence[Scan],
    options: RegistrationOptions,
    *,
    images: TrainingImages | EvaluationImages | None = None,
    name: str,
) -> Workflow:
    """
    Build the workflow of one subject: each T1w once, then each scan to its T1w or the template.

    Parameters
    ----------
    settings : Settings
        Settings of the run.
    scans : sequence of Scan
        The subject's scans, each with its T1w.
    options : RegistrationOptions
        How they are registered.
    images : TrainingImages or EvaluationImages, optional
        Images to train on, or to evaluate, that are written instead of derivatives.
    name : str
        Name of the workflow.

    Returns
    -------
    Workflow
    """
    workflow = Workflow(name=name)
    targets: dict[str, Workflow] = {}
    for scan in scans:
        target = anatomical_wf_name(scan)
        if target not in targets:
            targets[target] = _add_target(
                workflow, scan, settings, options, is_written=images is None
            )
        scan_wf = _add_scan(
            workflow, scan, targets[target], settings, options, is_reported=images is None
        )
        if images is None:
            _add_outputs(workflow, scan_wf, scan, targets[target], settings, options)
            save_scan = scan_wf.get_node("outputs_wf.save_scan")
            save_scan.inputs.methods = _scan_methods(workflow, scan_wf)
        else:
            _add_images(workflow, scan_wf, scan, targets[target], images)
    return workflow


def scan_request(scan: Scan, settings: Settings, options: RegistrationOptions) -> Request:
    """
    Say what the outputs of a scan are to be made from, to compare with what they were made from.

    Parameters
    ----------
    scan : Scan
        A scan with its target.
    settings : Settings
        Settings of the run.
    options : RegistrationOptions
        How scans are registered.

    Returns
    -------
    Request
    """

    def marks(files: Iterable[Path]) -> dict[str, str]:
        return fingerprints(files, settings.output_dir, settings.datasets)

    own_maps = [file for file in scan.diffusivities.values() if file]
    registration = {
        "Target": scan.space,
        "Files": marks([*scan.sources, *own_maps]),
        "Metadata": dict(scan.sidecar),
        **options.record,
    }
    given = Precomputed()
    if scan.t1w is not None:
        given = find_anatomy(scan, *settings.anatomy_sources)
        registration["Anatomy"] = marks(given.files)
        registration["BrainExtraction"] = (
            "given" if given.mask_files else settings.brain_extraction
        )
        if settings.synthstrip_model and not given.mask_files:
            registration["SynthStripModel"] = marks([settings.synthstrip_model])
    if scan.modality == "pet":
        registration[FRAMES] = settings.frames_request
    asked = settings.quantification_options
    plan = plan_quantification(scan, settings.bids_dir, asked)
    spaces = {}
    for space in spaces_from(scan.space, settings.further_spaces):
        given_xfms = given.template_xfms.get(space.template)
        spaces[space] = dict(registration)
        if given_xfms:
            spaces[space][TEMPLATE_TRANSFORMS] = marks(given_xfms)
    return Request(
        settings.transform,
        registration,
        quantification_record(plan, asked, marks(plan.files)),
        spaces,
    )


def methods_text(workflow: Workflow) -> str:
    """
    Join what the parts of a workflow say of themselves.

    Parameters
    ----------
    workflow : Workflow
        As `init_m2m_bids_wf` builds it.

    Returns
    -------
    str
        Markdown, each paragraph once, however many subjects and scans have it, and under one
        heading those that share it.
    """
    return methods_markdown(_methods_of([workflow]))


def single_subject_wf_name(subject: str) -> str:
    """Name of the workflow of a subject."""
    return f"sub_{identifier(subject)}_wf"


def anatomical_wf_name(scan: Scan) -> str:
    """Name of the workflow that prepares a scan's T1w, or takes the template in its place."""
    if scan.t1w is None:
        return f"target_{identifier(scan.template)}_wf"
    return f"{identifier(scan.t1w.name.split('.')[0])}_wf"


def scan_wf_name(scan: Scan) -> str:
    """Name of the workflow that registers a scan."""
    return f"{identifier(scan.name)}_wf"


def identifier(text: str) -> str:
    """
    Spell a BIDS name so that Nipype takes it for a node's.

    Examples
    --------
    >>> identifier("sub-01_trc-18F+X_pet")
    'sub_01_trc_18FplusX_pet'
    """
    return re.sub(r"\W", "_", text.replace("+", "plus"))


def _add_target(
    workflow: Workflow,
    scan: Scan,
    settings: Settings,
    options: RegistrationOptions,
    *,
    is_written: bool,
) -> Workflow:
    """Prepare what a scan is registered to: its T1w, which may be written, or the template."""
    if scan.t1w is None:
        return init_template_target_wf(name=anatomical_wf_name(scan))
    # Labels that methods are evaluated with must not help them.
    given = find_anatomy(scan, *settings.anatomy_sources) if is_written else Precomputed()
    anatomical_wf = _init_anatomy(scan, settings, options, given)
    if is_written:
        _add_anatomical_outputs(workflow, scan, anatomical_wf, settings, settings.datasets, given)
    return anatomical_wf


def _add_outputs(
    workflow: Workflow,
    scan_wf: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    settings: Settings,
    options: RegistrationOptions,
) -> None:
    """Write all that there is to be of a scan."""
    request = scan_request(scan, settings, options)
    obsolete = obsolete_outputs(scan, settings.output_dir, request)
    if scan.modality == "pet":
        _add_frames(workflow, scan_wf, anatomical_wf)
    _add_scan_outputs(scan_wf, scan, settings, options, request, obsolete)
    if scan.diffusivities:
        _add_diffusivities(workflow, scan, anatomical_wf, settings, options, request)
    _add_quantification(workflow, scan_wf, scan, anatomical_wf, settings, request, obsolete)
    for space, made_from in request.spaces.items():
        _add_space(workflow, scan, anatomical_wf, settings, options, space, dict(made_from))


def _init_anatomy(
    scan: Scan, settings: Settings, options: RegistrationOptions, precomputed: Precomputed
) -> Workflow:
    """Prepare a scan's T1w, with what other programs have made of it."""
    anatomical_wf = init_anatomical_wf(
        precomputed=precomputed,
        brain_extraction=settings.brain_extraction,
        synthstrip_model=settings.synthstrip_model,
        random_seed=settings.random_seed,
        omp_nthreads=options.omp_nthreads,
        name=anatomical_wf_name(scan),
    )
    anatomical_wf.inputs.inputnode.t1w_file = str(scan.t1w)
    return anatomical_wf


def _add_anatomical_outputs(
    workflow: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    settings: Settings,
    datasets: dict[str, Path],
    precomputed: Precomputed,
) -> None:
    """Write what was made of a scan's T1w."""
    outputs_wf = init_anatomical_outputs_wf(
        precomputed=precomputed,
        t1w_file=scan.t1w,
        t1w_entities=scan.t1w_entities,
        output_dir=settings.output_dir,
        datasets=datasets,
        name=f"outputs_{anatomical_wf_name(scan)}",
    )
    workflow.connect([
        (anatomical_wf, outputs_wf, [
            (f"outputnode.{field}", f"inputnode.{field}") for field in ANATOMY
        ]),
    ])  # fmt: skip


def _add_scan(
    workflow: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    settings: Settings,
    options: RegistrationOptions,
    *,
    is_reported: bool,
) -> Workflow:
    """Add the registration of one scan; return its workflow."""
    scan_wf = Workflow(name=scan_wf_name(scan))
    if scan.modality == "pet":
        reference_wf = init_pet_reference_wf(
            sidecar=scan.sidecar,
            kind=settings.pet_reference,
            has_motion_correction=not settings.hmc_off,
            random_seed=settings.random_seed,
            name="reference_wf",
        )
    elif scan.gradients is not None:
        reference_wf = init_fa_fit_wf(
            gradients=scan.gradients,
            mask=scan.mask,
            is_raw=scan.source == "raw",
            random_seed=options.random_seed,
            name="reference_wf",
        )
    else:
        reference_wf = init_fa_reference_wf(name="reference_wf")
    reference_wf.inputs.inputnode.in_file = str(scan.file)
    registration_wf = init_registration_wf(
        modality=scan.modality,
        options=options,
        template=scan.template,
        is_reported=is_reported,
        name="registration_wf",
    )
    scan_wf.connect([
        (reference_wf, registration_wf, [
            (f"outputnode.{_registered(scan)}", "inputnode.moving_file"),
            ("outputnode.out_file", "inputnode.native_file"),
        ]),
    ])  # fmt: skip
    fields = ("t1w_file", "mask_file", "dseg_file", "template2anat")
    workflow.connect([
        (anatomical_wf, scan_wf, [
            (f"outputnode.{field}", f"registration_wf.inputnode.{field}") for field in fields
        ]),
    ])  # fmt: skip
    return scan_wf


def _add_frames(workflow: Workflow, scan_wf: Workflow, anatomical_wf: Workflow) -> None:
    """Bring the frames of a PET scan to its T1w, should it have any."""
    frames_wf = init_pet_frames_wf(name="frames_wf")
    reference_wf, registration_wf = (
        scan_wf.get_node(name) for name in ("reference_wf", "registration_wf")
    )
    scan_wf.connect([
        (reference_wf, frames_wf, [
            (f"outputnode.{field}", f"inputnode.{field}")
            for field in ("frames_file", "frame_xfms", "motion_file")
        ]),
        (registration_wf, frames_wf, [
            (f"outputnode.{field}", f"inputnode.{field}")
            for field in ("preproc", "best_xfm", "figures")
        ]),
    ])  # fmt: skip
    workflow.connect([
        (anatomical_wf, scan_wf, [("outputnode.t1w_file", "frames_wf.inputnode.t1w_file")]),
    ])  # fmt: skip


def _add_scan_outputs(
    scan_wf: Workflow,
    scan: Scan,
    settings: Settings,
    options: RegistrationOptions,
    request: Request,
    obsolete: Sequence[Path],
) -> None:
    """Write the derivatives of a scan."""
    outputs_wf = init_scan_outputs_wf(
        scan=scan,
        output_dir=settings.output_dir,
        datasets=settings.datasets,
        options=options,
        made_from=dict(request.registration),
        obsolete=obsolete,
        name="outputs_wf",
    )
    reference_wf, registration_wf = (
        scan_wf.get_node(name) for name in ("reference_wf", "registration_wf")
    )
    framed: tuple[str, ...] = ()
    if scan.modality == "pet":
        framed = ("preproc", "figures")
        scan_wf.connect([
            (scan_wf.get_node("frames_wf"), outputs_wf, [
                (f"outputnode.{field}", f"inputnode.{field}") for field in (*framed, "static")
            ]),
            (reference_wf, outputs_wf, [
                (f"outputnode.{field}", f"inputnode.{field}")
                for field in ("motion_file", "motion_description", "frame_xfms")
            ]),
        ])  # fmt: skip
    scan_wf.connect([
        (reference_wf, outputs_wf, [("outputnode.method", "inputnode.reference_method")]),
        (registration_wf, outputs_wf, [
            (f"outputnode.{field}", f"inputnode.{field}")
            for field in OUTPUTS if field not in framed
        ]),
    ])  # fmt: skip


def _add_diffusivities(
    workflow: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    settings: Settings,
    options: RegistrationOptions,
    request: Request,
) -> None:
    """Write the diffusivities of an FA scan, those given or those fitted with it."""
    diffusivities_wf = init_diffusivities_wf(
        scan=scan,
        output_dir=settings.output_dir,
        datasets=settings.datasets,
        options=options,
        made_from=dict(request.registration),
        name="diffusivities_wf",
    )
    scan_wf = workflow.get_node(scan_wf_name(scan))
    reference_wf, registration_wf = (
        scan_wf.get_node(name) for name in ("reference_wf", "registration_wf")
    )
    scan_wf.connect([
        (registration_wf, diffusivities_wf, [
            ("outputnode.best_xfm", "inputnode.xfm"),
            ("outputnode.m2m_xfms", "inputnode.m2m_xfms"),
        ]),
    ])  # fmt: skip
    if scan.gradients is not None:
        scan_wf.connect([
            (reference_wf, diffusivities_wf, [
                (f"outputnode.{field}", f"inputnode.{field}") for field in MAPS
            ]),
        ])  # fmt: skip
    workflow.connect([
        (anatomical_wf, scan_wf, [
            ("outputnode.t1w_file", "diffusivities_wf.inputnode.reference_file"),
        ]),
    ])  # fmt: skip


def _add_space(
    workflow: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    settings: Settings,
    options: RegistrationOptions,
    space: OutputSpace,
    made_from: dict[str, Any],
) -> None:
    """Write a scan in another space; the first scan there brings its T1w along."""
    common: dict[str, Any] = {
        "templateflow_home": settings.templateflow_home,
        "output_dir": settings.output_dir,
        "datasets": settings.datasets,
        "options": options,
    }
    # Transforms are of the template, whatever the grid: the first of its spaces writes them.
    first = next(one for one in settings.further_spaces if one.template == space.template)
    given = Precomputed() if scan.t1w is None else find_anatomy(scan, *settings.anatomy_sources)
    common["given_xfms"] = given.template_xfms.get(space.template)
    space_wf = init_scan_space_wf(
        space=space,
        scan=scan,
        has_xfms=space == first,
        made_from=made_from,
        name=f"{identifier(str(space))}_wf",
        **common,
    )
    scan_wf = workflow.get_node(scan_wf_name(scan))
    reference_wf, registration_wf = (
        scan_wf.get_node(name) for name in ("reference_wf", "registration_wf")
    )
    made = {"out_file": "moving_file"}
    if scan.modality == "pet":
        made |= {field: field for field in ("frames_file", "frame_xfms")}
        made["method"] = "reference_method"
    elif scan.gradients is not None:
        made |= {field: field for field in MAPS}
    scan_wf.connect([
        (reference_wf, space_wf, [
            (f"outputnode.{output}", f"inputnode.{field}") for output, field in made.items()
        ]),
        (registration_wf, space_wf, [
            (f"outputnode.{field}", f"inputnode.{field}")
            for field in ("best_xfm", "best_inverse_xfm", "m2m_xfms")
        ]),
    ])  # fmt: skip
    workflow.connect([
        (anatomical_wf, scan_wf, [
            ("outputnode.t1w_file", f"{space_wf.name}.inputnode.t1w_file"),
        ]),
    ])  # fmt: skip
    if not space.is_template or scan.t1w is None:
        return
    name = f"{anatomical_wf_name(scan).removesuffix('_wf')}_{identifier(space.template)}_wf"
    template_wf = workflow.get_node(name)
    if template_wf is None:
        template_wf = init_template_wf(
            space=space,
            t1w_file=scan.t1w,
            t1w_entities=scan.t1w_entities,
            name=name,
            **common,
        )
        fields = ("t1w_file", "mask_file", "template2anat", "is_skull_stripped")
        workflow.connect([
            (anatomical_wf, template_wf, [
                (f"outputnode.{field}", f"inputnode.{field}") for field in fields
            ]),
        ])  # fmt: skip
    workflow.connect([
        (template_wf, scan_wf, [
            (f"outputnode.{field}", f"{space_wf.name}.inputnode.template_{field}")
            for field in ("xfm", "inverse_xfm")
        ]),
    ])  # fmt: skip


def _add_quantification(
    workflow: Workflow,
    scan_wf: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    settings: Settings,
    request: Request,
    obsolete: Sequence[Path],
) -> None:
    """Measure a registered scan in regions."""
    options = settings.quantification_options
    quantification_wf = init_quantification_wf(
        scan=scan,
        plan=plan_quantification(scan, settings.bids_dir, options),
        options=options,
        output_dir=settings.output_dir,
        datasets=settings.datasets,
        made_from=dict(request.quantification),
        obsolete=obsolete,
        name="quantification_wf",
    )
    reference_wf, registration_wf = (
        scan_wf.get_node(name) for name in ("reference_wf", "registration_wf")
    )
    registered = ("best_xfm", "best_inverse_xfm", "m2m_xfms")
    is_pet = scan.modality == "pet"
    on_t1w = scan_wf.get_node("frames_wf" if is_pet else "registration_wf")
    native = {"out_file": "native_file"}
    if is_pet:
        native |= {"frames_file": "frames_file", "frame_xfms": "frame_xfms"}
    scan_wf.connect([
        (on_t1w, quantification_wf, [("outputnode.preproc", "inputnode.preproc")]),
        (reference_wf, quantification_wf, [
            (f"outputnode.{output}", f"inputnode.{field}") for output, field in native.items()
        ]),
        (registration_wf, quantification_wf, [
            (f"outputnode.{field}", f"inputnode.{field}") for field in registered
        ]),
    ])  # fmt: skip
    workflow.connect([
        (anatomical_wf, scan_wf, [
            (f"outputnode.{field}", f"quantification_wf.inputnode.{field}")
            for field in ("t1w_file", "mask_file", "dseg_file")
        ]),
    ])  # fmt: skip


def _methods_of(parts: Iterable[Workflow]) -> dict[str, list[str]]:
    """Collect what workflows, and those in them, say of themselves: paragraphs by heading."""
    nested = (part for whole in parts for part in _nested(whole))
    return merge_methods(read_description(part.__desc__ or "") for part in nested)


def _scan_methods(workflow: Workflow, scan_wf: Workflow) -> dict[str, list[str]]:
    """Collect what is done for one scan, that of its T1w first."""
    needed = {scan_wf, *nx.ancestors(workflow._graph, scan_wf)}
    return _methods_of(part for part in topological_sort(workflow._graph)[0] if part in needed)


def _add_images(
    workflow: Workflow,
    scan_wf: Workflow,
    scan: Scan,
    anatomical_wf: Workflow,
    images: TrainingImages | EvaluationImages,
) -> None:
    """Write the images of a scan that a cohort level needs."""
    images_wf = init_images_wf(scan=scan, images=images, name="images_wf")
    reference_wf, registration_wf = (
        scan_wf.get_node(name) for name in ("reference_wf", "registration_wf")
    )
    scan_wf.connect([
        (reference_wf, images_wf, [
            (f"outputnode.{_registered(scan)}", "inputnode.moving_file"),
        ]),
        (registration_wf, images_wf, [("outputnode.rigid_xfm", "inputnode.rigid_xfm")]),
    ])  # fmt: skip
    fields = ("t1w_file", "mask_file", "dseg_file", "template2anat")
    workflow.connect([
        (anatomical_wf, scan_wf, [
            (f"outputnode.{field}", f"images_wf.inputnode.{field}") for field in fields
        ]),
    ])  # fmt: skip


def _registered(scan: Scan) -> str:
    """Name what registration is to see of a scan's reference: of PET a copy not negative."""
    return "registered_file" if scan.modality == "pet" else "out_file"


def _nested(workflow: Workflow) -> Iterator[Workflow]:
    """Yield a workflow and all those in it, as they run."""
    yield workflow
    for node in topological_sort(workflow._graph)[0]:
        if isinstance(node, Workflow):
            yield from _nested(node)
