"""Least squares between images of one contrast, on blobs whose place is known."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing.same_contrast import SameContrast

CENTRE_MM = np.array([30.0, -20.0, 10.0])
OFFSETS_MM = np.array([(-14, 6, 4), (10, 12, -9), (4, -16, 11), (16, -6, 8), (-6, -4, -15)])
BLOBS_MM = CENTRE_MM + OFFSETS_MM


def grid(shape, zooms, angles, centre_mm):
    axes = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * zooms
    return shape, from_matvec(axes, centre_mm - axes @ ((np.array(shape) - 1) / 2))


def blobs(shape, affine, pose):
    """Blobs of different weights, in a head that moved by a pose."""
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    places = apply_affine(pose, BLOBS_MM)
    distances = np.linalg.norm(points[..., None, :] - places, axis=-1)
    return (np.exp(-((distances / 8) ** 2) / 2) * (3, 2, 4, 1.5, 2.5)).sum(axis=-1)


def moved(angles, shift):
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return from_matvec(rotation, CENTRE_MM + shift - rotation @ CENTRE_MM)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rigid_motion_is_found_whatever_the_factor_and_the_offset(sign):
    """Each image on an oblique anisotropic grid of its own, with a determinant of a sign."""
    shape, affine = grid((20, 19, 22), (sign * 3.8, 4.2, 3.5), [12, -20, 7], CENTRE_MM)
    reference = nb.Nifti1Image(blobs(shape, affine, np.eye(4)), affine)
    search = SameContrast(reference, np.ones(shape, bool))
    true = moved([5, -4, 6], [2.5, -1.5, 3])
    shape, affine = grid((24, 21, 20), (3.4, 4.0, -4.1), [-8, 15, 3], (31, -19, 12))
    volume = 20 - 0.1 + 0.6 * blobs(shape, affine, true)
    found = search.register(ndimage.spline_filter(volume), affine, np.eye(4))
    apart = apply_affine(found, BLOBS_MM) - apply_affine(true, BLOBS_MM)
    # Blobs of 8 mm on voxels of 4 mm: what cubic splines and differences leave.
    assert np.linalg.norm(apart, axis=1).max() < 0.05
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)


def test_what_has_nothing_in_common_stays_where_it_is():
    shape, affine = grid((18, 18, 18), (4.0, 4.0, 4.0), [0, 0, 0], CENTRE_MM)
    data = blobs(shape, affine, np.eye(4))
    search = SameContrast(nb.Nifti1Image(data, affine), np.ones(shape, bool))
    start = moved([1, 0, 0], [1, 0, 0])
    assert search.register(ndimage.spline_filter(-data), affine, start) is start
