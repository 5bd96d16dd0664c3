"""The cohort levels: from a registered scan to the images that a network is trained on."""

from dataclasses import dataclass
from pathlib import Path

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.query import Scan
from m2m_bids.interfaces.training import SaveTrainingScan


@dataclass(frozen=True)
class TrainingImages:
    """
    Where the images that a network is trained on go, and on which grid they are.

    Parameters
    ----------
    folder : Path
        Gets a folder for each scan.
    grid_size : int
        Voxels along every axis.
    spacing_mm : float
        Their size.
    """

    folder: Path
    grid_size: int
    spacing_mm: float


def init_training_scan_wf(
    *, scan: Scan, images: TrainingImages, name: str = "outputs_wf"
) -> Workflow:
    """
    Write the images of a rigidly registered scan that a network is trained on.

    Parameters
    ----------
    scan : Scan
        PET or FA scan.
    images : TrainingImages
        Where they go.
    name : str
        Name of the workflow.

    Inputs
    ------
    moving_file
        Static image, native grid.
    rigid_xfm
        ITK affine, T1w points to points of the static image.
    t1w_file, mask_file, dseg_file, template2anat
        As `init_anatomical_wf` gives them.

    Outputs
    -------
    out_dir
        Folder of the scan.
    """
    workflow = Workflow(name=name)
    fields = ("moving_file", "rigid_xfm", "t1w_file", "mask_file", "dseg_file", "template2anat")
    inputnode = pe.Node(niu.IdentityInterface(fields=list(fields)), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=["out_dir"]), name="outputnode")
    save_images = pe.Node(
        SaveTrainingScan(
            out_dir=str(images.folder / scan.name),
            description={
                "name": scan.name,
                "subject": scan.subject,
                "modality": scan.modality,
            },
            grid_size=images.grid_size,
            spacing_mm=images.spacing_mm,
        ),
        name="save_images",
        mem_gb=1.5,
    )
    workflow.connect([
        (inputnode, save_images, [(field, field) for field in fields]),
        (save_images, outputnode, [("out_dir", "out_dir")]),
    ])  # fmt: skip
    return workflow
