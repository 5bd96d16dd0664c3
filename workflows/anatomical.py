"""The T1w reference of a session: bias field, brain mask, tissues."""

from typing import Literal

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.precomputed import Precomputed
from m2m_bids.interfaces.preprocessing import (
    AlignTemplate,
    ConformT1w,
    CorrectBias,
    ExtractBrain,
    SegmentTissues,
    TakeMask,
    TakeTissues,
)
from m2m_bids.interfaces.reports import AnatomicalFigure

BrainSource = Literal["auto", "template", "skip"]
_REORDERED = """\
#### Anatomical reference

The T1-weighted image was reordered to RAS+."""
_CORRECTED = {
    False: "Its intensity non-uniformity was corrected with N4 [@tustison2010] of ANTs.",
    True: "Its version without intensity non-uniformity was precomputed.",
}
_EXTRACTED = {
    False: "Its brain was found by registration of the MNI152 template (ICBM 2009a symmetric, as "
    "distributed with nilearn) [@fonov2011] with ANTs [@avants2008].",
    True: "Its brain mask was precomputed.",
}
_SKIPPED = "It had come without skull: its brain mask is where it has signal."
_SEGMENTED = {
    False: "Grey matter, white matter and cerebrospinal fluid were segmented within the mask.",
    True: "Its grey matter, white matter and cerebrospinal fluid were precomputed.",
}


def init_anatomical_wf(
    *,
    random_seed: int,
    omp_nthreads: int,
    precomputed: Precomputed | None = None,
    brain_extraction: BrainSource = "auto",
    name: str = "anatomical_wf",
) -> Workflow:
    """
    Prepare a T1w image.

    Parameters
    ----------
    random_seed : int
        Seed of ANTs.
    omp_nthreads : int
        Threads of one node.
    precomputed : Precomputed, optional
        Files of other programs that are used instead of steps.
    brain_extraction : {"auto", "template", "skip"}
        Where the brain is found, if there is no mask yet.
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
    template2anat
        ITK affine: maps points of MNI space to points of the T1w.
    is_skull_stripped
        Whether the T1w came without skull.
    figures
        SVG files.
    """
    given = precomputed or Precomputed()
    workflow = Workflow(name=name)
    texts = (
        _REORDERED,
        _SKIPPED
        if brain_extraction == "skip" and not given.mask
        else _EXTRACTED[bool(given.mask)],
        _CORRECTED[bool(given.t1w)],
        _SEGMENTED[bool(given.dseg)],
    )
    workflow.__desc__ = "\n".join(texts) + "\n"
    inputnode = pe.Node(niu.IdentityInterface(fields=["t1w_file"]), name="inputnode")
    outputnode = pe.Node(
        niu.IdentityInterface(
            fields=[
                "t1w_file",
                "mask_file",
                "dseg_file",
                "template2anat",
                "is_skull_stripped",
                "figures",
            ]
        ),
        name="outputnode",
    )
    conform_t1w = pe.Node(ConformT1w(), name="conform_t1w", mem_gb=1)
    brain_buffer = pe.Node(
        niu.IdentityInterface(fields=["mask_file", "template2anat", "is_skull_stripped"]),
        name="brain_buffer",
    )
    t1w_buffer = pe.Node(niu.IdentityInterface(fields=["t1w_file"]), name="t1w_buffer")
    dseg_buffer = pe.Node(niu.IdentityInterface(fields=["dseg_file"]), name="dseg_buffer")
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
        ]),
        (dseg_buffer, outputnode, [("dseg_file", "dseg_file")]),
        (draw_anatomy, outputnode, [("out_files", "figures")]),
    ])  # fmt: skip
    _add_brain(workflow, given, brain_extraction, random_seed, omp_nthreads)
    _add_t1w(workflow, given, omp_nthreads)
    _add_dseg(workflow, given)
    return workflow


def _add_brain(
    workflow: Workflow,
    given: Precomputed,
    brain_extraction: BrainSource,
    random_seed: int,
    omp_nthreads: int,
) -> None:
    """Fill `brain_buffer`: find the brain, or take its mask over and align the template."""
    conform_t1w, brain_buffer = (workflow.get_node(n) for n in ("conform_t1w", "brain_buffer"))
    outputs = [("template2anat", "template2anat"), ("is_skull_stripped", "is_skull_stripped")]
    if given.mask is None:
        extract_brain = pe.Node(
            ExtractBrain(random_seed=random_seed, source=brain_extraction),
            name="extract_brain",
            mem_gb=2,
            n_procs=omp_nthreads,
        )
        workflow.connect([
            (conform_t1w, extract_brain, [("out_file", "in_file")]),
            (extract_brain, brain_buffer, [("mask_file", "mask_file"), *outputs]),
        ])  # fmt: skip
        return
    take_mask = pe.Node(TakeMask(in_file=str(given.mask)), name="take_mask", mem_gb=1)
    align_template = pe.Node(
        AlignTemplate(random_seed=random_seed),
        name="align_template",
        mem_gb=2,
        n_procs=omp_nthreads,
    )
    if given.xfm is not None:
        align_template.inputs.xfm_file = str(given.xfm)
    workflow.connect([
        (conform_t1w, take_mask, [("out_file", "t1w_file")]),
        (conform_t1w, align_template, [("out_file", "in_file")]),
        (take_mask, align_template, [("out_file", "mask_file")]),
        (take_mask, brain_buffer, [("out_file", "mask_file")]),
        (align_template, brain_buffer, outputs),
    ])  # fmt: skip


def _add_t1w(workflow: Workflow, given: Precomputed, omp_nthreads: int) -> None:
    """Fill `t1w_buffer`: correct the bias field, or take the corrected image over."""
    t1w_buffer = workflow.get_node("t1w_buffer")
    if given.t1w is not None:
        take_t1w = pe.Node(ConformT1w(in_file=str(given.t1w)), name="take_t1w", mem_gb=1)
        workflow.connect([(take_t1w, t1w_buffer, [("out_file", "t1w_file")])])
        return
    correct_bias = pe.Node(CorrectBias(), name="correct_bias", mem_gb=2, n_procs=omp_nthreads)
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
    if given.dseg:
        files = [str(file) for file in given.dseg]
        take_tissues = pe.Node(TakeTissues(in_files=files), name="take_tissues", mem_gb=1)
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
        (segment_tissues, dseg_buffer, [("out_file", "dseg_file")]),
    ])  # fmt: skip
