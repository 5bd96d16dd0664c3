"""Rigid alignment of a PET or FA image with a T1w image, from several starts, scored."""

from typing import NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import (
    Stage,
    as_rigid,
    finite_data,
    register,
    resample_onto,
    same_grid,
    working_copy,
)
from m2m_bids.preprocessing.mutual_information import MutualInformation, climb, pose_matrix

COARSE_MM = 8.0
MIDDLE_MM = 5.0
FINE_MM = 2.0
# Rim around the brain that the measure sees: the edge of the brain carries most of the pose. The
# fixed image keeps its skull there: blanking it gained nothing on simulated PET and FA (errors of
# 0.3-0.6 mm either way).
RIM_MM = 8.0
ANGLE_DEG = 20
RIGID_STAGE = Stage("Rigid[0.1]", "MI[{},1,32,Regular,0.5]", "[60x40,1e-6,10]", "2x1", "2x1mm")
AFFINE_STAGE = RIGID_STAGE._replace(transform="Affine[0.1]")


class StartScore(NamedTuple):
    """
    How far one start came.

    Attributes
    ----------
    name : str
        For example ``header`` or ``centres of mass, -20 degrees about z``.
    score : float
        Mutual information (nats, 5 mm samples) after the search from this start.
    """

    name: str
    score: float


class RigidRegistration(NamedTuple):
    """
    A linear alignment: a rigid one, or of `register_affine` an affine one.

    Attributes
    ----------
    fixed2moving : ndarray, shape (4, 4)
        Maps points of the fixed world to points of the moving world, RAS+ mm; unless it is affine,
        a rotation and a shift.
    score : float
        Mutual information (nats) of the two images at this pose, over the brain mask and a rim
        of 8 mm, sampled every 3 mm, in 24 bins. 0 is independence; scores are comparable between
        transforms of one image pair, not between pairs.
    starts : tuple of StartScore
        Every start, best first.
    """

    fixed2moving: np.ndarray
    score: float
    starts: tuple[StartScore, ...]


def register_rigid(
    moving: nb.Nifti1Image,
    fixed: nb.Nifti1Image,
    fixed_mask: nb.Nifti1Image,
    *,
    random_seed: int = 0,
) -> RigidRegistration:
    """
    Align a moving image with a fixed image by a rotation and a shift.

    Each start (the header, the centres of mass, and both turned by 20 degrees about each axis)
    climbs the mutual information at 8 mm; the best distinct ones climb at 5 mm; the winner is
    refined by ANTs at 4 and 2 mm, which is kept if it scores higher. Results repeat exactly on one
    ITK thread; with more, the order of ANTs' sums moves them by about a tenth of a millimetre.

    Parameters
    ----------
    moving : Nifti1Image, shape (I, J, K)
        Static PET or FA image.
    fixed : Nifti1Image, shape (I, J, K)
        T1w image, with or without skull.
    fixed_mask : Nifti1Image
        Brain mask on the grid of ``fixed``.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    RigidRegistration
        Transform, score, starts.

    Raises
    ------
    ImageError
        If an image is not 3-D or has no signal, or if the mask is empty or on another grid.
    """
    fixed, brain = _around_brain(fixed, fixed_mask)
    moving_data = finite_data(moving)
    centre = nb.affines.apply_affine(brain.affine, ndimage.center_of_mass(brain.dataobj))
    coarse = _measure(fixed, brain, moving, COARSE_MM)
    middle = _measure(fixed, brain, moving, MIDDLE_MM)
    shift = nb.affines.apply_affine(moving.affine, _centre_of_mass(moving_data)) - centre
    found = []
    for name, pose in _starts(shift):
        pose, _ = climb(coarse, pose, centre, n_evaluations=250)
        found.append((middle(pose_matrix(pose, centre)), name, pose))
    found.sort(key=lambda item: -item[0])
    best = [climb(middle, item[2], centre, n_evaluations=400) for item in _distinct(found)]
    pose = max(best, key=lambda item: item[1])[0]
    final = _measure(fixed, brain, moving, 3.0)
    candidates = [pose_matrix(pose, centre)]
    candidates.append(as_rigid(_refine(fixed, brain, moving, candidates[0], random_seed)))
    scores = [final(matrix) for matrix in candidates]
    winner = int(np.argmax(scores))
    starts = tuple(StartScore(name, score) for score, name, _ in found)
    return RigidRegistration(candidates[winner], scores[winner], starts)


def register_affine(
    moving: nb.Nifti1Image,
    fixed: nb.Nifti1Image,
    fixed_mask: nb.Nifti1Image,
    *,
    random_seed: int = 0,
) -> RigidRegistration:
    """
    Align a moving image with a fixed image of another head, such as a template, by an affine map.

    The result of `register_rigid` is refined by ANTs with 12 parameters, which is kept if it
    scores higher.

    Parameters
    ----------
    moving, fixed, fixed_mask, random_seed
        As for `register_rigid`.

    Returns
    -------
    RigidRegistration
        With the starts of the rigid alignment.

    Raises
    ------
    ImageError
        As `register_rigid`.
    """
    rigid = register_rigid(moving, fixed, fixed_mask, random_seed=random_seed)
    fixed, brain = _around_brain(fixed, fixed_mask)
    start = rigid.fixed2moving
    affine = _refine(fixed, brain, moving, start, random_seed, stage=AFFINE_STAGE)
    score = _measure(fixed, brain, moving, 3.0)(affine)
    if score <= rigid.score:
        return rigid
    return rigid._replace(fixed2moving=affine, score=score)


def _around_brain(
    fixed: nb.Nifti1Image, fixed_mask: nb.Nifti1Image
) -> tuple[nb.Nifti1Image, nb.Nifti1Image]:
    """Copy the fixed image and its mask to 2 mm, cropped to the brain and its rim."""
    inside = same_grid(fixed_mask, fixed)
    zooms = np.linalg.norm(fixed.affine[:3, :3], axis=0)
    margin = np.ceil((RIM_MM + 2 * FINE_MM) / zooms).astype(int)
    box = tuple(
        slice(max(0, index.min() - pad), index.max() + 1 + pad)
        for index, pad in zip(np.nonzero(inside), margin, strict=True)
    )
    affine = fixed.affine @ nb.affines.from_matvec(np.eye(3), [part.start for part in box])
    data = np.maximum(finite_data(fixed), 0)
    data = np.minimum(data, np.percentile(data[inside], 99.8))[box]
    cropped = nb.Nifti1Image(data, affine)
    return (
        working_copy(cropped, FINE_MM, data=data),
        working_copy(cropped, FINE_MM, data=inside[box].astype(np.float32)),
    )


def _centre_of_mass(data: np.ndarray) -> tuple[float, ...]:
    """Centre of mass in voxels of what is brighter than a tenth of the maximum, clipped."""
    high = np.percentile(data[data > 0], 95)
    return ndimage.center_of_mass(np.clip(data, 0, high) * (data > 0.1 * high))


def _starts(shift: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Name the starting poses: two positions, each as it is and turned about three axes."""
    turns = [("", np.zeros(3))]
    for axis, name in enumerate("xyz"):
        for angle in (-ANGLE_DEG, ANGLE_DEG):
            turns.append((f", {angle:+d} degrees about {name}", np.eye(3)[axis] * angle))
    positions = {"header": np.zeros(3), "centres of mass": shift}
    return [
        (position + turn, np.concatenate([offset, np.deg2rad(angles)]))
        for position, offset in positions.items()
        for turn, angles in turns
    ]


def _distinct(found: list[tuple[float, str, np.ndarray]], *, n_best: int = 3) -> list[tuple]:
    """Keep the best few poses that are at least 4 mm or 4 degrees apart."""
    chosen = []
    for item in found:
        steps = [
            np.abs(item[2] - other[2]) / ([4.0] * 3 + [np.deg2rad(4)] * 3) for other in chosen
        ]
        if all(step.max() > 1 for step in steps):
            chosen.append(item)
        if len(chosen) == n_best:
            break
    return chosen


def _measure(
    fixed: nb.Nifti1Image, brain: nb.Nifti1Image, moving: nb.Nifti1Image, spacing_mm: float
) -> MutualInformation:
    """Build the mutual information over the brain and its rim at one spacing."""
    fixed_copy = working_copy(fixed, spacing_mm)
    region = resample_onto(
        _rim(brain).astype(np.float32), brain.affine, fixed_copy.shape, fixed_copy.affine
    )
    region = region > 0.5
    points = nb.affines.apply_affine(fixed_copy.affine, np.argwhere(region))
    values = np.asarray(fixed_copy.dataobj)[region]
    moving_copy = working_copy(moving, max(spacing_mm * 0.75, FINE_MM))
    return MutualInformation(
        points, values, np.maximum(np.asarray(moving_copy.dataobj), 0), moving_copy.affine
    )


def _rim(brain: nb.Nifti1Image) -> np.ndarray:
    """Dilate a 2 mm brain mask by the rim."""
    outside = np.asarray(brain.dataobj) <= 0.5
    return ndimage.distance_transform_edt(outside) * FINE_MM <= RIM_MM


def _refine(
    fixed: nb.Nifti1Image,
    brain: nb.Nifti1Image,
    moving: nb.Nifti1Image,
    fixed2moving: np.ndarray,
    random_seed: int,
    *,
    stage: Stage = RIGID_STAGE,
) -> np.ndarray:
    """Refine a linear map by ANTs; return the point map, (4, 4)."""
    region = nb.Nifti1Image(_rim(brain).astype(np.float32), brain.affine)
    result = register(
        fixed,
        working_copy(moving, FINE_MM),
        [stage],
        fixed2moving=fixed2moving,
        fixed_mask=region,
        random_seed=random_seed,
    )
    return result.fixed2moving
