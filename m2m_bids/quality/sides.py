"""Tell whether left and right of a scan are those of the T1w: by how its mirror image fits.

The hemispheres differ too little for the value of a similarity measure to show that a scan is
mirrored. So the scan is compared twice with what the tissues of the T1w would show: as it is, and
mirrored in the brain's mid-sagittal plane; both times after a rigid alignment of its own, so that
neither has the advantage of the better pose.
"""

from typing import NamedTuple

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage, optimize

from m2m_bids.preprocessing.mutual_information import pose_matrix
from m2m_bids.spatial.conform import grid_with_spacing
from m2m_bids.spatial.resampling import resample

FWHM_TO_SIGMA = 1 / np.sqrt(8 * np.log(2))
SPACING_MM = 3.0
EXPECTED_FWHM_MM = 6.0
SCAN_FWHM_MM = 4.0
TISSUES = (1, 2, 3)


class Sides(NamedTuple):
    """
    Likeness of a scan and what its T1w's tissues would show, -1 to 1.

    Parameters
    ----------
    as_it_is : float
        Of the scan.
    mirrored : float
        Of the scan mirrored in the mid-sagittal plane.
    """

    as_it_is: float
    mirrored: float

    @property
    def gap(self) -> float:
        """How much better the scan fits as it is; negative where its mirror image fits better."""
        return self.as_it_is - self.mirrored


def compare_sides(
    scan: nb.Nifti1Image,
    dseg: nb.Nifti1Image,
    mask: nb.Nifti1Image,
    *,
    fixed2moving: np.ndarray,
    template2fixed: np.ndarray,
) -> Sides:
    """
    Compare a scan and its mirror image with the tissues of the T1w.

    Parameters
    ----------
    scan : Nifti1Image, 3-D
        Static image on its native grid.
    dseg, mask : Nifti1Image
        Tissues (1 grey matter, 2 white matter, 3 fluid) and brain of the T1w, on one grid.
    fixed2moving : ndarray, shape (4, 4)
        Rigid map from points of the T1w to points of the scan, RAS+ mm.
    template2fixed : ndarray, shape (4, 4)
        Affine map from points of the symmetric template to points of the T1w, RAS+ mm.

    Returns
    -------
    Sides
    """
    # The symmetric template's mid-sagittal plane is x = 0.
    mirror = template2fixed @ np.diag([-1.0, 1, 1, 1]) @ np.linalg.inv(template2fixed)
    return Sides(*(_likeness(scan, dseg, mask, fixed2moving @ m) for m in (np.eye(4), mirror)))


def _likeness(
    scan: nb.Nifti1Image, dseg: nb.Nifti1Image, mask: nb.Nifti1Image, fixed2moving: np.ndarray
) -> float:
    """Correlate a scan with its tissues' mean brightness in the brain, at the best pose nearby."""
    grid = grid_with_spacing(mask, [SPACING_MM] * 3)
    inside = np.asarray(resample(mask, (), grid, order=0).dataobj) > 0
    points = apply_affine(grid.affine, np.argwhere(inside))
    painted = _paint(scan, dseg, fixed2moving)
    expected = np.asarray(resample(painted, (), grid, order=1).dataobj)[inside]
    data = np.nan_to_num(np.asarray(scan.dataobj, dtype=np.float32))
    data = ndimage.gaussian_filter(data, _sigmas(scan, SCAN_FWHM_MM))
    fixed2voxel = np.linalg.inv(scan.affine) @ fixed2moving
    centre = points.mean(axis=0)
    # One unit of the search is 4 mm or 4 degrees.
    unit = np.array([4.0] * 3 + [np.deg2rad(4)] * 3)

    def unlikeness(step: np.ndarray) -> float:
        voxels = apply_affine(fixed2voxel @ pose_matrix(step * unit, centre), points)
        return -correlation(expected, ndimage.map_coordinates(data, voxels.T, order=1))

    options = {"maxfev": 400, "xtol": 0.03, "ftol": 1e-4}
    return -float(optimize.minimize(unlikeness, np.zeros(6), method="Powell", options=options).fun)


def _paint(scan: nb.Nifti1Image, dseg: nb.Nifti1Image, fixed2moving: np.ndarray) -> nb.Nifti1Image:
    """Paint each tissue with its median in the scan, and blur."""
    tissues = np.asarray(dseg.dataobj)
    moved = np.asarray(resample(scan, (fixed2moving,), dseg, order=1).dataobj)
    painted = np.zeros(tissues.shape, np.float32)
    for tissue in TISSUES:
        where = tissues == tissue
        if where.any():
            painted[where] = np.median(moved[where])
    blurred = ndimage.gaussian_filter(painted, _sigmas(dseg, EXPECTED_FWHM_MM))
    return nb.Nifti1Image(blurred, dseg.affine)


def _sigmas(image: nb.Nifti1Image, fwhm_mm: float) -> np.ndarray:
    return fwhm_mm * FWHM_TO_SIGMA / np.linalg.norm(image.affine[:3, :3], axis=0)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where one of both is constant."""
    first, second = first - first.mean(), second - second.mean()
    norm = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / norm) if norm > 0 else 0.0
