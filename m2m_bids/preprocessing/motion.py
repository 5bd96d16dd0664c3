"""Motion between the volumes of a raw diffusion-weighted image."""

from typing import NamedTuple

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import (
    Stage,
    as_rigid,
    register,
    resample_onto,
    working_copy,
)
from m2m_bids.preprocessing.same_contrast import SameContrast
from m2m_bids.spatial.gradients import Gradients

FWHM_TO_SIGMA = 1 / np.sqrt(8 * np.log(2))
SPACING_MM = 3.0
RIGID_STAGE = Stage("Rigid[0.1]", "MI[{},1,32,Regular,0.5]", "[50x40,1e-6,10]", "2x1", "2x1mm")
# Volumes of one contrast are compared on a coarser grid, smoothed; at first more, for jumps.
COARSE_MM = 4.0
# Width of the smoothing, and whether a tensor predicts the volumes; else the others' mean does.
PASSES = ((8.0, False), (8.0, False), (5.0, True), (5.0, True))
# Of the bright voxels' signal; the logarithm of less is noise.
MIN_SIGNAL = 0.02
# Voxels above this share of the bright ones are head, and so is the rim around them.
HEAD_SHARE = 0.15
RIM_MM = 8.0
# Share of a volume in its own prediction. Above it, as with fewer than 18 directions or two
# volumes, the others alone say too little.
MAX_LEVERAGE = 0.35


class CorrectedVolumes(NamedTuple):
    """
    Volumes brought to their reference.

    Attributes
    ----------
    data : ndarray, shape (I, J, K, N)
        Volumes on the grid of the reference.
    gradients : Gradients
        Directions as the head at the reference has seen them.
    max_shift_mm, max_angle_deg : float
        Largest movement of the centre of the image, and largest rotation.
    """

    data: np.ndarray
    gradients: Gradients
    max_shift_mm: float
    max_angle_deg: float


def correct_motion(
    data: np.ndarray, vox2ras: np.ndarray, gradients: Gradients, *, random_seed: int = 0
) -> CorrectedVolumes:
    """
    Align each volume rigidly with the first one without diffusion weighting.

    Each volume is interpolated once (cubic; the outermost voxels continue outside), and its
    gradient turns with the head.

    Parameters
    ----------
    data : ndarray, shape (I, J, K, N)
        Volumes, not negative.
    vox2ras : ndarray, shape (4, 4)
        Affine of the image.
    gradients : Gradients
        Of these volumes, one without weighting among them.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    CorrectedVolumes
    """
    centre = apply_affine(vox2ras, (np.array(data.shape[:3]) - 1) / 2)
    corrected, directions = data.copy(), gradients.directions.copy()
    shifts, angles = [], []
    poses = find_poses(data, vox2ras, gradients, random_seed=random_seed)
    for index, pose in enumerate(poses):
        if not np.array_equal(pose, np.eye(4)):
            volume = data[..., index]
            moved = resample_onto(volume, vox2ras, data.shape[:3], pose @ vox2ras, order=3)
            corrected[..., index] = np.clip(moved, 0, volume.max())
        # Points of the reference turn by the pose's rotation into the volume, where the gradient
        # was applied: seen from the reference it turns back.
        directions[index] = pose[:3, :3].T @ gradients.directions[index]
        shifts.append(float(np.linalg.norm(apply_affine(pose, centre) - centre)))
        cosine = (np.trace(pose[:3, :3]) - 1) / 2
        angles.append(float(np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))))
    return CorrectedVolumes(
        corrected, Gradients(gradients.b_values, directions), max(shifts), max(angles)
    )


def find_poses(
    data: np.ndarray, vox2ras: np.ndarray, gradients: Gradients, *, random_seed: int = 0
) -> list[np.ndarray]:
    """
    Find where the head is in each volume, relative to the first one without weighting.

    Volumes without weighting are registered to their mean, weighted ones to their mean as well
    and then to what a tensor fitted to the others predicts, all by least squares; contrast
    differs only between the two means, which ANTs registers by mutual information.

    Parameters
    ----------
    data, vox2ras, gradients, random_seed
        As `correct_motion` takes them.

    Returns
    -------
    list of ndarray, shape (4, 4)
        For each volume, rigid map of points of the reference to points of the volume, RAS+ mm.
    """
    poses = np.tile(np.eye(4), (data.shape[3], 1, 1))
    means = []
    for chosen in (gradients.is_b0, ~gradients.is_b0):
        volumes = data[..., chosen]
        group = Gradients(gradients.b_values[chosen], gradients.directions[chosen])
        poses[chosen] = _align(volumes, vox2ras, group)
        means.append(_mean(volumes, vox2ras, poses[chosen]))
    poses[~gradients.is_b0] @= estimate_motion(*means, vox2ras, random_seed=random_seed)
    first = int(np.argmax(gradients.is_b0))
    poses = poses @ np.linalg.inv(poses[first])
    poses[first] = np.eye(4)  # without rounding: it needs no interpolation
    return list(poses)


def estimate_motion(
    reference: np.ndarray, volume: np.ndarray, vox2ras: np.ndarray, *, random_seed: int = 0
) -> np.ndarray:
    """
    Estimate where the head has moved between volumes whose contrast may differ.

    Parameters
    ----------
    reference, volume : ndarray, shape (I, J, K)
        Volumes of one grid.
    vox2ras : ndarray, shape (4, 4)
        Its affine.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    ndarray, shape (4, 4)
        Maps points of the reference to points of the volume: rotation and shift, RAS+ mm.
    """
    spacing_mm = max(SPACING_MM, float(np.linalg.norm(vox2ras[:3, :3], axis=0).max()))
    fixed, moving = (
        working_copy(nb.Nifti1Image(values, vox2ras), spacing_mm) for values in (reference, volume)
    )
    result = register(
        fixed, moving, [RIGID_STAGE], fixed2moving=np.eye(4), random_seed=random_seed
    )
    return as_rigid(result.fixed2moving)


def _align(volumes: np.ndarray, vox2ras: np.ndarray, gradients: Gradients) -> np.ndarray:
    """Align volumes of one contrast with what the others predict: maps to each from a common."""
    n_volumes = volumes.shape[3]
    poses = np.tile(np.eye(4), (n_volumes, 1, 1))
    if n_volumes == 1:
        return poses
    copies = [
        working_copy(nb.Nifti1Image(volumes[..., index], vox2ras), COARSE_MM)
        for index in range(n_volumes)
    ]
    grid = copies[0].affine
    for fwhm_mm, has_tensor in PASSES:
        splines = [_smooth_spline(copy, fwhm_mm) for copy in copies]
        aligned = np.stack([_moved(*pair, grid) for pair in zip(splines, poses, strict=True)])
        is_head = _head(aligned.mean(axis=0))
        expected = _expected(aligned, _hat_matrix(gradients, poses, has_tensor=has_tensor))
        for index, (spline, start) in enumerate(zip(splines, poses, strict=True)):
            reference = nb.Nifti1Image(expected[index], grid)
            poses[index] = SameContrast(reference, is_head).register(spline, grid, start)
    return poses


def _hat_matrix(gradients: Gradients, poses: np.ndarray, *, has_tensor: bool) -> np.ndarray:
    """Matrix that fits logarithms of signals: by a tensor if they determine it, or a mean."""
    n_volumes = len(poses)
    if has_tensor and not gradients.is_b0.any():
        seen = np.einsum("nji,nj->ni", poses[:, :3, :3], gradients.directions)
        products = seen[:, [0, 1, 2, 0, 0, 1]] * seen[:, [0, 1, 2, 1, 2, 2]]
        weighted = gradients.b_values[:, None] / gradients.b_values.max() * products
        design = np.column_stack([np.ones(n_volumes), weighted])
        hat = design @ np.linalg.pinv(design)
        if np.diag(hat).max() <= MAX_LEVERAGE:
            return hat
    return np.full((n_volumes, n_volumes), 1 / n_volumes)


def _expected(aligned: np.ndarray, hat: np.ndarray) -> np.ndarray:
    """Predict each volume by a fit of logarithms, from the others if these are enough."""
    floor = MIN_SIGNAL * np.percentile(aligned, 98)
    logarithms = np.log(np.maximum(aligned, floor)).reshape(len(aligned), -1)
    leverage = np.diag(hat)[:, None]
    own = np.where(leverage <= MAX_LEVERAGE, leverage, 0)
    return np.exp((hat @ logarithms - own * logarithms) / (1 - own)).reshape(aligned.shape)


def _smooth_spline(copy: nb.Nifti1Image, fwhm_mm: float) -> np.ndarray:
    """Smooth a volume on the coarse grid, as coefficients of a cubic spline."""
    data = np.asarray(copy.dataobj, dtype=float)
    smoothed = ndimage.gaussian_filter(data, fwhm_mm * FWHM_TO_SIGMA / COARSE_MM, mode="nearest")
    return ndimage.spline_filter(smoothed)


def _moved(spline: np.ndarray, pose: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Bring a volume, as a cubic spline, to the pose of the others."""
    matrix = np.linalg.solve(affine, pose @ affine)
    return ndimage.affine_transform(
        spline, matrix[:3, :3], matrix[:3, 3], order=3, mode="nearest", prefilter=False
    )


def _mean(volumes: np.ndarray, vox2ras: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Average aligned volumes on their own grid."""
    shape = volumes.shape[:3]
    moved = (
        resample_onto(volumes[..., index], vox2ras, shape, pose @ vox2ras)
        for index, pose in enumerate(poses)
    )
    return sum(moved) / len(poses)


def _head(mean: np.ndarray) -> np.ndarray:
    """Mark the head and a rim around it on the coarse grid."""
    inside = mean > HEAD_SHARE * np.percentile(mean, 98)
    return ndimage.distance_transform_edt(~inside) * COARSE_MM <= RIM_MM
