"""Images that other programs see, and the way back from what they find."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.baselines.base import Images, chain_through_template, images_in_template
from m2m_bids.evaluation.folding import folding_percentage_paper
from m2m_bids.spatial.fields import grid_points
from m2m_bids.spatial.transforms import map_points

# None of them commutes with another; the template's is sheared.
RIGID = from_matvec(Rotation.from_euler("xz", [25, -60], degrees=True).as_matrix(), [12, -45, 8])
SHEAR = np.array([[1, 0.1, 0], [0, 1, -0.1], [0, 0, 1.0]])
TEMPLATE = from_matvec(
    Rotation.from_euler("y", 20, degrees=True).as_matrix() @ np.diag([1.1, 0.9, 1.05]) @ SHEAR,
    [3, 4, 5],
)
LINEAR = from_matvec(np.diag([0.9, 1.05, 1.1]), [2, -3, 1])


def pair_of(fixed2moving=RIGID, template2fixed=TEMPLATE):
    """Two equal boxes, the moving one carried away by the rigid map."""
    affine = from_matvec(np.eye(3) * 4.0, [-98, -115, -93])
    data = np.zeros((50, 50, 50), dtype=np.float32)
    data[15:35, 12:36, 17:33] = 1
    data[15:25, 12:36, 17:33] = 2
    fixed = nb.Nifti1Image(data, affine)
    return Images(
        moving=nb.Nifti1Image(data, fixed2moving @ affine),
        fixed=fixed,
        fixed_mask=nb.Nifti1Image((data > 0).astype(np.uint8), affine),
        fixed2moving=fixed2moving,
        template2fixed=template2fixed,
        modality="pet",
    )


def test_images_in_the_template_are_aligned_and_isotropic():
    grid = images_in_template(pair_of(), 4.0)
    for image in (grid.moving, grid.fixed, grid.region):
        assert image.shape == (48, 48, 48)
        np.testing.assert_allclose(image.affine[:3, :3], 4.0 * np.eye(3))
    moving, fixed = grid.moving.get_fdata(), grid.fixed.get_fdata()
    assert (fixed.min(), fixed.max()) == (0, 1)
    # They differ by what `float32` and the interpolation at the edges leave.
    np.testing.assert_allclose(moving, fixed, atol=1e-3)
    # The centre of the box, by hand.
    center = apply_affine(
        np.linalg.inv(TEMPLATE), [-98 + 24.5 * 4, -115 + 23.5 * 4, -93 + 24.5 * 4]
    )
    found = apply_affine(grid.fixed.affine, ndimage.center_of_mass(fixed > 0))
    np.testing.assert_allclose(found, center, atol=0.5)


def test_similarity_is_measured_in_the_brain_and_its_rim():
    grid = images_in_template(pair_of(), 4.0)
    region = np.asarray(grid.region.dataobj) > 0
    brain = np.asarray(grid.fixed.dataobj) > 0
    assert region[brain].all()
    distance_mm = 4.0 * ndimage.distance_transform_edt(~brain)
    np.testing.assert_array_equal(region, distance_mm <= 8)
    assert region.sum() > 1.5 * brain.sum()


def test_chain_goes_through_the_template_and_back(rng):
    affine = images_in_template(pair_of(), 4.0).fixed.affine
    # A displacement that is linear in the position is interpolated exactly.
    slope, shift = rng.uniform(-0.1, 0.1, (3, 3)), np.array([5.0, -7.0, 3.0])
    displacement = grid_points((48, 48, 48), affine) @ slope.T + shift
    chain = chain_through_template(pair_of(), displacement, affine, linear=LINEAR)
    points = rng.uniform(-50, 50, (200, 3))
    in_template = apply_affine(np.linalg.inv(TEMPLATE), points)
    displaced = in_template + in_template @ slope.T + shift
    expected = apply_affine(RIGID @ TEMPLATE @ LINEAR, displaced)
    assert np.linalg.norm(expected - apply_affine(RIGID, points), axis=1).min() > 1
    np.testing.assert_allclose(map_points(chain, points), expected, atol=1e-3)
    # Without a linear map, the identity stands in its place.
    chain = chain_through_template(pair_of(), displacement, affine)
    expected = apply_affine(RIGID @ TEMPLATE, displaced)
    np.testing.assert_allclose(map_points(chain, points), expected, atol=1e-3)


def test_end_of_a_field_is_no_fold():
    images = pair_of(np.eye(4), np.eye(4))
    affine = images_in_template(images, 4.0).fixed.affine
    chain = chain_through_template(images, np.full((48, 48, 48, 3), 12.0), affine)
    shape, everywhere = (150, 150, 150), from_matvec(2 * np.eye(3), [-150, -167, -145])
    assert folding_percentage_paper(chain, shape, everywhere) == 0
    # Far away nothing is displaced, in the middle all.
    np.testing.assert_allclose(map_points(chain, [[150.0, 0, 0]]), [[150, 0, 0]], atol=1e-4)
    np.testing.assert_allclose(map_points(chain, [[0.0, 0, 0]]), [[12, 12, 12]], atol=1e-4)


def test_images_that_do_not_overlap_are_refused():
    images = pair_of(from_matvec(np.eye(3), [1000, 0, 0]))
    away = Images(**{**images.__dict__, "moving": images.fixed})
    with pytest.raises(ValueError, match="do not overlap"):
        images_in_template(away, 4.0)
