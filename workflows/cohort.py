"""The cohort levels: from a registered scan to the images that are trained on or evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow as Workflow

from m2m_bids.bids.query import Scan
from m2m_bids.interfaces.scan_files import SCAN_NAME, SaveScanFiles
from m2m_bids.interfaces.training import SaveTrainingScan
from m2m_bids.json_files import read_json
from m2m_bids.spatial.whole import is_whole


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

    def interface(self, scan: Scan) -> SaveTrainingScan:
        """Make the interface that writes the images of a scan."""
        return SaveTrainingScan(
            out_dir=str(self.folder / scan.name),
            description={
                "name": scan.name,
                "subject": scan.subject,
                "modality": scan.modality,
            },
            grid_size=self.grid_size,
            spacing_mm=self.spacing_mm,
        )

    def has(self, scan: Scan) -> bool:
        """Tell whether the images of a scan are there."""
        return _is_whole(self.folder / scan.name)


@dataclass(frozen=True)
class EvaluationImages:
    """
    Where the images that registration is evaluated on go; they keep their grids.

    Parameters
    ----------
    folder : Path
        Gets a folder for each scan.
    """

    folder: Path

    def interface(self, scan: Scan) -> SaveScanFiles:
        """Make the interface that writes the images of a scan."""
        return SaveScanFiles(
            out_dir=str(self.folder / scan.name), description=self.description(scan)
        )

    def description(self, scan: Scan) -> dict[str, Any]:
        """Say what the images of a scan are made of: they are made anew when that changes."""
        made_of = {"name": scan.name, "scan": stamp(scan.file), "t1w": stamp(scan.t1w)}
        if scan.gradients is not None:
            made_of["gradients"] = [stamp(file) for file in scan.gradients]
        return made_of

    def has(self, scan: Scan) -> bool:
        """Tell whether the images of a scan are there, and made of the files as they are."""
        folder = self.folder / scan.name
        return _is_whole(folder) and read_json(folder / SCAN_NAME) == self.description(scan)


def _is_whole(folder: Path) -> bool:
    """Tell whether the images of a scan were written, each to its end."""
    return (folder / SCAN_NAME).is_file() and all(map(is_whole, folder.glob("[!.]*")))


def stamp(file: Path) -> list[str | int]:
    """Return what changes when a file does: its path, size and time of modification."""
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


def init_images_wf(
    *, scan: Scan, images: TrainingImages | EvaluationImages, name: str = "images_wf"
) -> Workflow:
    """
    Write the images of a rigidly registered scan that a cohort level needs.

    Parameters
    ----------
    scan : Scan
        PET or FA scan.
    images : TrainingImages or EvaluationImages
        Which images, and where they go.
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
    save_images = pe.Node(images.interface(scan), name="save_images", mem_gb=1.5)
    workflow.connect([
        (inputnode, save_images, [(field, field) for field in fields]),
        (save_images, outputnode, [("out_dir", "out_dir")]),
    ])  # fmt: skip
    return workflow
