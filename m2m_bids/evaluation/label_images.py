"""Label images of scans: as the classes that are evaluated, and in the world of a scan."""

from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.evaluation.labels import Scheme, evaluation_labels
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.labels import load_labels


def read_labels(file: Path, scheme: Scheme) -> nb.Nifti1Image:
    """
    Read a label image as the classes that are evaluated.

    Parameters
    ----------
    file : Path
        NIfTI, or FreeSurfer's ``.mgz``.
    scheme : str
        What its numbers mean, see `m2m_bids.evaluation.labels.evaluation_labels`.

    Returns
    -------
    Nifti1Image, 3-D, uint8
        On its own grid.

    Raises
    ------
    ImageError
        If it cannot be read, is not 3-D, or has no label of the scheme.
    """
    image = load_labels(file)
    try:
        classes = evaluation_labels(np.asanyarray(image.dataobj), scheme)
    except ValueError as error:
        raise ImageError(f"{file}: {error}") from error
    return nb.Nifti1Image(classes, image.affine)


def labels_in_scan(labels: nb.Nifti1Image, fixed2moving: np.ndarray) -> nb.Nifti1Image:
    """
    Carry a T1w's labels to the world of a scan that is aligned with it, without interpolation.

    Parameters
    ----------
    labels : Nifti1Image
        Labels in the world of the T1w.
    fixed2moving : ndarray, shape (4, 4)
        Affine map from points of the T1w to points of the scan, RAS+ mm.

    Returns
    -------
    Nifti1Image
        The same voxels, placed in the world of the scan.
    """
    return nb.Nifti1Image(np.asanyarray(labels.dataobj), fixed2moving @ labels.affine)
