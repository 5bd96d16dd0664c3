"""The objective on affinely related phantoms, whose maps are exact and do not commute.

Each image shows a phantom through an affine map to the phantom's coordinates, so that the map
between two images is a product of matrices, and a composition in the wrong order is a different
matrix.
"""

import numpy as np
import pytest
import torch

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.m2m import (
    CycleMaps,
    CyclePairs,
    ObjectiveConfig,
    cycle_map,
    cycle_paths,
    cycle_similarity_loss,
    objective_losses,
    predict_cycle,
)
from m2m_bids.registration.maps import compose, warp
from m2m_bids.registration.regularity import jacobian_identity_loss
from m2m_bids.registration.similarity import lncc_loss

SIZE = 33
SIGMA = 3.0
NAMES = ("s", "t", "bridge_s", "bridge_t")


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
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = 0.5 - linear @ np.full(3, 0.5) + shift
    return affine


# From each image to the phantom. S covers a small part of it, so that the cycle, which starts in
# S, stays inside every grid: whatever the rotations, nothing is extrapolated and the cycle closes
# to rounding.
TO_PHANTOM = {
    "s": about_centre(rotation(0.8, 0) @ np.diag([0.5, 0.4, 0.45])),
    "t": about_centre(rotation(0.7, 1), shift=(0.02, 0, 0)),
    "bridge_s": about_centre(rotation(-0.9, 2) @ np.diag([1.0, 0.9, 1.0]), shift=(0, -0.02, 0)),
    "bridge_t": about_centre(rotation(0.6, 0), shift=(0, 0, 0.02)),
}
ALIGNED = {**TO_PHANTOM, "bridge_t": TO_PHANTOM["bridge_s"]}


def point_map(to_phantom, moving, fixed):
    """Matrix of the map from points of ``fixed`` to points of ``moving``."""
    return np.linalg.inv(to_phantom[moving]) @ to_phantom[fixed]


def affine_map(affine):
    matrix = torch.from_numpy(affine)
    points = identity_map(SIZE, like=matrix)
    moved = torch.einsum("de,neijk->ndijk", matrix[:3, :3], points) + matrix[:3, 3].view(
        1, 3, 1, 1, 1
    )
    return moved.float()


def phantom(affine, *, is_functional):
    """Eight smooth blobs near the centre, seen through an affine map, in one of two contrasts."""
    points = affine_map(affine)
    generator = np.random.default_rng(5)
    image = torch.zeros(1, 1, SIZE, SIZE, SIZE)
    for _ in range(8):
        centre = torch.from_numpy(generator.uniform(0.4, 0.6, 3)).float().view(1, 3, 1, 1, 1)
        heights = generator.uniform(0.2, 1, 2)
        width = generator.uniform(0.03, 0.05)
        blob = torch.exp(-0.5 * ((points - centre) / width).square().sum(1, keepdim=True))
        image = image + heights[int(is_functional)] * blob
    return image


def make_pairs(to_phantom, *, is_aligned):
    images = [phantom(to_phantom[name], is_functional=name in ("s", "bridge_s")) for name in NAMES]
    return CyclePairs(*images, is_aligned=is_aligned)


def exact_maps(to_phantom, *, is_aligned):
    edges = [("s", "t"), ("t", "bridge_s"), ("bridge_s", "bridge_t"), ("bridge_t", "s")]
    st, ts, ss, ts2 = (affine_map(point_map(to_phantom, *edge)) for edge in edges)
    return CycleMaps(st, ts, None if is_aligned else ss, ts2)


@pytest.fixture(params=[False, True], ids=["four edges", "aligned bridge"])
def case(request):
    """Poses, pairs and exact maps."""
    to_phantom = ALIGNED if request.param else TO_PHANTOM
    return (
        to_phantom,
        make_pairs(to_phantom, is_aligned=request.param),
        exact_maps(to_phantom, is_aligned=request.param),
    )


def floor_loss(pairs):
    """Value of the four terms for identical images: LNCC is blind where they are flat."""
    return sum(lncc_loss(image, image, sigma_voxels=SIGMA).item() for image in pairs[:4])


def test_similarity_is_at_its_floor_for_the_exact_maps(case):
    _, pairs, maps = case
    loss = cycle_similarity_loss(pairs, cycle_paths(maps), lncc_sigma_voxels=SIGMA).item()
    identity = identity_map(SIZE)
    start = CycleMaps(identity, identity, None, identity)
    unregistered = cycle_similarity_loss(pairs, cycle_paths(start), lncc_sigma_voxels=SIGMA).item()
    # What is left of the excess is interpolation of blobs two voxels wide.
    assert loss - floor_loss(pairs) < 0.03 * (unregistered - floor_loss(pairs))


def similarity_by_matrices(to_phantom, pairs, *, is_reversed):
    """Evaluate Eq. 2 with products of matrices instead of composed maps."""
    st, tb, bb, bs = (
        point_map(to_phantom, *edge)
        for edge in (("s", "t"), ("t", "bridge_s"), ("bridge_s", "bridge_t"), ("bridge_t", "s"))
    )
    terms = [
        (pairs.s, pairs.bridge_s, (st, tb)),
        (pairs.bridge_s, pairs.s, (bb, bs)),
        (pairs.t, pairs.bridge_t, (tb, bb)),
        (pairs.bridge_t, pairs.t, (bs, st)),
    ]
    total = 0
    for moving, fixed, (outer, inner) in terms:
        product = inner @ outer if is_reversed else outer @ inner
        total += lncc_loss(warp(moving, affine_map(product)), fixed, sigma_voxels=SIGMA).item()
    return total


def test_similarity_is_that_of_the_papers_order(case):
    to_phantom, pairs, maps = case
    loss = cycle_similarity_loss(pairs, cycle_paths(maps), lncc_sigma_voxels=SIGMA).item()
    ours = similarity_by_matrices(to_phantom, pairs, is_reversed=False)
    other_order = similarity_by_matrices(to_phantom, pairs, is_reversed=True)
    # Where a composed map leaves a grid both images are black, to the blobs' tails.
    assert loss == pytest.approx(ours, abs=1e-3)
    assert other_order - floor_loss(pairs) > 10 * (loss - floor_loss(pairs))
    assert other_order - loss > 0.15


def test_cycle_closes_for_the_exact_maps(case):
    _, _, maps = case
    cycle = cycle_map(cycle_paths(maps))
    torch.testing.assert_close(cycle, identity_map(SIZE), rtol=0, atol=2e-6)
    # Eq. 3 differentiates with 32 steps of rounding errors of 1e-7 each.
    assert jacobian_identity_loss(cycle).item() < 1e-8


def test_cycle_in_the_reverse_order_does_not_close():
    maps = exact_maps(TO_PHANTOM, is_aligned=False)
    matrices = [
        point_map(TO_PHANTOM, *edge)
        for edge in (("s", "t"), ("t", "bridge_s"), ("bridge_s", "bridge_t"), ("bridge_t", "s"))
    ]
    st, tb, bb, bs = matrices
    np.testing.assert_allclose(st @ tb @ bb @ bs, np.eye(4), atol=1e-12)
    reverse = bs @ bb @ tb @ st
    assert np.square(reverse[:3, :3] - np.eye(3)).sum() > 0.1
    swapped = CycleMaps(maps.bridge_t_s, maps.bridge, maps.t_bridge_s, maps.st)
    assert jacobian_identity_loss(cycle_map(cycle_paths(swapped))).item() > 0.1


def test_each_edge_is_asked_for_once_and_in_its_direction():
    levels = dict(zip(NAMES, (1.0, 2.0, 4.0, 8.0), strict=True))
    calls = []

    def network(moving, fixed):
        calls.append(len(moving))
        return (0.1 * moving - 0.001 * fixed).expand(-1, 3, -1, -1, -1)

    images = [torch.full((2, 1, 4, 4, 4), level) for level in levels.values()]
    maps = predict_cycle(network, CyclePairs(*images, is_aligned=False))
    for phi, (moving, fixed) in zip(
        maps,
        (("s", "t"), ("t", "bridge_s"), ("bridge_s", "bridge_t"), ("bridge_t", "s")),
        strict=True,
    ):
        expected = identity_map(4) + 0.1 * levels[moving] - 0.001 * levels[fixed]
        torch.testing.assert_close(phi, expected.expand(2, -1, -1, -1, -1))
    assert calls == [2] * 4

    aligned = predict_cycle(network, CyclePairs(*images, is_aligned=True))
    assert aligned.bridge is None
    for name in ("st", "t_bridge_s", "bridge_t_s"):
        torch.testing.assert_close(getattr(aligned, name), getattr(maps, name))
    assert calls == [2] * 7


def lookup_network(to_phantom, pairs):
    """Return a network that recognises the images and knows the exact maps."""
    known = dict(zip(NAMES, pairs[:4], strict=True))

    def name_of(image):
        return next(name for name, other in known.items() if torch.equal(image, other))

    def network(moving, fixed):
        return torch.cat(
            [
                affine_map(point_map(to_phantom, name_of(a), name_of(b))) - identity_map(SIZE)
                for a, b in zip(moving.split(1), fixed.split(1), strict=True)
            ]
        )

    return network


def test_objective_of_a_network_that_knows_the_answer(case):
    to_phantom, pairs, _ = case
    # For Eq. 4 the inverse edge, from S to T, starts in S too.
    config = ObjectiveConfig(regularity_weight=0.3, gradcycon_weight=0.7, lncc_sigma_voxels=SIGMA)
    losses, maps = objective_losses(lookup_network(to_phantom, pairs), pairs, config)
    assert set(losses) == {"similarity", "gradcycon", "regularity"}
    assert losses["gradcycon"].item() < 1e-8
    assert losses["regularity"].item() < 1e-8
    expected = cycle_similarity_loss(pairs, cycle_paths(maps), lncc_sigma_voxels=SIGMA)
    torch.testing.assert_close(losses["similarity"], expected)


def test_weights_scale_their_terms():
    pairs = make_pairs(ALIGNED, is_aligned=True)

    def network(moving, fixed):
        bump = torch.exp(-30 * (identity_map(SIZE) - 0.5).square().sum(1, keepdim=True))
        return 0.05 * bump.expand(len(moving), 3, -1, -1, -1)

    one, _ = objective_losses(
        network,
        pairs,
        ObjectiveConfig(regularity_weight=1.0, gradcycon_weight=1.0, lncc_sigma_voxels=SIGMA),
    )
    other, maps = objective_losses(
        network,
        pairs,
        ObjectiveConfig(regularity_weight=3.0, gradcycon_weight=0.25, lncc_sigma_voxels=SIGMA),
    )
    torch.testing.assert_close(other["gradcycon"], 0.25 * one["gradcycon"])
    torch.testing.assert_close(other["regularity"], 3 * one["regularity"])
    torch.testing.assert_close(other["similarity"], one["similarity"])
    torch.testing.assert_close(
        one["gradcycon"],
        jacobian_identity_loss(compose(compose(maps.st, maps.t_bridge_s), maps.bridge_t_s)),
    )


def test_no_inverse_edge_without_gradicon():
    calls = []

    def network(moving, fixed):
        calls.append(len(moving))
        return torch.zeros(len(moving), 3, SIZE, SIZE, SIZE)

    pairs = make_pairs(ALIGNED, is_aligned=True)
    losses, _ = objective_losses(network, pairs, ObjectiveConfig(regularity_weight=0))
    assert set(losses) == {"similarity", "gradcycon"}
    assert calls == [1] * 3
