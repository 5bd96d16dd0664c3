"""Take over images of a T1w's preparation that another program has made."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.ants_bridge import same_grid
from m2m_bids.spatial.conform import to_ras
from m2m_bids.spatial.images import ImageError, load_image, require_3d

GREY, WHITE, FLUID = 1, 2, 3


def take_mask(file: Path | str, t1w: nb.Nifti1Image) -> nb.Nifti1Image:
    """
    Read a brain mask, its axes reordered to RAS+.

    Parameters
    ----------
    file : Path or str
        Mask, above 0.5 in the brain.
    t1w : Nifti1Image, shape (I, J, K)
        RAS+ T1w image.

    Returns
    -------
    Nifti1Image
        uint8, 1 in the brain, on the grid of the T1w.

    Raises
    ------
    ImageError
        If the mask cannot be read, is on another grid, or is empty.
    """
    image = _read(file)
    mask = _like(np.asarray(image.dataobj) > 0.5, image, file)
    same_grid(mask, t1w)
    return mask


def take_tissues(
    files: Sequence[Path | str], t1w: nb.Nifti1Image, mask: nb.Nifti1Image
) -> nb.Nifti1Image:
    """
    Read tissues, their axes reordered to RAS+, inside a brain mask.

    Parameters
    ----------
    files : sequence of Path or str
        One image of labels, grey matter 1, white matter 2 and fluid 3, or three of the
        probability of each.
    t1w, mask : Nifti1Image, shape (I, J, K)
        RAS+ T1w image without bias field, and its brain mask.

    Returns
    -------
    Nifti1Image
        uint8 labels on the grid of the T1w, 0 outside of the mask.

    Raises
    ------
    ImageError
        If an image cannot be read, is on another grid, has other labels, or if the tissues are
        not as bright as they are in a T1w image, fluid, grey and white: old versions of fMRIPrep
        number them otherwise.
    """
    images = [_read(file) for file in files]
    if len(images) == 1:
        labels = np.asarray(images[0].dataobj)
    else:
        chances = np.stack([np.zeros(images[0].shape), *(np.asarray(i.dataobj) for i in images)])
        labels = np.argmax(chances, axis=0)
    values = set(np.unique(labels).tolist())
    if not {GREY, WHITE} <= values <= {0, GREY, WHITE, FLUID}:
        raise ImageError(
            f"{files[0]}: labels {sorted(values)[:10]}: expected 1 grey matter, 2 white matter "
            "and 3 cerebrospinal fluid. Leave the dataset out of --derivatives."
        )
    labels = labels * same_grid(mask, t1w)
    dseg = _like(labels, images[0], files[0])
    same_grid(dseg, t1w)
    data = np.asarray(t1w.dataobj)
    present = [tissue for tissue in (FLUID, GREY, WHITE) if (labels == tissue).any()]
    brightness = [float(np.median(data[labels == tissue])) for tissue in present]
    if brightness != sorted(brightness):
        raise ImageError(
            f"{files[0]}: tissues {present} have T1w intensities {brightness}, expected "
            "ascending: they are numbered otherwise than in BIDS (1 grey matter, 2 white matter, "
            "3 fluid). "
            "Leave the dataset out of --derivatives."
        )
    return dseg


def _read(file: Path | str) -> nb.Nifti1Image:
    return to_ras(require_3d(load_image(file), file))


def _like(data: np.ndarray, image: nb.Nifti1Image, file: Path | str) -> nb.Nifti1Image:
    """Wrap whole numbers as an image of the name of a file."""
    result = nb.Nifti1Image(data.astype(np.uint8), image.affine)
    result.set_filename(str(file))  # messages name it
    return result
