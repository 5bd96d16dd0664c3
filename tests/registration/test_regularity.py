"""Regularity losses: zero at their exact solutions, known values elsewhere."""

import numpy as np
import pytest
import torch

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import compose, map_from_displacement
from m2m_bids.registration.regularity import bending_loss, gradicon_loss, jacobian_identity_loss
from m2m_bids.registration.similarity import smooth

LINEAR = np.array([[0.9, 0.5, 0.0], [-0.3, 0.6, 0.1], [0.2, 0.0, 1.4]])


def affine_map(linear, size, dtype=torch.float64):
    points = identity_map(size, like=torch.zeros(1, dtype=torch.float64)) - 0.5
    return (torch.einsum("de,neijk->ndijk", torch.from_numpy(linear), points) + 0.5).to(dtype)


def smooth_map(size, amplitude, sigma, seed):
    noise = torch.randn((1, 3, size, size, size), generator=torch.Generator().manual_seed(seed))
    disp = smooth(noise.double(), sigma)
    return map_from_displacement(disp * (amplitude / disp.abs().max()))


def test_jacobian_loss_of_the_identity_is_exactly_zero():
    # 16 steps are exact in binary, so no rounding either.
    assert jacobian_identity_loss(identity_map(17)).item() == 0


def test_jacobian_loss_of_the_identity_on_any_grid_is_zero_to_rounding():
    assert jacobian_identity_loss(identity_map(24)).item() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jacobian_loss_of_an_affine_map_is_its_distance_from_the_identity(dtype):
    expected = np.square(LINEAR - np.eye(3)).sum()
    loss = jacobian_identity_loss(affine_map(LINEAR, 10, dtype)).item()
    assert loss == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 1e-12)


def test_gradicon_is_zero_for_inverse_affine_maps():
    shrink = 0.5 * LINEAR  # takes the grid into itself, so that its inverse is applied inside
    forward, backward = affine_map(np.linalg.inv(shrink), 12), affine_map(shrink, 12)
    assert gradicon_loss(forward, backward).item() < 1e-20
    assert gradicon_loss(forward, affine_map(0.9 * shrink, 12)).item() == pytest.approx(
        0.03, rel=1e-6
    )


def four_composition_loss(phi_ab, phi_ba, seed, step=1e-3):
    """GradICON as the authors evaluate it: jittered points, one in eight, four compositions."""
    size = phi_ab.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    points = identity_map(size, like=phi_ab)
    jitter = torch.randn(points.shape, generator=generator, dtype=points.dtype) / (size - 1)
    points = (points + jitter)[..., ::2, ::2, ::2]

    def cycle(at):
        return compose(phi_ab, compose(phi_ba, at))

    base = cycle(points)
    total = 0
    for axis in range(3):
        offset = torch.zeros(1, 3, 1, 1, 1, dtype=points.dtype)
        offset[0, axis] = step
        total += ((cycle(points + offset) - base - offset) / step).square().sum(1).mean()
    return total


def test_one_composition_is_comparable_to_the_four_of_the_papers_code():
    forward, backward = smooth_map(32, 0.06, 4, seed=0), smooth_map(32, 0.06, 4, seed=1)
    ours = gradicon_loss(forward, backward).item()
    theirs = np.mean([four_composition_loss(forward, backward, seed).item() for seed in range(5)])
    assert ours > 0.01
    # Trilinear maps are kinked at voxel borders, and the border is weighted differently.
    assert ours == pytest.approx(theirs, rel=0.15)


def test_bending_of_an_affine_displacement_is_zero():
    disp = affine_map(LINEAR, 9) - affine_map(np.eye(3), 9)
    assert bending_loss(disp).item() < 1e-24


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({(0, 0): 1.0}, 4.0),  # i^2: second difference 2, squared
        ({(0, 1): 1.0}, 2.0),  # i j: mixed difference 1, counted twice
        ({(1, 1): 0.5, (2, 1): 3.0}, 1.0 + 18.0),
    ],
)
@pytest.mark.parametrize("component", [0, 2])
def test_bending_of_a_quadratic_displacement(terms, expected, component):
    ijk = torch.stack(torch.meshgrid(*[torch.arange(6.0, dtype=torch.float64)] * 3, indexing="ij"))
    disp = torch.zeros(1, 3, 6, 6, 6, dtype=torch.float64)
    for (d, e), factor in terms.items():
        disp[0, component] += factor * ijk[d] * ijk[e]
    assert bending_loss(disp).item() == pytest.approx(expected, rel=1e-12)
