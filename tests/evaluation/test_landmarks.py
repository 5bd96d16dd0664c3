import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec

from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.spatial.fields import DisplacementField


def test_errors_of_headers_alone_are_the_shift(rng):
    points = rng.normal(0, 40, (20, 3))
    np.testing.assert_allclose(landmark_errors((), points, points + np.array([2, -3, 6])), 7)


def test_the_affine_maps_fixed_points_to_moving_points(rng):
    fixed2moving = from_matvec([[0, -1, 0], [1, 0, 0], [0, 0, 1]], (5, 0, -2))
    points = rng.normal(0, 40, (20, 3))
    moved = apply_affine(fixed2moving, points)
    np.testing.assert_allclose(landmark_errors(fixed2moving, points, moved), 0, atol=1e-12)
    inverse_errors = landmark_errors(np.linalg.inv(fixed2moving), points, moved)
    assert inverse_errors.min() > 1


def test_chain_is_applied_innermost_first():
    # Shift by a constant field, then double: 2 (x + 1); the other order would be 2 x + 1.
    field = DisplacementField(np.ones((5, 5, 5, 3)), np.diag([10.0, 10.0, 10.0, 1.0]))
    double = np.diag([2.0, 2.0, 2.0, 1.0])
    points = np.array([[10.0, 20.0, 30.0]])
    np.testing.assert_allclose(landmark_errors((double, field), points, 2 * (points + 1)), 0)
    np.testing.assert_allclose(
        landmark_errors((double, field), points, 2 * points + 1), np.sqrt(3)
    )


@pytest.mark.parametrize(
    ("fixed", "moving"),
    [
        (np.zeros((3, 3)), np.zeros((2, 3))),
        (np.zeros((3, 2)), np.zeros((3, 2))),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        (np.full((1, 3), np.nan), np.zeros((1, 3))),
    ],
)
def test_landmarks_that_are_no_pairs_of_points_are_errors(fixed, moving):
    with pytest.raises(ValueError, match="landmarks must"):
        landmark_errors((), fixed, moving)
