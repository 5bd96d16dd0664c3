"""Train a network on a cohort of rigidly aligned scans, without Nipype and BIDS."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from m2m_bids.api import images_on_grid
from m2m_bids.evaluation.scan_files import SCAN_NAME
from m2m_bids.json_files import read_json_object
from m2m_bids.spatial.conform import sample_on_grid, template_grid
from m2m_bids.spatial.images import load_image
from m2m_bids.whole_files import replacing, replacing_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from m2m_bids.registration.sampling import CycleSampler, TrainingScan
    from m2m_bids.registration.training import Predict, Processes
    from m2m_bids.registration.weights import WeightsCard

SPLITS_NAME = "splits.tsv"
SPLITS = ("train", "validation", "test")
MAX_VALIDATION_PAIRS = 20
COMPACT_GRID = (64, 3.0)
PAPER_GRID = (128, 1.5)

NetworkSize = Literal["compact", "paper"]


@dataclass(frozen=True)
class TrainingOptions:
    """
    What to train, and how long.

    Parameters
    ----------
    network : str
        Name in the registry of networks.
    network_size : {"compact", "paper"}
        ``"compact"`` for processors, on 64 voxels of 3 mm with a learning rate of 1e-3 that falls;
        ``"paper"`` for GPUs, on 128 voxels of 1.5 mm with the paper's constant 5e-5.
    objective : str
        One of `m2m_bids.registration.presets.OBJECTIVES`.
    pre_aligned : str
        Number or share of the subjects whose own pair may be the bridge.
    aligned_share : float
        How often the bridge is such a pair, where there are any.
    n_iterations : int
    batch_size, learning_rate : optional
        In each process; by default those of the network's size and objective.
    start_from : Path, optional
        Weights folder to start from, which then says network, size and grid.
    use_bfloat16 : bool, optional
        By default where the device computes in it.
    seed : int
    validate_every : int
        Iterations.
    grid : tuple of int and float, optional
        Voxels along every axis, and their size in mm; by default that of the network's size.
    """

    network: str = "gradicon"
    network_size: NetworkSize = "compact"
    objective: str = "m2m+gcc"
    pre_aligned: str = "0"
    aligned_share: float = 1.0
    n_iterations: int = 50_000
    batch_size: int | None = None
    learning_rate: float | None = None
    start_from: Path | None = None
    use_bfloat16: bool | None = None
    seed: int = 0
    validate_every: int = 500
    grid: tuple[int, float] | None = None

    @property
    def is_paper(self) -> bool:
        """Whether the paper's batch size and learning rate are the defaults."""
        return self.network_size == "paper" and self.start_from is None


def training_grid(options: TrainingOptions) -> tuple[int, float]:
    """
    Return the grid that a training works on.

    Parameters
    ----------
    options : TrainingOptions

    Returns
    -------
    size : int
        Voxels along every axis.
    spacing_mm : float

    Raises
    ------
    WeightsError
        If the weights to start from cannot be read.
    """
    if options.start_from:
        from m2m_bids.registration.weights import read_card

        card = read_card(options.start_from)
        return card.grid_size, card.spacing_mm
    if options.grid:
        return options.grid
    return COMPACT_GRID if options.network_size == "compact" else PAPER_GRID


def save_training_scan(
    folder: Path,
    description: dict[str, str],
    files: dict[str, Path | str],
    *,
    fixed2moving: np.ndarray,
    template2fixed: np.ndarray,
    grid: tuple[int, float],
) -> Path:
    """
    Bring a rigidly aligned scan to a network's grid, and write it for training.

    Parameters
    ----------
    folder : Path
        Of the scan; it appears at once, when everything is in it.
    description : dict
        ``name``, ``subject`` and ``modality`` of the scan.
    files : dict of str to path
        ``moving``, ``fixed``, ``mask`` and, optional, ``labels`` on the grid of ``fixed``.
    fixed2moving, template2fixed : ndarray, shape (4, 4)
        Maps from fixed points to moving points, and from MNI points to fixed points, RAS+ mm.
    grid : tuple of int and float
        Voxels along every axis, and their size in MNI space, mm.

    Returns
    -------
    Path
        The folder, as `find_training_scans` reads it.

    Raises
    ------
    ImageError
        If the images do not overlap.
    """
    network_grid = template_grid(template2fixed, size=grid[0], spacing_mm=grid[1])
    images = {name: load_image(file) for name, file in files.items()}
    moving, fixed = images_on_grid(
        images["moving"],
        images["fixed"],
        images["mask"],
        fixed2moving=fixed2moving,
        grid=network_grid,
    )
    arrays = {"functional": moving.astype(np.float16), "t1w": fixed.astype(np.float16)}
    if "labels" in images:
        labels = sample_on_grid(images["labels"], network_grid, order=0)
        arrays["labels"] = np.rint(labels).astype(np.uint8)
    write_training_arrays(folder, description, arrays)
    return folder


def write_training_arrays(
    folder: Path, description: dict[str, str], arrays: dict[str, np.ndarray]
) -> None:
    """
    Write the arrays of a scan; their folder appears when it is whole.

    Parameters
    ----------
    folder : Path
    description : dict
        ``name``, ``subject`` and ``modality`` of the scan.
    arrays : dict of str to ndarray, shape (n, n, n)
        ``functional`` and ``t1w`` in [0, 1] and, optional, ``labels``.
    """
    with replacing_folder(folder) as beside:
        for name, array in arrays.items():
            np.save(beside / f"{name}.npy", array, allow_pickle=False)
        (beside / SCAN_NAME).write_text(json.dumps(description, indent=2) + "\n")


def find_training_scans(images_dir: Path, names: Iterable[str]) -> "list[TrainingScan]":
    """
    Find the scans that `save_training_scan` has written.

    Parameters
    ----------
    images_dir : Path
        Their common folder.
    names : iterable of str
        Names of the scans that are wanted; those that are not there are left out.

    Returns
    -------
    list of TrainingScan
    """
    from m2m_bids.registration.sampling import TrainingScan

    found = []
    for name in sorted(set(names)):
        file = images_dir / name / SCAN_NAME
        if file.is_file():
            found.append(TrainingScan(folder=file.parent, **read_json_object(file)))
    return found


def split_subjects(subjects: Iterable[str], file: Path, *, seed: int = 0) -> dict[str, str]:
    """
    Split subjects into those to train, to validate and to test on.

    A tenth of them, at least two, is for validation from 8 subjects on, and as many for the test
    from 12 on. Subjects that the file has keep their split, so that it may also be written by
    hand.

    Parameters
    ----------
    subjects : iterable of str
    file : Path
        ``splits.tsv``: ``participant_id`` and ``split``, one of `SPLITS`.
    seed : int

    Returns
    -------
    dict of str to str
        Split of each subject.

    Raises
    ------
    ValueError
        If the file is not as described, or has a subject twice.
    """
    subjects = sorted(set(subjects))
    known = read_splits(file) if file.is_file() else {}
    n_held_out = max(2, round(0.1 * len(subjects)))
    wanted = {
        "validation": n_held_out if len(subjects) >= 8 else 0,
        "test": n_held_out if len(subjects) >= 12 else 0,
    }
    splits = {subject: known[subject] for subject in subjects if subject in known}
    new = [subject for subject in subjects if subject not in known]
    shuffled = [new[i] for i in np.random.default_rng(seed).permutation(len(new))]
    for subject in shuffled:
        counts = {name: list(splits.values()).count(name) for name in SPLITS}
        missing = [name for name in ("validation", "test") if counts[name] < wanted[name]]
        # A run that goes on with more subjects trains on them, and keeps what it measures on.
        splits[subject] = missing[0] if missing and not known else "train"
    return splits


def record_splits(splits: dict[str, str], file: Path) -> None:
    """
    Write which subject is in which split, beside those that the file has already.

    Parameters
    ----------
    splits : dict of str to str
        As `split_subjects` gives them.
    file : Path
    """
    rows = (read_splits(file) if file.is_file() else {}) | splits
    lines = [f"sub-{subject}\t{rows[subject]}" for subject in sorted(rows)]
    with replacing(file, is_alone=True) as beside:
        beside.write_text("\n".join(["participant_id\tsplit", *lines]) + "\n")


def read_splits(file: Path) -> dict[str, str]:
    """
    Read which subject of a training is in which split.

    Parameters
    ----------
    file : Path
        ``splits.tsv`` of a training.

    Returns
    -------
    dict of str to str
        One of `SPLITS` for each subject.

    Raises
    ------
    ValueError
        If the file is not as described, or has a subject twice.
    """
    splits: dict[str, str] = {}
    header, *lines = file.read_text().splitlines()
    for number, line in enumerate(lines, start=2):
        subject, _, split = line.partition("\t")
        subject = subject.removeprefix("sub-")
        if header != "participant_id\tsplit" or split not in SPLITS or subject in splits:
            raise ValueError(
                f"{file}, line {number}: {line!r}; expected columns participant_id and split, one"
                f" of {', '.join(SPLITS)}, and each subject once"
            )
        splits[subject] = split
    return splits


class CohortValidation:
    """
    Pairs of different subjects on which a network is tried while it is trained.

    Parameters
    ----------
    scans : sequence of TrainingScan
        Of the subjects for validation.
    seed : int
        Chooses the pairs, at most `MAX_VALIDATION_PAIRS`.
    """

    def __init__(self, scans: "Sequence[TrainingScan]", *, seed: int = 0):
        pairs = [
            (moving, fixed)
            for moving in scans
            for fixed in scans
            if moving.subject != fixed.subject and moving.modality == fixed.modality
        ]
        order = np.random.default_rng(seed).permutation(len(pairs))[:MAX_VALIDATION_PAIRS]
        self.pairs = [pairs[i] for i in order]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.pairs)

    def __call__(self, predict: "Predict", index: int, device: "torch.device") -> dict[str, float]:
        """
        Register a pair and measure it.

        Parameters
        ----------
        predict : callable
            Takes moving and fixed images to displacements.
        index : int
            Of the pair.
        device : torch.device

        Returns
        -------
        dict of str to float
            ``dsc`` and ``dsc_before``, the mean Dice coefficient of the labels after and before
            (not a number without labels); ``folding_percent``, voxels of the fixed brain whose
            Jacobian determinant is not positive; ``lncc`` and ``mi``, the similarity of both
            modalities, which Fig. 1 of the paper shows to mislead.
        """
        from m2m_bids.registration.grids import sample
        from m2m_bids.registration.maps import (
            jacobian_determinant,
            map_from_displacement,
            warp,
        )
        from m2m_bids.registration.similarity import lncc_loss, mutual_information_loss

        moving, fixed = self.pairs[index]
        functional, t1w = (image[None].to(device) for image in
                           (moving.read("functional"), fixed.read("t1w")))  # fmt: skip
        phi = map_from_displacement(predict(functional, t1w))
        moved = warp(functional, phi)
        brain = t1w[:, 0, :-1, :-1, :-1] > 0
        folds = jacobian_determinant(phi)[brain] <= 0
        measures = {
            "folding_percent": 100 * folds.float().mean().item(),
            "lncc": 1 - lncc_loss(moved, t1w).item(),
            "mi": -mutual_information_loss(moved, t1w).item(),
            "dsc": float("nan"),
            "dsc_before": float("nan"),
        }
        if moving.has_labels and fixed.has_labels:
            known, target = moving.read("labels")[None], fixed.read("labels")[None]
            warped = sample(known.float().to(device), phi, mode="nearest").cpu()
            measures["dsc"] = _dice(warped.byte(), target)
            measures["dsc_before"] = _dice(known, target)
        return measures


def _dice(one: "torch.Tensor", other: "torch.Tensor") -> float:
    from m2m_bids.evaluation.overlap import dice_per_label

    scores = dice_per_label(one.numpy(), other.numpy())
    return float(np.mean(list(scores.values()))) if scores else float("nan")


def train_network(
    scans: "Sequence[TrainingScan]",
    options: TrainingOptions,
    run_dir: Path,
    *,
    processes: "Processes | None" = None,
    training_command: str = "",
    shows_progress: bool = False,
) -> Path:
    """
    Train a network on a cohort; a training that was stopped is continued.

    Parameters
    ----------
    scans : sequence of TrainingScan
        All of the cohort; they are split by subject, and the split is written to
        ``run_dir/splits.tsv``.
    options : TrainingOptions
    run_dir : Path
        Checkpoint, logs, and at the end ``weights/``.
    processes : Processes, optional
        One process on the device that is there by default.
    training_command : str
        For the card of the weights.
    shows_progress : bool

    Returns
    -------
    Path
        The weights folder.

    Raises
    ------
    CohortError
        If there are too few subjects.
    TrainingError
        If training cannot go on.
    WeightsError
        If the weights to start from cannot be used.
    """
    from m2m_bids.registration.m2m import objective_losses
    from m2m_bids.registration.presets import preset
    from m2m_bids.registration.training import TrainingConfig, TrainingTask, fit
    from m2m_bids.registration.weights import save_weights

    name, network = _network(options)
    _, spacing_mm = training_grid(options)
    objective = preset(name, options.objective, spacing_mm=spacing_mm).objective
    splits = _splits(scans, options, run_dir)
    record_splits(splits, run_dir / SPLITS_NAME)
    by_split = {
        split: [scan for scan in scans if splits[scan.subject] == split] for split in SPLITS
    }
    cycles = _cycles(by_split["train"], options)
    config = TrainingConfig(
        n_iterations=options.n_iterations,
        seed=options.seed,
        use_bfloat16=options.use_bfloat16,
        validate_every=min(options.validate_every, options.n_iterations),
        **_optimisation(options),
    )
    task = TrainingTask(
        network,
        lambda predict, pairs: objective_losses(predict, pairs, objective)[0],
        cycles,
        CohortValidation(by_split["validation"], seed=options.seed),
        identity={**_same_when_resumed(options), "scans": _digest(by_split["train"])},
    )
    trained, _ = fit(task, config, run_dir, processes=processes, shows_progress=shows_progress)
    weights_dir = run_dir / "weights"
    if is_first_process():
        details = {
            "objective": asdict(objective),
            "pre_aligned_subjects": len(cycles.config.pre_aligned),
        }
        card = _card(name, trained, by_split["train"], options, details, training_command)
        save_weights(trained, card, weights_dir)
    return weights_dir


def check_cohort(scans: "Sequence[TrainingScan]", options: TrainingOptions, run_dir: Path) -> None:
    """
    Check that there are enough subjects and voxels, before images are prepared.

    Parameters
    ----------
    scans : sequence of TrainingScan
        Their folders may be missing.
    options : TrainingOptions
    run_dir : Path
        Of the training, which may have a split already.

    Raises
    ------
    CohortError
        If there are too few.
    """
    from m2m_bids.registration.sampling import CohortError

    if not options.start_from:
        size, smallest = training_grid(options)[0], _config(options).smallest_image
        if size < smallest:
            raise CohortError(
                f"--grid-size {size}: the network {options.network} needs {smallest} voxels or"
                " more along an axis. Give a larger --grid-size and a smaller --grid-spacing."
            )
    splits = _splits(scans, options, run_dir)
    _cycles([scan for scan in scans if splits[scan.subject] == "train"], options)


def _splits(
    scans: "Sequence[TrainingScan]", options: TrainingOptions, run_dir: Path
) -> dict[str, str]:
    subjects = {scan.subject for scan in scans}
    return split_subjects(subjects, run_dir / SPLITS_NAME, seed=options.seed)


def _cycles(scans: "Sequence[TrainingScan]", options: TrainingOptions) -> "CycleSampler":
    from m2m_bids.registration.presets import preset
    from m2m_bids.registration.sampling import CycleSampler, SamplingConfig, choose_pre_aligned

    defaults = preset(options.network, options.objective)
    is_m2m = defaults.objective.is_m2m
    subjects = {scan.subject for scan in scans}
    pre_aligned = choose_pre_aligned(subjects, options.pre_aligned, seed=options.seed)
    sampling = SamplingConfig(
        batch_size=options.batch_size or (defaults.batch_size if options.is_paper else 2),
        seed=options.seed,
        has_bridge=is_m2m,
        pre_aligned=pre_aligned if is_m2m else frozenset(),
        aligned_share=options.aligned_share,
    )
    return CycleSampler(scans, sampling)


def _same_when_resumed(options: TrainingOptions) -> dict[str, object]:
    """Give the options that a training which goes on must share with the one that was stopped."""
    free = ("n_iterations", "use_bfloat16", "validate_every")
    described = {name: value for name, value in asdict(options).items() if name not in free}
    return {**described, "start_from": str(options.start_from or "")}


def _card(
    name: str,
    network: "nn.Module",
    scans: "Sequence[TrainingScan]",
    options: TrainingOptions,
    details: dict[str, object],
    training_command: str,
) -> "WeightsCard":
    """Say what was trained, and on what."""
    from m2m_bids.registration.weights import WeightsCard

    size, spacing_mm = training_grid(options)
    n_subjects = len({scan.subject for scan in scans})
    return WeightsCard(
        network=name,
        config=asdict(network.config),
        grid_size=size,
        spacing_mm=spacing_mm,
        modalities=tuple(sorted({scan.modality for scan in scans})),
        training_data=f"{len(scans)} scans of {n_subjects} participants",
        training_command=training_command,
        details={
            **details,
            "training_subjects": n_subjects,
            "iterations": options.n_iterations,
            "start_from": str(options.start_from or ""),
            "torch": importlib.metadata.version("torch"),
            "python": platform.python_version(),
        },
    )


def _digest(scans: "Sequence[TrainingScan]") -> str:
    names = "\n".join(sorted(scan.name for scan in scans))
    return f"{len(scans)} ({hashlib.sha256(names.encode()).hexdigest()[:12]})"


def _optimisation(options: TrainingOptions) -> dict:
    if options.is_paper:
        rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
        return {**rate, "schedule": "constant"}
    return {
        "learning_rate": options.learning_rate or (2e-4 if options.start_from else 1e-3),
        "schedule": "cosine",
        "average_decay": 0.999,
        "gradient_norm": 1.0,
    }


def _network(options: TrainingOptions) -> "tuple[str, nn.Module]":
    """Make the network of the options, with known weights if there are any to start from."""
    import torch

    from m2m_bids.registration.networks import NETWORKS
    from m2m_bids.registration.weights import load_weights

    if options.start_from:
        network, card = load_weights(options.start_from)
        return card.network, network
    torch.manual_seed(options.seed)
    return options.network, NETWORKS[options.network].network(_config(options))


def _config(options: TrainingOptions) -> Any:
    """Give the sizes of a network that starts from random weights."""
    from m2m_bids.registration.networks import NETWORKS

    family = NETWORKS[options.network]
    return family.compact if options.network_size == "compact" else family.paper()


def is_first_process() -> bool:
    """Tell whether this is the process that writes results, of all that train together."""
    import torch

    distributed = torch.distributed
    return not distributed.is_initialized() or distributed.get_rank() == 0
