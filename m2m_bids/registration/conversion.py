"""Weights trained by others: checkpoints of the ICON project's networks as weights folders."""

import hashlib
import math
import pickle
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from m2m_bids.registration.networks.gradicon import (
    GradICON,
    GradICONConfig,
    from_icon,
    icon_names,
)
from m2m_bids.registration.weights import CARD_NAME, WeightsCard, WeightsError, save_weights

_MODALITIES = ("pet", "fa")
# Of a U-Net in the ICON project.
_PARTS = ("downConvs", "upConvs", "batchNorms", "lastConv")
# What its modules keep beside weights, and rebuild from the image size.
_BUFFERS = ("identity_map", "input_shape", "spacing")
_OTHER_NETWORK = (
    "not a GradICON network of the ICON project (uniGradICON, multiGradICON or M2M-Reg's), whose"
    " tensors are named such as netPsi.net.downConvs.0.weight"
)


def convert_checkpoint(
    file: Path | str,
    folder: Path | str,
    *,
    modalities: Sequence[str],
    grid_size: int,
    spacing_mm: float,
    training_data: str = "not stated",
) -> WeightsCard:
    """
    Write a weights folder from a checkpoint of the ICON project's GradICON network.

    The checkpoint is a state dict that `torch.save` wrote, as uniGradICON, multiGradICON and the
    research code of M2M-Reg do, or a Lightning checkpoint that holds one; nothing in it but
    tensors and plain values is unpickled. The sizes of the network, and how many U-Nets it has,
    are read from its tensors: three for M2M-Reg, and a fourth at full resolution for uniGradICON.

    The network is then given images as m2m-bids prepares them, clipped at a high percentile and
    scaled to [0, 1] with a background of zero. The weights of uniGradICON and multiGradICON are
    of 175 voxels along every axis, whatever the field of view, and of images scaled from their
    minimum and their 99th percentile (CT from -1000 to 1000 HU); give ``grid_size=175`` and a
    spacing at which that grid holds the head, and check the results before use.

    Parameters
    ----------
    file : Path or str
        Checkpoint.
    folder : Path or str
        Weights folder to write, new or without weights.
    modalities : sequence of str
        Modalities to register with T1w by these weights, ``"pet"`` or ``"fa"``.
    grid_size : int
        Voxels along every axis of the grid it was trained on.
    spacing_mm : float
        Their size.
    training_data : str
        What it was trained on, for the card.

    Returns
    -------
    WeightsCard
        As written; its details name the checkpoint and its SHA-256.

    Raises
    ------
    WeightsError
        If the checkpoint cannot be read or is of another network, an argument makes no sense, or
        the folder holds weights already or cannot be written.
    """
    file, folder = Path(file), Path(folder)
    if (folder / CARD_NAME).exists():
        raise WeightsError(f"{folder}: holds weights already; name a new folder")
    _check_card(modalities, grid_size, spacing_mm)
    state, sha256 = _read_state(file)
    network = _rebuild(state, file)
    config = network.config
    smallest = 2 ** (config.n_scales + len(config.down_widths) - 2) + 1
    if grid_size < smallest:
        raise WeightsError(
            f"grid_size must be at least {smallest} for the network of {file}, got {grid_size}"
        )
    card = WeightsCard(
        network="gradicon",
        config=asdict(config),
        grid_size=grid_size,
        spacing_mm=float(spacing_mm),
        modalities=tuple(modalities),
        training_data=training_data,
        training_command=f"not by m2m-bids; converted from {file.name} by m2m-bids-convert",
        details={"source_file": file.name, "source_sha256": sha256, "torch": torch.__version__},
    )
    try:
        return save_weights(network, card, folder)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be written ({error.strerror})") from error


def _check_card(modalities: Sequence[str], grid_size: int, spacing_mm: float) -> None:
    unknown = [modality for modality in modalities if modality not in _MODALITIES]
    if unknown or not modalities or len(set(modalities)) < len(modalities):
        raise WeightsError(
            f"modalities must be some of {', '.join(_MODALITIES)}, got"
            f" {', '.join(modalities) or 'none'}"
        )
    if grid_size < 1:
        raise WeightsError(f"grid_size must be positive, got {grid_size}")
    if not (spacing_mm > 0 and math.isfinite(spacing_mm)):
        raise WeightsError(f"spacing_mm must be positive, got {spacing_mm:g}")


def _read_state(file: Path) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of a checkpoint, and the SHA-256 of the file."""
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: not a PyTorch file of tensors and plain values only; other objects are not"
            " unpickled, since that could run any program. Save the network's state_dict() alone."
        ) from error
    except (
        # What a damaged or foreign file makes of the reader.
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise WeightsError(f"{file}: not a PyTorch file, or damaged; get it again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{file}: holds no state dict, but {_kind(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{file}: holds {_kind(value)} named {name!r}, where a state dict holds tensors"
            )
    return content, sha256


def _kind(value: object) -> str:
    is_empty = value is None or (isinstance(value, dict) and not value)
    return "nothing" if is_empty else f"a {type(value).__name__}"


def _rebuild(state: dict[str, Tensor], file: Path) -> GradICON:
    """Rebuild the network whose tensors these are."""
    weights = {
        name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in _BUFFERS
    }
    prefix, n_scales, n_last_steps = _find_cascade(weights, file)
    foreign = next((name for name in weights if not name.startswith(prefix)), None)
    if foreign is not None:
        raise WeightsError(f"{file}: {foreign} is no part of the network; {_OTHER_NETWORK}")
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    try:
        renamed = from_icon(weights, n_scales=n_scales, n_last_steps=n_last_steps)
    except ValueError as error:
        raise WeightsError(f"{file}: {prefix}{error}; {_OTHER_NETWORK}") from error
    try:
        config = GradICONConfig(
            down_widths=_widths(renamed, "down_convs", 0),
            up_widths=_widths(renamed, "up_convs", 1),
            n_scales=n_scales,
            n_last_steps=n_last_steps,
        )
    except ValueError as error:
        raise WeightsError(f"{file}: {error}; {_OTHER_NETWORK}") from error
    with torch.device("meta"):
        expected = GradICON(config).state_dict()
    theirs = icon_names(n_scales, n_last_steps)
    for name, tensor in expected.items():
        unet = name[: name.index(".", len("unets."))]
        shown = f"{name} (of {prefix}{theirs[unet]})"
        if name not in renamed:
            raise WeightsError(f"{file}: lacks the tensor {shown}; {_OTHER_NETWORK}")
        if renamed[name].shape != tensor.shape:
            raise WeightsError(
                f"{file}: the tensor {shown} has the shape {tuple(renamed[name].shape)}, not"
                f" {tuple(tensor.shape)}; {_OTHER_NETWORK}"
            )
        if not torch.isfinite(renamed[name]).all():
            raise WeightsError(f"{file}: the tensor {shown} has values that are not finite")
    surplus = next((name for name in renamed if name not in expected), None)
    if surplus is not None:
        raise WeightsError(f"{file}: {surplus} is no part of the network; {_OTHER_NETWORK}")
    network = GradICON(config)
    network.load_state_dict(renamed)
    return network


def _find_cascade(weights: dict[str, Tensor], file: Path) -> tuple[str, int, int]:
    """Return what stands before all names, the number of scales, and that of last steps."""
    unets = set()
    for name in weights:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in _PARTS), 0)
        if at:
            unets.add(".".join(parts[:at]))
    for n_scales in range(1, len(unets) + 1):
        n_last_steps = len(unets) - n_scales
        names = set(icon_names(n_scales, n_last_steps).values())
        first = min(unets)
        for prefix in {first.removesuffix(name) for name in names}:
            if {prefix + name for name in names} == unets and (f".{prefix}").endswith("."):
                return prefix, n_scales, n_last_steps
    raise WeightsError(f"{file}: {_OTHER_NETWORK}")


def _widths(state: dict[str, Tensor], part: str, axis: int) -> tuple[int, ...]:
    """Return the channels that the convolutions of the first U-Net give, finest first."""
    widths: list[int] = []
    while (tensor := state.get(name := f"unets.0.{part}.{len(widths)}.weight")) is not None:
        if tensor.ndim != 5 or not tensor.numel():
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not five axes")
        widths.append(tensor.shape[axis])
    return tuple(widths)
