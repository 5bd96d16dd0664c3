"""Checkpoints of the ICON project become weights folders of the same map, or are refused."""

import hashlib
from pathlib import Path

import pytest
import torch

from m2m_bids.registration.conversion import convert_checkpoint
from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig, icon_names
from m2m_bids.registration.weights import CARD_NAME, WeightsError, load_weights, read_card

PARTS = {
    "down_convs": "downConvs",
    "up_convs": "upConvs",
    "norms": "batchNorms",
    "last_conv": "lastConv",
}
ARGUMENTS = {"modalities": ("pet", "fa"), "grid_size": 24, "spacing_mm": 6.0}


def small_network(**sizes):
    """A network with random weights, small enough for 16 voxels."""
    config = GradICONConfig(down_widths=(4, 8), up_widths=(4, 6), **sizes)
    network = GradICON(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.2 + 0.1 * torch.rand(tensor.shape, generator=generator))
    return network.eval()


def icon_state(network, prefix=""):
    """Name the tensors of a network as the ICON project would."""
    names = icon_names(network.config.n_scales, network.config.n_last_steps)
    state = {}
    for name, tensor in network.state_dict().items():
        unets, number, part, rest = name.split(".", 3)
        state[f"{prefix}{names[f'{unets}.{number}']}.{PARTS[part]}.{rest}"] = tensor
    return state


@pytest.fixture
def network():
    return small_network(n_scales=3, n_last_steps=1)


@pytest.fixture
def convert(tmp_path):
    """Save what is given as a checkpoint, and convert that."""

    def convert_content(content, **changes):
        file = tmp_path / "network_weights_100"
        torch.save(content, file)
        return convert_checkpoint(file, tmp_path / "weights", **{**ARGUMENTS, **changes})

    return convert_content


@pytest.mark.parametrize(
    ("n_scales", "n_last_steps"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1)]
)
@pytest.mark.parametrize("prefix", ["", "regis_net.", "module.regis_net.", "net.network."])
def test_a_checkpoint_comes_back_as_the_network(convert, tmp_path, n_scales, n_last_steps, prefix):
    network = small_network(n_scales=n_scales, n_last_steps=n_last_steps)
    card = convert(icon_state(network, prefix))
    loaded, loaded_card = load_weights(tmp_path / "weights")
    assert loaded_card.sha256 == card.sha256
    assert loaded.config == network.config
    expected = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_the_card_says_where_the_weights_come_from(convert, network, tmp_path):
    convert(icon_state(network), training_data="ADNI", modalities=["pet"])
    card = read_card(tmp_path / "weights")
    sha256 = hashlib.sha256((tmp_path / "network_weights_100").read_bytes()).hexdigest()
    assert card.network == "gradicon"
    assert (card.grid_size, card.spacing_mm, card.modalities) == (24, 6.0, ("pet",))
    assert card.training_data == "ADNI"
    assert "network_weights_100" in card.training_command
    assert card.details["source_file"] == "network_weights_100"
    assert card.details["source_sha256"] == sha256


def test_a_lightning_checkpoint_is_unwrapped(convert, network):
    state = {
        **icon_state(network, "network.regis_net."),
        "network.identity_map": torch.zeros(1, 3, 4, 4, 4),
        "network.regis_net.netPhi.netPsi.identity_map": torch.zeros(1, 3, 4, 4, 4),
        "network.regis_net.spacing": torch.zeros(3),
    }
    card = convert({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-4}})
    assert card.config["n_last_steps"] == 1


def test_half_precision_becomes_single(convert, network, tmp_path):
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in icon_state(network).items()
    }
    convert(halves)
    loaded, _ = load_weights(tmp_path / "weights")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"net": x}, lambda x: [x]])
def test_other_objects_are_not_unpickled(convert, tmp_path, wrap):
    with pytest.raises(WeightsError, match=r"network_weights_100: .* other objects are not"):
        convert(wrap(Payload(tmp_path / "made")))
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("content", [b"", b"not weights\n", b"PK\x03\x04 damaged", bytes(2000)])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    file = tmp_path / "file.trch"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"file\.trch: not a PyTorch file"):
        convert_checkpoint(file, tmp_path / "weights", **ARGUMENTS)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_file_cut_short_is_refused(network, tmp_path, share):
    file = tmp_path / "file.trch"
    torch.save(icon_state(network), file)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match=r"file\.trch: not a PyTorch file"):
        convert_checkpoint(file, tmp_path / "weights", **ARGUMENTS)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.trch: cannot be read \(No such file"):
        convert_checkpoint(tmp_path / "none.trch", tmp_path / "weights", **ARGUMENTS)
    with pytest.raises(WeightsError, match="cannot be read"):
        convert_checkpoint(tmp_path, tmp_path / "weights", **ARGUMENTS)


def without(state, ending):
    return {name: tensor for name, tensor in state.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "holds no state dict, but nothing"),
        (lambda state: [1, 2], "holds no state dict, but a list"),
        (lambda state: {"epoch": 3, **state}, "holds a int named 'epoch'"),
        (lambda state: {"a.weight": torch.zeros(2)}, "not a GradICON network"),
        (lambda state: {"downConvs.0.weight": torch.zeros(2)}, "not a GradICON network"),
        (
            lambda state: {**state, "affine.weight": torch.zeros(2)},
            r"affine\.weight: no such tensor",
        ),
        (
            lambda state: {**state, "netPsi.net.residues.0.weight": torch.zeros(2)},
            r"netPsi\.net\.residues\.0\.weight: no such tensor",
        ),
        (
            lambda state: {**state, "netPsi.net.downConvs.7.weight": torch.zeros(2)},
            r"unets\.3\.down_convs\.7\.weight is no part",
        ),
        (
            lambda state: without(state, "netPsi.net.batchNorms.0.running_mean"),
            r"lacks the tensor unets\.\d\.norms\.0\.running_mean",
        ),
        (
            lambda state: {n: t for n, t in state.items() if not n.startswith("netPhi.netPsi.")},
            "not a GradICON network",
        ),
        (
            lambda state: {**state, "netPsi.net.downConvs.0.weight": torch.zeros(4, 4, 3, 3, 3)},
            r"\(of netPsi\.net\) has the shape \(4, 4, 3, 3, 3\), not \(4, 2, 3, 3, 3\)",
        ),
        (
            lambda state: {**state, "netPsi.net.lastConv.bias": torch.full((3,), torch.nan)},
            "values that are not finite",
        ),
        (
            lambda state: {n: t[..., 0] if t.ndim == 5 else t for n, t in state.items()},
            "not five axes",
        ),
        (
            lambda state: without(without(state, "upConvs.1.weight"), "upConvs.1.bias"),
            "as many down_widths as up_widths",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(convert, network, tmp_path, change, message):
    with pytest.raises(WeightsError, match=f"network_weights_100: .*{message}") as caught:
        convert(change(icon_state(network)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "weights").exists()


def test_a_second_network_under_another_prefix_is_refused(convert, network):
    state = icon_state(network, "regis_net.")
    with pytest.raises(WeightsError, match=r"affine\.weight is no part of the network"):
        convert({**state, "affine.weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match="not a GradICON network"):
        convert({**state, **icon_state(network, "other.")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ()}, "modalities must be some of pet, fa, got none"),
        ({"modalities": ("pet", "t2w")}, "got pet, t2w"),
        ({"modalities": ("pet", "pet")}, "got pet, pet"),
        ({"grid_size": 0}, "grid_size must be positive"),
        ({"grid_size": 8}, "grid_size must be at least 9 for the network of .*_100, got 8"),
        ({"spacing_mm": 0.0}, "spacing_mm must be positive, got 0"),
        ({"spacing_mm": float("nan")}, "spacing_mm must be positive, got nan"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(convert, network, changes, message):
    with pytest.raises(WeightsError, match=message):
        convert(icon_state(network), **changes)


def test_weights_are_not_overwritten(convert, network, tmp_path):
    convert(icon_state(network))
    before = (tmp_path / "weights" / CARD_NAME).read_bytes()
    with pytest.raises(WeightsError, match="holds weights already"):
        convert(icon_state(network), grid_size=64)
    assert (tmp_path / "weights" / CARD_NAME).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(network, tmp_path):
    file = tmp_path / "file.trch"
    torch.save(icon_state(network), file)
    with pytest.raises(WeightsError, match=r"file\.trch.weights: cannot be written"):
        convert_checkpoint(file, file / "weights", **ARGUMENTS)


def icon_network(icon, networks, channels, n_last_steps):
    """Nest the ICON modules as uniGradICON does, with U-Nets of other widths."""

    def unet():
        return icon.FunctionFromVectorField(networks.UNet2(len(channels[1]), channels, 3))

    network = unet()
    for _ in range(2):
        network = icon.TwoStepRegistration(icon.DownsampleRegistration(network, 3), unet())
    for _ in range(n_last_steps):
        network = icon.TwoStepRegistration(network, unet())
    network.assign_identity_map((1, 1, 20, 20, 20))
    return network.eval()


@pytest.mark.parametrize("n_last_steps", [0, 1, 2])
def test_same_map_as_the_icon_network(tmp_path, n_last_steps):
    icon = pytest.importorskip("icon_registration")
    from icon_registration import networks

    generator = torch.Generator().manual_seed(n_last_steps)
    theirs = icon_network(icon, networks, [[2, 4, 8], [4, 6]], n_last_steps)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.ndim > 1:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1.5 * noise / tensor[0].numel() ** 0.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    file = tmp_path / "Step_2_final.trch"
    torch.save(theirs.state_dict(), file)
    convert_checkpoint(file, tmp_path / "weights", **ARGUMENTS)
    ours, card = load_weights(tmp_path / "weights")
    assert card.config["n_last_steps"] == n_last_steps
    moving, fixed = torch.rand((2, 1, 1, 20, 20, 20), generator=generator)
    with torch.no_grad():
        expected = theirs(moving, fixed)(theirs.identity_map)
        disp = ours(moving, fixed)
    assert disp.abs().max() > 0.05
    torch.testing.assert_close(identity_map(20) + disp, expected, rtol=0, atol=1e-4)


def test_names_of_a_last_step():
    assert icon_names(3, 1) == {
        "unets.3": "netPsi.net",
        "unets.2": "netPhi.netPsi.net",
        "unets.1": "netPhi.netPhi.net.netPsi.net",
        "unets.0": "netPhi.netPhi.net.netPhi.net.net",
    }


def test_the_number_of_last_steps_is_not_negative():
    with pytest.raises(ValueError, match="n_last_steps must not be negative, got -1"):
        GradICONConfig(n_last_steps=-1)


def test_last_steps_need_no_larger_images(network):
    """They work at full resolution: 9 voxels are still enough for three scales."""
    images = torch.rand((2, 1, 1, 9, 9, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert network(*images).shape == (1, 3, 9, 9, 9)
