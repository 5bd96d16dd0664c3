"""What is evaluated of a scan: a folder with its image, its T1w and their rigid alignment."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from m2m_bids.spatial.images import load_image, save_image
from m2m_bids.spatial.itk import read_affine, write_affine
from m2m_bids.whole_files import replacing_folder

SCAN_NAME = "scan.json"


@dataclass(frozen=True)
class ScanFiles:
    """
    Files of a scan that is aligned rigidly with the T1w of the same participant.

    Parameters
    ----------
    moving_file : Path
        Static PET or FA image, native grid.
    t1w_file : Path
        T1w image without bias field.
    mask_file, dseg_file : Path
        Brain mask, and grey matter 1, white matter 2 and fluid 3, on the grid of the T1w.
    rigid_xfm : Path
        ITK affine: T1w points to points of the moving image.
    template2anat : Path
        ITK affine: MNI points to T1w points.
    """

    moving_file: Path
    t1w_file: Path
    mask_file: Path
    dseg_file: Path
    rigid_xfm: Path
    template2anat: Path

    @classmethod
    def below(cls, folder: Path) -> "ScanFiles":
        """Name the files in a folder that `save_scan_files` has written, or will write."""
        names = {field.name: field.name.removesuffix("_file") for field in fields(cls)}
        return cls(
            **{
                key: folder / (f"{name}.nii.gz" if key.endswith("_file") else f"{name}.txt")
                for key, name in names.items()
            }
        )


def save_scan_files(folder: Path, description: dict[str, Any], files: ScanFiles) -> Path:
    """
    Copy the files of a scan into a folder of its own, which appears when it is whole.

    Parameters
    ----------
    folder : Path
        Of the scan; what it held before is removed.
    description : dict
        What the files were made of, in types that JSON has.
    files : ScanFiles
        Where they are.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ImageError, ValueError
        If an image or a transform cannot be read.
    """
    with replacing_folder(folder) as beside:
        for field in fields(ScanFiles):
            source = getattr(files, field.name)
            destination = getattr(ScanFiles.below(beside), field.name)
            if field.name.endswith("_file"):
                save_image(load_image(source), destination)
            else:
                write_affine(read_affine(source), destination)
        (beside / SCAN_NAME).write_text(json.dumps(description, indent=2) + "\n")
    return folder
