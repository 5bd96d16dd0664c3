"""Label images: read in any format, and brought to the grid of the image that they are of."""

import math
from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.spatial.images import (
    READ_ERRORS,
    ImageError,
    load_image,
    require_3d,
    require_memory,
)
from m2m_bids.spatial.resampling import resample

# Of a simulated person's grey and white matter, 99 % lie in the mask that the template gives; 90 %
# if moved by 10 mm, 79 % by 20 mm.
MIN_SHARE_IN_BRAIN = 0.9


def load_labels(file: Path | str) -> nb.Nifti1Image:
    """
    Read a label image as it is numbered.

    Parameters
    ----------
    file : Path or str
        NIfTI, or FreeSurfer's ``.mgz``.

    Returns
    -------
    Nifti1Image, 3-D, of an integer type
        On its own grid.

    Raises
    ------
    ImageError
        If it cannot be read, is not 3-D, or has a value that is not a whole number.
    """
    file = Path(file)
    image = require_3d(load_mgh(file) if file.suffix == ".mgz" else load_image(file), file)
    try:
        labels = whole_numbers(np.asanyarray(image.dataobj))
    except ValueError as error:
        raise ImageError(f"{file}: {error}") from error
    return nb.Nifti1Image(labels, image.affine, dtype=labels.dtype)


def whole_numbers(labels: np.ndarray) -> np.ndarray:
    """
    Return labels as integers, if nothing is lost.

    Parameters
    ----------
    labels : ndarray
        Label map of any type.

    Returns
    -------
    ndarray
        As it is if its type is one of integers, otherwise int32.

    Raises
    ------
    ValueError
        If a value is not a whole number.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind in "iu":
        return labels
    is_whole = labels.dtype.kind == "f" and np.isfinite(labels).all()
    if not is_whole or (labels != np.rint(labels)).any():
        raise ValueError(
            f"labels must be whole numbers, got {labels.dtype} with others; resample label maps "
            "by nearest neighbour"
        )
    return labels.astype(np.int32)


def labels_on_t1w(
    labels: nb.Nifti1Image, t1w: nb.Nifti1Image, mask: nb.Nifti1Image, name: Path | str
) -> nb.Nifti1Image:
    """
    Bring a T1w's labels, of another grid, to the grid of the T1w.

    FreeSurfer's conformed images have another grid, but the same world as the image that they
    were made of.

    Parameters
    ----------
    labels : Nifti1Image, 3-D, of an integer type
        Labels in the world of the T1w.
    t1w, mask : Nifti1Image, 3-D
        The image, and its brain mask on the same grid.
    name : Path or str
        Of the labels, in messages.

    Returns
    -------
    Nifti1Image, of the same type
        By nearest voxel.

    Raises
    ------
    ImageError
        If less than 90 % of the labels are inside the brain mask: they are of another image.
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


def load_mgh(file: Path) -> nb.Nifti1Image:
    """
    Read an image of FreeSurfer.

    Parameters
    ----------
    file : Path
        ``.mgz`` or ``.mgh``.

    Returns
    -------
    Nifti1Image
        The same voxels; its affine maps them to RAS+ scanner millimetres, as the image has it that
        FreeSurfer was given.

    Raises
    ------
    ImageError
        If it cannot be read, or its voxels would take more memory than there is.
    """
    try:
        image = nb.load(file)
        sizes = map(int, image.shape)
        require_memory(math.prod(sizes) * image.get_data_dtype().itemsize, file)
        return nb.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    except ImageError:
        raise
    except READ_ERRORS as error:
        raise ImageError(
            f"{file}: not a readable image ({error}): expected FreeSurfer's .mgz. Copy it again."
        ) from error
