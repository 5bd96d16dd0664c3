"""The fast objective against the paper's equations written down slowly (`reference.py`)."""

import copy

import pytest
import torch

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.m2m import CyclePairs, ObjectiveConfig, objective_losses
from m2m_bids.registration.maps import compose, map_from_displacement
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.regularity import gradicon_loss, jacobian_identity_loss
from m2m_bids.registration.similarity import smooth

SIZE = 20
SMALL = {"down_widths": (8, 16, 64), "up_widths": (8, 16, 16)}


def make_pairs(*, is_aligned, dtype=torch.float64):
    """Four smooth images, two subjects each."""
    noise = torch.randn(
        (4, 2, 1, SIZE, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=dtype
    )
    images = smooth(noise, 1.5)
    images = (images - images.amin()) / (images.amax() - images.amin())
    return CyclePairs(*images, is_aligned=is_aligned)


def make_network(normalization="batch", dtype=torch.float64):
    """A small network in training whose maps move by a few voxels."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = GradICON(GradICONConfig(**SMALL, normalization=normalization)).to(dtype)
        for unet in network.unets:
            torch.nn.init.normal_(unet.last_conv.weight, std=0.02)
    return network.train()


def gradients(losses, parameters):
    return torch.autograd.grad(torch.stack(list(losses.values())).sum(), parameters)


def assert_close(ours, theirs, rtol):
    """Compare tensors with the largest entry of each as the unit."""
    for a, b in zip(ours, theirs, strict=True):
        scale = max(b.abs().max().item(), 1e-6)
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=rtol)


# ICON computes with constants in float32 also in float64.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("is_aligned", [False, True], ids=["four edges", "aligned bridge"])
def test_loss_and_gradients_are_the_references(reference, is_aligned, dtype, rtol):
    pytest.importorskip("icon_registration")
    pairs = make_pairs(is_aligned=is_aligned, dtype=dtype)
    network = make_network(dtype=dtype)
    predict, module, names = reference.icon_gradicon(network, SIZE)
    config = ObjectiveConfig(regularizer="diffusion", regularity_weight=0.7, gradcycon_weight=0)
    ours, _ = objective_losses(network, pairs, config)
    theirs = reference.m2m_losses(
        predict, pairs, regularizer="diffusion", regularity_weight=0.7, gradcycon_weight=0
    )
    assert set(ours) == set(theirs)
    assert_close(ours.values(), [theirs[name] for name in ours], rtol)
    # The parameters in front of a batch normalisation that takes their effect away have none.
    parameters = [
        name
        for name, _ in network.named_parameters()
        if not ("up_convs" in name and name.endswith("bias"))
    ]
    by_name = dict(module.named_parameters())
    assert_close(
        gradients(ours, [network.get_parameter(name) for name in parameters]),
        gradients(theirs, [by_name[names[name]] for name in parameters]),
        rtol,
    )
    # Batch statistics, too, are of one edge at a time and kept in the same order.
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, module.get_buffer(names[name]), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_whole_objective_against_separate_calls_of_the_same_network(reference, normalization):
    pairs = make_pairs(is_aligned=False)
    network = make_network(normalization)
    separate = copy.deepcopy(network)
    config = ObjectiveConfig(regularity_weight=0, gradcycon_weight=0)
    ours, _ = objective_losses(network, pairs, config)
    theirs = reference.m2m_losses(separate, pairs, regularity_weight=0, gradcycon_weight=0)
    del theirs["regularity"]
    assert_close(ours.values(), [theirs[name] for name in ours], 1e-9)
    names = [name for name, _ in network.named_parameters()]
    assert_close(
        gradients(ours, [network.get_parameter(name) for name in names]),
        gradients(theirs, [separate.get_parameter(name) for name in names]),
        1e-8,
    )


def still_at_the_border(size, seed):
    """A random displacement of at most 3 % of the grid, smooth, and zero on the border."""
    noise = torch.randn(
        (1, 3, size, size, size),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    window = torch.sin(torch.pi * identity_map(size, like=noise)).square().prod(1, keepdim=True)
    # To four standard deviations: cut at two, the window's edge would make the field rough.
    disp = smooth(noise, 6, radius_voxels=24) * window
    return 0.03 * disp / disp.abs().max()


@pytest.mark.parametrize("n_maps", [2, 4], ids=["GradICON", "GradCyCon"])
def test_forward_differences_are_the_four_compositions_of_the_paper(reference, n_maps):
    size = 48
    disps = [still_at_the_border(size, seed) for seed in range(n_maps)]
    maps = [map_from_displacement(disp) for disp in disps]
    functions = [reference.as_function(disp) for disp in disps]
    ours, theirs = maps[-1], functions[-1]
    for phi, function in zip(maps[-2::-1], functions[-2::-1], strict=True):
        ours, theirs = compose(phi, ours), reference.compose(function, theirs)
    ours = jacobian_identity_loss(ours).item()
    seeds = range(4)
    theirs = [
        reference.jacobian_loss(theirs, size, disps[0], torch.Generator().manual_seed(seed)).item()
        for seed in seeds
    ]
    # Their every second point of n stands for two voxels, so that they average over n^3 voxels,
    # with half a voxel outside of each border where nothing moves; ours over the (n - 1)^3 between
    # voxel centres. That is (48 / 47)^3 = 6.5 %; the rest is interpolation and noise.
    within = sum(theirs) / len(theirs) * (size / (size - 1)) ** 3
    assert ours > 0.005
    assert ours == pytest.approx(within, rel=0.02)


def test_both_discretisations_are_exact_for_affine_maps(reference):
    size = 24
    points = identity_map(size, like=torch.zeros(1, dtype=torch.float64))
    linear = torch.tensor(
        [[0.3, 0.1, 0.0], [-0.1, 0.4, 0.05], [0.0, 0.1, 0.2]], dtype=torch.float64
    )
    inner = torch.einsum("de,neijk->ndijk", linear, points - 0.5) + 0.5
    outer = 0.9 * (points - 0.5) + 0.5
    expected = (0.9 * linear - torch.eye(3)).square().sum().item()
    assert gradicon_loss(outer, inner).item() == pytest.approx(expected, rel=1e-12)

    def as_function(matrix):
        return lambda at: torch.einsum("de,neijk->ndijk", matrix, at - 0.5) + 0.5

    cycle = reference.compose(as_function(0.9 * torch.eye(3).double()), as_function(linear))
    assert reference.jacobian_loss(cycle, size, points).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [17, 24, 96])
def test_jacobian_loss_of_the_identity_is_exactly_zero(size):
    assert jacobian_identity_loss(identity_map(size)).item() == 0
