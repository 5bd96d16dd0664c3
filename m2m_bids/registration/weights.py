"""Weights of a network: a safetensors file and the JSON card that rebuilds the network."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
from torch import nn

from m2m_bids.json_files import read_json_object
from m2m_bids.registration.networks import NETWORKS
from m2m_bids.whole_files import replacing

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
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    data = safetensors.torch.save(tensors)
    card = WeightsCard(**{**asdict(card), "sha256": hashlib.sha256(data).hexdigest()})
    text = json.dumps(asdict(card), indent=2) + "\n"
    for name, content in ((TENSORS_NAME, data), (CARD_NAME, text.encode())):
        with replacing(folder / name, is_alone=True) as beside:
            beside.write_bytes(content)
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
                f"{folder}: no {name} in this weights folder; it should hold {CARD_NAME} and"
                f" {TENSORS_NAME}, as training writes them. Name such a folder with --weights."
            )
    try:
        entries = read_json_object(folder / CARD_NAME)
        card = WeightsCard(**{**entries, "modalities": tuple(entries["modalities"])})
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / CARD_NAME}: not a weights card ({error!r}). Copy the folder again."
        ) from error
    return card


def read_tensors(folder: Path | str) -> tuple[bytes, WeightsCard]:
    """
    Read a weights folder and check its hash.

    Parameters
    ----------
    folder : Path or str

    Returns
    -------
    data : bytes
        The safetensors file.
    card : WeightsCard

    Raises
    ------
    WeightsError
        If a file is missing or unreadable, or the hash differs from the card's.
    """
    folder = Path(folder)
    card = read_card(folder)
    file = folder / TENSORS_NAME
    try:
        data = file.read_bytes()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}).") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card.sha256:
        raise WeightsError(
            f"{file}: its SHA-256 is {sha256}, but {CARD_NAME} says {card.sha256}. The file is"
            " damaged or was exchanged; get both files again from one source."
        )
    return data, card


def load_weights(folder: Path | str) -> tuple[nn.Module, WeightsCard]:
    """
    Rebuild a network from its weights folder; nothing is unpickled.

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
        As `read_tensors` does, and if the tensors do not fit the network of the card.
    """
    folder = Path(folder)
    data, card = read_tensors(folder)
    if card.network not in NETWORKS:
        raise WeightsError(
            f"{folder / CARD_NAME}: unknown network {card.network!r};"
            f" known are {', '.join(sorted(NETWORKS))}"
        )
    try:
        network = NETWORKS[card.network].build(card.config)
        network.load_state_dict(safetensors.torch.load(data))
    except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{folder / TENSORS_NAME}: does not fit the network of its card ({reason})"
        ) from error
    return network.eval(), card
