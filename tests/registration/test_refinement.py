"""Instance optimisation recovers a known warp between two contrasts, without folds."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.m2m import CycleMaps, CyclePairs, ObjectiveConfig, objective_losses
from m2m_bids.registration.maps import (
    compose,
    integrate_velocity,
    jacobian_determinant,
    map_from_displacement,
)
from m2m_bids.registration.refinement import RefinementConfig, register_pair
from m2m_bids.registration.similarity import smooth

SIZE = 32
CORE = (..., *[slice(5, -5)] * 3)


def smooth_noise(n_channels, sigma, seed):
    noise = torch.randn(
        (1, n_channels, SIZE, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)
    )
    smoothed = smooth(noise, sigma)
    return smoothed / smoothed.abs().max()


def diffeomorphism(voxels, seed):
    """Smooth map without folds; its velocity, in voxels, fades towards the border."""
    centred = (identity_map(SIZE) - 0.5).abs().amax(1, keepdim=True)
    fade = ((0.5 - centred) / 0.2).clamp(0, 1)
    velocity = smooth_noise(3, 5, seed) * fade * voxels / (SIZE - 1)
    return map_from_displacement(integrate_velocity(velocity))


def contrasts(points):
    """Two images of one texture: they share its shape, but not its contrast."""
    texture = sample((1 + smooth_noise(1, 2, seed=0)) / 2, points)
    centred = (identity_map(SIZE) - 0.5).norm(dim=1, keepdim=True)
    brain = torch.sigmoid((0.42 - sample(centred, points)) * 40)
    functional = brain * (0.2 + 0.8 * (1 - texture)).square()
    anatomical = brain * (0.3 + 0.7 * torch.sin(7 * texture).square())
    return functional, anatomical


@pytest.fixture(scope="module")
def known():
    """Pairs, the texture coordinates of S and of T, and the identity."""
    of_s, of_t = diffeomorphism(2.5, seed=1), diffeomorphism(2.5, seed=2)
    bridge = contrasts(identity_map(SIZE))
    pairs = CyclePairs(contrasts(of_s)[0], contrasts(of_t)[1], *bridge, is_aligned=True)
    return pairs, of_s, of_t


def mean_error_voxels(phi, coordinates_of_moving, coordinates_of_fixed):
    """Mean of |X_S(phi(x)) - X_T(x)| in the core."""
    error = compose(coordinates_of_moving, phi) - coordinates_of_fixed
    return error[CORE].norm(dim=1).mean().item() * (SIZE - 1)


CONFIG = RefinementConfig(velocity_size=16)


@pytest.fixture(scope="module")
def refined(known):
    return register_pair(None, known[0], CONFIG)


def test_known_warp_is_recovered(known, refined):
    _, of_s, of_t = known
    before = mean_error_voxels(identity_map(SIZE), of_s, of_t)
    assert before > 0.8
    assert mean_error_voxels(refined.forward, of_s, of_t) < 0.5 * before
    assert mean_error_voxels(refined.backward, of_t, of_s) < 0.6 * before


def test_refined_maps_do_not_fold(refined):
    for phi in (refined.forward, refined.backward):
        assert phi.shape == (1, 3, SIZE, SIZE, SIZE)
        assert not phi.requires_grad
        assert jacobian_determinant(phi).min() > 0


def test_forward_and_backward_agree(refined):
    round_trip = compose(refined.forward, refined.backward) - identity_map(SIZE)
    assert round_trip[CORE].norm(dim=1).mean().item() * (SIZE - 1) < 0.5


def test_losses_fall_and_are_named(refined):
    assert len(refined.losses) == CONFIG.n_steps
    assert all(set(terms) == {"m2m", "gradcycon", "bending"} for terms in refined.losses)
    first_fine = 2 * CONFIG.n_steps // 3
    assert refined.losses[first_fine - 1]["m2m"] < refined.losses[0]["m2m"]
    assert refined.losses[-1]["m2m"] < refined.losses[first_fine]["m2m"]


def test_similarity_gain_says_whether_the_map_helps(known, refined):
    assert refined.similarity_gain > 0.1
    unmoved = register_pair(None, known[0], RefinementConfig(n_steps=0))
    assert unmoved.similarity_gain == pytest.approx(0, abs=1e-5)


def test_similarity_says_whether_the_image_is_of_its_kind(known, refined):
    """An image whose voxels are scrambled within the outline gains too, but is not similar."""
    pairs = known[0]
    assert refined.similarity > 0.7
    inside = pairs.s > 0.05
    values = pairs.s[inside]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    scrambled = pairs.s.clone()
    scrambled[inside] = values[order]
    assert register_pair(None, pairs._replace(s=scrambled), CONFIG).similarity < 0.3


def test_what_is_simulated_from_the_fixed_image_helps(known, refined):
    pairs, of_s, of_t = known
    likeness = contrasts(of_t)[0].square()  # its contrast need not be right
    result = register_pair(None, pairs, CONFIG, likeness)
    error = mean_error_voxels(result.forward, of_s, of_t)
    assert error < 0.9 * mean_error_voxels(refined.forward, of_s, of_t)
    assert jacobian_determinant(result.forward).min() > 0
    assert result.losses[-1]["likeness"] < result.losses[2 * CONFIG.n_steps // 3]["likeness"]
    assert result.likeness > 0.7
    assert result.likeness_gain > 0.05
    assert (refined.likeness, refined.likeness_gain) == (None, None)


def network_of(maps):
    """Return a network that predicts given maps for the three edges, in their order."""
    edges = cycle((maps.st, maps.t_bridge_s, maps.bridge_t_s))

    def network(moving, fixed):
        return torch.cat([next(edges) for _ in moving]) - identity_map(SIZE)

    return network


def test_no_steps_keep_the_networks_maps(known):
    maps = CycleMaps(*(diffeomorphism(2, seed) for seed in (3, 4)), None, diffeomorphism(2, 5))
    result = register_pair(network_of(maps), known[0], RefinementConfig(n_steps=0))
    torch.testing.assert_close(result.forward, maps.st)
    torch.testing.assert_close(result.backward, compose(maps.t_bridge_s, maps.bridge_t_s))
    assert result.losses == []


def test_refinement_starts_from_the_networks_maps(known):
    maps = CycleMaps(*(diffeomorphism(2, seed) for seed in (3, 4)), None, diffeomorphism(2, 5))
    config = RefinementConfig(
        n_steps=1, step_voxels=1e-6, network_sigma_voxels=0.0, velocity_size=16
    )
    result = register_pair(network_of(maps), known[0], config)
    torch.testing.assert_close(result.forward, maps.st, rtol=0, atol=1e-5)
    # The first value is the objective of the network's maps at half the resolution.
    full, _ = objective_losses(
        network_of(maps),
        known[0],
        ObjectiveConfig(
            regularity_weight=0.0, gradcycon_weight=1.0, lncc_sigma_voxels=config.lncc_sigma_voxels
        ),
    )
    assert result.losses[0]["gradcycon"] == pytest.approx(full["gradcycon"].item(), rel=0.3)


def test_near_pairs_start_from_the_identity(known):
    """What a network gets wrong within a person is forgotten; between two people it is kept."""
    _, of_s, _ = known
    functional, anatomical = contrasts(of_s)
    bridge = contrasts(identity_map(SIZE))
    own = CyclePairs(functional, anatomical, *bridge, is_aligned=True)
    wrong = CycleMaps(diffeomorphism(2, 3), diffeomorphism(2, 4), None, diffeomorphism(2, 5))
    config = replace(CONFIG, n_steps=6, step_voxels=0.02)
    errors = [
        mean_error_voxels(
            register_pair(network_of(wrong), own, replace(config, near_voxels=near)).forward,
            of_s,
            of_s,
        )
        for near in (0.0, 0.1, 3.0)
    ]
    assert errors[0] == errors[1]
    assert errors[2] < 0.3 * errors[0]


def test_folds_of_the_network_are_smoothed_away(known):
    folded = identity_map(SIZE) + 0.1 * smooth_noise(3, 1.5, seed=3)
    assert jacobian_determinant(folded).min() < 0
    config = RefinementConfig(n_steps=1, step_voxels=1e-6, velocity_size=16)
    maps = CycleMaps(folded, folded, None, folded)
    result = register_pair(network_of(maps), known[0], config)
    assert jacobian_determinant(result.forward).min() > 0


def test_smoothing_keeps_affine_maps(known):
    """Away from the border, and there shifts."""
    config = RefinementConfig(n_steps=1, step_voxels=1e-6, velocity_size=16)
    scaled = 0.9 * identity_map(SIZE) + 0.08
    shifted = identity_map(SIZE) + torch.tensor([0.1, -0.05, 0.02]).view(1, 3, 1, 1, 1)
    for phi, where in ((scaled, CORE), (shifted, ...)):
        result = register_pair(network_of(CycleMaps(phi, phi, None, phi)), known[0], config)
        torch.testing.assert_close(result.forward[where], phi[where], rtol=0, atol=1e-5)


def test_refinement_is_deterministic(known):
    config = RefinementConfig(n_steps=3, velocity_size=16)
    one, other = (register_pair(None, known[0], config) for _ in range(2))
    assert torch.equal(one.forward, other.forward)


def test_bridge_must_be_aligned(known):
    with pytest.raises(ValueError, match="must be an aligned pair"):
        register_pair(None, known[0]._replace(is_aligned=False), CONFIG)
