"""Brain mask and tissues of a T1w image, from what FreeSurfer made of it."""

from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import name_of
from m2m_bids.preprocessing.precomputed import FLUID, GREY, WHITE
from m2m_bids.spatial.images import ImageError, require_3d
from m2m_bids.spatial.labels import load_labels, load_mgh
from m2m_bids.spatial.resampling import resample

# Numbers of aseg, aparc+aseg, aparc.a2009s+aseg and wmparc, last included. The others (ventricles,
# choroid plexus, vessels, CSF) are fluid.
_GREY = (
    *((3, 3), (8, 13), (17, 20), (26, 27), (42, 42), (47, 56), (58, 59), (80, 82)),
    *((1000, 2999), (11000, 12999)),
)
_WHITE = (
    *((2, 2), (7, 7), (16, 16), (28, 28), (41, 41), (46, 46), (60, 60), (77, 79), (85, 85)),
    *((173, 178), (250, 255), (3000, 4999), (5001, 5002), (13000, 14999)),
)
# Without brainmask.mgz the labels are closed by as much as niworkflows does, over the sulci.
CLOSING_MM = 4.0
# Voxels of brainmask.mgz that an editor has erased hold 1.
ERASED = 1
# Detail, what is finer than this, tells images apart and does not depend on the bias field.
DETAIL_SIGMA_MM = 4.0
# On real images: 0.97 and more with itself conformed, through a strong bias field too; 0.7 at a
# shift of 2 mm, 0.5 at 3 mm; at most 0.25 with other people, affinely aligned.
AGREEMENT = 0.6


class FreeSurferBrain(NamedTuple):
    """
    What FreeSurfer knows of the brain, on the grid of the T1w.

    Attributes
    ----------
    mask : Nifti1Image, uint8
        1 in the brain with its ventricles and sulci.
    tissues : Nifti1Image, uint8
        Grey matter 1, white matter 2, fluid 3; fluid is all of the mask that is neither.
    """

    mask: nb.Nifti1Image
    tissues: nb.Nifti1Image


def take_freesurfer(
    t1w: nb.Nifti1Image,
    label_file: Path | str,
    original_file: Path | str,
    brainmask_file: Path | str | None = None,
) -> FreeSurferBrain:
    """
    Bring FreeSurfer's brain to the grid of the T1w image that it was made of.

    Conformed images have another grid, but the world (scanner RAS) of the image that FreeSurfer
    was given. Mask and tissues are resampled linearly, each as a share, and then decided.

    Parameters
    ----------
    t1w : Nifti1Image, shape (I, J, K)
        T1w image.
    label_file : Path or str
        ``aparc+aseg.mgz``, ``aseg.mgz`` or the like.
    original_file : Path or str
        ``orig.mgz``, the same T1w as FreeSurfer has conformed it.
    brainmask_file : Path or str, optional
        ``brainmask.mgz``. Without it, the brain is the labels closed by 4 mm.

    Returns
    -------
    FreeSurferBrain

    Raises
    ------
    ImageError
        If a file cannot be read or lies on another grid than the labels, or if ``original_file``
        is of another image than the T1w.
    """
    labels = check_labels(label_file, original_file, t1w)
    numbers = np.asanyarray(labels.dataobj)
    brain = _brain(labels, label_file, brainmask_file)
    is_grey, is_white = _member(numbers, _GREY), _member(numbers, _WHITE)
    classes = {GREY: is_grey, WHITE: is_white, FLUID: brain & ~is_grey & ~is_white}
    inside = _share(brain, labels, t1w) > 0.5
    shares = np.stack([_share(part, labels, t1w) for part in classes.values()])
    tissues = np.where(inside, np.array([*classes])[np.argmax(shares, axis=0)], 0)
    return FreeSurferBrain(
        *(nb.Nifti1Image(data.astype(np.uint8), t1w.affine) for data in (inside, tissues))
    )


def check_labels(
    label_file: Path | str, original_file: Path | str, t1w: nb.Nifti1Image
) -> nb.Nifti1Image:
    """
    Read FreeSurfer's labels, if they are of a T1w image.

    Parameters
    ----------
    label_file : Path or str
        ``aparc+aseg.mgz``, ``aseg.mgz`` or the like.
    original_file : Path or str
        ``orig.mgz``, the T1w as FreeSurfer has conformed it.
    t1w : Nifti1Image, shape (I, J, K)
        T1w image.

    Returns
    -------
    Nifti1Image, of an integer type
        Labels on their own grid.

    Raises
    ------
    ImageError
        If a file cannot be read, both lie on different grids, or the detail of the two images
        where there are labels does not agree.
    """
    labels = load_labels(label_file)
    original = _on_grid_of(labels, label_file, original_file)
    agreement = detail_correlation(original, t1w, np.asanyarray(labels.dataobj) > 0)
    if not agreement >= AGREEMENT:
        raise ImageError(
            f"{original_file}: its detail agrees with that of {name_of(t1w)} by a correlation of "
            f"{agreement:.2f}, expected {AGREEMENT} at least: FreeSurfer was given another image, "
            "or this one from before its header was changed. Run FreeSurfer on this T1w, or take "
            "the subject out of --fs-subjects-dir."
        )
    return labels


def detail_correlation(original: nb.Nifti1Image, t1w: nb.Nifti1Image, brain: np.ndarray) -> float:
    """
    Correlate the detail of two images inside the brain: an image minus itself, smoothed.

    Parameters
    ----------
    original : Nifti1Image, shape (I, J, K)
        Image on whose grid they are compared.
    t1w : Nifti1Image
        Image of the same world.
    brain : ndarray of bool, shape (I, J, K)
        Where they are compared.

    Returns
    -------
    float
        Pearson's correlation, -1 to 1; 0 where an image has no detail.
    """
    if not brain.any():
        return 0.0
    margin = 12
    box = tuple(
        slice(max(0, int(i.min()) - margin), int(i.max()) + margin + 1) for i in np.nonzero(brain)
    )
    start = nb.affines.from_matvec(np.eye(3), [part.start for part in box])
    cropped = nb.Nifti1Image(
        np.asarray(original.dataobj, dtype=np.float32)[box], original.affine @ start
    )
    zooms = np.linalg.norm(original.affine[:3, :3], axis=0)
    details = []
    for image in (cropped, resample(t1w, (), cropped, order=1)):
        data = np.nan_to_num(np.asarray(image.dataobj, dtype=np.float32))
        smooth = ndimage.gaussian_filter(data, DETAIL_SIGMA_MM / zooms, truncate=3)
        details.append((data - smooth)[brain[box]])
    if min(np.ptp(detail) for detail in details) <= 0:
        return 0.0
    return float(np.corrcoef(*details)[0, 1])


def _brain(
    labels: nb.Nifti1Image, label_file: Path | str, brainmask_file: Path | str | None
) -> np.ndarray:
    """Find the brain on the grid of the labels: holes filled, bool."""
    brain = np.asanyarray(labels.dataobj) > 0
    if brainmask_file is not None:
        image = _on_grid_of(labels, label_file, brainmask_file)
        return ndimage.binary_fill_holes(brain | (np.asanyarray(image.dataobj) > ERASED))
    zooms = np.linalg.norm(labels.affine[:3, :3], axis=0)
    grown = ndimage.distance_transform_edt(~brain, sampling=zooms) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, sampling=zooms) > CLOSING_MM
    return ndimage.binary_fill_holes(brain | closed)


def _on_grid_of(
    labels: nb.Nifti1Image, label_file: Path | str, file: Path | str
) -> nb.Nifti1Image:
    """Read another image of the same subject, and check that it lies on the same grid."""
    image = require_3d(load_mgh(Path(file)), file)
    if image.shape != labels.shape or not np.allclose(image.affine, labels.affine, atol=1e-3):
        raise ImageError(
            f"{file}: its grid {image.shape} differs from that of {label_file}, {labels.shape}: "
            "they are not of one run of FreeSurfer. Copy both from the same subject."
        )
    return image


def _member(numbers: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Tell which labels are in ranges, last included."""
    table = np.zeros(max(last for _, last in ranges) + 2, dtype=bool)
    for first, last in ranges:
        table[first : last + 1] = True
    return table[np.clip(numbers, 0, len(table) - 1)]


def _share(part: np.ndarray, labels: nb.Nifti1Image, t1w: nb.Nifti1Image) -> np.ndarray:
    """Bring a part of the brain to the grid of the T1w: 0 to 1, (I, J, K)."""
    image = nb.Nifti1Image(part.astype(np.float32), labels.affine)
    return np.asarray(resample(image, (), t1w, order=1).dataobj)
