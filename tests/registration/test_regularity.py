"""Regularity losses: zero at their exact solutions, known values elsewhere."""

import numpy as np
import pytest
import torch

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import jacobian, map_from_displacement
from m2m_bids.registration.regularity import (
    bending_loss,
    diffusion_loss,
    gradicon_loss,
    jacobian_identity_loss,
)
from m2m_bids.registration.similarity import smooth

LINEAR = np.array([[0.9, 0.5, 0.0], [-0.3, 0.6, 0.1], [0.2, 0.0, 1.4]])


def affine_map(linear, size, dtype=torch.float64):
    points = identity_map(size, like=torch.zeros(1, dtype=torch.float64)) - 0.5
    return (torch.einsum("de,neijk->ndijk", torch.from_numpy(linear), points) + 0.5).to(dtype)


def smooth_map(size, amplitude, sigma, seed):
    noise = torch.randn((1, 3, size, size, size), generator=torch.Generator().manual_seed(seed))
    disp = smooth(noise.double(), sigma)
    return map_from_displacement(disp * (amplitude / disp.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [2, 17, 24, 47])
def test_jacobian_loss_of_the_identity_is_exactly_zero(size, dtype):
    """Also where the steps of the grid are not exact in binary."""
    identity = identity_map(size, like=torch.zeros(1, dtype=dtype))
    assert jacobian_identity_loss(identity).item() == 0
    assert jacobian_identity_loss(identity.expand(2, -1, -1, -1, -1)).item() == 0


def test_jacobian_loss_is_that_of_the_jacobian(rng):
    phi = torch.from_numpy(rng.random((2, 3, 7, 7, 7)))
    eye = torch.eye(3, dtype=phi.dtype)[None, :, :, None, None, None]
    expected = (jacobian(phi) - eye).square().sum((1, 2)).mean().item()
    assert jacobian_identity_loss(phi).item() == pytest.approx(expected, rel=1e-12)


def test_jacobian_loss_has_its_gradient(rng):
    phi = torch.from_numpy(rng.random((2, 3, 4, 4, 4))).requires_grad_()
    assert torch.autograd.gradcheck(jacobian_identity_loss, phi, fast_mode=True)


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


@pytest.mark.parametrize("size", [2, 6, 11])
def test_diffusion_of_an_affine_displacement_is_the_square_of_its_gradient(size):
    """Without unit, so that it is the same on any grid, and for voxels per voxel."""
    disp = affine_map(LINEAR, size) - affine_map(np.eye(3), size)
    expected = np.square(LINEAR - np.eye(3)).sum()
    assert diffusion_loss(disp).item() == pytest.approx(expected, rel=1e-12)
    pairs = torch.cat((disp, 0 * disp))
    assert diffusion_loss(pairs).item() == pytest.approx(expected / 2, rel=1e-12)


def test_diffusion_of_a_translation_is_zero():
    disp = torch.full((1, 3, 5, 5, 5), 0.3)
    assert diffusion_loss(disp).item() == 0


def test_diffusion_equals_numpy(rng):
    disp = rng.standard_normal((2, 3, 6, 6, 6))
    slopes = [np.diff(5 * disp, axis=axis)[..., :5, :5, :5] for axis in (2, 3, 4)]
    expected = np.square(slopes).sum((0, 2)).mean()
    assert diffusion_loss(torch.from_numpy(disp)).item() == pytest.approx(expected, rel=1e-12)


def test_diffusion_keeps_only_the_displacement(rng):
    disp = torch.from_numpy(rng.standard_normal((1, 3, 6, 6, 6))).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        diffusion_loss(disp)
    assert all(tensor.data_ptr() == disp.data_ptr() for tensor in kept if tensor.numel() > 1)
