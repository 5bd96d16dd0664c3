import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.mutual_information import MutualInformation, climb, pose_matrix


def textured(rng, n=16):
    data = np.zeros((n + 10,) * 3, dtype=np.float32)
    data[5:-5, 5:-5, 5:-5] = ndimage.gaussian_filter(rng.normal(size=(n,) * 3), 2) * 10 + 3
    return data


def measure(fixed, moving, spacing_mm=4.0):
    affine = np.diag([spacing_mm] * 3 + [1.0])
    ijk = np.argwhere(np.ones(fixed.shape))
    return MutualInformation(
        nb.affines.apply_affine(affine, ijk), fixed.ravel(), moving, affine, n_bins=16
    )


def test_of_an_image_with_itself_it_is_the_entropy(rng):
    data = rng.integers(0, 4, size=(20, 20, 20)).astype(np.float32)
    score = MutualInformation(np.argwhere(data >= 0), data.ravel(), data, np.eye(4), n_bins=4)
    share = np.bincount(data.astype(int).ravel()) / data.size
    np.testing.assert_allclose(score(np.eye(4)), -np.sum(share * np.log(share)), rtol=1e-5)


def test_of_independent_images_it_is_nearly_zero(rng):
    fixed, moving = rng.normal(size=(2, 30, 30, 30)).astype(np.float32)
    # Its expectation for independent samples is about (bins - 1)^2 / 2N = 0.004.
    assert measure(fixed, moving, 1.0)(np.eye(4)) < 0.02


def test_leaving_the_field_of_view_costs(rng):
    data = textured(rng)
    score = measure(data, data)
    half = np.eye(4)
    half[0, 3] = data.shape[0] * 2.0
    assert score(half) < 0.5 * score(np.eye(4))
    half[0, 3] = 1e4
    assert score(half) == 0


def test_climb_finds_a_known_pose(rng, tools):
    data = textured(rng)
    centre = np.full(3, 4.0 * (data.shape[0] - 1) / 2)
    true = np.array([9.0, -7.0, 6.0, *np.deg2rad([8.0, -6.0, 10.0])])
    matrix = pose_matrix(true, centre) @ np.diag([4.0, 4.0, 4.0, 1.0])
    ijk = np.argwhere(np.ones(data.shape))
    points = nb.affines.apply_affine(np.diag([4.0, 4.0, 4.0, 1.0]), ijk)
    score = MutualInformation(points, data.ravel(), -data + 20, matrix)
    found, value = climb(score, np.zeros(6), centre, n_evaluations=600)
    mask = nb.Nifti1Image(np.ones(data.shape, dtype=np.uint8), np.diag([4.0, 4.0, 4.0, 1.0]))
    distance = tools["mean_distance_mm"](
        pose_matrix(found, centre), pose_matrix(true, centre), mask
    )
    assert distance < 2.0  # half a voxel
    assert value == score(pose_matrix(found, centre))


def test_pose_keeps_its_centre_and_scales():
    centre = np.array([10.0, -20.0, 30.0])
    matrix = pose_matrix(np.array([1, 2, 3, 0.3, -0.2, 0.5, np.log(1.1)]), centre)
    np.testing.assert_allclose(nb.affines.apply_affine(matrix, centre), np.add(centre, (1, 2, 3)))
    np.testing.assert_allclose(np.linalg.det(matrix[:3, :3]), 1.1**3)
