"""A PET scan to one static reference image, and its frames to the T1w."""

from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.interfaces.preprocessing import EstimateMotion, StaticReference
from m2m_bids.interfaces.registration import ResampleFrames
from m2m_bids.interfaces.reports import MotionFigure

_KINDS = {
    "auto": "averaged over time, weighted by their duration where that was known",
    "twa": "averaged over time, weighted by their duration",
    "sum": "averaged over time and, for registration, summed",
}


def init_pet_reference_wf(
    *,
    sidecar: dict[str, Any],
    kind: str = "auto",
    has_motion_correction: bool = True,
    random_seed: int = 0,
    name: str = "reference_wf",
) -> Workflow:
    """
    Make one static image of a PET scan.

    Parameters
    ----------
    sidecar : dict
        Metadata of the scan, of which the timing of the frames is used as far as it can be.
    kind : str
        As `m2m_bids.preprocessing.pet.static_reference` takes it.
    has_motion_correction : bool
        Whether the frames of a dynamic scan are aligned.
    random_seed : int
        Seed of ANTs.
    name : str
        Name of the workflow.

    Inputs
    ------
    in_file
        PET image, 3-D or 4-D.

    Outputs
    -------
    out_file
        3-D image, in the units of the scan.
    registered_file
        What registration is to see of it: not negative.
    method
        How it was made.
    frames_file
        The PET image as it came.
    frame_xfms
        ITK affine per frame, reference points to frame points; empty for a 3-D image or without
        motion correction.
    motion_file, motion_description
        Table of motion parameters and its sidecar; undefined where `frame_xfms` is empty.
    """
    workflow = Workflow(name=name)
    workflow.__desc__ = _description(kind, has_motion_correction)
    timing = {key: sidecar[key] for key in ("FrameTimesStart", "FrameDuration") if key in sidecar}
    inputnode = pe.Node(niu.IdentityInterface(fields=["in_file"]), name="inputnode")
    outputnode = pe.Node(
        niu.IdentityInterface(
            fields=[
                *("out_file", "registered_file", "method", "frames_file", "frame_xfms"),
                *("motion_file", "motion_description"),
            ]
        ),
        name="outputnode",
    )
    static_reference = pe.Node(
        StaticReference(sidecar=timing, kind=kind), name="static_reference", mem_gb=2
    )
    workflow.connect([
        (inputnode, static_reference, [("in_file", "in_file")]),
        (inputnode, outputnode, [("in_file", "frames_file")]),
        (static_reference, outputnode, [
            (field, field) for field in ("out_file", "registered_file", "method")
        ]),
    ])  # fmt: skip
    if not has_motion_correction:
        outputnode.inputs.frame_xfms = []
        return workflow
    estimate_motion = pe.Node(
        EstimateMotion(sidecar=timing, random_seed=random_seed),
        name="estimate_motion",
        mem_gb=2,
    )
    workflow.connect([
        (inputnode, estimate_motion, [("in_file", "in_file")]),
        (estimate_motion, static_reference, [("frame_xfms", "frame_xfms")]),
        (estimate_motion, outputnode, [
            ("frame_xfms", "frame_xfms"),
            ("motion_file", "motion_file"),
            ("description", "motion_description"),
        ]),
    ])  # fmt: skip
    return workflow


def init_pet_frames_wf(*, name: str = "frames_wf") -> Workflow:
    """
    Bring the frames of a dynamic scan to the T1w, and plot their motion; leave 3-D scans alone.

    Parameters
    ----------
    name : str
        Name of the workflow.

    Inputs
    ------
    frames_file, frame_xfms, motion_file
        As `init_pet_reference_wf` gives them.
    preproc, best_xfm, figures
        As `init_registration_wf` gives them.
    t1w_file
        As `init_anatomical_wf` gives it.

    Outputs
    -------
    preproc
        The scan on the T1w's grid: all frames of a dynamic one, in one interpolation each.
    static
        Registered static image of a dynamic scan; undefined for a 3-D one.
    figures
        SVG files, with that of the motion.
    """
    workflow = Workflow(name=name)
    inputnode = pe.Node(
        niu.IdentityInterface(
            fields=[
                *("frames_file", "frame_xfms", "motion_file"),
                *("preproc", "best_xfm", "figures", "t1w_file"),
            ]
        ),
        name="inputnode",
    )
    outputnode = pe.Node(
        niu.IdentityInterface(fields=["preproc", "static", "figures"]), name="outputnode"
    )
    resample_frames = pe.Node(ResampleFrames(), name="resample_frames", mem_gb=2)
    draw_motion = pe.Node(MotionFigure(), name="draw_motion")
    list_figures = pe.Node(niu.Merge(2), name="list_figures")
    workflow.connect([
        (inputnode, resample_frames, [
            ("frames_file", "in_file"),
            ("frame_xfms", "frame_xfms"),
            ("preproc", "static_file"),
            ("best_xfm", "xfm"),
            ("t1w_file", "reference_file"),
        ]),
        (inputnode, draw_motion, [("motion_file", "motion_file")]),
        (inputnode, list_figures, [("figures", "in1")]),
        (draw_motion, list_figures, [("out_files", "in2")]),
        (resample_frames, outputnode, [("out_file", "preproc"), ("static_file", "static")]),
        (list_figures, outputnode, [("out", "figures")]),
    ])  # fmt: skip
    return workflow


def _description(kind: str, has_motion_correction: bool) -> str:
    """Tell what is done, for the methods section."""
    aligned = "were not aligned"
    if has_motion_correction:
        aligned = (
            "were aligned by rigid registration of their edges with ANTs [@avants2011], those "
            "before 120 s or with little signal by the transform of the nearest other one,"
        )
    number = kind.removeprefix("frame:")
    used = _KINDS.get(kind, f"frame {number}, counted from 0, was taken for the static image")
    return f"""\
#### PET

Frames, where there were several, {aligned} and {used}; for registration,
negative voxels of that static image were set to zero. Each frame was brought to the T1w from its
own grid in one interpolation.
"""
