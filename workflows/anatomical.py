"""The T1w reference of a session: bias field, brain mask, tissues."""

from pathlib import Path
from typing import Literal

from nipype.interfaces import utility as niu
from nipype.interfaces.base import isdefined
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.precomputed import FreeSurferFiles, Precomputed
from m2m_bids.interfaces.preprocessing import (
    AlignTemplate,
    ConformT1w,
    CorrectBias,
    ExtractBrain,
    SegmentTissues,
    TakeFreeSurfer,
    TakeMask,
    TakeTissues,
)
from m2m_bids.interfaces.reports import AnatomicalFigure

BrainSource = Literal["auto", "template", "skip", "synthstrip"]
_REORDERED = """\
#### Anatomical reference

The T1-weighted image was reordered to RAS+."""
_CORRECTED = {
    False: "Its intensity non-uniformity was corrected with N4 [@tustison2010] of ANTs.",
    True: "Its version without intensity non-uniformity was precomputed.",
}
_EXTRACTED = {
    "template": "Its brain was found by registration of the MNI152 template (ICBM 2009a "
    "symmetric, as distributed with nilearn) [@fonov2011] with ANTs [@avants2008].",
    "synthstrip": "Its brain was found by SynthStrip [@hoopes2022].",
    "skip": "It had come without skull: its brain mask is where it has signal.",
    "precomputed": "Its brain mask was precomputed.",
    "freesurfer": "Its brain mask was taken from FreeSurfer [@fischl2012].",
}
_SEGMENTED = {
    "own": "Grey matter, white matter and cerebrospinal fluid were segmented within the mask by a "
    "mixture of three Gaussians with a Markov random field, fitted by expectation maximisation "
    "with the template's tissue maps as a weak prior.",
    "precomputed": "Its grey matter, white matter and cerebrospinal fluid were precomputed.",
    "freesurfer": "Its grey matter and white matter were taken from FreeSurfer; the rest of the "
    "mask is cerebrospinal fluid.",
}


def init_anatomical_wf(
    *,
    random_seed: int,
    omp_nthreads: int,
    precomputed: Precomputed | None = None,
    brain_extraction: BrainSource = "auto",
    synthstrip_model: Path | None = None,
    name: str = "anatomical_wf",
) -> Workflow:
    """
    Prepare a T1w image.

    Parameters
    ----------
    random_seed : int
        Seed of ANTs.
    omp_nthreads : int
        Threads of SynthStrip.
    precomputed : Precomputed, optional
        Files of other programs that are used instead of steps.
    brain_extraction : {"auto", "template", "skip", "synthstrip"}
        Where the brain is found, if there is no mask yet.
    synthstrip_model : Path, optional
        Weights of SynthStrip, which "auto" takes too.
    name : str
        Name of the workflow.

    Inputs
    ------
    t1w_file
        T1w image as it came.

    Outputs
    -------
    t1w_file
        RAS+ T1w image without bias field, with its skull.
    mask_file
        Brain mask on its grid.
    dseg_file
        Grey matter 1, white matter 2, fluid 3.
    probability_files
        Probability of each, in this order; undefined if another program has made the tissues.
    template2anat
        ITK affine: maps points of MNI space to points of the T1w.
    is_skull_stripped
        Whether the T1w came without skull.
    mask_method
        How the mask was found, in words.
    figures
        SVG files.
    """
    given = precomputed or Precomputed()
    workflow = Workflow(name=name)
    workflow.__desc__ = _description(given, brain_extraction, synthstrip_model)
    inputnode = pe.Node(niu.IdentityInterface(fields=["t1w_file"]), name="inputnode")
    outputnode = pe.Node(
        niu.IdentityInterface(
            fields=[
                "t1w_file",
                "mask_file",
                "dseg_file",
                "probability_files",
                "template2anat",
                "is_skull_stripped",
                "mask_method",
                "figures",
            ]
        ),
        name="outputnode",
    )
    conform_t1w = pe.Node(ConformT1w(), name="conform_t1w", mem_gb=1)
    brain_buffer = pe.Node(
        niu.IdentityInterface(
            fields=["mask_file", "template2anat", "is_skull_stripped", "mask_method"]
        ),
        name="brain_buffer",
    )
    t1w_buffer = pe.Node(niu.IdentityInterface(fields=["t1w_file"]), name="t1w_buffer")
    dseg_buffer = pe.Node(
        niu.IdentityInterface(fields=["dseg_file", "probability_files"]), name="dseg_buffer"
    )
    draw_anatomy = pe.Node(AnatomicalFigure(), name="draw_anatomy", mem_gb=1)
    workflow.connect([
        (inputnode, conform_t1w, [("t1w_file", "in_file")]),
        (t1w_buffer, draw_anatomy, [("t1w_file", "t1w_file")]),
        (brain_buffer, draw_anatomy, [("mask_file", "mask_file")]),
        (dseg_buffer, draw_anatomy, [("dseg_file", "dseg_file")]),
        (t1w_buffer, outputnode, [("t1w_file", "t1w_file")]),
        (brain_buffer, outputnode, [
            ("mask_file", "mask_file"),
            ("template2anat", "template2anat"),
            ("is_skull_stripped", "is_skull_stripped"),
            ("mask_method", "mask_method"),
        ]),
        (dseg_buffer, outputnode, [
            ("dseg_file", "dseg_file"), ("probability_files", "probability_files"),
        ]),
        (draw_anatomy, outputnode, [("out_files", "figures")]),
    ])  # fmt: skip
    if given.freesurfer is not None and not (given.mask and given.dseg):
        _add_freesurfer(workflow, given.freesurfer)
    if given.mask_files:
        _add_given_brain(workflow, given, random_seed)
    else:
        extract_brain = ExtractBrain(
            random_seed=random_seed, source=brain_extraction, n_threads=omp_nthreads
        )
        if synthstrip_model is not None:
            extract_brain.inputs.synthstrip_model = str(synthstrip_model)
        _add_brain(workflow, extract_brain)
    _add_t1w(workflow, given)
    _add_dseg(workflow, given)
    return workflow


def _description(
    given: Precomputed, brain_extraction: BrainSource, synthstrip_model: Path | None
) -> str:
    """Tell what is done, for the methods section."""
    if given.mask_files:
        brain = "precomputed" if given.mask else "freesurfer"
    elif brain_extraction == "auto":
        brain = "synthstrip" if synthstrip_model else "template"
    else:
        brain = brain_extraction
    tissues = "own"
    if given.tissue_files:
        tissues = "precomputed" if given.dseg else "freesurfer"
    texts = (_REORDERED, _EXTRACTED[brain], _CORRECTED[bool(given.t1w)], _SEGMENTED[tissues])
    return "\n".join(texts) + "\n"


def _add_freesurfer(workflow: Workflow, files: FreeSurferFiles) -> None:
    """Take over what FreeSurfer has made."""
    take_freesurfer = pe.Node(
        TakeFreeSurfer(label_file=str(files.labels), original_file=str(files.original)),
        name="take_freesurfer",
        mem_gb=2,
    )
    if files.brainmask is not None:
        take_freesurfer.inputs.brainmask_file = str(files.brainmask)
    conform_t1w = workflow.get_node("conform_t1w")
    workflow.connect([(conform_t1w, take_freesurfer, [("out_file", "t1w_file")])])


def _add_brain(workflow: Workflow, interface: ExtractBrain) -> None:
    """Fill `brain_buffer`: find the brain."""
    conform_t1w, brain_buffer = (workflow.get_node(n) for n in ("conform_t1w", "brain_buffer"))
    # SynthStrip has 48 channels of up to 320 voxels of 1 mm, cubed; 192 or 256 are usual.
    # ANTs has one thread, so that its results repeat.
    is_network = isdefined(interface.inputs.synthstrip_model)
    extract_brain = pe.Node(
        interface,
        name="extract_brain",
        mem_gb=8 if is_network else 2,
        n_procs=interface.inputs.n_threads if is_network else 1,
    )
    fields = ("mask_file", "template2anat", "is_skull_stripped")
    workflow.connect([
        (conform_t1w, extract_brain, [("out_file", "in_file")]),
        (extract_brain, brain_buffer, [
            *((field, field) for field in fields), ("method", "mask_method"),
        ]),
    ])  # fmt: skip


def _add_given_brain(workflow: Workflow, given: Precomputed, random_seed: int) -> None:
    """Fill `brain_buffer`: take a mask over, and align the template."""
    conform_t1w, brain_buffer = (workflow.get_node(n) for n in ("conform_t1w", "brain_buffer"))
    if given.mask is not None:
        mask, field = TakeMask(in_file=str(given.mask)), "out_file"
        take_brain = pe.Node(mask, name="take_mask", mem_gb=1)
        brain_buffer.inputs.mask_method = "Found by another program."
        workflow.connect([(conform_t1w, take_brain, [("out_file", "t1w_file")])])
    else:
        take_brain, field = workflow.get_node("take_freesurfer"), "mask_file"
        brain_buffer.inputs.mask_method = "Found by FreeSurfer, resampled from its conformed grid."
    align_template = pe.Node(
        AlignTemplate(random_seed=random_seed), name="align_template", mem_gb=2
    )
    if given.xfm is not None:
        align_template.inputs.xfm_file = str(given.xfm)
    workflow.connect([
        (conform_t1w, align_template, [("out_file", "in_file")]),
        (take_brain, align_template, [(field, "mask_file")]),
        (take_brain, brain_buffer, [(field, "mask_file")]),
        (align_template, brain_buffer, [
            ("template2anat", "template2anat"), ("is_skull_stripped", "is_skull_stripped"),
        ]),
    ])  # fmt: skip


def _add_t1w(workflow: Workflow, given: Precomputed) -> None:
    """Fill `t1w_buffer`: correct the bias field, or take the corrected image over."""
    t1w_buffer = workflow.get_node("t1w_buffer")
    if given.t1w is not None:
        take_t1w = pe.Node(ConformT1w(in_file=str(given.t1w)), name="take_t1w", mem_gb=1)
        workflow.connect([(take_t1w, t1w_buffer, [("out_file", "t1w_file")])])
        return
    correct_bias = pe.Node(CorrectBias(), name="correct_bias", mem_gb=2)
    conform_t1w, brain_buffer = (workflow.get_node(n) for n in ("conform_t1w", "brain_buffer"))
    workflow.connect([
        (conform_t1w, correct_bias, [("out_file", "in_file")]),
        (brain_buffer, correct_bias, [("mask_file", "mask_file")]),
        (correct_bias, t1w_buffer, [("out_file", "t1w_file")]),
    ])  # fmt: skip


def _add_dseg(workflow: Workflow, given: Precomputed) -> None:
    """Fill `dseg_buffer`: segment the tissues, or take them over."""
    t1w_buffer, brain_buffer, dseg_buffer = (
        workflow.get_node(n) for n in ("t1w_buffer", "brain_buffer", "dseg_buffer")
    )
    if given.tissue_files:
        take_tissues = pe.Node(TakeTissues(), name="take_tissues", mem_gb=1)
        if given.dseg:
            take_tissues.inputs.in_files = [str(file) for file in given.dseg]
        else:
            take_freesurfer = workflow.get_node("take_freesurfer")
            workflow.connect([(take_freesurfer, take_tissues, [("dseg_file", "in_files")])])
        workflow.connect([
            (t1w_buffer, take_tissues, [("t1w_file", "t1w_file")]),
            (brain_buffer, take_tissues, [("mask_file", "mask_file")]),
            (take_tissues, dseg_buffer, [("out_file", "dseg_file")]),
        ])  # fmt: skip
        return
    segment_tissues = pe.Node(SegmentTissues(), name="segment_tissues", mem_gb=2)
    workflow.connect([
        (t1w_buffer, segment_tissues, [("t1w_file", "in_file")]),
        (brain_buffer, segment_tissues, [
            ("mask_file", "mask_file"), ("template2anat", "template2anat"),
        ]),
        (segment_tissues, dseg_buffer, [
            ("out_file", "dseg_file"), ("probability_files", "probability_files"),
        ]),
    ])  # fmt: skip
