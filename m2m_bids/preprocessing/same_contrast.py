r"""
Rigid registration of images of the same contrast, by least squares.

A volume V of the head and a reference R differ by a rigid map of points, a factor and an offset:
:math:`V(M x) \approx a R(x) + c`. About the true map, the volume changes with a small further
motion as the reference does, so that both images and the six parameters of the motion obey

.. math:: V(M x) = a R(x) + c - a \nabla R(x) \cdot (t + \omega \times (x - x_0)),

which is linear in a, c, at and :math:`a\omega`, with coefficients that depend on the reference
alone (the inverse compositional algorithm of Baker and Matthews, Int J Comput Vis 2004; the
linear system is that of AFNI's ``3dvolreg``). Between images of different contrast it fails.
"""

from collections.abc import Sequence

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

MAX_ITERATIONS = 30
SMALLEST_STEP_MM = 0.01
# By how much a rotation moves points at the rim of a head.
HEAD_RADIUS_MM = 70.0


class SameContrast:
    """
    A reference that volumes of its contrast are registered to.

    Parameters
    ----------
    reference : Nifti1Image, shape (I, J, K)
        Image of the head, smooth at the scale of its voxels.
    is_used : ndarray of bool, shape (I, J, K)
        Voxels that are compared.
    """

    def __init__(self, reference: nb.Nifti1Image, is_used: np.ndarray) -> None:
        data = np.asarray(reference.dataobj, dtype=float)
        self._points = apply_affine(reference.affine, np.argwhere(is_used))
        self._centre = self._points.mean(axis=0)
        by_voxel = np.stack([slope[is_used] for slope in np.gradient(data)], axis=-1)
        slopes = by_voxel @ np.linalg.inv(reference.affine[:3, :3])
        turns = np.cross(self._points - self._centre, slopes)
        values = data[is_used]
        system = np.column_stack([values, np.ones_like(values), -slopes, -turns])
        self._solver = np.linalg.solve(system.T @ system, system.T)

    def register(
        self, coefficients: np.ndarray, affine: np.ndarray, start: np.ndarray
    ) -> np.ndarray:
        """
        Find where the head of the reference is in a volume.

        Parameters
        ----------
        coefficients : ndarray, shape (I, J, K)
            Cubic spline of the volume (``scipy.ndimage.spline_filter``).
        affine : ndarray, shape (4, 4)
            Of the volume.
        start : ndarray, shape (4, 4)
            Map to begin with.

        Returns
        -------
        ndarray, shape (4, 4)
            Rigid map of points of the reference to points of the volume, RAS+ mm.
        """
        found = start
        for _ in range(MAX_ITERATIONS):
            ijk = apply_affine(np.linalg.solve(affine, found), self._points)
            seen = ndimage.map_coordinates(
                coefficients, ijk.T, order=3, mode="nearest", prefilter=False
            )
            factor, _, *motion = self._solver @ seen
            if factor <= 0:
                return start  # the images have nothing in common
            shift, turn = np.split(np.array(motion) / factor, 2)
            found = found @ _small_motion(shift, turn, self._centre)
            if np.linalg.norm(shift) + HEAD_RADIUS_MM * np.linalg.norm(turn) < SMALLEST_STEP_MM:
                break
        return found


def _small_motion(shift: np.ndarray, turn: np.ndarray, centre: Sequence[float]) -> np.ndarray:
    """Turn about a centre by a vector of radians, then shift."""
    rotation = Rotation.from_rotvec(turn).as_matrix()
    return from_matvec(rotation, centre + shift - rotation @ centre)
