"""Smoothing against the Gaussian, in millimetres, and at the border of the field of view."""

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.quantification.smoothing import smooth


def test_a_point_becomes_a_gaussian():
    spacing, shape = np.array([1.5, 2.0, 2.5]), (31, 25, 21)
    axes = Rotation.from_euler("xyz", [30, 20, -25], degrees=True).as_matrix() * spacing
    affine = from_matvec(axes, [3, 4, 5])
    data = np.zeros(shape, np.float32)
    data[15, 12, 10] = 1000
    found = smooth(nb.Nifti1Image(data, affine), 8.0, np.ones(shape, bool)).get_fdata()
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    distance = np.linalg.norm(points - points[15, 12, 10], axis=-1)
    expected = 0.5 ** ((2 * distance / 8.0) ** 2)
    expected *= 1000 / expected.sum()
    # Truncated at four standard deviations.
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.max())


def test_values_do_not_fall_off_at_the_border():
    data = np.full((20, 20, 20, 2), 5.0, np.float32)
    seen = np.zeros(data.shape[:3], bool)
    seen[3:15] = True
    data[~seen] = 0
    found = smooth(nb.Nifti1Image(data, np.eye(4)), 6.0, seen).get_fdata()
    np.testing.assert_allclose(found[seen], 5, rtol=1e-5)
    assert not found[~seen].any()
