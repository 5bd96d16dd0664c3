import tomllib
from pathlib import Path

import pytest
import torch

from m2m_bids.cli.convert import main
from m2m_bids.registration.networks.gradicon import GradICONConfig, UNet
from m2m_bids.registration.weights import load_weights

OPTIONS = ["--modalities", "fa", "pet", "--grid-size", "24", "--spacing", "1.5"]


@pytest.fixture
def checkpoint(tmp_path):
    """A single U-Net with the names of the ICON project."""
    state = UNet(GradICONConfig(down_widths=(4,), up_widths=(4,))).state_dict()
    names = {
        "down_convs": "downConvs",
        "up_convs": "upConvs",
        "norms": "batchNorms",
        "last_conv": "lastConv",
    }
    renamed = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        renamed[f"regis_net.net.{names[part]}.{rest}"] = tensor
    torch.save(renamed, tmp_path / "net.trch")
    return tmp_path / "net.trch"


def test_convert_writes_a_weights_folder(checkpoint, tmp_path, capsys):
    folder = tmp_path / "weights"
    assert main([str(checkpoint), str(folder), *OPTIONS, "--training-data", "my cohort"]) == 0
    printed = capsys.readouterr()
    assert f"{folder}: weights of 1 U-Nets for fa and pet, 24 voxels of 1.5 mm" in printed.out
    assert printed.err == ""
    _, card = load_weights(folder)
    assert card.modalities == ("fa", "pet")
    assert (card.grid_size, card.spacing_mm) == (24, 1.5)
    assert card.training_data == "my cohort"


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_errors_are_one_line(tmp_path, capsys, content):
    file = tmp_path / "net.trch"
    if content is not None:
        file.write_bytes(content)
    assert main([str(file), str(tmp_path / "weights"), *OPTIONS]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"m2m-bids-convert: {file}: ")
    assert printed.err.count("\n") == 1


def test_options_that_make_no_sense_are_one_line(checkpoint, tmp_path, capsys):
    options = [*OPTIONS[:-1], "-1"]
    assert main([str(checkpoint), str(tmp_path / "weights"), *options]) == 1
    assert capsys.readouterr().err == ("m2m-bids-convert: spacing_mm must be positive, got -1\n")


@pytest.mark.parametrize("left_out", ["--modalities", "--grid-size", "--spacing"])
def test_what_the_checkpoint_does_not_say_must_be_given(checkpoint, tmp_path, capsys, left_out):
    given = {"--modalities": ["pet"], "--grid-size": ["24"], "--spacing": ["1.5"]}
    options = [
        text for name, values in given.items() if name != left_out for text in (name, *values)
    ]
    with pytest.raises(SystemExit):
        main([str(checkpoint), str(tmp_path / "weights"), *options])
    assert left_out in capsys.readouterr().err


def test_the_package_installs_the_command():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"]["m2m-bids-convert"] == "m2m_bids.cli.convert:main"
