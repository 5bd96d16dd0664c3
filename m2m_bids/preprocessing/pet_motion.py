"""Motion of the head between the frames of a dynamic PET scan."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing.ants_bridge import (
    Stage,
    as_rigid,
    name_of,
    register,
    working_copy,
)
from m2m_bids.preprocessing.pet import StaticReference, as_frames, static_reference
from m2m_bids.preprocessing.pet_timing import FrameTiming, frame_timing
from m2m_bids.spatial.images import ImageError

SPACING_MM = 4.0
FWHM_MM = 6.0
# As in PETPrep, but for the middle of a frame: long first frames are as good as any.
EARLY_S = 120.0
# Frames with less than this share of the best frame's signal follow their neighbours.
LOWEST_SHARE = 0.05
# Voxels above this share of the bright ones are head, and so is the rim around them.
HEAD_SHARE = 0.15
RIM_MM = 12.0
# Frames are compared by the magnitude of their gradient: edges stay where they are while the
# contrast between tissues changes. Activity itself, by mutual information or correlation, left
# errors of 0.4-0.8 mm on simulated uptake, where its gradient leaves 0.2 mm.
EDGE_SIGMA_MM = 4.0
RIGID_STAGE = Stage("Rigid[0.5]", "MI[{},1,32,Regular,0.5]", "[60x30,1e-6,8]", "2x1", "2x0mm")
PARAMETERS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


class FrameMotion(NamedTuple):
    """
    How the head moved between the frames of a scan.

    Attributes
    ----------
    reference2frames : tuple of ndarray, shape (4, 4)
        For each frame, rigid map of points of the reference to points of the frame, RAS+ mm: it
        carries the frame onto the reference, and says where the head went.
    parameters : ndarray, shape (T, 6)
        For each frame, in the order of `PARAMETERS`: where the centre of the head went along the
        world's axes (mm), and the rotation about them there (radians; x first, then y, then z,
        about fixed axes).
    reference_frame : int
        Frame whose pose is the reference's, from 0.
    followers : tuple of int
        Frames without a transform of their own, from 0: they take that of the nearest other one.
    """

    reference2frames: tuple[np.ndarray, ...]
    parameters: np.ndarray
    reference_frame: int
    followers: tuple[int, ...]


def estimate_motion(
    image: nb.Nifti1Image, timing: FrameTiming, *, random_seed: int = 0
) -> FrameMotion:
    """
    Estimate the motion of the head between frames.

    The edges of smoothed frames are registered rigidly (ANTs, mutual information) to those of the
    frame of the most signal, and then, from there, to the mean of what is aligned so, which has
    less noise. Frames whose middle is before 120 s or that have little signal are not
    registered: they take the transform of the frame nearest in time that was.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K, T)
        Dynamic PET scan, of two frames or more.
    timing : FrameTiming
        Timing of its frames; what is not known is done without.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    FrameMotion
        A transform and motion parameters per frame.

    Raises
    ------
    ImageError
        If the image is not 4-D, or no frame has a positive voxel.
    """
    if image.ndim != 4 or image.shape[3] < 2:
        raise ImageError(f"{name_of(image)}: {image.shape}, expected a 4-D PET scan of frames.")
    copies = [_smoothed(image, index) for index in range(image.shape[3])]
    signal = _signal(copies, timing)
    if signal.max() <= 0:
        raise ImageError(
            f"{name_of(image)}: no finite positive voxel in any frame, expected PET activity. "
            "Check the reconstruction, or leave this scan out."
        )
    usable = _usable_frames(signal, timing)
    anchor = max(usable, key=lambda index: signal[index])
    edges = {index: _edges(copies[index]) for index in usable}
    mask = nb.Nifti1Image(_head(copies[anchor]).astype(np.float32), copies[anchor].affine)
    xfms = {index: np.eye(4) for index in usable}
    xfms = _register_frames(edges[anchor], mask, edges, xfms, random_seed)
    xfms = _register_frames(_mean_of(edges, xfms, anchor), mask, edges, xfms, random_seed)
    # The reference has the anchor's pose, wherever the mean came to lie.
    to_anchor = np.linalg.inv(xfms[anchor])
    own = {index: xfm @ to_anchor for index, xfm in xfms.items()}
    own[anchor] = np.eye(4)  # without rounding: such a frame needs no interpolation
    affines = tuple(own[index] for index in _nearest(usable, len(copies), timing))
    centre = _centre(copies[anchor])
    return FrameMotion(
        affines,
        np.array([motion_parameters(affine, centre) for affine in affines]),
        anchor,
        tuple(index for index in range(len(copies)) if index not in usable),
    )


def corrected_reference(
    image: nb.Nifti1Image, sidecar: Mapping[str, Any], *, random_seed: int = 0
) -> StaticReference:
    """
    Reduce a PET scan to one volume; the frames of a dynamic one are aligned first.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        PET scan.
    sidecar : mapping
        Its metadata, of which the timing of the frames is used as far as it can be.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    StaticReference
        As the app makes it without further options.

    Raises
    ------
    ImageError
        If the image is not 3-D or 4-D, or has no finite positive voxel.
    """
    image = as_frames(image)
    if image.ndim == 3:
        return static_reference(image)
    timing = frame_timing(sidecar, image.shape[3])
    motion = estimate_motion(image, timing, random_seed=random_seed)
    return static_reference(image, timing, reference2frames=motion.reference2frames)


def motion_parameters(affine: np.ndarray, centre: Sequence[float]) -> np.ndarray:
    """
    Describe a rigid map by six numbers.

    Parameters
    ----------
    affine : ndarray, shape (4, 4)
        Rigid map of points, mm.
    centre : sequence of float
        Point whose shift is the translation, mm.

    Returns
    -------
    ndarray, shape (6,)
        Translation (mm) and rotation about fixed axes x, y, z in this order (radians).

    Examples
    --------
    >>> motion_parameters(nb.affines.from_matvec(np.eye(3), [1, 2, 3]), [5, 5, 5]).tolist()
    [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    """
    shift = apply_affine(affine, centre) - np.asarray(centre, dtype=float)
    angles = Rotation.from_matrix(affine[:3, :3]).as_euler("xyz")
    return np.concatenate([shift, angles])


def write_parameters(motion: FrameMotion, file: Path) -> Path:
    """Write motion parameters as a table (.tsv), a line per frame; return the file."""
    lines = ["\t".join(PARAMETERS)]
    # "+ 0.0" spells a negative zero as zero.
    lines += ["\t".join(f"{value + 0.0:.6f}" for value in row) for row in motion.parameters]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def describe_motion(motion: FrameMotion, timing: FrameTiming) -> dict[str, Any]:
    """Compose the sidecar of the table of motion parameters."""
    axes = {"x": "right", "y": "anterior", "z": "superior"}
    columns = {
        f"trans_{axis}": {
            "Description": f"Shift of the centre of the head towards {way} (RAS+ world).",
            "Units": "mm",
        }
        for axis, way in axes.items()
    }
    columns |= {
        f"rot_{axis}": {
            "Description": f"Rotation of the head about the {axis} axis of the world, through its "
            "centre, in the order x, y, z about fixed axes.",
            "Units": "rad",
        }
        for axis in axes
    }
    remarks = [text for text in (timing.starts_remark, timing.durations_remark) if text]
    return {
        "Description": "Motion of the head relative to the reference frame.",
        "ReferenceFrame": motion.reference_frame,
        "FramesWithoutEstimate": list(motion.followers),
        **({"TimingRemarks": remarks} if remarks else {}),
        **columns,
    }


def _frame(image: nb.Nifti1Image, index: int) -> nb.Nifti1Image:
    """Return one frame of a 4-D image as float32, what is not finite set to 0."""
    data = np.asarray(image.dataobj[..., index], dtype=np.float32)
    return nb.Nifti1Image(np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0), image.affine)


def _smoothed(image: nb.Nifti1Image, index: int) -> nb.Nifti1Image:
    """Copy a frame to the grid of the estimation, smoothed."""
    frame = _frame(image, index)
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)
    sigma = FWHM_MM / math.sqrt(8 * math.log(2)) / zooms
    data = ndimage.gaussian_filter(np.asarray(frame.dataobj), sigma, mode="constant", truncate=3.0)
    return working_copy(frame, SPACING_MM, data=data)


def _signal(copies: Sequence[nb.Nifti1Image], timing: FrameTiming) -> np.ndarray:
    """Return the mean positive activity of each frame, times its duration where it is known."""
    means = np.array([np.maximum(copy.dataobj, 0).mean() for copy in copies])
    return means if timing.durations_s is None else means * timing.durations_s


def _usable_frames(signal: np.ndarray, timing: FrameTiming) -> list[int]:
    """List the frames to register: with signal and, if there are any such, not early."""
    enough = signal >= LOWEST_SHARE * signal.max()
    if timing.starts_s is not None:
        late = enough & (_times(len(signal), timing) >= EARLY_S)
        enough = late if late.any() else enough
    return [int(index) for index in np.flatnonzero(enough)]


def _times(n_frames: int, timing: FrameTiming) -> np.ndarray:
    """Return the middle of each frame, or its start (seconds), or its place among the frames."""
    if timing.starts_s is None:
        return np.arange(n_frames)
    if timing.durations_s is None:
        return timing.starts_s
    return timing.starts_s + timing.durations_s / 2


def _nearest(usable: Sequence[int], n_frames: int, timing: FrameTiming) -> list[int]:
    """Give each frame the usable frame nearest in time."""
    times = _times(n_frames, timing)
    return [min(usable, key=lambda other: abs(times[other] - time)) for time in times]


def _edges(copy: nb.Nifti1Image) -> nb.Nifti1Image:
    """Return the magnitude of the gradient, the largest value 1."""
    data = np.asarray(copy.dataobj)
    data = ndimage.gaussian_gradient_magnitude(data, EDGE_SIGMA_MM / SPACING_MM, mode="nearest")
    return nb.Nifti1Image(
        (data / max(data.max(), np.finfo(np.float32).tiny)).astype(np.float32), copy.affine
    )


def _register_frames(
    reference: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    frames: Mapping[int, nb.Nifti1Image],
    starts: Mapping[int, np.ndarray],
    random_seed: int,
) -> dict[int, np.ndarray]:
    """Register frames to a reference, each from its start; return rigid point maps."""
    found = {}
    for index, frame in frames.items():
        result = register(
            reference,
            frame,
            [RIGID_STAGE],
            fixed2moving=starts[index],
            fixed_mask=mask,
            random_seed=random_seed,
        )
        found[index] = as_rigid(result.fixed2moving)
    return found


def _mean_of(
    frames: Mapping[int, nb.Nifti1Image], xfms: Mapping[int, np.ndarray], anchor: int
) -> nb.Nifti1Image:
    """Average aligned frames on the grid of one of them."""
    grid = frames[anchor]
    total = np.zeros(grid.shape)
    for index, frame in frames.items():
        matrix = np.linalg.solve(frame.affine, xfms[index] @ grid.affine)
        data = np.asarray(frame.dataobj, dtype=float)
        total += ndimage.affine_transform(
            data, matrix[:3, :3], matrix[:3, 3], grid.shape, order=3, mode="nearest"
        )
    return nb.Nifti1Image((total / len(frames)).astype(np.float32), grid.affine)


def _head(image: nb.Nifti1Image) -> np.ndarray:
    """Mark the head and a rim around it in a smoothed frame."""
    data = np.asarray(image.dataobj)
    inside = data > HEAD_SHARE * np.percentile(data[data > 0], 98)
    return ndimage.distance_transform_edt(~inside) * SPACING_MM <= RIM_MM


def _centre(image: nb.Nifti1Image) -> np.ndarray:
    """Centre of mass of a smoothed frame, world mm."""
    return apply_affine(image.affine, ndimage.center_of_mass(np.maximum(image.dataobj, 0)))
