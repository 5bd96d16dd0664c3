import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine, from_matvec

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import jacobian_determinant
from m2m_bids.simulation.anatomy import Subject
from m2m_bids.simulation.truth import (
    choose_landmarks,
    field_between,
    grid_positions,
    label_map,
    random_displacement,
    random_pose,
    unseen_generator,
    world2unit,
)
from m2m_bids.spatial.conform import BRAIN_CENTER_MM

SIZE, SPACING = 24, 8.0
EXTENT = SPACING * (SIZE - 1)
AFFINE = from_matvec(np.eye(3) * SPACING, np.asarray(BRAIN_CENTER_MM) - EXTENT / 2)


@pytest.fixture
def ball():
    """A ball of white matter in a shell of grey matter, with a core of ventricles."""
    identity = identity_map(SIZE)
    radius_mm = (identity - 0.5).norm(dim=1, keepdim=True) * EXTENT
    wm, gm = (radius_mm < 45).float(), ((radius_mm >= 45) & (radius_mm < 62)).float()
    csf = (radius_mm < 18).float()
    template = torch.cat((gm, csf, gm, wm - csf, gm + wm, csf), 1)
    return Subject(identity, torch.cat((csf, gm, wm - csf), 1), template)


def test_seeds_of_training_and_of_tests_do_not_meet():
    # The generator drops the upper half of a seed: these two are the same stream.
    low, high = (torch.Generator().manual_seed(seed) for seed in (7, (5 << 32) + 7))
    assert torch.equal(torch.rand(4, generator=low), torch.rand(4, generator=high))
    training = torch.rand(4, generator=torch.Generator().manual_seed((1 << 32) + 7))
    assert not torch.equal(torch.rand(4, generator=unseen_generator(7)), training)
    with pytest.raises(ValueError, match="-1"):
        unseen_generator(-1)


def test_pose_is_a_rotation_about_the_brain_within_its_bounds():
    for seed in range(20):
        pose = random_pose(unseen_generator(seed), max_shift_mm=10, max_angle_deg=20, is_far=True)
        rotation = pose[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        angle = np.rad2deg(np.arccos((np.trace(rotation) - 1) / 2))
        assert 10 <= angle <= 20
        shift = apply_affine(pose, BRAIN_CENTER_MM) - BRAIN_CENTER_MM
        assert 5 <= np.linalg.norm(shift) <= 10 + 1e-6


def test_grid_positions_agree_with_an_affine_at_each_voxel(rng):
    affine = from_matvec(rng.normal(size=(3, 3)), (3, -4, 5))
    expected = apply_affine(affine, np.moveaxis(np.indices((4, 5, 6)), 0, -1))
    positions = grid_positions((4, 5, 6), affine)
    np.testing.assert_allclose(np.moveaxis(positions[0].numpy(), 0, -1), expected, atol=1e-5)


def test_world2unit_takes_corners_to_corners():
    unit = apply_affine(world2unit(AFFINE, (SIZE,) * 3), AFFINE[:3, 3] + [0, EXTENT, EXTENT / 2])
    np.testing.assert_allclose(unit, [0, 1, 0.5], atol=1e-12)


def test_displacement_has_its_length_no_folds_and_ends_at_the_border(ball):
    disp = random_displacement(ball, EXTENT, unseen_generator(0), mean_mm=4.0)
    brain = ball.tissues.sum(1, keepdim=True) > 0.5
    length_mm = disp.norm(dim=1, keepdim=True)[brain].mean() * EXTENT
    # The velocity has this mean; the length of the flow's path is a little longer than its chord.
    assert length_mm.item() == pytest.approx(4, rel=0.2)
    assert jacobian_determinant(identity_map(SIZE) + disp).min() > 0.2
    assert disp[:, :, 0].abs().max() == 0
    assert disp[..., -1].abs().max() == 0


def test_epi_distortion_alone_is_along_its_axis(ball):
    disp = random_displacement(ball, EXTENT, unseen_generator(0), has_epi_distortion=True)
    assert disp[:, 1].abs().max() * EXTENT > 1
    assert disp[:, [0, 2]].abs().max() < 1e-6
    still = random_displacement(ball, EXTENT, unseen_generator(0))
    assert still.abs().max() == 0


def test_field_between_shifts_goes_from_fixed_to_moving():
    # The fixed image shows at x the anatomy at x + 8 mm, the moving one at x + 20 mm: a point of
    # the fixed image lies 12 mm lower in the moving one.
    identity = identity_map(SIZE)
    shift = torch.zeros_like(identity)
    shift[:, 0] = 1 / EXTENT
    truth = field_between(identity + 8 * shift, identity + 20 * shift, AFFINE)
    inner = truth.data[4:-4, 4:-4, 4:-4]
    np.testing.assert_allclose(inner[..., 0], -12, atol=0.01)
    np.testing.assert_allclose(inner[..., 1:], 0, atol=0.01)


def test_landmarks_show_the_same_anatomy_in_both_images(ball):
    identity = identity_map(SIZE)
    coordinates = tuple(
        identity + random_displacement(ball, EXTENT, unseen_generator(seed), mean_mm=6.0)
        for seed in (1, 2)
    )
    truth = field_between(*coordinates, AFFINE)
    brain = ball.tissues[0].sum(0).numpy() > 0.5
    landmarks = choose_landmarks(coordinates, truth, brain, unseen_generator(3), n_points=60)
    assert landmarks.fixed.shape == (60, 3)
    # Independent of the inversion: look up in both images what each point shows.
    shown = [
        torch.nn.functional.grid_sample(
            phi.transpose(2, 4),
            torch.from_numpy(
                2 * apply_affine(world2unit(AFFINE, (SIZE,) * 3), points)[None, None, None] - 1
            ).float(),
            align_corners=True,
        )
        for phi, points in zip(coordinates, landmarks, strict=True)
    ]
    assert ((shown[0] - shown[1]) * EXTENT).abs().max() < 0.02
    # The field is interpolated over 8 mm; landmarks are not.
    errors = np.linalg.norm(truth.map(landmarks.fixed) - landmarks.moving, axis=1)
    assert errors.max() < 1.5
    assert np.linalg.norm(landmarks.fixed - landmarks.moving, axis=1).mean() > 4


def test_landmarks_are_spread_through_the_brain(ball):
    identity = identity_map(SIZE)
    truth = field_between(identity, identity, AFFINE)
    brain = ball.tissues[0].sum(0).numpy() > 0.5
    points = choose_landmarks((identity, identity), truth, brain, unseen_generator(0)).fixed
    assert len(points) == 200
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    # 200 balls in a ball of 62 mm have 62 / 200**(1/3) = 10.6 mm each.
    assert distances.min() > 7
    offset = np.abs(points - np.asarray(BRAIN_CENTER_MM)).mean(axis=0)
    np.testing.assert_allclose(offset, offset.mean(), rtol=0.2)


def test_labels_are_the_most_probable_tissues(ball):
    labels = label_map(ball, identity_map(SIZE))
    center = SIZE // 2
    line = labels[center, center, center:]
    assert line.tolist() == sorted(line, key=[4, 2, 1, 0].index)
    assert {1, 2, 4} <= set(line.tolist())
    # A cavity that is no ventricle is other fluid.
    no_ventricles = ball.template.clone()
    no_ventricles[:, 5] = 0
    other = label_map(Subject(ball.coordinates, ball.tissues, no_ventricles), identity_map(SIZE))
    assert (other[labels == 4] == 3).all()
