import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.spatial.fields import (
    DisplacementField,
    check_affine,
    grid_points,
    invert_displacement,
    jacobian_determinant,
)

ROTATION = Rotation.from_euler("xyz", [25, -15, 40], degrees=True).as_matrix()
# Oblique, anisotropic, left-handed.
GRID_AFFINE = from_matvec(ROTATION * [-3, 2.5, 4], [40, -30, -50])
SHAPE = (24, 26, 20)


def affine_field(matrix, translation):
    """Field of the affine map: linear interpolation holds it exactly."""
    points = grid_points(SHAPE, GRID_AFFINE)
    return DisplacementField(points @ np.transpose(matrix) + translation - points, GRID_AFFINE)


def wave_field(amplitude_mm, *, wavelength_mm=60):
    """Smooth field, not zero at the borders; derivatives to amplitude * 2 pi / wavelength."""
    points = grid_points(SHAPE, GRID_AFFINE)
    waves = np.sin(2 * np.pi * points[..., [1, 2, 0]] / wavelength_mm + [0.3, 1.1, 2.0])
    return DisplacementField(amplitude_mm * waves, GRID_AFFINE)


def test_map_is_exact_for_affine_fields(rng):
    matrix = np.eye(3) + rng.normal(scale=0.2, size=(3, 3))
    field = affine_field(matrix, [10, -5, 3])
    points = apply_affine(GRID_AFFINE, rng.uniform(0, np.array(SHAPE) - 1, size=(200, 3)))
    np.testing.assert_allclose(field.map(points), points @ matrix.T + [10, -5, 3], atol=1e-4)
    assert field.map(points.reshape(4, 50, 3)).shape == (4, 50, 3)
    assert field.map(points[0]).shape == (3,)


def test_outside_the_grid_is_identity_or_continued():
    field = affine_field(np.eye(3), [10, -5, 3])
    ijk = np.array([[-0.4, 5, 5], [-0.6, 5, 5], [5, 25.4, 5], [5, 5, 19.6]])
    points = apply_affine(GRID_AFFINE, ijk)
    moved = [[10, -5, 3], [0, 0, 0], [10, -5, 3], [0, 0, 0]]
    np.testing.assert_allclose(field.map(points) - points, moved, atol=1e-5)
    continued = field.displacement(points, is_continued=True)
    np.testing.assert_allclose(continued, [[10, -5, 3]] * 4, atol=1e-5)


def test_jacobian_of_affine_maps(rng):
    for matrix in (np.eye(3), ROTATION, np.diag([1.5, 0.5, -1]), rng.normal(size=(3, 3))):
        determinants = jacobian_determinant(affine_field(matrix, [10, 0, -4]))
        assert determinants.shape == SHAPE
        # float32 differences of displacements up to 200 mm over 2.5 mm.
        np.testing.assert_allclose(determinants, np.linalg.det(matrix), atol=2e-3)


def test_jacobian_of_a_wave_is_central_difference():
    field = wave_field(6.0)
    points = field.points()
    phase = 2 * np.pi / 60 * points[..., [1, 2, 0]] + [0.3, 1.1, 2.0]
    a, b, c = np.moveaxis(6 * 2 * np.pi / 60 * np.cos(phase), -1, 0)
    # Matrix I + [[0, a, 0], [0, 0, b], [c, 0, 0]] has determinant 1 + a b c.
    inner = (slice(1, -1),) * 3
    # Central differences of step h of sin(k x) are off by (k h)^2 / 6, here below 3 %, per factor.
    np.testing.assert_allclose(
        jacobian_determinant(field)[inner], (1 + a * b * c)[inner], atol=0.03
    )


def test_jacobian_finds_folds():
    ijk = grid_points(SHAPE, np.eye(4))
    data = np.zeros((*SHAPE, 3))
    data[..., 0] = 10 * np.sin(ijk[..., 0] / 3)
    determinants = jacobian_determinant(DisplacementField(data, np.eye(4)))
    assert determinants.min() < -1
    with pytest.raises(ValueError, match="two points"):
        jacobian_determinant(DisplacementField(data[:1], np.eye(4)))


@pytest.mark.parametrize("amplitude_mm", [2.0, 6.0, 9.0])
def test_inverse_of_a_wave(amplitude_mm, rng):
    field = wave_field(amplitude_mm)
    assert jacobian_determinant(field).min() > 0
    inverse, residual_mm = invert_displacement(field)
    assert residual_mm <= 0.01
    # At grid points of the inverse: to the tolerance.
    points = field.points()
    back = inverse.map(points)
    ijk = apply_affine(np.linalg.inv(GRID_AFFINE), back)
    inside = ((ijk >= 0) & (ijk <= np.array(SHAPE) - 1)).all(axis=-1)
    np.testing.assert_allclose(field.map(back)[inside], points[inside], atol=0.02)
    # Between them both are linear where the true inverse is not: below half a voxel.
    ijk = rng.uniform(5, np.array(SHAPE) - 6, size=(500, 3))
    points = apply_affine(GRID_AFFINE, ijk)
    error_mm = np.linalg.norm(field.map(inverse.map(points)) - points, axis=1)
    assert error_mm.max() < 0.5 * field.spacing_mm.min()
    # The other way round, errors grow by the expansion of the inverse: fivefold at 9 mm.
    mapped = apply_affine(np.linalg.inv(GRID_AFFINE), field.map(points))
    inside = ((mapped >= 1) & (mapped <= np.array(SHAPE) - 2)).all(axis=-1)
    error_mm = np.linalg.norm(inverse.map(field.map(points)) - points, axis=1)[inside]
    assert np.median(error_mm) < 0.5 * field.spacing_mm.min()
    if amplitude_mm < 9:
        assert error_mm.max() < 0.5 * field.spacing_mm.min()


def test_inverse_where_the_map_expands_fourfold():
    matrix = np.diag([4.0, 3.0, 0.4])
    center = apply_affine(GRID_AFFINE, (np.array(SHAPE) - 1) / 2)
    field = affine_field(matrix, center - matrix @ center)
    inverse, residual_mm = invert_displacement(field)
    assert residual_mm <= 0.01
    points = center + np.array([[8.0, -6, 2], [-10, 5, -4], [0, 0, 0]])
    expected = center + (points - center) / [4, 3, 0.4]
    np.testing.assert_allclose(inverse.map(points), expected, atol=0.03)


def test_inverse_of_a_fold_has_a_residual():
    ijk = grid_points(SHAPE, np.eye(4))
    data = np.zeros((*SHAPE, 3))
    data[..., 0] = 6 * np.sin(ijk[..., 0])
    _, residual_mm = invert_displacement(DisplacementField(data, np.eye(4)), max_iterations=20)
    assert residual_mm > 0.5


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (np.zeros((4, 4, 3)), np.eye(4), "shape"),
        (np.zeros((4, 4, 4, 2)), np.eye(4), "shape"),
        (np.full((4, 4, 4, 3), np.nan), np.eye(4), "finite"),
        (np.zeros((4, 4, 4, 3)), np.eye(4) + np.eye(4, k=1) * 0.1, "affine"),
        (np.zeros((4, 4, 4, 3)), np.eye(4) + np.eye(4)[[3, 0, 3, 3]].T * 0.1, "affine"),
    ],
)
def test_bad_fields(data, affine, message):
    with pytest.raises(ValueError, match=message):
        DisplacementField(data, affine)


def test_sheared_grid_is_rejected():
    sheared = np.eye(4)
    sheared[0, 1] = 0.01
    with pytest.raises(ValueError, match="orthogonal"):
        DisplacementField(np.zeros((4, 4, 4, 3)), sheared)


@pytest.mark.parametrize(
    "affine", [np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(4)[::-1]]
)
def test_bad_affines(affine):
    with pytest.raises(ValueError, match="invertible"):
        check_affine(affine)
