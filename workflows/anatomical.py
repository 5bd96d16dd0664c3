"""The T1w reference of a session: bias field, brain mask, tissues."""

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.interfaces.preprocessing import (
    ConformT1w,
    CorrectBias,
    ExtractBrain,
    SegmentTissues,
)
from m2m_bids.interfaces.reports import AnatomicalFigure


def init_anatomical_wf(
    *, random_seed: int, omp_nthreads: int, name: str = "anatomical_wf"
) -> Workflow:
    """
    Prepare a T1w image.

    Parameters
    ----------
    random_seed : int
        Seed of ANTs.
    omp_nthreads : int
        Threads of one node.
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
    workflow = Workflow(name=name)
    workflow.__desc__ = """\
#### Anatomical reference

The T1-weighted image was reordered to RAS+. Its brain was found by registration of the MNI152
template (ICBM 2009a symmetric, as distributed with nilearn) with ANTs, and its intensity
non-uniformity corrected with N4. Grey matter, white matter and cerebrospinal fluid were segmented
within the brain mask.
"""
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
    extract_brain = pe.Node(
        ExtractBrain(random_seed=random_seed),
        name="extract_brain",
        mem_gb=2,
        n_procs=omp_nthreads,
    )
    correct_bias = pe.Node(CorrectBias(), name="correct_bias", mem_gb=2, n_procs=omp_nthreads)
    segment_tissues = pe.Node(SegmentTissues(), name="segment_tissues", mem_gb=2)
    draw_anatomy = pe.Node(AnatomicalFigure(), name="draw_anatomy", mem_gb=1)

    workflow.connect([
        (inputnode, conform_t1w, [("t1w_file", "in_file")]),
        (conform_t1w, extract_brain, [("out_file", "in_file")]),
        (conform_t1w, correct_bias, [("out_file", "in_file")]),
        (extract_brain, correct_bias, [("mask_file", "mask_file")]),
        (extract_brain, segment_tissues, [
            ("mask_file", "mask_file"), ("template2anat", "template2anat"),
        ]),
        (correct_bias, segment_tissues, [("out_file", "in_file")]),
        (correct_bias, draw_anatomy, [("out_file", "t1w_file")]),
        (extract_brain, draw_anatomy, [("mask_file", "mask_file")]),
        (segment_tissues, draw_anatomy, [("out_file", "dseg_file")]),
        (correct_bias, outputnode, [("out_file", "t1w_file")]),
        (extract_brain, outputnode, [
            ("mask_file", "mask_file"),
            ("template2anat", "template2anat"),
            ("is_skull_stripped", "is_skull_stripped"),
        ]),
        (segment_tissues, outputnode, [("out_file", "dseg_file")]),
        (draw_anatomy, outputnode, [("out_files", "figures")]),
    ])  # fmt: skip
    return workflow
