"""From a T1w to a template, against a map that is known."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec

from m2m_bids.preprocessing import normalization
from m2m_bids.preprocessing.mutual_information import rotation_matrix
from m2m_bids.preprocessing.normalization import normalize_t1w
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.templates import EMBEDDED, load_template
from m2m_bids.spatial.transforms import map_points

SPACING_MM = 4.0
# Turned by up to 17 degrees, larger along one axis, and shifted.
ANAT2TEMPLATE = from_matvec(
    rotation_matrix(np.array([0.3, -0.1, 0.2])) @ np.diag([0.95, 1.08, 1.0]), (6, -9, 12)
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return load_template(EMBEDDED, tmp_path_factory.mktemp("none"), resolution=4)


@pytest.fixture(scope="module")
def warp():
    """Bend template space by up to 9 mm, in waves of 90 mm."""
    affine = from_matvec(np.eye(3) * 6, (-120, -150, -110))
    points = DisplacementField(np.zeros((40, 45, 40, 3)), affine).points()
    waves = np.sin(2 * np.pi * points[..., [1, 2, 0]] / 90 + np.array([0, 1, 2]))
    return DisplacementField(5 * waves, affine)


@pytest.fixture(scope="module")
def anatomy(template, warp):
    """The template as if it were somebody's T1w, on an oblique, anisotropic grid."""
    rotation = rotation_matrix(np.array([-0.2, 0.25, 0.1]))
    matrix = rotation @ np.diag([-3.5, 4.0, 3.0])
    shape = (62, 58, 72)
    affine = from_matvec(matrix, np.array([5, -20, 10]) - matrix @ ((np.array(shape) - 1) / 2))
    grid = nb.Nifti1Image(np.zeros(shape, np.uint8), affine)
    chain = (warp, ANAT2TEMPLATE)
    mask = resample(template.mask, chain, grid, order=0)
    return resample(template.t1w, chain, grid), mask


def brain_points(mask):
    return apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj) > 0)[::40])


def test_a_known_map_is_found(template, warp, anatomy, monkeypatch):
    monkeypatch.setattr(normalization, "SPACING_MM", SPACING_MM)
    t1w, mask = anatomy
    found = normalize_t1w(t1w, mask, template, template2anat=np.linalg.inv(ANAT2TEMPLATE))
    points = brain_points(mask)
    expected = map_points((warp, ANAT2TEMPLATE), points)
    errors = np.linalg.norm(map_points(found.anat2template, points) - expected, axis=1)
    affine_alone = np.linalg.norm(apply_affine(ANAT2TEMPLATE, points) - expected, axis=1)
    assert affine_alone.mean() > 5
    # Less than half a voxel; smooth white matter holds no detail to go by.
    assert errors.mean() < 1.5
    there = map_points(found.template2anat, map_points(found.anat2template, points))
    assert np.linalg.norm(there - points, axis=1).mean() < 0.2


def test_brains_that_lie_apart_start_at_their_centres(template):
    brain = normalization._brain(template.t1w, template.mask)
    away = from_matvec(np.eye(3), (90, -40, 10))
    moved = nb.Nifti1Image(np.asarray(brain.dataobj), away @ brain.affine)
    np.testing.assert_allclose(normalization._start(brain, moved, np.eye(4)), away, atol=1e-6)
    near = from_matvec(np.eye(3), (80, -35, 10))
    np.testing.assert_array_equal(normalization._start(brain, moved, near), near)


def test_a_mask_of_another_grid_is_refused(template, anatomy):
    with pytest.raises(ImageError, match="the mask's grid"):
        normalize_t1w(anatomy[0], template.mask, template, template2anat=np.eye(4))
