"""The level ``train``: prepare the images of a cohort, train a network on them."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.cli.environment import count_gpus, prepare_environment, use_one_heap
from m2m_bids.cli.prepare import empty_work_folder, prepare_images, usable_scans
from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan
    from m2m_bids.cohort import TrainingOptions
    from m2m_bids.registration.training import Processes

LOGGER = logging.getLogger("m2m_bids")


def run_training(settings: Settings) -> int:
    """
    Run the level ``train``.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    int
        0 if a network was trained, or its images prepared, from all scans; 1 if some failed.

    Raises
    ------
    ValueError
        If the cohort, the options or an earlier training in the same folder do not allow it.
    """
    if not settings.prepare_only:
        count_gpus(settings.device)
    scans = usable_scans(settings)
    if not settings.dry_run and _is_first_process():
        empty_work_folder(settings, scans)
    # Before Nipype and matplotlib are imported: both write to the home directory on import.
    prepare_environment(settings)
    options = _options(settings)
    images_dir = _images_dir(settings, options)
    _check(settings, scans, options)
    if settings.dry_run:
        sys.stdout.write(_dry_run_text(settings, scans, images_dir) + "\n")
        return 0

    from m2m_bids.cohort import training_grid
    from m2m_bids.registration.training import Processes
    from m2m_bids.workflows.cohort import TrainingImages

    images = TrainingImages(images_dir, *training_grid(options))
    processes = Processes.from_environment(settings.device)
    failures: dict[str, str] = {}
    due = [scan for scan in scans if not images.has(scan)]
    if due and processes.n_devices * processes.n_nodes > 1:
        LOGGER.warning(
            "%d of %d scans are not prepared and are left out; to prepare them, run once in one"
            " process with --prepare-only",
            *(len(due), len(scans)),
        )
    elif due:
        failures = prepare_images(settings, due, images)
    if settings.prepare_only:
        sys.stdout.write(
            "\n".join([f"{len(scans) - len(failures)} scans in {images_dir}", *_shown(failures)])
            + "\n"
        )
        return 1 if failures else 0
    with _hold_run_dir(settings):
        return _train(settings, scans, images_dir, options, processes, failures)


def _options(settings: Settings) -> "TrainingOptions":
    from m2m_bids.cohort import TrainingOptions
    from m2m_bids.registration.networks import NETWORKS
    from m2m_bids.registration.presets import OBJECTIVES

    for option, value, known in (
        ("--network", settings.network, sorted(NETWORKS)),
        ("--objective", settings.objective, OBJECTIVES),
    ):
        if value not in known:
            raise ValueError(f"{option}: {value!r} is unknown; known are {', '.join(known)}")
    return TrainingOptions(
        network=settings.network,
        network_size=settings.network_size,
        objective=settings.objective,
        pre_aligned=settings.pre_aligned,
        aligned_share=settings.aligned_share,
        n_iterations=settings.max_steps,
        batch_size=settings.batch_size or None,
        learning_rate=settings.learning_rate,
        start_from=settings.weights,
        use_bfloat16={"auto": None, "bfloat16": True, "float32": False}[settings.precision],
        seed=settings.random_seed,
        validate_every=settings.validate_every,
        grid=(settings.grid_size, settings.grid_spacing_mm) if settings.grid_size else None,
    )


def _images_dir(settings: Settings, options: "TrainingOptions") -> Path:
    from m2m_bids.cohort import training_grid

    size, spacing_mm = training_grid(options)
    return settings.training_dir / "images" / f"{size}x{spacing_mm:g}mm"


def _check(settings: Settings, scans: "list[Scan]", options: "TrainingOptions") -> None:
    """Refuse, before anything is computed, what would fail after it."""
    from m2m_bids.bids.locks import is_held, level_lock
    from m2m_bids.cohort import check_cohort

    check_cohort(_training_scans(scans, Path()), options, settings.run_dir)
    if not settings.prepare_only:
        is_running = _is_first_process() and is_held(level_lock("train", settings.run_dir))
        _refuse_to_begin_again(settings, is_running=is_running)


def _refuse_to_begin_again(settings: Settings, *, is_running: bool = False) -> None:
    """Refuse a training where there is one, unless it is to be continued."""
    from m2m_bids.registration.training import CHECKPOINT_NAME

    has_checkpoint = (settings.run_dir / CHECKPOINT_NAME).is_file()
    if (has_checkpoint or is_running) and not settings.resume:
        raise ValueError(
            f"{settings.run_dir}: there is a training already. Continue it with --resume, or give"
            " this one a folder of its own with --run-name."
        )


def _is_first_process() -> bool:
    """Tell whether this is the first of the processes that torchrun or SLURM has started."""
    variables = os.environ
    return int(variables.get("RANK", variables.get("SLURM_PROCID", "0"))) == 0


@contextlib.contextmanager
def _hold_run_dir(settings: Settings) -> Iterator[None]:
    """Keep other trainings off the folder of this one, of whose processes the first has it."""
    from m2m_bids.bids.locks import hold_level

    if not _is_first_process():
        yield
        return
    with hold_level("train", [settings.run_dir]):
        # Another one may have begun, and ended, meanwhile.
        _refuse_to_begin_again(settings)
        yield


def _training_scans(scans: "list[Scan]", images_dir: Path) -> list:
    from m2m_bids.registration.sampling import TrainingScan

    return [
        TrainingScan(scan.name, scan.subject, scan.modality, images_dir / scan.name)
        for scan in scans
    ]


def _train(
    settings: Settings,
    scans: "list[Scan]",
    images_dir: Path,
    options: "TrainingOptions",
    processes: "Processes",
    failures: dict[str, str],
) -> int:
    import torch

    from m2m_bids.api import DeviceError, explained_out_of_memory
    from m2m_bids.cohort import find_training_scans, is_first_process, train_network
    from m2m_bids.registration.training import VALIDATION_LOG, TrainingError, read_log
    from m2m_bids.reports.training import draw_training

    for line in _shown(failures):
        LOGGER.warning("left out: %s", line)
    use_one_heap()
    if processes.n_devices == 1:
        torch.set_num_threads(settings.nprocs)
    advice = "give a smaller --batch-size with --resume, or a coarser --grid-spacing"
    try:
        with explained_out_of_memory(advice):
            weights_dir = train_network(
                find_training_scans(images_dir, (scan.name for scan in scans)),
                options,
                settings.run_dir,
                processes=processes,
                training_command=shlex.join(["m2m-bids", *sys.argv[1:]]),
                shows_progress=sys.stdout.isatty(),  # where Lightning draws it
            )
    except (TrainingError, DeviceError) as error:
        raise ValueError(str(error)) from error
    if not is_first_process():
        return 0
    lines = []
    if rows := read_log(settings.run_dir / VALIDATION_LOG):
        lines.append(_last_validation(rows[-1]))
        lines.append(f"Curves:  {draw_training(rows, settings.run_dir / 'training.svg')}")
    lines += [
        f"Weights: {weights_dir}",
        "Use them: m2m-bids BIDS OUT participant --weights " + shlex.quote(str(weights_dir)),
        *_shown(failures),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failures else 0


def _last_validation(row: dict[str, float]) -> str:
    parts = [f"folds {row['folding_percent']:.3f} %", f"LNCC {row['lncc']:.3f}"]
    if "dsc" in row:
        parts.insert(0, f"DSC {row['dsc_before']:.3f} before, {row['dsc']:.3f} after")
    line = f"Validation at iteration {row['iteration']:.0f}: " + ", ".join(parts)
    if row.get("dsc", 1) < row.get("dsc_before", 0):
        line += (
            "\nThe overlap is lower than without the network: train for longer or on more"
            " participants, or start from the package's weights (--weights default)."
        )
    return line


def _dry_run_text(settings: Settings, scans: "list[Scan]", images_dir: Path) -> str:
    by_modality = {
        modality: [scan for scan in scans if scan.modality == modality]
        for modality in settings.modalities
    }
    lines = [f"m2m-bids would train {settings.network} with {settings.objective} on"]
    lines += [
        f"  {len(found)} {modality} scans of {len({scan.subject for scan in found})} participants"
        for modality, found in by_modality.items()
    ]
    lines += [f"images in   {images_dir}", f"training in {settings.run_dir}"]
    return "\n".join(lines)


def _shown(failures: dict[str, str]) -> list[str]:
    return [f"  failed: {name}: {reason}" for name, reason in failures.items()]
