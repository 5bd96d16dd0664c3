import numpy as np
import pytest
import torch
from nibabel.affines import from_matvec

from m2m_bids.registration.grids import identity_map
from m2m_bids.simulation.head import scalp_uptake, simulate_head, simulate_head_t1w
from m2m_bids.simulation.truth import grid_positions, unseen_generator
from m2m_bids.spatial.conform import BRAIN_CENTER_MM

SIZE, SPACING = 38, 5.0
RADIUS_MM = 65.0
AFFINE = from_matvec(np.eye(3) * SPACING, np.asarray(BRAIN_CENTER_MM) - SPACING * (SIZE - 1) / 2)


@pytest.fixture(scope="module")
def head():
    """A head round a ball."""
    distance_mm = (identity_map(SIZE) - 0.5).norm(dim=1, keepdim=True) * SPACING * (SIZE - 1)
    return simulate_head((distance_mm < RADIUS_MM).float(), AFFINE, unseen_generator(0))


def line_upwards(n=100, step_mm=1.0):
    """Points from the brain's centre to the air above the head, (1, 3, 7, 7, n)."""
    start = np.asarray(BRAIN_CENTER_MM) - (3 * step_mm, 3 * step_mm, 0)
    return grid_positions((7, 7, n), from_matvec(np.eye(3) * step_mm, start))


def test_distances_are_those_from_the_ball(head):
    from_brain, depth = head.distances(line_upwards())
    steps_mm = np.arange(100)
    # Half a voxel of the brain's mask and one of the distances' grid.
    np.testing.assert_allclose(from_brain[3, 3, 30:95], steps_mm[30:95] - RADIUS_MM, atol=3.75)
    skin_mm = steps_mm[(depth[3, 3] > 0).numpy()].max() - RADIUS_MM
    assert 7 < skin_mm < 19


def test_layers_follow_one_another_from_the_brain_outwards(head):
    image = simulate_head_t1w(head, line_upwards(), unseen_generator(1))[3, 3].numpy()
    from_brain, depth = (x[3, 3].numpy() for x in head.distances(line_upwards()))
    fluid = image[from_brain < 0]
    bone = image[(from_brain > 2.3) & (from_brain < 6)]
    fat = image[(depth > 2) & (depth < 4)]
    air = image[depth < -3]
    assert fluid[2:-3].min() > 0.1
    assert fluid[2:-3].max() < 0.3
    assert bone.min() < 0.2
    assert fat.max() > 0.6
    assert air.size > 5
    assert air.max() < 1e-6


def test_neck_goes_on_below_the_grid_and_there_is_air_all_round(head):
    below = grid_positions((1, 1, 1), from_matvec(np.eye(3), (0, -40, -260)))
    assert head.distances(below)[1].item() > 20
    for far in ((-150, -20, 0), (150, -20, 0), (0, 160, 0), (0, -200, 0), (0, -20, 180)):
        point = grid_positions((1, 1, 1), from_matvec(np.eye(3), far))
        assert head.distances(point)[1].item() < 0


def test_tracer_is_in_soft_tissue_outside_the_skull(head):
    points = grid_positions((SIZE,) * 3, AFFINE)
    uptake = scalp_uptake(head, points)
    from_brain, depth = head.distances(points)
    assert uptake[from_brain < 7].max() == 0
    assert uptake[depth < 0].max() == 0
    assert uptake[(from_brain > 8) & (depth > 1) & (depth < 8)].min() == 1


def test_heads_differ_by_seed_alone(head):
    brain = torch.zeros(1, 1, SIZE, SIZE, SIZE)
    brain[..., 10:28, 8:30, 10:28] = 1
    first, same, other = (
        simulate_head(brain, AFFINE, unseen_generator(seed)).distances_mm for seed in (3, 3, 4)
    )
    assert torch.equal(first, same)
    assert (first[:, 1] - other[:, 1]).abs().max() > 1
