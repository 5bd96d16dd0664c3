"""Static reference of a PET scan, 3-D or dynamic."""

from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.ants_bridge import name_of
from m2m_bids.spatial.images import ImageError


class StaticReference(NamedTuple):
    """
    One volume that stands for a PET scan.

    Attributes
    ----------
    image : Nifti1Image, shape (I, J, K)
        float32, finite and not negative, in the units of the scan.
    method : str
        How it came about: ``3-D image``, ``mean of N frames, weighted by duration``,
        ``mean of N frames``, or the last with the reason why the durations were not used.
    """

    image: nb.Nifti1Image
    method: str


def static_reference(
    image: nb.Nifti1Image, frame_durations_s: Sequence[float] | None = None
) -> StaticReference:
    """
    Reduce a PET scan to one volume.

    A 3-D image, also one stored as (I, J, K, 1), is the main path. A dynamic scan is averaged
    over time with its frame durations as weights, which is the activity averaged over the scan.
    Frames are not realigned.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        PET scan; negative voxels (reconstruction noise) and those not finite count as 0.
    frame_durations_s : sequence of float, length T, optional
        Durations of the frames, as BIDS ``FrameDuration``. They are not used (and the method says
        so) if their number is not T, or if one is not a positive number.

    Returns
    -------
    StaticReference
        The volume and how it was made.

    Raises
    ------
    ImageError
        If the image is not 3-D or 4-D, or has no finite positive voxel.
    """
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise ImageError(
            f"{name_of(image)}: {len(image.shape)}-D image {image.shape}, expected a 3-D or 4-D "
            "PET scan. Store one volume, or the frames along the fourth axis."
        )
    if len(shape) == 3:
        data, method = _positive(np.asarray(image.dataobj).reshape(shape)), "3-D image"
    else:
        frames = np.asarray(image.dataobj).reshape(shape)
        weights, method = _weights(shape[3], frame_durations_s)
        data = np.zeros(shape[:3], dtype=np.float32)
        for index, weight in enumerate(weights):
            data += np.float32(weight) * _positive(frames[..., index])
    if not data.any():
        raise ImageError(
            f"{name_of(image)}: no finite positive voxel, expected PET activity. "
            "Check the reconstruction, or leave this scan out."
        )
    return StaticReference(nb.Nifti1Image(data, image.affine), method)


def _positive(data: np.ndarray) -> np.ndarray:
    """Return float32 values, what is negative or not finite set to 0."""
    data = data.astype(np.float32)
    return np.where(np.isfinite(data) & (data > 0), data, np.float32(0))


def _weights(n_frames: int, durations_s: Sequence[float] | None) -> tuple[np.ndarray, str]:
    """Return weights that sum to 1, and the method in words."""
    equal = np.full(n_frames, 1 / n_frames)
    method = f"mean of {n_frames} frames"
    if durations_s is None:
        return equal, method
    durations = np.asarray(durations_s, dtype=float).ravel()
    if len(durations) != n_frames:
        return equal, f"{method}, unweighted: {len(durations)} durations given"
    if not (np.isfinite(durations).all() and (durations > 0).all()):
        return equal, f"{method}, unweighted: a duration is not positive"
    return durations / durations.sum(), f"{method}, weighted by duration"
