"""Numbers of a registration, on images whose truth is known."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.evaluation.measures import (
    landmarks_of,
    measure_registration,
    paper_grid,
)
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.transforms import map_points

FIXED = from_matvec(
    Rotation.from_euler("xyz", [5, -10, 15], degrees=True).as_matrix() @ np.diag([-2, 2, 3]),
    [30, -20, 10],
)
TRUTH = from_matvec(Rotation.from_euler("z", 30, degrees=True).as_matrix(), [4, -7, 2])


def image(data, affine=FIXED):
    return nb.Nifti1Image(np.asarray(data, dtype=np.uint8), affine)


@pytest.fixture
def labels():
    """Grey matter in white matter, as classes to evaluate."""
    data = np.zeros((24, 20, 16), dtype=np.uint8)
    data[5:19, 4:16, 3:13] = 21
    data[9:15, 8:12, 6:10] = 22
    return data


def test_true_map_is_perfect(labels):
    fixed = image(labels)
    measures = measure_registration(
        TRUTH,
        image(labels > 0),
        fixed_labels=fixed,
        moving_labels=image(labels, TRUTH @ FIXED),
        landmarks=landmarks_of(TRUTH, image(labels > 0)),
    )
    assert measures["dsc"] == measures["dsc_grey_matter"] == measures["dsc_white_matter"] == 1
    assert measures["hd95_mm"] == 0
    assert measures["landmark_error_mm"] == pytest.approx(0, abs=1e-9)
    assert measures["folding_percent"] == measures["folding_percent_paper"] == 0


def test_wrong_map_is_measured(labels):
    shift = from_matvec(np.eye(3), FIXED[:3, 2])  # a voxel of 3 mm
    measures = measure_registration(
        shift @ TRUTH,
        image(labels > 0),
        fixed_labels=image(labels),
        moving_labels=image(labels, TRUTH @ FIXED),
        landmarks=landmarks_of(TRUTH, image(labels > 0)),
    )
    assert measures["landmark_error_mm"] == pytest.approx(3)
    assert measures["dsc"] < 0.95
    assert measures["hd95_mm"] > 0


def test_what_is_not_known_is_not_measured(labels):
    measures = measure_registration((), image(labels > 0), fixed_labels=image(labels))
    assert set(measures) == {"folding_percent", "folding_percent_paper"}


def test_folds_are_counted_in_the_brain_and_on_the_grid_of_the_paper(labels):
    # Mirrored along an axis: every determinant is -1.
    mirror = np.diag([-1.0, 1, 1, 1])
    measures = measure_registration(mirror, image(labels > 0), fixed_labels=image(labels))
    assert measures["folding_percent"] == measures["folding_percent_paper"] == 100
    # One fold outside of the brain, in a corner.
    disp = np.zeros((24, 20, 16, 3), dtype=np.float32)
    disp[2, 2, 1] = apply_affine(from_matvec(FIXED[:3, :3]), [3, 0, 0])
    field = DisplacementField(disp, FIXED)
    measures = measure_registration(field, image(labels > 0), fixed_labels=image(labels))
    assert measures["folding_percent"] == 0
    assert 0 < measures["folding_percent_paper"] < 1


def test_grid_of_the_paper_surrounds_the_brain():
    # 300 x 300 x 150 mm.
    mask = np.zeros((150, 150, 50), dtype=np.uint8)
    mask[40:61, 10:31, 20:31] = 1
    shape, affine = paper_grid(image(mask))
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), 1.5)
    corners = apply_affine(np.linalg.inv(FIXED) @ affine, [[0, 0, 0], np.subtract(shape, 1)])
    # The first axis has room for all 128 voxels; the others end where the image ends.
    assert shape[0] == 128
    np.testing.assert_allclose(corners[:, 0].mean(), 50)
    np.testing.assert_allclose(corners[0, 1:], 0, atol=1e-9)
    # 95.25 mm to one side of the voxel 20, and the whole 49 voxels of 3 mm.
    assert shape[1:] == (int((20 * 2 + 95.25) / 1.5) + 1, int(49 * 3 / 1.5) + 1)


def test_grid_that_fits_exactly_is_whole():
    data = np.ones((64, 64, 64), dtype=np.uint8)
    shape, affine = paper_grid(image(data, np.diag([3.0, 3, 3, 1])))
    # 63 steps of 3 mm.
    assert shape == (127, 127, 127)
    np.testing.assert_allclose(affine, np.diag([1.5, 1.5, 1.5, 1]))


def test_empty_masks():
    empty = image(np.zeros((4, 4, 4)))
    for function in (paper_grid, lambda mask: landmarks_of((), mask)):
        with pytest.raises(ValueError, match="no voxel is inside"):
            function(empty)


def test_points_of_a_reference_are_spread_over_the_brain():
    mask = np.zeros((60, 60, 60), dtype=np.uint8)
    mask[10:50, 10:50, 10:50] = 1
    fixed, moving = landmarks_of(TRUTH, image(mask))
    assert len(np.unique(fixed, axis=0)) == len(fixed) == 10_000
    np.testing.assert_allclose(moving, map_points(TRUTH, fixed))
    ijk = apply_affine(np.linalg.inv(FIXED), fixed)
    # Three standard errors of the mean of a uniform distribution over 40 voxels.
    np.testing.assert_allclose(ijk.mean(0), 29.5, atol=3 * 40 / np.sqrt(12 * 10_000))
    np.testing.assert_allclose([ijk.min(0), ijk.max(0)], [[10] * 3, [49] * 3], atol=1e-9)
    mask[...] = 0
    mask[:2, :2, :2] = 1
    assert len(landmarks_of(TRUTH, image(mask)).fixed) == 8
