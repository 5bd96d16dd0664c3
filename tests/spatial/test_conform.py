import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.spatial.conform import (
    NetworkGrid,
    grid_with_spacing,
    sample_on_grid,
    spacing_in_ras,
    template_grid,
    to_ras,
)

ROTATION = Rotation.from_euler("xyz", [25, -15, 40], degrees=True).as_matrix()


def ramp_image(affine, shape=(30, 31, 32), slope=(0.5, -0.3, 0.2)):
    """Image whose value is a linear function of world position."""
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return nb.Nifti1Image((points @ slope + 100).astype(np.float32), affine)


def test_template_grid_holds_the_brain_of_nilearn():
    from nilearn.datasets import load_mni152_brain_mask

    mask = load_mni152_brain_mask(resolution=2)
    grid = template_grid(np.eye(4))
    brain = apply_affine(mask.affine, np.argwhere(mask.get_fdata() > 0))
    ijk = apply_affine(np.linalg.inv(grid.affine), brain)
    margins = np.stack([ijk.min(axis=0), grid.size - 1 - ijk.max(axis=0)])
    assert margins.min() > 0
    # Centred: margins on both sides agree to one network voxel.
    np.testing.assert_allclose(margins[0], margins[1], atol=1)
    np.testing.assert_allclose(grid.spacing_mm, 3)


def test_template_grid_is_carried_by_the_point_map():
    template2fixed = from_matvec(ROTATION @ np.diag([1.1, 0.9, 1.2]), [30, -20, 10])
    plain = template_grid(np.eye(4), size=20, spacing_mm=5, center_mm=(1, 2, 3))
    carried = template_grid(template2fixed, size=20, spacing_mm=5, center_mm=(1, 2, 3))
    ijk = np.array([[0, 0, 0], [19, 3, 7]])
    np.testing.assert_allclose(
        apply_affine(carried.affine, ijk),
        apply_affine(template2fixed, apply_affine(plain.affine, ijk)),
    )
    np.testing.assert_allclose(apply_affine(plain.affine, [9.5, 9.5, 9.5]), [1, 2, 3])
    np.testing.assert_allclose(carried.spacing_mm, [5.5, 4.5, 6])
    assert carried.shape == (20, 20, 20)


@pytest.mark.parametrize(("size", "affine"), [(1, np.eye(4)), (8, np.zeros((4, 4)))])
def test_network_grid_is_validated(size, affine):
    with pytest.raises(ValueError, match="must be"):
        NetworkGrid(size, affine)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_sampling_finds_the_right_points(order):
    image = ramp_image(from_matvec(ROTATION * [-2, 3, 4], [40, -30, -90]))
    point_map = from_matvec(ROTATION.T @ np.diag([1, 1.2, 0.9]), [5, -8, 12])
    center = apply_affine(np.linalg.inv(point_map) @ image.affine, [15, 15, 16])
    grid = NetworkGrid(8, from_matvec(np.diag([2, 2.5, 3.0]), center - [7, 8.75, 10.5]))
    values = sample_on_grid(image, grid, point_map=point_map, order=order)
    points = apply_affine(point_map @ grid.affine, np.moveaxis(np.indices(grid.shape), 0, -1))
    assert values.shape == (8, 8, 8)
    assert values.dtype == np.float32
    # Nearest: half a voxel's diagonal times the slope; smoothing leaves a ramp as it is.
    tolerance = 0.5 * np.linalg.norm([2, 3, 4]) * np.linalg.norm([0.5, 0.3, 0.2])
    np.testing.assert_allclose(
        values, points @ [0.5, -0.3, 0.2] + 100, atol=tolerance if order == 0 else 2e-3
    )


def test_outside_is_cval_and_nan_is_zero():
    data = np.full((10, 10, 10), np.nan, dtype=np.float32)
    data[5:] = 1
    grid = NetworkGrid(20, from_matvec(np.eye(3), [-5, -5, -5]))
    values = sample_on_grid(nb.Nifti1Image(data, np.eye(4)), grid, cval=-7)
    inside = np.zeros((20, 20, 20), dtype=bool)
    inside[5:15, 5:15, 5:15] = True
    np.testing.assert_array_equal(values[~inside], -7)
    np.testing.assert_array_equal(values[10:15, 5:15, 5:15], 1)
    np.testing.assert_array_equal(values[5:10, 5:15, 5:15], 0)


def test_coarse_sampling_does_not_alias(rng):
    noise = nb.Nifti1Image(rng.normal(size=(64, 64, 64)).astype(np.float32), np.eye(4))
    coarse = NetworkGrid(12, from_matvec(np.eye(3) * 4, [8, 8, 8]))
    fine = NetworkGrid(12, from_matvec(np.eye(3) * 0.99, [8, 8, 8]))
    # White noise smoothed with variance s^2 along three axes has variance (4 pi s^2)^(-3/2).
    sigma_squared = (4**2 - 1) / (8 * np.log(2))
    expected = (4 * np.pi * sigma_squared) ** -0.75
    np.testing.assert_allclose(sample_on_grid(noise, coarse).std(), expected, rtol=0.1)
    unsmoothed = np.asarray(noise.dataobj)[8:19, 8:19, 8:19]
    np.testing.assert_allclose(sample_on_grid(noise, fine, order=0)[:11, :11, :11], unsmoothed)


def test_labels_are_not_smoothed(rng):
    labels = nb.Nifti1Image(rng.integers(0, 4, size=(32, 32, 32)).astype(np.uint8), np.eye(4))
    grid = NetworkGrid(8, from_matvec(np.eye(3) * 4, [1, 1, 1]))
    np.testing.assert_array_equal(
        sample_on_grid(labels, grid, order=0), np.asarray(labels.dataobj)[1::4, 1::4, 1::4]
    )


def test_sampling_needs_three_axes():
    image = nb.Nifti1Image(np.zeros((4, 4, 4, 2), "f4"), np.eye(4))
    with pytest.raises(ValueError, match="3-D"):
        sample_on_grid(image, NetworkGrid(4, np.eye(4)))


def test_to_ras_keeps_world_positions():
    image = ramp_image(np.array([[0, 0, -3.0, 9], [-2, 0, 0, 8], [0, 1, 0, 7], [0, 0, 0, 1]]))
    canonical = to_ras(image)
    assert nb.aff2axcodes(canonical.affine) == ("R", "A", "S")
    np.testing.assert_allclose(
        canonical.dataobj, ramp_image(canonical.affine, canonical.shape).dataobj
    )


@pytest.mark.parametrize("spacing", [(1.0, 2.5, 4.0), (6.0, 6.0, 6.0)])
def test_another_spacing_keeps_directions_and_field_of_view(spacing):
    affine = from_matvec(ROTATION @ np.diag([-2.0, 3.0, 1.5]), (10, -20, 30))
    image = nb.Nifti1Image(np.zeros((20, 31, 42), np.float32), affine)
    grid = grid_with_spacing(image, spacing)
    matrix = grid.affine[:3, :3]
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), spacing)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(matrix / spacing, directions)
    # Every corner of the old voxels lies in the new ones, and less than a voxel is added.
    for outer, inner, margin in ((grid, image, 0), (image, grid, 1)):
        corners = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        corners = corners * inner.shape - 0.5
        ijk = apply_affine(np.linalg.inv(outer.affine) @ inner.affine, corners)
        allowed = margin * np.array(spacing) / np.linalg.norm(outer.affine[:3, :3], axis=0)
        assert (ijk > -0.51 - allowed).all()
        assert (ijk < np.array(outer.shape) - 0.49 + allowed).all()


def test_spacing_of_no_length():
    image = nb.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="must be positive"):
        grid_with_spacing(image, (1, 0, 1))


def test_spacing_along_right_anterior_superior():
    affine = np.array([[0, 0, -3.0, 0], [1.0, 0, 0, 0], [0, -2.0, 0, 0], [0, 0, 0, 1]])
    image = nb.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine)
    np.testing.assert_array_equal(spacing_in_ras(image), [3, 1, 2])
