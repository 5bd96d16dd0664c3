"""A weights folder comes back as it was written, or is refused with one clear message."""

import hashlib
import json
import pickle
from dataclasses import asdict

import pytest
import torch

from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.weights import (
    CARD_NAME,
    TENSORS_NAME,
    WeightsCard,
    WeightsError,
    load_weights,
    read_card,
    save_weights,
)

CONFIG = GradICONConfig(down_widths=(4, 8), up_widths=(4, 4), n_scales=2, normalization="batch")


@pytest.fixture
def network():
    generator = torch.Generator().manual_seed(0)
    network = GradICON(CONFIG)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return network


@pytest.fixture
def folder(network, tmp_path):
    card = WeightsCard(
        network="gradicon",
        config=asdict(CONFIG),
        grid_size=16,
        spacing_mm=6.0,
        modalities=("pet", "fa"),
        training_data="noise",
        training_command="none",
        details={"iterations": 0},
    )
    save_weights(network, card, tmp_path / "weights")
    return tmp_path / "weights"


def edit_card(folder, **changes):
    file = folder / CARD_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_tensors(folder, data):
    """Exchange the tensors together with the hash on the card."""
    (folder / TENSORS_NAME).write_bytes(data)
    edit_card(folder, sha256=hashlib.sha256(data).hexdigest())


def test_round_trip(network, folder):
    loaded, card = load_weights(folder)
    assert not loaded.training
    assert loaded.config == CONFIG
    states = network.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    images = torch.rand((2, 1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(network.eval()(*images), loaded(*images))
    assert card.modalities == ("pet", "fa")
    assert card.details == {"iterations": 0}
    assert card.sha256 == hashlib.sha256((folder / TENSORS_NAME).read_bytes()).hexdigest()
    assert sorted(file.name for file in folder.iterdir()) == [CARD_NAME, TENSORS_NAME]


def test_round_trip_of_any_memory_format(network, folder, tmp_path):
    again = save_weights(
        network.to(memory_format=torch.channels_last_3d), read_card(folder), tmp_path / "again"
    )
    assert again.sha256 == read_card(folder).sha256


def test_weights_are_on_the_disk_before_they_have_their_names(network, folder, renamed):
    """Also over what a process has left that was killed as it wrote."""
    (folder / f".{TENSORS_NAME}.partial").write_bytes(b"a part")
    save_weights(network, read_card(folder), folder)
    files = [folder / name for name in (TENSORS_NAME, CARD_NAME)]
    assert renamed == {file: file.stat().st_size for file in files}
    assert sorted(folder.iterdir()) == sorted(files)


def test_wrong_hash_is_refused(folder):
    edit_card(folder, sha256="0" * 64)
    with pytest.raises(
        WeightsError, match=r"weights\.safetensors: its SHA-256 is .*card\.json says 0000"
    ):
        load_weights(folder)


def test_changed_byte_is_refused(folder):
    data = bytearray((folder / TENSORS_NAME).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS_NAME).write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        load_weights(folder)


@pytest.mark.parametrize("n_bytes", [0, 4, 100, -4])
@pytest.mark.parametrize("has_its_hash", [False, True])
def test_truncated_file_is_refused(folder, n_bytes, has_its_hash):
    data = (folder / TENSORS_NAME).read_bytes()[:n_bytes]
    if has_its_hash:
        replace_tensors(folder, data)
    else:
        (folder / TENSORS_NAME).write_bytes(data)
    with pytest.raises(WeightsError, match=r"weights\.safetensors"):
        load_weights(folder)


def test_pickle_is_refused_and_not_run(network, folder, tmp_path):
    evidence = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (evidence.write_text, ("unpickled",))

    for data in (pickle.dumps(Payload()), torch_pickle(network)):
        replace_tensors(folder, data)
        with pytest.raises(WeightsError, match=r"weights\.safetensors: does not fit"):
            load_weights(folder)
    assert not evidence.exists()


def torch_pickle(network):
    import io

    stream = io.BytesIO()
    torch.save(network.state_dict(), stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", [CARD_NAME, TENSORS_NAME])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"no {name} in this weights folder"):
        load_weights(folder)


def test_a_file_in_place_of_the_folder_is_refused(folder):
    with pytest.raises(WeightsError, match="in this weights folder"):
        load_weights(folder / TENSORS_NAME)


def test_file_that_cannot_be_read_is_refused(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(WeightsError, match=r"weights\.safetensors.*Permission denied"):
        load_weights(folder)


def test_unknown_network_is_refused(folder):
    edit_card(folder, network="transporter")
    with pytest.raises(WeightsError, match=r"unknown network 'transporter'.*known are.*gradicon"):
        load_weights(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"down_widths": [4, 16], "up_widths": [4, 4], "n_scales": 2},  # other sizes
        {**asdict(CONFIG), "n_scales": 3},  # tensors missing
        {"widths": [4]},  # other fields
        {"down_widths": 4, "up_widths": 4},
        {"down_widths": [], "up_widths": []},
        [1],
    ],
)
def test_config_that_does_not_fit_is_refused(folder, config):
    edit_card(folder, config=config)
    with pytest.raises(WeightsError, match="does not fit the network of its card"):
        load_weights(folder)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "[1]",
            '"gradicon"',
            '{"network": "gradicon"}',
            '{"spam": 1}',
            "\x00\xff",
        ),
        *("[" * 100_000, '{"network": ' + "9" * 5000 + "}"),
    ],
)
def test_card_that_is_no_card_is_refused(folder, text):
    (folder / CARD_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"card\.json: not a weights card"):
        read_card(folder)


def test_card_without_modalities_is_refused(folder):
    edit_card(folder, modalities=None)
    with pytest.raises(WeightsError, match=r"card\.json: not a weights card"):
        read_card(folder)
