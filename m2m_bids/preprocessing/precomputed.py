"""Take over images of a T1w's preparation that another program has made."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import same_grid
from m2m_bids.spatial.conform import to_ras
from m2m_bids.spatial.images import ImageError, load_image, require_3d
from m2m_bids.spatial.itk import read_chain
from m2m_bids.spatial.transforms import map_points

GREY, WHITE, FLUID = 1, 2, 3
# An affine alone brings 97 % of the template's brain into that of a real T1w; of a brain that is
# moved by 10 mm, 88 to 90 % stay inside, by 15 mm 84 %.
MIN_SHARE_INSIDE = 0.9
N_POINTS = 20000


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


def check_transform(
    file: Path | str, mask: nb.Nifti1Image, other_mask: nb.Nifti1Image
) -> tuple[np.ndarray, np.ndarray]:
    """
    Check that a transform between a T1w image and a template is of these two.

    Parameters
    ----------
    file : Path or str
        ITK transform (``.h5`` or ``.txt``) of points of one to points of the other.
    mask, other_mask : Nifti1Image, 3-D
        Brain mask of the one, and of the other.

    Returns
    -------
    points, mapped : ndarray, shape (n, 3)
        Points throughout the brain of the one, and where they come to, RAS+ mm.

    Raises
    ------
    ImageError
        If less than 90 % of the one brain comes to lie in the other: the transform is of another
        direction or another image.
    ValueError
        If the file cannot be read.
    """
    voxels = np.argwhere(np.asarray(mask.dataobj) > 0.5)
    points = nb.affines.apply_affine(mask.affine, voxels[:: max(1, len(voxels) // N_POINTS)])
    mapped = map_points(read_chain(file), points)
    found = nb.affines.apply_affine(np.linalg.inv(other_mask.affine), mapped)
    inside = np.asarray(other_mask.dataobj, dtype=np.float32)
    share = np.mean(ndimage.map_coordinates(inside, found.T, order=0) > 0.5)
    if share < MIN_SHARE_INSIDE:
        raise ImageError(
            f"{file}: brings only {100 * share:.0f} % of the brain of one image into that of the "
            f"other, expected {100 * MIN_SHARE_INSIDE:.0f} % at least. It is of another image or "
            "direction: leave the dataset out of --derivatives."
        )
    return points, mapped


def _read(file: Path | str) -> nb.Nifti1Image:
    return to_ras(require_3d(load_image(file), file))


def _like(data: np.ndarray, image: nb.Nifti1Image, file: Path | str) -> nb.Nifti1Image:
    """Wrap whole numbers as an image of the name of a file."""
    result = nb.Nifti1Image(data.astype(np.uint8), image.affine)
    result.set_filename(str(file))  # messages name it
    return result
