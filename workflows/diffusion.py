"""A map of fractional anisotropy, cleaned."""

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.interfaces.preprocessing import CleanFA


def init_fa_reference_wf(*, name: str = "reference_wf") -> Workflow:
    """
    Clean an FA map.

    Parameters
    ----------
    name : str
        Name of the workflow.

    Inputs
    ------
    in_file
        FA map as it came.

    Outputs
    -------
    out_file
        FA in [0, 1], zero outside the brain.
    method
        What was done.
    """
    workflow = Workflow(name=name)
    workflow.__desc__ = """\
#### Diffusion

Maps of fractional anisotropy were cleaned: not finite and negative values were set to zero, values
above one replaced by the median of their neighbours, and what is not connected to the brain
removed.
"""
    inputnode = pe.Node(niu.IdentityInterface(fields=["in_file"]), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=["out_file", "method"]), name="outputnode")
    clean_fa = pe.Node(CleanFA(), name="clean_fa", mem_gb=1)
    workflow.connect([
        (inputnode, clean_fa, [("in_file", "in_file")]),
        (clean_fa, outputnode, [("out_file", "out_file"), ("method", "method")]),
    ])  # fmt: skip
    return workflow
