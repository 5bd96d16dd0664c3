"""Label images of scans: read in any format, on the grid of the T1w or in the world of a scan."""

from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.evaluation.labels import Scheme, evaluation_labels
from m2m_bids.spatial.images import ImageError, load_image, require_3d
from m2m_bids.spatial.resampling import resample

MIN_SHARE_IN_BRAIN = 0.5


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
    image = require_3d(_load_mgh(file) if file.suffix == ".mgz" else load_image(file), file)
    try:
        classes = evaluation_labels(np.asanyarray(image.dataobj), scheme)
    except ValueError as error:
        raise ImageError(f"{file}: {error}") from error
    return nb.Nifti1Image(classes, image.affine)


def labels_on_t1w(
    labels: nb.Nifti1Image, t1w: nb.Nifti1Image, mask: nb.Nifti1Image, name: Path | str
) -> nb.Nifti1Image:
    """
    Bring a T1w's labels, of another grid, to the grid of the T1w.

    FreeSurfer's conformed images have another grid, but the same world as the image that they
    were made of.

    Parameters
    ----------
    labels : Nifti1Image, 3-D, uint8
        Labels in the world of the T1w.
    t1w, mask : Nifti1Image, 3-D
        The image, and its brain mask on the same grid.
    name : Path or str
        Of the labels, in messages.

    Returns
    -------
    Nifti1Image, uint8
        By nearest voxel.

    Raises
    ------
    ImageError
        If less than half of the labels are inside the brain mask: they are of another image.
    """
    on_grid = resample(labels, (), t1w, order=0)
    is_labelled = np.asanyarray(on_grid.dataobj) > 0
    n_inside = np.count_nonzero(is_labelled & (np.asanyarray(mask.dataobj) > 0))
    # Counted on their own grid too, part of which may be outside of the T1w's.
    voxel_ratio = abs(np.linalg.det(t1w.affine[:3, :3]) / np.linalg.det(labels.affine[:3, :3]))
    n_labels = np.count_nonzero(labels.dataobj) / voxel_ratio
    share = n_inside / max(n_labels, np.count_nonzero(is_labelled), 1)
    if share < MIN_SHARE_IN_BRAIN:
        raise ImageError(
            f"{name}: {100 * share:.0f} % of its labels are inside the brain of the T1w, expected"
            f" at least {100 * MIN_SHARE_IN_BRAIN:.0f} %. Give labels in the space of this T1w."
        )
    return on_grid


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


def _load_mgh(file: Path) -> nb.Nifti1Image:
    try:
        image = nb.load(file)
        return nb.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    except (OSError, EOFError, ValueError, nb.filebasedimages.ImageFileError) as error:
        raise ImageError(
            f"{file}: not a readable image ({error}): expected FreeSurfer's .mgz. Copy it again."
        ) from error
