"""Maps against affine maps, whose composition, inverse and derivative are known exactly."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.maps import (
    compose,
    integrate_velocity,
    invert,
    jacobian,
    jacobian_determinant,
    map_from_displacement,
    warp,
)
from m2m_bids.registration.similarity import smooth


def rotation(angle, axis):
    i, j = [a for a in range(3) if a != axis]
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = (
        np.cos(angle),
        -np.sin(angle),
        np.sin(angle),
        np.cos(angle),
    )
    return matrix


def about_centre(linear, shift=(0, 0, 0)):
    """Point map x -> linear (x - c) + c + shift, as (4, 4)."""
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = 0.5 - linear @ np.full(3, 0.5) + shift
    return affine


def affine_map(affine, size, dtype=torch.float64):
    points = identity_map(size, like=torch.zeros(1, dtype=torch.float64))
    matrix = torch.from_numpy(np.asarray(affine))
    moved = torch.einsum("de,neijk->ndijk", matrix[:3, :3], points) + matrix[:3, 3].view(
        1, 3, 1, 1, 1
    )
    return moved.to(dtype)


def smooth_displacement(size, amplitude, sigma, seed=0):
    """Random smooth displacement whose largest component is ``amplitude`` (unit coordinates)."""
    noise = torch.randn((1, 3, size, size, size), generator=torch.Generator().manual_seed(seed))
    disp = smooth(noise, sigma)
    return disp * (amplitude / disp.abs().max())


# The inner map takes the whole grid into the grid, so nothing is extrapolated; they do not
# commute.
OUTER = about_centre(rotation(0.9, 0) @ np.diag([1.7, 0.6, 1.1]), shift=(0.3, -0.2, 0.1))
INNER = about_centre(rotation(0.7, 2) @ np.diag([0.5, 0.35, 0.6]), shift=(0.02, -0.05, 0.06))


def test_compose_applies_the_inner_map_first():
    composed = compose(affine_map(OUTER, 9), affine_map(INNER, 9))
    np.testing.assert_allclose(composed, affine_map(OUTER @ INNER, 9), atol=1e-12)
    other_order = affine_map(INNER @ OUTER, 9)
    assert (composed - other_order).abs().max() > 0.2


def test_compose_takes_grids_of_different_sizes():
    composed = compose(affine_map(OUTER, 6), affine_map(INNER, 11))
    np.testing.assert_allclose(composed, affine_map(OUTER @ INNER, 11), atol=1e-12)


def test_compose_is_exact_to_float32():
    composed = compose(affine_map(OUTER, 9, torch.float32), affine_map(INNER, 9, torch.float32))
    np.testing.assert_allclose(composed, affine_map(OUTER @ INNER, 9), atol=2e-6)


def test_compose_continues_the_displacement_beyond_the_border():
    outer = affine_map(OUTER, 9)
    inner = affine_map(about_centre(np.eye(3), shift=(0, 0, 0.5)), 9)
    points = inner.clamp(0, 1)
    expected = inner + affine_map(OUTER - np.diag([1, 1, 1, 0]), 9).new_tensor(
        np.einsum("de,neijk->ndijk", OUTER[:3, :3] - np.eye(3), points)
        + OUTER[:3, 3].reshape(1, 3, 1, 1, 1)
    )
    np.testing.assert_allclose(compose(outer, inner), expected, atol=1e-12)


def test_compose_refuses_other_batch_sizes():
    with pytest.raises(ValueError, match="batch sizes differ"):
        compose(
            identity_map(4).expand(2, -1, -1, -1, -1), identity_map(4).expand(3, -1, -1, -1, -1)
        )


def test_map_from_displacement_adds_the_identity():
    disp = smooth_displacement(8, 0.2, 1.5)
    torch.testing.assert_close(map_from_displacement(disp) - identity_map(8), disp)


def test_warp_pulls_back_and_is_zero_outside():
    # image(x) = 1 + x_0 + 2 x_1 + 3 x_2 is exact under linear interpolation.
    points = identity_map(9, like=torch.zeros(1, dtype=torch.float64))
    image = 1 + (points * points.new_tensor([1, 2, 3]).view(1, 3, 1, 1, 1)).sum(1, keepdim=True)
    phi = affine_map(INNER, 9)
    expected = 1 + (phi * phi.new_tensor([1, 2, 3]).view(1, 3, 1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(warp(image, phi), expected)
    assert warp(image, phi + 2).abs().max() == 0


def test_warping_twice_is_warping_through_the_composition():
    points = identity_map(32)
    offset = points - points.new_tensor([0.6, 0.45, 0.4]).view(1, 3, 1, 1, 1)
    scale = points.new_tensor([0.1, 0.15, 0.2]).view(1, 3, 1, 1, 1)
    image = torch.exp(-0.5 * (offset / scale).square().sum(1, keepdim=True))
    outer = affine_map(about_centre(rotation(0.6, 0)), 32, torch.float32)
    inner = affine_map(about_centre(rotation(0.6, 2)), 32, torch.float32)
    twice = warp(warp(image, outer), inner)
    once = warp(image, compose(outer, inner))
    other_order = warp(image, compose(inner, outer))
    # Interpolating twice smooths a little; the wrong order is far off.
    assert (twice - once).abs().max() < 0.05
    assert (twice - other_order).abs().max() > 0.3


LINEAR = np.array([[0.1, -0.4, 0.1], [0.3, -0.2, 0.0], [0.0, 0.2, 0.15]])


def linear_velocity(size):
    affine = np.zeros((4, 4))
    affine[:3, :3] = LINEAR
    affine[:3, 3] = -LINEAR @ np.full(3, 0.5)
    return affine_map(affine, size)


def test_flow_of_a_linear_velocity_is_the_matrix_exponential():
    size, core = 17, (..., *[slice(5, -5)] * 3)  # trajectories from the core stay in the grid
    expected = affine_map(about_centre(expm(LINEAR)), size)[core]
    error = {}
    for n_squarings in (6, 7):
        flow = map_from_displacement(
            integrate_velocity(linear_velocity(size), n_squarings=n_squarings)
        )
        error[n_squarings] = (flow[core] - expected).abs().max().item()
    # (I + M / 64)^64 differs from exp(M) by about |M|^2 / 128 = 0.002 of a distance of at most
    # 0.3.
    assert error[6] < 8e-4
    # ... and the first step is of first order: one more squaring halves the error.
    assert error[7] == pytest.approx(error[6] / 2, rel=0.05)


def test_flow_of_minus_the_velocity_is_the_inverse():
    velocity = smooth_displacement(24, 0.12, 4)
    forward = map_from_displacement(integrate_velocity(velocity))
    backward = map_from_displacement(integrate_velocity(-velocity))
    identity, core = identity_map(24), (..., *[slice(3, -3)] * 3)
    moved = (forward - identity)[core].abs().max()
    assert moved > 0.08
    for cycle in (compose(forward, backward), compose(backward, forward)):
        residual = (cycle - identity)[core].abs().max()
        assert residual < 0.1 / 23  # a tenth of a voxel
    assert jacobian_determinant(forward).min() > 0


@pytest.mark.parametrize(
    "linear", [rotation(0.5, 1) @ np.diag([0.8, 1.2, 1.0]), np.diag([1.6, 0.7, 1.3])]
)
def test_invert_an_affine_map(linear):
    phi = affine_map(about_centre(linear), 17)
    expected = affine_map(np.linalg.inv(about_centre(linear)), 17)
    inside = (expected.min(1).values > 0) & (expected.max(1).values < 1)
    error = (invert(phi, n_iterations=60) - expected).abs().max(1).values
    assert inside.float().mean() > 0.1
    assert error[inside].max() < 1e-5


def test_invert_undoes_a_smooth_map():
    phi = map_from_displacement(smooth_displacement(24, 0.1, 4))
    identity = identity_map(24)
    inverse = invert(phi)
    core = (..., *[slice(4, -4)] * 3)
    assert (phi - identity)[core].abs().max() > 0.05
    # The iteration solves this one: a hundredth of a voxel is left after 30 damped steps.
    assert (compose(phi, inverse) - identity)[core].abs().max() < 0.01 / 23
    # Here the inverse is interpolated, whose second derivative is not small.
    residual = (compose(inverse, phi) - identity)[core].abs()
    assert residual.max() < 0.2 / 23
    assert residual.mean() < 0.03 / 23


def test_jacobian_of_an_affine_map_is_its_matrix():
    derivative = jacobian(affine_map(OUTER, 7))
    assert derivative.shape == (1, 3, 3, 6, 6, 6)
    expected = np.broadcast_to(OUTER[:3, :3].reshape(1, 3, 3, 1, 1, 1), derivative.shape)
    np.testing.assert_allclose(derivative, expected, atol=1e-12)


@pytest.mark.parametrize("linear", [OUTER[:3, :3], INNER[:3, :3], np.diag([1.0, -1.0, 1.0])])
def test_jacobian_determinant_of_an_affine_map(linear):
    determinant = jacobian_determinant(affine_map(about_centre(linear), 7))
    np.testing.assert_allclose(determinant, np.linalg.det(linear), atol=1e-12)


def test_jacobian_determinant_finds_a_fold():
    phi = identity_map(9).clone()
    assert jacobian_determinant(phi).min() > 0.999
    phi[0, 0, 4, 4, 4] += 1.5 / 8  # past its neighbour along the first axis
    assert (jacobian_determinant(phi) <= 0).sum() >= 1


def test_gradients_flow_through_composition_to_both_maps():
    outer = map_from_displacement(smooth_displacement(8, 0.1, 1.5)).requires_grad_()
    inner = map_from_displacement(smooth_displacement(8, 0.1, 1.5, seed=1)).requires_grad_()
    compose(outer, inner).square().mean().backward()
    assert outer.grad.abs().max() > 0
    assert inner.grad.abs().max() > 0
    # The outer map is interpolated with weights that sum to one at every point.
    weights = torch.autograd.grad(sample(outer, inner).sum(), outer)[0]
    assert weights.sum().item() == pytest.approx(outer.numel(), rel=1e-5)
