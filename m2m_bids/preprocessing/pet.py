"""Static reference of a PET scan, 3-D or dynamic."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.preprocessing.ants_bridge import name_of
from m2m_bids.preprocessing.pet_timing import FrameTiming
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.resampling import resample


class StaticReference(NamedTuple):
    """
    One volume that stands for a PET scan.

    Attributes
    ----------
    image : Nifti1Image, shape (I, J, K)
        float32, finite, in the units of the scan. Noise is below zero where it is: without it,
        means of what is faint would be too large.
    registered : Nifti1Image, shape (I, J, K)
        What registration is to see: float32, finite and not negative, in any unit.
    method : str
        How it came about: ``3-D image``, ``mean of N frames, weighted by duration``,
        ``mean of N frames, unweighted`` with the reason, or ``frame I of N, from 0``; with
        ``; registered by their sum`` or ``, aligned`` where that is so.
    """

    image: nb.Nifti1Image
    registered: nb.Nifti1Image
    method: str


def as_frames(image: nb.Nifti1Image) -> nb.Nifti1Image:
    """
    Return a scan as one volume or as frames along the fourth axis, which is longer than one.

    Raises
    ------
    ImageError
        If the image is neither 3-D nor 4-D, but for further axes of length one.
    """
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise ImageError(
            f"{name_of(image)}: {len(image.shape)}-D image {image.shape}, expected a 3-D or 4-D "
            "PET scan. Store one volume, or the frames along the fourth axis."
        )
    if shape == image.shape:
        return image
    squeezed = type(image)(np.asanyarray(image.dataobj).reshape(shape), image.affine, image.header)
    if file := image.get_filename():
        squeezed.set_filename(file)  # messages name it
    return squeezed


def is_dynamic(image: nb.Nifti1Image) -> bool:
    """Tell whether a PET scan has several frames."""
    return as_frames(image).ndim == 4


def static_reference(
    image: nb.Nifti1Image,
    timing: FrameTiming | None = None,
    *,
    kind: str = "auto",
    reference2frames: Sequence[np.ndarray] = (),
) -> StaticReference:
    """
    Reduce a PET scan to one volume.

    A 3-D image, also one stored as (I, J, K, 1), is the main path: it is taken as it is, whatever
    `kind` says. Frames are aligned one by one, with one interpolation of each.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        PET scan; voxels that are not finite count as 0, and in registration those that are
        negative (reconstruction noise).
    timing : FrameTiming, optional
        Timing of the frames.
    kind : str
        ``twa`` for the mean weighted by duration, which is the activity averaged over the scan;
        ``frame:N`` for one of the frames, from 0; ``auto`` for ``twa`` where the durations can be
        used, else the plain mean; ``sum`` for the same, registered by the sum of the frames, which
        is no activity itself.
    reference2frames : sequence of ndarray, shape (4, 4), length T, optional
        Maps of points of the reference to points of each frame, RAS+ mm; without any, frames are
        taken as they are.

    Returns
    -------
    StaticReference
        The volume and how it was made.

    Raises
    ------
    ImageError
        If the image is not 3-D or 4-D, or has no finite positive voxel; if the durations are
        asked for and cannot be used, or the frame is not there.
    """
    image = as_frames(image)
    if image.ndim == 3:
        data, method = _finite(np.asarray(image.dataobj)), "3-D image"
        registered = np.maximum(data, 0)
    else:
        weights, method = _weights(image, image.shape[3], timing, kind)
        data, registered = np.zeros((2, *image.shape[:3]), dtype=np.float32)
        for index in np.flatnonzero(weights):
            frame = _aligned_frame(image, index, reference2frames)
            weight = np.float32(weights[index])
            data += weight * frame
            registered += np.float32(1 if kind == "sum" else weight) * np.maximum(frame, 0)
        method += "; registered by their sum" if kind == "sum" else ""
        method += ", aligned" if len(reference2frames) else ""
    if not registered.any():
        raise ImageError(
            f"{name_of(image)}: no finite positive voxel ({method}), expected PET activity. "
            "Check the reconstruction, or leave this scan out."
        )
    volumes = (nb.Nifti1Image(values, image.affine) for values in (data, registered))
    return StaticReference(*volumes, method)


def _finite(data: np.ndarray) -> np.ndarray:
    """Return float32 values, what is not finite set to 0."""
    return np.nan_to_num(data.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _aligned_frame(
    image: nb.Nifti1Image, index: int, reference2frames: Sequence[np.ndarray]
) -> np.ndarray:
    """Return one frame on the grid of the scan, in the pose of the reference."""
    data = _finite(np.asarray(image.dataobj)[..., index])
    if not len(reference2frames) or np.array_equal(reference2frames[index], np.eye(4)):
        return data
    frame = nb.Nifti1Image(data, image.affine)
    return np.asarray(resample(frame, reference2frames[index], frame).dataobj)


def _weights(
    image: nb.Nifti1Image, n_frames: int, timing: FrameTiming | None, kind: str
) -> tuple[np.ndarray, str]:
    """Return the weight of each frame, and the method in words."""
    if found := re.fullmatch(r"frame:(\d+)", kind):
        index = int(found[1])
        if index >= n_frames:
            raise ImageError(
                f"{name_of(image)}: {n_frames} frames, --pet-reference {kind} asks for frame "
                f"{index}. Frames count from 0: give at most frame:{n_frames - 1}."
            )
        return np.eye(n_frames)[index], f"frame {index} of {n_frames}, from 0"
    if timing is not None and timing.durations_s is not None:
        weights = timing.durations_s / timing.durations_s.sum()
        return weights, f"mean of {n_frames} frames, weighted by duration"
    reason = timing.durations_remark if timing is not None else "FrameDuration is not given"
    if kind == "twa":
        raise ImageError(
            f"{name_of(image)}: {reason}, which --pet-reference twa needs. Correct the sidecar, "
            "or give auto for the plain mean."
        )
    return np.full(n_frames, 1 / n_frames), f"mean of {n_frames} frames, unweighted: {reason}"
