"""A PET scan to one static reference image."""

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.interfaces.preprocessing import StaticReference


def init_pet_reference_wf(
    *, frame_durations_s: list[float] | None, name: str = "reference_wf"
) -> Workflow:
    """
    Make one static image of a PET scan.

    Parameters
    ----------
    frame_durations_s : list of float or None
        Duration of each frame, seconds.
    name : str
        Name of the workflow.

    Inputs
    ------
    in_file
        PET image, 3-D or 4-D.

    Outputs
    -------
    out_file
        3-D image.
    method
        How it was made.
    """
    workflow = Workflow(name=name)
    workflow.__desc__ = """\
#### PET

Frames, where there were several, were averaged over time, weighted by their duration where that
was known; negative and not finite voxels were set to zero.
"""
    inputnode = pe.Node(niu.IdentityInterface(fields=["in_file"]), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=["out_file", "method"]), name="outputnode")
    static_reference = pe.Node(StaticReference(), name="static_reference", mem_gb=2)
    if frame_durations_s:
        static_reference.inputs.frame_durations_s = frame_durations_s
    workflow.connect([
        (inputnode, static_reference, [("in_file", "in_file")]),
        (static_reference, outputnode, [("out_file", "out_file"), ("method", "method")]),
    ])  # fmt: skip
    return workflow
