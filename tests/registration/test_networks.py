"""What every network of the registry promises, whichever modules the package holds."""

import dataclasses
import json

import pytest
import torch

from m2m_bids.registration import networks
from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import map_from_displacement, warp
from m2m_bids.registration.networks import NETWORKS
from m2m_bids.registration.networks.family import NetworkFamily
from m2m_bids.registration.weights import WeightsCard, load_weights, save_weights

# Odd, and at every halving; the compact GradICON takes nothing smaller.
SIZE = 33

N_PARAMETERS = {"gradicon": 53_010_687, "transmorph": 46_771_251, "corrmlp": 1_825_990}


def images(size=SIZE, n=1):
    return torch.rand((2, n, 1, size, size, size), generator=torch.Generator().manual_seed(0))


def randomized(family):
    """Build the compact network; random weights and biases take the place of zero ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = family.network(family.compact)
        with torch.no_grad():
            for parameter in network.parameters():
                scale = 0.05 if parameter.ndim > 1 else 0.02
                parameter.add_(scale * torch.randn(parameter.shape))
    return network


@pytest.fixture(params=sorted(NETWORKS))
def family(request):
    return NETWORKS[request.param]


def test_registry_holds_every_family():
    assert set(N_PARAMETERS) <= set(NETWORKS)
    for name, family in NETWORKS.items():
        assert isinstance(family, NetworkFamily)
        assert family.name == name
        assert isinstance(family.compact, family.config)


def test_two_modules_cannot_share_a_name(monkeypatch):
    # The registry finds modules by itself, so a copied file with the old name must not win.
    monkeypatch.setattr(networks.corrmlp, "FAMILY", NETWORKS["transmorph"])
    with pytest.raises(RuntimeError, match="transmorph"):
        networks.collect_families()


@pytest.mark.parametrize(("name", "n_parameters"), N_PARAMETERS.items())
def test_papers_parameters(name, n_parameters):
    family = NETWORKS[name]
    with torch.device("meta"):
        network = family.network(family.paper())
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters


def test_build_from_the_config_of_a_card(family):
    config = json.loads(json.dumps(dataclasses.asdict(family.compact)))
    network = family.build(config)
    assert type(network) is family.network
    assert network.config == family.compact
    assert network.config == family.config(**dataclasses.asdict(family.compact))
    hash(network.config)


def test_build_refuses_unknown_sizes(family):
    with pytest.raises(TypeError, match="spam"):
        family.build({"spam": 1})


def test_almost_zero_displacement_at_the_start(family):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        disp = family.network(family.compact)(*images(n=2))
    assert disp.shape == (2, 3, SIZE, SIZE, SIZE)
    assert disp.dtype == torch.float32
    # A twentieth of a voxel, where a step of training moves the displacement by more.
    assert disp.abs().max() < 0.05 / (SIZE - 1)


@pytest.mark.parametrize("size", [SIZE, 36])
def test_any_grid_and_the_same_twice(family, size):
    network = randomized(family).eval()
    with torch.no_grad():
        disp = network(*images(size))
        again = network(*images(size))
    assert disp.shape == (1, 3, size, size, size)
    assert torch.isfinite(disp).all()
    assert disp.abs().max() > 0
    assert torch.equal(disp, again)


def test_moving_and_fixed_are_not_alike(family):
    moving, fixed = images()
    network = randomized(family).eval()
    with torch.no_grad():
        assert not torch.allclose(network(moving, fixed), network(fixed, moving))


def test_pairs_of_a_batch_are_apart(family):
    # In evaluation; batch normalisation mixes them in training.
    moving, fixed = images(n=2)
    network = randomized(family).eval()
    with torch.no_grad():
        together = network(moving, fixed)
        alone = network(moving[1:], fixed[1:])
    # Other kernels serve other batch sizes: float32 of another order of summation.
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4 * alone.abs().max())


def test_gradients_reach_every_parameter(family):
    network = randomized(family).train()
    network(*images()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_smallest_image_is_taken(family):
    network = randomized(family).train()
    size = network.config.smallest_image
    network(*images(size)).square().sum().backward()
    with pytest.raises(ValueError, match=f"larger than {size - 1} voxels, got {size - 1}"):
        network(*images(size - 1))


def test_too_small_images_are_refused(family):
    with pytest.raises(ValueError, match=r"images must be larger than \d+ voxels, got 2"):
        family.network(family.compact)(*images(2))


def test_displacement_stays_float32_under_autocast(family):
    network = randomized(family).eval()
    with torch.no_grad():
        exact = network(*images())
        with torch.autocast("cpu", torch.bfloat16):
            disp = network(*images())
    assert disp.dtype == torch.float32
    # bfloat16 keeps eight bits, and random weights amplify what it drops.
    assert (disp - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("name", ["corrmlp", "transmorph"])
def test_layer_norms_in_bfloat16_keep_the_gradients_of_many_voxels(name):
    # Added up in bfloat16, a voxel is lost as soon as the sum is 256 times as large.
    layers = NETWORKS[name].network(NETWORKS[name].compact).modules()
    layers = {len(x.weight): x for x in layers if isinstance(x, torch.nn.LayerNorm)}
    assert len(layers) > 2
    for n_channels, layer in layers.items():
        voxels = torch.randn(20000, n_channels, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            layer(voxels.bfloat16()).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((n_channels,), 20000.0))


def test_group_norms_are_in_float32_under_autocast():
    seen = []
    network = NETWORKS["gradicon"].network(NETWORKS["gradicon"].compact)
    for layer in network.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(*images())
    assert set(seen) == {torch.float32}


def test_weights_come_back(family, tmp_path):
    network = randomized(family)
    card = WeightsCard(
        network=family.name,
        config=dataclasses.asdict(family.compact),
        grid_size=SIZE,
        spacing_mm=6.0,
        modalities=("pet",),
        training_data="noise",
        training_command="none",
    )
    save_weights(network, card, tmp_path)
    loaded, _ = load_weights(tmp_path)
    assert loaded.config == family.compact
    states = network.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# GradICON needs larger images; it is compared with the ICON project's.
@pytest.mark.parametrize(("name", "rate"), [("transmorph", 1e-3), ("corrmlp", 3e-4)])
def test_learns_the_way_between_shifted_blobs(name, rate):
    size = 16
    shift = torch.tensor([0.10, -0.06, 0.04]).view(1, 3, 1, 1, 1)
    centres = 0.35 + 0.3 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0))

    def blobs(x):
        distances = (x - centres.view(4, 3, 1, 1, 1)).square().sum(1, keepdim=True)
        return (-distances / 0.01).exp().sum(0, keepdim=True) / 2

    x = identity_map(size)
    there, here = blobs(x - shift), blobs(x)
    moving, fixed = torch.cat((there, here)), torch.cat((here, there))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name].network(NETWORKS[name].compact)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for _ in range(11):
        warped = warp(moving, map_from_displacement(network(moving, fixed)))
        loss = (warped - fixed).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * (moving - fixed).square().mean()
    # there(x + shift) = here(x): so far the blobs themselves must go, each axis by itself.
    with torch.no_grad():
        disp = network(moving, fixed)
    there_disp, here_disp = (disp * fixed).sum((2, 3, 4)) / fixed.sum((2, 3, 4))
    shift = shift.flatten()
    assert (there_disp / shift > 0.15).all()
    assert (here_disp / -shift > 0.15).all()
