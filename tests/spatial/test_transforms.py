import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.spatial.conform import NetworkGrid, template_grid
from m2m_bids.spatial.fields import DisplacementField, grid_points, jacobian_determinant
from m2m_bids.spatial.transforms import (
    compose,
    displacement_from_unit,
    invert,
    map_points,
    unit_from_world,
)

ROTATION = Rotation.from_euler("xyz", [25, -15, 40], degrees=True).as_matrix()
RIGID = from_matvec(
    Rotation.from_euler("zyx", [-35, 20, 50], degrees=True).as_matrix(), [60, -20, 35]
)
SHEAR = from_matvec(ROTATION @ [[1.2, 0.3, 0], [0, 0.8, -0.2], [0, 0, 1.1]], [-15, 40, 8])
# Oblique, anisotropic, left-handed, sheared: a template's grid carried into the fixed world.
GRID = NetworkGrid(
    16,
    from_matvec(
        ROTATION @ np.diag([-5, 4, 6]) @ [[1, 0.1, 0], [0, 1, 0.2], [0, 0, 1]], [30, -20, -60]
    ),
)


def reference_image(affine=None, shape=(24, 30, 20)):
    affine = from_matvec(ROTATION * [-2.5, 3, 3.5], [35, -35, -45]) if affine is None else affine
    return nb.Nifti1Image(np.zeros(shape, np.uint8), affine)


def wave_field(amplitude_mm):
    matrix = ROTATION.T * [4, -4, 4]
    affine = from_matvec(matrix, -matrix @ [28, 28, 28])
    points = grid_points((57, 57, 57), affine)
    waves = np.sin(points[..., [1, 2, 0]] / 12 + [0.3, 1.1, 2.0])
    return DisplacementField(amplitude_mm * waves, affine)


def test_chains_apply_the_last_first(rng):
    field = wave_field(8.0)
    points = rng.uniform(-30, 30, size=(100, 3))
    for outer, inner in ((RIGID, field), (field, RIGID), (SHEAR, RIGID), (field, field)):
        expected = map_points(outer, map_points(inner, points))
        np.testing.assert_allclose(map_points((outer, inner), points), expected, atol=1e-9)
        np.testing.assert_allclose(map_points(compose(outer, inner), points), expected, atol=1e-9)
        if outer is not inner:
            # The wrong order is far off, so that these tests can fail.
            other = map_points((inner, outer), points)
            assert np.median(np.linalg.norm(other - expected, axis=1)) > 5


def test_compose_is_associative_and_flat(rng):
    field = wave_field(8.0)
    points = rng.uniform(-30, 30, size=(20, 3))
    left = compose(compose(RIGID, field), SHEAR)
    right = compose(RIGID, compose(field, SHEAR))
    assert len(left) == len(right) == 3
    np.testing.assert_array_equal(map_points(left, points), map_points(right, points))
    np.testing.assert_array_equal(map_points((), points), points)


def test_invert_undoes_a_chain(rng):
    chain = (SHEAR, RIGID, wave_field(8.0), SHEAR)
    points = rng.uniform(-25, 25, size=(300, 3))
    for round_trip in (
        map_points(compose(invert(chain), chain), points),
        map_points(compose(chain, invert(chain)), points),
    ):
        # Half a voxel of the field's 4 mm grid; the affines' scales are up to 1.2 squared.
        assert np.linalg.norm(round_trip - points, axis=1).max() < 2
        assert np.linalg.norm(round_trip - points, axis=1).mean() < 0.3


def test_invert_of_affines_is_exact(rng):
    points = rng.uniform(-100, 100, size=(50, 3))
    inverse = invert((SHEAR, RIGID))
    np.testing.assert_allclose(map_points(inverse, map_points((SHEAR, RIGID), points)), points)


@pytest.mark.parametrize("bad", [np.eye(3), np.zeros((4, 4)), (np.eye(4), np.ones((4, 4)))])
def test_chains_reject_what_is_no_transform(bad):
    with pytest.raises(ValueError, match="affine must be"):
        map_points(bad, np.zeros(3))


def test_unit_displacement_of_an_affine_becomes_the_same_affine(rng):
    """The network sees unit coordinates; the world map must be the analytic one."""
    size = GRID.size
    unit_map = np.eye(3) + rng.normal(scale=0.1, size=(3, 3))
    unit_shift = np.array([0.05, -0.04, 0.08])
    unit = np.moveaxis(np.indices(GRID.shape), 0, -1) / (size - 1)
    disp_unit = np.moveaxis(unit @ unit_map.T + unit_shift - unit, -1, 0)
    field = displacement_from_unit(disp_unit, GRID, reference_image(), spacing_mm=2.0)

    unit2world = GRID.affine @ np.diag([size - 1, size - 1, size - 1, 1])
    world_map = unit2world @ from_matvec(unit_map, unit_shift) @ np.linalg.inv(unit2world)
    points = apply_affine(GRID.affine, rng.uniform(3, size - 4, size=(500, 3)))
    covered = np.abs(apply_affine(np.linalg.inv(field.affine), points) / field.shape - 0.5) < 0.45
    points = points[covered.all(axis=1)]
    assert len(points) > 50
    np.testing.assert_allclose(field.map(points), apply_affine(world_map, points), atol=1e-3)
    np.testing.assert_allclose(unit_from_world(world_map, GRID), disp_unit, atol=1e-5)


def test_one_unit_component_moves_along_one_axis_of_the_grid():
    disp_unit = np.zeros((3, *GRID.shape))
    disp_unit[1] = 2 / (GRID.size - 1)
    field = displacement_from_unit(disp_unit, GRID, reference_image())
    # Two voxels along j, everywhere: the border continues outside the network grid.
    expected = np.broadcast_to(2 * GRID.affine[:3, 1], field.data.shape)
    np.testing.assert_allclose(field.data, expected, rtol=1e-5)


def test_unit_world_round_trip(rng):
    unit = np.moveaxis(np.indices(GRID.shape), 0, -1) / (GRID.size - 1)
    disp_unit = np.moveaxis(0.04 * np.sin(4 * unit[..., [2, 0, 1]] + [0.2, 1, 2]), -1, 0)
    center = apply_affine(GRID.affine, [7.5, 7.5, 7.5])
    wide = reference_image(from_matvec(ROTATION * 4, center - ROTATION @ [58, 58, 58]), (30,) * 3)
    field = displacement_from_unit(disp_unit, GRID, wide, spacing_mm=1.5)
    assert (jacobian_determinant(field) > 0).all()
    # Linear interpolation twice, in a field that bends by 0.04 * 4^2 / 15^2 / 8 per voxel squared.
    np.testing.assert_allclose(unit_from_world(field, GRID), disp_unit, atol=1e-3)


def test_full_size_network_grid_is_3_mm():
    grid = template_grid(RIGID)
    disp_unit = np.zeros((3, *grid.shape), np.float32)
    disp_unit[0] = 1 / 63
    disp_mm = displacement_from_unit(disp_unit, grid, reference_image()).data
    np.testing.assert_allclose(np.linalg.norm(disp_mm, axis=-1), 3, rtol=1e-5)
    np.testing.assert_allclose(disp_mm[0, 0, 0], RIGID[:3, 0] * 3, rtol=1e-5)


@pytest.mark.parametrize(
    "affine",
    [
        from_matvec(ROTATION * [-2.5, 3, 3.5], [35, -35, -45]),
        from_matvec(np.diag([-1, -1.2, 7.0]), [35, -35, -45]),
        from_matvec(np.array([[2, 0.2, 0], [0, 2, 0], [0, 0.1, 2]]), [0, 0, 0]),
    ],
)
def test_field_covers_the_reference_and_follows_its_axes(affine):
    image = reference_image(affine, (24, 30, 2))
    field = displacement_from_unit(np.zeros((3, *GRID.shape)), GRID, image, spacing_mm=3.0)
    corners = apply_affine(
        affine, np.stack(np.meshgrid(*((-0.5, n - 0.5) for n in image.shape)), -1)
    )
    ijk = apply_affine(np.linalg.inv(field.affine), corners)
    assert ijk.min() >= -1e-6
    assert (ijk <= np.array(field.shape) - 1 + 1e-6).all()
    np.testing.assert_allclose(field.spacing_mm, 3)
    cosines = (
        (field.affine[:3, :3] * affine[:3, :3]).sum(axis=0)
        / 3
        / np.linalg.norm(affine[:3, :3], axis=0)
    )
    # The same axes, or for the sheared grid within its shear.
    np.testing.assert_allclose(cosines, 1, atol=0.01)


def test_no_jump_at_the_border_of_the_network_grid():
    disp_unit = np.full((3, *GRID.shape), 0.1)
    huge = reference_image(from_matvec(np.eye(3) * 10, [-250, -250, -250]), (50, 50, 50))
    data = displacement_from_unit(disp_unit, GRID, huge, spacing_mm=10).data
    np.testing.assert_allclose(data, np.broadcast_to(data[0, 0, 0], data.shape), rtol=1e-5)


def test_displacement_must_fit_the_grid():
    with pytest.raises(ValueError, match="disp_unit must have shape"):
        displacement_from_unit(np.zeros((3, 8, 8, 8)), GRID, reference_image())
