"""95 % Hausdorff distance against brute force, a distance transform and spheres."""

import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.distance import cdist

from m2m_bids.evaluation.hausdorff import hd95_per_label, surface_points

TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -1.0]])
OBLIQUE = from_matvec(TURN * (0.8, 1.7, 2.9), (10, -20, 5))
SHEARED = from_matvec([[1, 0.5, 0], [0, 1.2, 0.3], [0, 0, 2]], (3, 4, 5))


def blobs(rng, shape=(18, 15, 12)):
    """Make three labels in lumps."""
    fields = ndimage.gaussian_filter(rng.normal(size=(4, *shape)), (0, 1.5, 1.5, 1.5))
    return fields.argmax(0)


def brute_surface(inside, affine):
    """Find the surface one voxel after the other."""
    steps = [*np.eye(3, dtype=int), *-np.eye(3, dtype=int)]
    inner = {tuple(voxel) for voxel in np.argwhere(inside)}
    return np.array(
        [
            apply_affine(affine, voxel)
            for voxel in inner
            if any(tuple(np.add(voxel, step)) not in inner for step in steps)
        ]
    )


@pytest.mark.parametrize("affine", [np.eye(4), OBLIQUE, SHEARED])
def test_equals_brute_force(rng, affine):
    one, other = blobs(rng), blobs(rng)
    found = hd95_per_label(one, other, affine)
    assert list(found) == [1, 2, 3]
    for label, distance in found.items():
        all_mm = cdist(*(brute_surface(labels == label, affine) for labels in (one, other)))
        directed = [np.percentile(all_mm.min(axis), 95) for axis in (0, 1)]
        assert distance == pytest.approx(max(directed), rel=1e-9)


def test_equals_distance_transform(rng):
    one, other = blobs(rng, (40, 36, 30)), blobs(rng, (40, 36, 30))
    for label, distance in hd95_per_label(one, other, OBLIQUE).items():
        edges = [(m == label) & ~ndimage.binary_erosion(m == label) for m in (one, other)]
        from_one, from_other = (
            ndimage.distance_transform_edt(~edge, sampling=(0.8, 1.7, 2.9)) for edge in edges
        )
        directed = np.percentile(from_other[edges[0]], 95), np.percentile(from_one[edges[1]], 95)
        assert distance == pytest.approx(max(directed), rel=1e-9)


def ball(shape, affine, center_mm, radius_mm):
    ijk = np.moveaxis(np.indices(shape), 0, -1)
    distance = np.linalg.norm(apply_affine(affine, ijk) - center_mm, axis=-1)
    return (distance <= radius_mm).astype(np.uint8)


SPACING = np.array([0.8, 1.0, 1.5])
GRID = (70, 56, 38)
BALL_AFFINE = from_matvec(TURN * SPACING, -(TURN * SPACING) @ (np.array(GRID) - 1) / 2)
# A surface voxel's centre lies inside the ball by at most its diagonal, so that each distance is
# off by less than that.
DIAGONAL_MM = np.linalg.norm(SPACING)


def test_concentric_spheres_are_apart_by_the_difference_of_radii():
    small, large = (ball(GRID, BALL_AFFINE, 0, radius) for radius in (12, 19))
    assert hd95_per_label(small, large, BALL_AFFINE)[1] == pytest.approx(7, abs=DIAGONAL_MM)


def test_displaced_spheres():
    radius_mm, shift_mm = 18.0, 8.0
    one = ball(GRID, BALL_AFFINE, (0, 0, -shift_mm / 2), radius_mm)
    other = ball(GRID, BALL_AFFINE, (0, 0, shift_mm / 2), radius_mm)
    # A point of one sphere at the angle t has the height cos t, which is uniform over a sphere.
    cosine = np.linspace(-1, 1, 200_001)
    to_center = np.sqrt(radius_mm**2 + shift_mm**2 - 2 * radius_mm * shift_mm * cosine)
    expected = np.percentile(np.abs(to_center - radius_mm), 95)
    assert 7 < expected < shift_mm
    found = hd95_per_label(one, other, BALL_AFFINE)[1]
    assert found == pytest.approx(expected, abs=DIAGONAL_MM / 2)


def test_a_shift_along_an_axis_is_measured_in_its_spacing():
    one, other = np.zeros((2, 20, 20, 20), dtype=np.uint8)
    one[5:15, 5:15, 5:6], other[5:15, 5:15, 9:10] = 4, 4
    assert hd95_per_label(one, other, OBLIQUE)[4] == pytest.approx(4 * 2.9)


def test_the_larger_direction_counts():
    # A bar of 100 voxels, and the same with ten voxels more: the surface of the longer one has the
    # distances 1 to 10 there, the 95th percentile of its 110 being 4.55; the shorter one has 0.
    one, other = np.zeros((2, 120, 3, 3), dtype=np.uint8)
    one[:100, 1, 1], other[:110, 1, 1] = 1, 1
    assert hd95_per_label(one, other, np.eye(4)) == {1: pytest.approx(4.55)}
    assert hd95_per_label(other, one, np.eye(4)) == {1: pytest.approx(4.55)}


def test_equal_maps_have_no_distance(rng):
    labels = blobs(rng)
    assert hd95_per_label(labels, labels, OBLIQUE) == {1: 0.0, 2: 0.0, 3: 0.0}


def test_a_few_far_voxels_are_left_out():
    one = ball((30, 30, 30), np.eye(4), 15, 9)
    other = one.copy()
    other[0, 0, 0] = 1
    assert hd95_per_label(one, other, np.eye(4)) == {1: 0.0}


def test_labels_absent_from_a_map_have_no_distance(rng):
    one, other = blobs(rng), blobs(rng)
    other[other == 2] = 0
    assert list(hd95_per_label(one, other, np.eye(4), labels=(3, 2, 1, 7))) == [3, 1]
    assert hd95_per_label(0 * one, other, np.eye(4)) == {}


def test_surface_of_a_cube_is_hollow_and_at_the_border_of_the_grid():
    inside = np.ones((4, 5, 6), dtype=bool)
    assert len(surface_points(inside, np.eye(4))) == 4 * 5 * 6 - 2 * 3 * 4
    assert surface_points(~inside, np.eye(4)).shape == (0, 3)


def test_maps_that_cannot_be_compared():
    one = np.zeros((3, 3, 3), dtype=int)
    with pytest.raises(ValueError, match="differ in shape"):
        hd95_per_label(one, one[1:], np.eye(4))
    with pytest.raises(ValueError, match="hold integers, got float64"):
        hd95_per_label(one, one * 1.0, np.eye(4))
    with pytest.raises(ValueError, match="3-D"):
        hd95_per_label(one[0], one[0], np.eye(4))
