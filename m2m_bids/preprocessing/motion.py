"""Motion between the volumes of a raw diffusion-weighted image."""

from typing import NamedTuple

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine

from m2m_bids.preprocessing.ants_bridge import (
    Stage,
    as_rigid,
    register,
    resample_onto,
    working_copy,
)
from m2m_bids.spatial.gradients import Gradients

SPACING_MM = 3.0
RIGID_STAGE = Stage("Rigid[0.1]", "MI[{},1,32,Regular,0.5]", "[50x40,1e-6,10]", "2x1", "2x1mm")


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

    Mutual information is maximised with ANTs, each volume is interpolated once (cubic; the
    outermost voxels continue outside), and its gradient turns with the head.

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
    reference = int(np.argmax(gradients.is_b0))
    centre = apply_affine(vox2ras, (np.array(data.shape[:3]) - 1) / 2)
    corrected, directions = data.copy(), gradients.directions.copy()
    shifts, angles = [0.0], [0.0]
    for index in range(data.shape[3]):
        if index == reference:
            continue
        pose = estimate_motion(
            data[..., reference], data[..., index], vox2ras, random_seed=random_seed
        )
        moved = resample_onto(data[..., index], vox2ras, data.shape[:3], pose @ vox2ras, order=3)
        corrected[..., index] = np.clip(moved, 0, data[..., index].max())
        # Points of the reference turn by the pose's rotation into the volume, where the gradient
        # was applied: seen from the reference it turns back.
        directions[index] = pose[:3, :3].T @ gradients.directions[index]
        shifts.append(float(np.linalg.norm(apply_affine(pose, centre) - centre)))
        cosine = (np.trace(pose[:3, :3]) - 1) / 2
        angles.append(float(np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))))
    return CorrectedVolumes(
        corrected, Gradients(gradients.b_values, directions), max(shifts), max(angles)
    )


def estimate_motion(
    reference: np.ndarray, volume: np.ndarray, vox2ras: np.ndarray, *, random_seed: int = 0
) -> np.ndarray:
    """
    Estimate where the head has moved from a reference volume to another.

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
