"""GradICON's network: its size, its start, and the same map as the ICON project's."""

from contextlib import nullcontext

import pytest
import torch

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.networks import NETWORKS, gradicon, recomputation
from m2m_bids.registration.networks.gradicon import (
    COMPACT,
    GradICON,
    GradICONConfig,
    UNet,
    from_icon,
    icon_names,
)

TINY = GradICONConfig(down_widths=(4, 8), up_widths=(4, 4), normalization="group")


@pytest.fixture
def pair():
    """Two images of shape (2, 1, 16, 16, 16)."""
    return torch.rand((2, 2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0)).unbind()


def randomize(network, seed=0, scale=1.0):
    """Give every tensor of a network's state random values; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise.clamp(-2, 2))
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(0.1 * noise)
            elif tensor.ndim > 1:
                tensor.copy_(scale * noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(1 + 0.1 * noise)
    return network


def icon_network(icon_registration, size):
    """Nest the ICON modules as uniGradICON does."""
    from icon_registration import networks

    def unet():
        return icon_registration.FunctionFromVectorField(networks.tallUNet2(dimension=3))

    network = unet()
    for _ in range(2):
        network = icon_registration.TwoStepRegistration(
            icon_registration.DownsampleRegistration(network, dimension=3), unet()
        )
    network.assign_identity_map((1, 1, size, size, size))
    return network


def test_default_network_has_the_papers_parameters():
    with torch.device("meta"):
        network = GradICON()
    assert sum(parameter.numel() for parameter in network.parameters()) == 53_010_687


def test_compact_network_fits_the_package():
    with torch.device("meta"):
        network = GradICON(COMPACT)
    n_bytes = sum(4 * tensor.numel() for tensor in network.state_dict().values())
    assert n_bytes < 25e6


@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_displacement_is_zero_at_the_start(pair, normalization):
    config = GradICONConfig(down_widths=(4, 8), up_widths=(4, 4), normalization=normalization)
    disp = GradICON(config)(*pair)
    assert disp.shape == (2, 3, 16, 16, 16)
    # x + 0 - x, where each scale's zero displacement is interpolated.
    assert disp.abs().max() == 0


@pytest.mark.parametrize("size", [9, 12, 17])
def test_any_size_above_the_smallest(size):
    images = torch.rand((2, 1, 1, size, size, size), generator=torch.Generator().manual_seed(0))
    disp = randomize(GradICON(TINY)).eval()(*images)
    assert disp.shape == (1, 3, size, size, size)
    assert torch.isfinite(disp).all()


def test_too_small_images_are_refused():
    # Three scales of two halvings: 8 voxels become 2 at the coarsest scale, then 1, which cannot
    # be halved.
    with pytest.raises(ValueError, match="larger than 8 voxels, got 8"):
        GradICON(TINY)(*torch.zeros(2, 1, 1, 8, 8, 8))


def test_group_normalization_keeps_subjects_apart(pair):
    network = randomize(GradICON(TINY)).train()
    together = network(*pair)
    alone = network(pair[0][:1], pair[1][:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-6)


def test_training_reaches_every_parameter(pair):
    network = randomize(GradICON(TINY))
    network(*pair).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("is_autocast", [False, True])
def test_what_is_computed_again_for_the_gradient_is_what_was(pair, monkeypatch, is_autocast):
    config = GradICONConfig(down_widths=(4, 8, 16), up_widths=(4, 8, 8), n_scales=1)
    served = []
    serve = recomputation._Recipe.serve
    monkeypatch.setattr(
        recomputation._Recipe, "serve", lambda self: served.append(serve(self)) or served[-1]
    )
    results = []
    for context in (recomputation.computed_again, lambda *_: nullcontext()):
        monkeypatch.setattr(gradicon, "computed_again", context)
        network = randomize(GradICON(config)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            disp = network(*pair)
        disp.square().sum().backward()
        results.append([disp, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    # Two halvings (the third keeps what it gathers); two doublings of what was normalised, whose
    # rectification asks too.
    assert len(served) == 2 + 2 * 2
    assert {x.dtype for x in served} == {torch.bfloat16 if is_autocast else torch.float32}


def test_scales_are_composed_coarsest_outermost():
    # Constant displacements of the scales add up; a scale's field is warped by the finer ones.
    class Constant(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, moving, fixed):
            return torch.full((1, 3, *moving.shape[2:]), self.shift)

    class Stretch(torch.nn.Module):
        def forward(self, moving, fixed):
            return 0.5 * identity_map(moving.shape[-1])

    network = GradICON(GradICONConfig(down_widths=(4,), up_widths=(4,), n_scales=2))
    network.unets = torch.nn.ModuleList([Stretch(), Constant(-0.25)])
    disp = network(torch.zeros(1, 1, 9, 9, 9), torch.zeros(1, 1, 9, 9, 9))
    inner = (identity_map(9) - 0.25).clamp(0, 1)
    # 1.5 (x - 0.25) within the grid; the coarse displacement continues beyond its border.
    expected = -0.25 + 0.5 * inner
    torch.testing.assert_close(disp, expected, rtol=0, atol=1e-6)


def test_config_from_a_card_has_tuples():
    network = NETWORKS["gradicon"].build(
        {"down_widths": [4, 8], "up_widths": [4, 4], "normalization": "group"}
    )
    assert network.config == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_widths": (4, 8, 16)}, "as many down_widths as up_widths"),
        ({"down_widths": (), "up_widths": ()}, "at least one"),
        ({"normalization": "layer"}, "normalization must be"),
        ({"n_scales": 0}, "n_scales must be at least 1"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        GradICONConfig(**{"down_widths": (4, 8), "up_widths": (4, 4), **changes})


def test_icon_names_of_the_three_scales():
    assert icon_names() == {
        "unets.2": "netPsi.net",
        "unets.1": "netPhi.net.netPsi.net",
        "unets.0": "netPhi.net.netPhi.net.net",
    }


@pytest.mark.parametrize(
    "name", ["regis_net.netPsi.net.lastConv.weight", "netPsi.net.residues.0.weight"]
)
def test_from_icon_refuses_what_it_does_not_know(name):
    with pytest.raises(ValueError, match=name):
        from_icon({name: torch.zeros(1)})


def test_same_map_as_the_icon_network():
    icon_registration = pytest.importorskip("icon_registration")
    size = 65  # the smallest that both take, and odd at every scale
    theirs = randomize(icon_network(icon_registration, size), scale=1.5).eval()
    ours = GradICON().eval()
    ours.load_state_dict(from_icon(theirs.state_dict()))
    # Warping images of noise makes rounding a thousand times larger.
    theirs, ours = theirs.double(), ours.double()
    moving, fixed = torch.rand(
        (2, 1, 1, size, size, size), generator=torch.Generator().manual_seed(1)
    ).double()
    with torch.no_grad():
        expected = theirs(moving, fixed)(theirs.identity_map)
        disp = ours(moving, fixed)
    identity = identity_map(size, like=disp)
    assert (expected - identity).abs().max() > 0.05
    # ICON's identity map is made in float32.
    torch.testing.assert_close(identity + disp, expected, rtol=0, atol=1e-4)


def test_unet_is_the_icon_projects():
    icon_registration = pytest.importorskip("icon_registration")
    from icon_registration import networks

    assert icon_registration  # imported before its sub-module, as its users do
    theirs = randomize(networks.tallUNet2(dimension=3)).eval()
    ours = UNet(GradICONConfig()).eval()
    renamed = from_icon(
        {f"net.{name}": tensor for name, tensor in theirs.state_dict().items()}, n_scales=1
    )
    ours.load_state_dict(
        {name.removeprefix("unets.0."): tensor for name, tensor in renamed.items()}
    )
    images = torch.rand((2, 1, 1, 32, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(*images), theirs(*images), rtol=0, atol=1e-5)


def test_compact_network_gives_the_same_bytes_on_any_number_of_threads():
    """On the grid of the default weights, the three edges of a refinement together."""
    network = randomize(GradICON(COMPACT), scale=0.1).eval()
    images = torch.rand((2, 3, 1, 64, 64, 64), generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        with torch.no_grad():
            found.append(network(*images))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
