"""
Mutual information of two images at many poses, quickly enough to search among them.

An evaluation at 6-8 mm takes about a millisecond, so that dozens of starting poses can be tried
before ANTs refines the best. It is exactly repeatable: no random sampling, no threads.
"""

import numpy as np
from scipy import ndimage, optimize


class MutualInformation:
    r"""
    Mutual information between a fixed image's samples and a moving image.

    .. math:: MI = \sum_{ab} p_{ab} \ln \frac{p_{ab}}{p_a p_b}

    from a joint histogram in which a moving value is shared linearly by its two nearest bins, so
    that the measure is continuous in the pose. Samples that fall outside the moving image's
    field of view are left out and the result is multiplied by the fraction that remains:
    otherwise leaving the field of view would cost nothing.

    Parameters
    ----------
    points : ndarray, shape (N, 3)
        Samples of the fixed image, world mm.
    values : ndarray, shape (N,)
        Fixed intensities there.
    moving_data : ndarray, shape (I, J, K)
        Moving image.
    moving_vox2ras : ndarray, shape (4, 4)
        Affine of the moving image.
    n_bins : int
        Bins of either axis of the histogram, between the 0.5th and 99.5th percentile.
    """

    def __init__(self, points, values, moving_data, moving_vox2ras, *, n_bins=24):
        self.points = np.column_stack([points, np.ones(len(points))])
        self.n_bins = n_bins
        self.fixed_bin = np.rint(_to_bins(values, values, n_bins)).astype(np.intp)
        self.moving_data = _to_bins(moving_data, moving_data[moving_data != 0], n_bins)
        self.ras2vox = np.linalg.inv(moving_vox2ras)

    def __call__(self, fixed2moving: np.ndarray) -> float:
        """
        Return the mutual information in nats, 0 (none) or more.

        Parameters
        ----------
        fixed2moving : ndarray, shape (4, 4)
            Maps points of the fixed world to points of the moving world.
        """
        voxels = self.points @ (self.ras2vox @ fixed2moving)[:3].T
        size = np.array(self.moving_data.shape)
        inside = np.all((voxels > -0.5) & (voxels < size - 0.5), axis=1)
        n_inside = np.count_nonzero(inside)
        if n_inside < 0.1 * len(inside):
            return 0.0
        moving = ndimage.map_coordinates(
            self.moving_data, voxels[inside].T, order=1, mode="nearest"
        )
        lower = np.minimum(moving.astype(np.intp), self.n_bins - 2)
        weight = moving - lower
        index = self.fixed_bin[inside] * self.n_bins + lower
        joint = np.bincount(index, 1 - weight, self.n_bins**2)
        joint[1:] += np.bincount(index, weight, self.n_bins**2)[:-1]
        joint = joint.reshape(self.n_bins, self.n_bins) / n_inside
        outer = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        full = joint > 0
        information = np.sum(joint[full] * np.log(joint[full] / outer[full]))
        return float(max(information, 0.0) * n_inside / len(inside))


def _to_bins(data: np.ndarray, sample: np.ndarray, n_bins: int) -> np.ndarray:
    """Scale intensities to [0, n_bins - 1], by the robust range of a sample of them."""
    low, high = np.percentile(sample, [0.5, 99.5])
    low = min(low, 0.0) if low > 0 else low
    scale = (n_bins - 1) / max(high - low, np.finfo(np.float32).tiny)
    return np.clip((data - low) * scale, 0, n_bins - 1).astype(np.float32)


def rotation_matrix(angles: np.ndarray) -> np.ndarray:
    """
    Rotate about the x, then the y, then the z axis.

    Parameters
    ----------
    angles : array_like, shape (3,)
        Radians.

    Returns
    -------
    ndarray, shape (3, 3)
        Rotation matrix.
    """
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", angles).as_matrix()


def pose_matrix(pose: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """
    Build the point map of a pose.

    Parameters
    ----------
    pose : array_like, shape (6,) or (7,)
        Shift (mm), rotation about x, y, z (radians), and the logarithm of an isotropic scale.
    centre : ndarray, shape (3,)
        Fixed point about which the pose rotates and scales, world mm.

    Returns
    -------
    ndarray, shape (4, 4)
        Maps ``x`` to ``scale * R @ (x - centre) + centre + shift``.
    """
    matrix = np.eye(4)
    scale = np.exp(pose[6]) if len(pose) > 6 else 1.0
    matrix[:3, :3] = scale * rotation_matrix(pose[3:6])
    matrix[:3, 3] = centre + pose[:3] - matrix[:3, :3] @ centre
    return matrix


def climb(
    score: MutualInformation, pose: np.ndarray, centre: np.ndarray, *, n_evaluations: int
) -> tuple[np.ndarray, float]:
    """
    Improve a pose by Powell's method.

    Parameters
    ----------
    score : MutualInformation
        Measure to raise.
    pose : ndarray, shape (6,) or (7,)
        Where to start, as in `pose_matrix`.
    centre : ndarray, shape (3,)
        Centre of the pose, world mm.
    n_evaluations : int
        Number of evaluations after which to stop.

    Returns
    -------
    pose : ndarray
        Improved pose.
    score : float
        Its mutual information, nats.
    """
    # One unit of the search is 10 mm, 10 degrees or 10 percent.
    unit = np.array([10.0] * 3 + [np.deg2rad(10)] * 3 + [0.1])[: len(pose)]
    result = optimize.minimize(
        lambda step: -score(pose_matrix(pose + step * unit, centre)),
        np.zeros(len(pose)),
        method="Powell",
        options={"maxfev": n_evaluations, "xtol": 0.02, "ftol": 1e-4},
    )
    return pose + result.x * unit, -float(result.fun)
