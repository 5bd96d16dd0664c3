"""The level evaluate: each pair of images registered by each method, and measured."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.labels import LabelFile
from m2m_bids.interfaces.evaluation import MeasureRegistration, RegisterByMethod
from m2m_bids.interfaces.labels import PrepareLabels
from m2m_bids.interfaces.preprocessing import RegisterRigid
from m2m_bids.interfaces.records import MoveImages, SaveRecord
from m2m_bids.workflows.base import identifier
from m2m_bids.workflows.memory import declare_memory

PAIR_FIELDS = (
    "moving_file",
    "fixed_file",
    "mask_file",
    "dseg_file",
    "template2anat",
    "rigid_xfm",
)


@dataclass(frozen=True)
class MethodOptions:
    """
    A method, and how it is run.

    Parameters
    ----------
    key : str
        Name of the method in the records.
    weights : Path or None
        Weights folder of M2M-Reg.
    weights_sha256 : str
        Hash on its card.
    n_refine : int
        Steps of instance optimisation of M2M-Reg.
    can_use_gpu : bool
        Whether it runs on a GPU where there is one.
    """

    key: str
    weights: Path | None = None
    weights_sha256: str = ""
    n_refine: int = 0
    can_use_gpu: bool = False


@dataclass(frozen=True)
class MovingLabels:
    """
    Labels of the moving scan.

    Parameters
    ----------
    label : LabelFile
        In the world of the scan or, with the others given, of the T1w of its participant.
    t1w_file, mask_file, rigid_xfm : Path or None
        That T1w, its brain mask, and its rigid alignment with the scan.
    """

    label: LabelFile
    t1w_file: Path | None = None
    mask_file: Path | None = None
    rigid_xfm: Path | None = None


@dataclass(frozen=True)
class PairInputs:
    """
    What is known of a pair of images before it is registered.

    Parameters
    ----------
    name : str
        Name of the pair.
    modality : {"pet", "fa"}
        Kind of the moving scan.
    moving_file, fixed_file, mask_file, dseg_file, template2anat : Path
        Static image, T1w image, its brain mask and tissues, and ITK affine of MNI points to T1w
        points.
    rigid_xfm : Path or None
        ITK affine of points of the fixed image to those of the moving image; None where they have
        to be aligned, being of different participants.
    fixed_labels : LabelFile
        In the world of the fixed image.
    moving_labels : MovingLabels or None
        None where they are not known but by a registration.
    landmarks, reference_xfm : Path or None
        What is known of the true transform.
    """

    name: str
    modality: Literal["pet", "fa"]
    moving_file: Path
    fixed_file: Path
    mask_file: Path
    dseg_file: Path
    template2anat: Path
    rigid_xfm: Path | None
    fixed_labels: LabelFile
    moving_labels: MovingLabels | None
    landmarks: Path | None = None
    reference_xfm: Path | None = None


@dataclass(frozen=True)
class Task:
    """
    One registration: a method that is due for a pair.

    Parameters
    ----------
    method : MethodOptions
    record : dict
        Fields of the record that are known before.
    made_with : dict
        What the record depends on.
    out_dir : Path
        Folder of the record.
    is_shown : bool
        Whether moved image and labels are kept, to be shown.
    """

    method: MethodOptions
    record: dict[str, Any]
    made_with: dict[str, Any]
    out_dir: Path
    is_shown: bool = False


@dataclass(frozen=True)
class RunOptions:
    """
    How registrations are run, the same for all of them.

    Parameters
    ----------
    device : str
        Device of methods that can use a GPU.
    use_gpu : bool
        Whether these take one of Nipype's GPU slots.
    random_seed : int
    omp_nthreads : int
        Threads of one node.
    spacing_mm : float
        Voxels of the images that methods other than M2M-Reg see.
    """

    device: str
    use_gpu: bool
    random_seed: int
    omp_nthreads: int
    spacing_mm: float


def init_evaluation_wf(
    *,
    pairs: Sequence[tuple[PairInputs, Sequence[Task]]],
    options: RunOptions,
    base_dir: Path,
    crash_dir: Path,
    name: str = "evaluation_wf",
) -> Workflow:
    """
    Build the workflow that registers pairs by methods.

    Parameters
    ----------
    pairs : sequence of (PairInputs, sequence of Task)
        Pairs, and what is due for each.
    options : RunOptions
    base_dir, crash_dir : Path
        Folders of the nodes and of their crash files.
    name : str
        Name of the workflow.

    Returns
    -------
    Workflow
        One workflow per pair in it.
    """
    workflow = Workflow(name=name, base_dir=str(base_dir))
    workflow.config["execution"]["crashdump_dir"] = str(crash_dir)
    for pair, tasks in pairs:
        pair_wf = init_pair_wf(
            pair=pair, tasks=tasks, options=options, name=pair_wf_name(pair.name)
        )
        for field in PAIR_FIELDS:
            if (file := getattr(pair, field)) is not None:
                setattr(pair_wf.inputs.inputnode, field, str(file))
        declare_memory(pair_wf, [pair.fixed_file], {})
        workflow.add_nodes([pair_wf])
    for node in workflow._get_all_nodes():
        node.config = deepcopy(workflow.config)
    return workflow


def pair_wf_name(pair: str) -> str:
    """Name of the workflow of a pair."""
    return f"{identifier(pair)}_wf"


def node_names(method: str) -> tuple[str, ...]:
    """Names of the nodes that the record of a method depends on, in the order of their run."""
    key = identifier(method)
    return (
        *("align", "fixed_labels", "moving_labels"),
        *(f"{step}_{key}" for step in ("register", "measure", "move", "save")),
    )


def init_pair_wf(
    *, pair: PairInputs, tasks: Sequence[Task], options: RunOptions, name: str
) -> Workflow:
    """
    Register a pair by several methods.

    Parameters
    ----------
    pair : PairInputs
    tasks : sequence of Task
        The methods that are due.
    options : RunOptions
    name : str
        Name of the workflow.

    Inputs
    ------
    moving_file, fixed_file, mask_file, dseg_file, template2anat
        As of `PairInputs`.
    rigid_xfm
        ITK affine of fixed points to moving points, if that is known.

    Outputs
    -------
    record_files
        The records.
    """
    workflow = Workflow(name=name)
    inputnode = pe.Node(niu.IdentityInterface(fields=list(PAIR_FIELDS)), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=["record_files"]), name="outputnode")
    rigidnode = pe.Node(niu.IdentityInterface(fields=["rigid_xfm"]), name="rigidnode")
    fixed_labels = pe.Node(
        PrepareLabels(**pair.fixed_labels.inputs, scheme=pair.fixed_labels.scheme),
        name="fixed_labels",
        mem_gb=1,
    )
    records = pe.Node(niu.Merge(len(tasks)), name="records")
    workflow.connect([
        (inputnode, fixed_labels, [("fixed_file", "t1w_file"), ("mask_file", "mask_file")]),
        (records, outputnode, [("out", "record_files")]),
    ])  # fmt: skip
    if pair.moving_labels is not None:
        workflow.add_nodes([_moving_labels_node(pair.moving_labels)])
    if pair.rigid_xfm is not None:
        workflow.connect(inputnode, "rigid_xfm", rigidnode, "rigid_xfm")
    else:
        align = pe.Node(
            RegisterRigid(random_seed=options.random_seed),
            name="align",
            mem_gb=1.5,
        )
        fields = ("moving_file", "fixed_file", "mask_file")
        workflow.connect([
            (inputnode, align, [(field, field) for field in fields]),
            (align, rigidnode, [("xfm", "rigid_xfm")]),
        ])  # fmt: skip
    for place, task in enumerate(tasks, start=1):
        save = _add_task(workflow, pair, task, options)
        workflow.connect(save, "out_file", records, f"in{place}")
    return workflow


def _moving_labels_node(moving: MovingLabels) -> pe.Node:
    """Make the node that brings the labels of the moving scan to its world."""
    moving_labels = pe.Node(
        PrepareLabels(**moving.label.inputs, scheme=moving.label.scheme),
        name="moving_labels",
        mem_gb=1,
    )
    for field in ("t1w_file", "mask_file", "rigid_xfm"):
        if (file := getattr(moving, field)) is not None:
            setattr(moving_labels.inputs, field, str(file))
    return moving_labels


def _add_task(workflow: Workflow, pair: PairInputs, task: Task, options: RunOptions) -> pe.Node:
    """Register by one method, and measure; return the node that saves the record."""
    key = identifier(task.method.key)
    inputnode, rigidnode, fixed_labels, moving_labels = (
        workflow.get_node(name)
        for name in ("inputnode", "rigidnode", "fixed_labels", "moving_labels")
    )
    register = pe.Node(_register(pair, task.method, options), name=f"register_{key}", mem_gb=4)
    # Nipype counts n_procs against the GPU slots too.
    register.n_procs = 1 if register.inputs.use_gpu else options.omp_nthreads
    measure = pe.Node(MeasureRegistration(), name=f"measure_{key}", mem_gb=2)
    for field in ("landmarks", "reference_xfm"):
        if (file := getattr(pair, field)) is not None:
            setattr(measure.inputs, field, str(file))
    save = pe.Node(
        SaveRecord(record=task.record, made_with=task.made_with, out_dir=str(task.out_dir)),
        name=f"save_{key}",
    )
    workflow.connect([
        (inputnode, register, [(field, field) for field in PAIR_FIELDS if field != "rigid_xfm"]),
        (rigidnode, register, [("rigid_xfm", "rigid_xfm")]),
        (register, measure, [("xfm", "xfm")]),
        (inputnode, measure, [("mask_file", "mask_file")]),
        (fixed_labels, measure, [("out_file", "fixed_labels")]),
        (register, save, [("fields", "registration")]),
        (measure, save, [("fields", "measures")]),
    ])  # fmt: skip
    if moving_labels is not None:
        workflow.connect(moving_labels, "out_file", measure, "moving_labels")
    if task.is_shown:
        _add_pictures(workflow, key)
    return save


def _register(pair: PairInputs, method: MethodOptions, options: RunOptions) -> RegisterByMethod:
    """Make the interface that registers a pair."""
    register = RegisterByMethod(
        method=method.key,
        modality=pair.modality,
        n_refine=method.n_refine,
        spacing_mm=options.spacing_mm,
        device=options.device,
        random_seed=options.random_seed,
        n_threads=options.omp_nthreads,
        use_gpu=options.use_gpu and method.can_use_gpu,
    )
    if method.weights is not None:
        register.inputs.weights = str(method.weights)
        register.inputs.weights_sha256 = method.weights_sha256
    return register


def _add_pictures(workflow: Workflow, key: str) -> None:
    """Keep the moved image, and the moved labels, with the record."""
    inputnode, register, moving_labels, save = (
        workflow.get_node(name)
        for name in ("inputnode", f"register_{key}", "moving_labels", f"save_{key}")
    )
    move = pe.Node(MoveImages(), name=f"move_{key}", mem_gb=1.5)
    workflow.connect([
        (inputnode, move, [("moving_file", "moving_file"), ("fixed_file", "reference_file")]),
        (register, move, [("xfm", "xfm")]),
        (move, save, [("moved_file", "moved_file"), ("moved_labels", "moved_labels")]),
    ])  # fmt: skip
    if moving_labels is not None:
        workflow.connect(moving_labels, "out_file", move, "moving_labels")
