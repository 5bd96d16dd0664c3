"""Weights of a network: a folder with a safetensors file and the JSON card that rebuilds the network."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
from torch import nn

from m2m_bids.registration.networks import NETWORKS

TENSORS_NAME = "weights.safetensors"
CARD_NAME = "card.json"


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class WeightsCard:
    """
    What a weights folder says of itself.

    Parameters
    ----------
    network : str
        Name in the registry of networks.
    config : dict
        Its sizes.
    grid_size : int
        Voxels along every axis of the grid it was trained on.
    spacing_mm : float
        Their size.
    modalities : tuple of str
        Modalities it registers with T1w, ``"pet"`` or ``"fa"``.
    training_data : str
        What it was trained on.
    training_command : str
        How.
    sha256 : str
        Of the safetensors file, as 64 hexadecimal digits.
    details : dict
        Anything else worth knowing: iterations, losses, versions.
    """

    network: str
    config: dict
    grid_size: int
    spacing_mm: float
    modalities: tuple[str, ...]
    training_data: str
    training_command: str
    sha256: str = ""
    details: dict = field(default_factory=dict)


def save_weights(network: nn.Module, card: WeightsCard, folder: Path | str) -> WeightsCard:
    """
    Write a weights folder, each file beside and then renamed.

    Parameters
    ----------
    network : Module
    card : WeightsCard
        Its hash is filled in.
    folder : Path or str

    Returns
    -------
    WeightsCard
        With the hash.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    data = safetensors.torch.save(tensors)
    card = WeightsCard(**{**asdict(card), "sha256": hashlib.sha256(data).hexdigest()})
    text = json.dumps(asdict(card), indent=2) + "\n"
    for name, content in ((TENSORS_NAME, data), (CARD_NAME, text.encode())):
        beside = folder / f".{name}.partial"
        beside.write_bytes(content)
        os.replace(beside, folder / name)
    return card


def read_card(folder: Path | str) -> WeightsCard:
    """
    Read the card of a weights folder.

    Parameters
    ----------
    folder : Path or str

    Returns
    -------
    WeightsCard

    Raises
    ------
    WeightsError
        If the folder or the card is missing, or the card is not as `save_weights` writes it.
    """
    folder = Path(folder)
    for name in (CARD_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise WeightsError(
                f"{folder}: no {name} in this weights folder; it should hold {CARD_NAME} and {TENSORS_NAME},"
                " as training writes them. Name such a folder with --weights."
            )
    try:
        entries = json.loads((folder / CARD_NAME).read_text())
        card = WeightsCard(**entries)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise WeightsError(f"{folder / CARD_NAME}: not a weights card ({error}). Copy the folder again.") from error
    return WeightsCard(**{**asdict(card), "modalities": tuple(card.modalities)})


def load_weights(folder: Path | str) -> tuple[nn.Module, WeightsCard]:
    """
    Rebuild a network from its weights folder and check its hash; nothing is unpickled.

    Parameters
    ----------
    folder : Path or str

    Returns
    -------
    network : Module
        On the CPU, in evaluation mode.
    card : WeightsCard

    Raises
    ------
    WeightsError
        If a file is missing or unreadable, the hash differs from the card's, or the tensors do not fit.
    """
    folder = Path(folder)
    card = read_card(folder)
    file = folder / TENSORS_NAME
    data = file.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card.sha256:
        raise WeightsError(
            f"{file}: its SHA-256 is {sha256}, but {CARD_NAME} says {card.sha256}. The file is damaged or was"
            " exchanged; get both files again from one source."
        )
    if card.network not in NETWORKS:
        raise WeightsError(
            f"{folder / CARD_NAME}: unknown network {card.network!r}; known are {', '.join(sorted(NETWORKS))}"
        )
    try:
        network = NETWORKS[card.network](card.config)
        network.load_state_dict(safetensors.torch.load(data))
    except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{file}: does not fit the network of its card ({reason})") from error
    return network.eval(), card
