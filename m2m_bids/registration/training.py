"""The optimisation of a network, on Lightning: checkpoints, resume, several processes, logs."""

import copy
import csv
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from m2m_bids.registration.edges import InPrecision
from m2m_bids.whole_files import replacing

LOGGER = logging.getLogger(__name__)
CHECKPOINT_NAME = "checkpoint.ckpt"
TRAINING_LOG = "training.csv"
VALIDATION_LOG = "validation.csv"
# What may differ between the slices of one training without changing its result.
_FREE_TO_CHANGE = {"checkpoint_minutes", "log_every", "validate_every"}

Losses = dict[str, Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]


class TrainingError(RuntimeError):
    """A training that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class TrainingConfig:
    """
    How to optimise; the defaults are the paper's.

    Parameters
    ----------
    n_iterations : int
        Of the whole training.
    learning_rate : float
        Adam's.
    schedule : {"constant", "cosine"}
        ``"cosine"``: after a linear warm-up of 200 iterations, or a tenth of them, the learning
        rate falls along half a cosine to a hundredth.
    average_decay : float
        Of the moving average of the weights, which is what training gives; 0 for none.
    gradient_norm : float, optional
        Gradients are scaled down to this norm.
    seed : int
        Of what is random in the network.
    use_bfloat16 : bool, optional
        Autocast to bfloat16 in the network; by default where the device computes in it
        (`has_fast_bfloat16`), so that a run can go on on another machine.
    checkpoint_minutes : float
        Between checkpoints.
    log_every, validate_every : int
        Iterations between rows of the logs.
    """

    n_iterations: int
    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    average_decay: float = 0.0
    gradient_norm: float | None = None
    seed: int = 0
    use_bfloat16: bool | None = None
    checkpoint_minutes: float = 3.0
    log_every: int = 100
    validate_every: int = 500

    def rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration, as a factor of ``learning_rate``."""
        if self.schedule == "constant":
            return 1.0
        n_iterations = max(1, self.n_iterations)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / n_iterations)))
        n_warm_up = min(200, n_iterations / 10)
        return (0.01 + 0.99 * cosine) * min(1.0, (iteration + 1) / n_warm_up)


@dataclass(frozen=True)
class Processes:
    """
    Where a training runs.

    Parameters
    ----------
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    n_devices, n_nodes : int
        Processes on a node, and nodes; several are started by torchrun or SLURM, each of which
        runs the same program.
    """

    device: str = "auto"
    n_devices: int = 1
    n_nodes: int = 1

    @classmethod
    def from_environment(cls, device: str) -> "Processes":
        """Read the numbers that torchrun or SLURM has set; one process without them."""
        variables = os.environ
        if "LOCAL_WORLD_SIZE" in variables and "WORLD_SIZE" in variables:
            n_devices = int(variables["LOCAL_WORLD_SIZE"])
            return cls(device, n_devices, int(variables["WORLD_SIZE"]) // n_devices)
        if SLURMEnvironment.detect():
            n_tasks, n_nodes = (int(variables[f"SLURM_{n}"]) for n in ("NTASKS", "NNODES"))
            return cls(device, n_tasks // n_nodes, n_nodes)
        return cls(device)


class Share(NamedTuple):
    """The part of an iteration's batch that one of ``n_ranks`` processes computes."""

    iteration: int
    rank: int
    n_ranks: int
    device: torch.device

    def numbers(self, batch_size: int) -> range:
        """Give the numbers of the share's items; those of all ranks follow each other."""
        start = (self.iteration * self.n_ranks + self.rank) * batch_size
        return range(start, start + batch_size)


class Validation(Protocol):
    """Examples that a network is tried on while it is trained."""

    def __len__(self) -> int:
        """Count the examples."""

    def __call__(self, predict: Predict, index: int, device: torch.device) -> dict[str, float]:
        """Measure one example; not a number where a measure does not apply."""


@dataclass(frozen=True)
class TrainingTask:
    """
    What to optimise.

    Parameters
    ----------
    network : Module
        Optimised in place.
    objective : callable
        Takes a network-like callable and a batch to named loss terms, whose sum is minimised.
    batches : callable
        Takes a `Share` to its batch, always the same one.
    validation : Validation, optional
    is_replayable : bool
        All batches have tensors of the same shapes and are otherwise equal, and the objective does
        the same with each: a GPU can do it as one graph, without waiting for the CPU.
    identity : dict
        Anything else that a continued run must have in common with its checkpoint, in types that
        JSON has.
    """

    network: nn.Module
    objective: Callable[[Predict, Any], Losses]
    batches: Callable[[Share], Any]
    validation: Validation | None = None
    _: KW_ONLY
    is_replayable: bool = False
    identity: dict[str, Any] = field(default_factory=dict)


def has_fast_bfloat16(device: torch.device) -> bool:
    """
    Tell whether a device computes in bfloat16; others imitate it, many times slower than float32.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    bool
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fit(
    task: TrainingTask,
    config: TrainingConfig,
    run_dir: Path,
    *,
    processes: Processes | None = None,
    max_minutes: float = math.inf,
    shows_progress: bool = False,
) -> tuple[nn.Module, bool]:
    """
    Optimise a network until the end or until the time is up; a checkpoint there is continued.

    Parameters
    ----------
    task : TrainingTask
    config : TrainingConfig
    run_dir : Path
        Holds the checkpoint, ``training.csv``, ``validation.csv`` and TensorBoard's ``logs/``.
    processes : Processes, optional
        One process on the device that is there by default.
    max_minutes : float
        Of this slice.
    shows_progress : bool
        Draw a progress bar.

    Returns
    -------
    network : Module
        With averaged weights if they are averaged, on the CPU and in evaluation mode.
    is_done : bool
        Whether all iterations are done.

    Raises
    ------
    TrainingError
        If the checkpoint is of another training or cannot be read, the loss or a gradient is not
        finite, or a checkpoint cannot be written; the last one stays as it is.
    KeyboardInterrupt
        If it is interrupted; it goes on from the last checkpoint.
    """
    processes = processes or Processes()
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    task.network.train()
    module = _Optimisation(task, config, run_dir)
    checkpoint = run_dir / CHECKPOINT_NAME
    # A process that was killed while it wrote leaves a part of a checkpoint.
    (run_dir / f".{CHECKPOINT_NAME}.partial").unlink(missing_ok=True)
    ckpt_path = str(checkpoint) if checkpoint.is_file() else None
    on_interrupt = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # Advice on what is meant: an averaged network in evaluation mode, a folder that is there,
        # no `srun` outside of a job.
        warnings.filterwarnings("ignore", module="lightning")
        trainer = _trainer(config, run_dir, processes, max_minutes, shows_progress)
        try:
            trainer.fit(
                module,
                DataLoader(_Endless(), batch_size=None),
                _validation_loader(task.validation),
                ckpt_path=ckpt_path,
                weights_only=True,
            )
        except SystemExit as error:
            # Lightning ends the process when it is interrupted; who called may have more to do.
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from error
    trainer.save_checkpoint(checkpoint)
    return module.result.cpu().eval(), trainer.global_step >= config.n_iterations


class _Endless(IterableDataset):
    """Counts; batches are drawn by the number of the iteration, which a checkpoint keeps."""

    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1


def _validation_loader(validation: Validation | None) -> DataLoader | None:
    return DataLoader(range(len(validation)), batch_size=None) if validation else None


class Replay:
    """
    An objective as CUDA graphs, forward and backward: its many small kernels are launched at once.

    Parameters
    ----------
    predict : Module
        The network, on a GPU.
    objective : callable
        As of `TrainingTask`.
    batch : Any
        What the objective will be evaluated for, but for the values of its tensors.
    """

    def __init__(
        self, predict: nn.Module, objective: Callable[[Predict, Any], Losses], batch: Any
    ):
        terms = _Terms(predict, objective, batch).train()
        # Its inputs are the graph's own, into which others are copied.
        inputs = tuple(tensor.clone() for tensor in _tensors(batch))
        self._graphed = torch.cuda.make_graphed_callables(terms, inputs, allow_unused_input=True)
        self._names = terms.names

    def __call__(self, batch: Any) -> Losses:
        """Evaluate the objective; the losses are overwritten by the next call."""
        return dict(zip(self._names, self._graphed(*_tensors(batch)), strict=True))


class _Terms(nn.Module):
    """An objective that takes and gives tensors alone."""

    def __init__(
        self, predict: nn.Module, objective: Callable[[Predict, Any], Losses], batch: Any
    ):
        super().__init__()
        self.predict = predict
        self.objective = objective
        leaves, self.structure = tree_flatten(batch)
        self.leaves = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.names: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _HOLE else leaf for leaf in self.leaves]
        losses = self.objective(self.predict, tree_unflatten(leaves, self.structure))
        self.names[:] = losses
        return tuple(losses.values())


_HOLE = object()


def _tensors(batch: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))


class _Optimisation(pl.LightningModule):
    """The optimisation as Lightning wants it."""

    def __init__(self, task: TrainingTask, config: TrainingConfig, run_dir: Path):
        super().__init__()
        self.network = task.network
        self.average = None
        if config.average_decay:
            self.average = copy.deepcopy(task.network).eval().requires_grad_(False)
        self.task = task
        self.config = config
        self.run_dir = run_dir
        self._drawn: tuple[int, Any] = (-1, None)
        self._losses: Losses = {}
        self._replay: Replay | None = None

    @property
    def result(self) -> nn.Module:
        """The network that training gives."""
        return self.network if self.average is None else self.average

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=self.config.learning_rate,
            fused=self.device.type == "cuda" or None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.config.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, _: int) -> dict[str, Tensor]:
        share = Share(self.global_step, self.global_rank, self.trainer.world_size, self.device)
        # By the iteration, so that a continued run draws what an undisturbed one does.
        torch.manual_seed((self.config.seed * 1_000_003 + share.numbers(1)[0]) % 2**32)
        number, batch = self._drawn
        if number != share.iteration:
            batch = self._draw(share)
        losses = self._evaluate(batch)
        if self.device.type == "cuda":
            # While the GPU computes.
            later = share._replace(iteration=share.iteration + 1)
            self._drawn = later.iteration, self._draw(later)
        total = torch.stack(list(losses.values())).sum()
        # A replayed graph writes its losses to the same place again.
        self._losses = {name: loss.detach().clone() for name, loss in losses.items()}
        return {"loss": total} | self._losses

    def _draw(self, share: Share) -> Any:
        return move_data_to_device(self.task.batches(share), self.device)

    def _evaluate(self, batch: Any) -> Losses:
        if self.device.type != "cuda" or not self.task.is_replayable:
            return self.task.objective(self._predictor(self.network), batch)
        if self._replay is None:
            predictor = self._predictor(self.network)
            self._replay = Replay(predictor, self.task.objective, batch)
        return self._replay(batch)

    def configure_gradient_clipping(self, optimizer, *_: Any, **__: Any) -> None:
        limit = self.config.gradient_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        # One question: a GPU waits for the answer.
        if torch.isfinite(torch.stack([norm, *self._losses.values()])).all():
            return
        terms = {name: loss.item() for name, loss in self._losses.items()}
        what = f"the loss is not finite ({terms})"
        if all(map(math.isfinite, terms.values())):
            what = "the gradients are not finite"
        raise TrainingError(f"iteration {self.global_step}: {what}. {self._advice}")

    def update_average(self) -> None:
        """Move the average towards the current weights."""
        decay = min(self.config.average_decay, self.global_step / (self.global_step + 10))
        states = (self.average.state_dict(), self.network.state_dict())
        averaged, current = (
            [value for value in state.values() if value.is_floating_point()] for state in states
        )
        # All at once: on a GPU a call for each would take as long as the network.
        get_ema_multi_avg_fn(decay)(averaged, current, 0)
        for name, value in states[1].items():
            if not value.is_floating_point():
                states[0][name].copy_(value)

    def validation_step(self, index: int) -> None:
        measures = self.task.validation(self._predictor(self.result), int(index), self.device)
        known = {name: value for name, value in measures.items() if not math.isnan(value)}
        self.log_dict(known, on_epoch=True, batch_size=1, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = asdict(self.config)
        checkpoint["identity"] = self.task.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        free = set(_FREE_TO_CHANGE)
        if self.config.schedule == "constant":
            free.add("n_iterations")
        before = checkpoint.get("config", {}) | checkpoint.get("identity", {})
        now = asdict(self.config) | self.task.identity
        differences = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(set(before) | set(now))
            if name not in free and before.get(name) != now.get(name)
        ]
        if differences:
            raise TrainingError(
                f"{self.run_dir}: its checkpoint is of another training"
                f" ({'; '.join(differences)}). Continue with the same, or start in another folder."
            )

    def _predictor(self, network: nn.Module) -> InPrecision:
        use_bfloat16 = self.config.use_bfloat16
        if use_bfloat16 is None:
            use_bfloat16 = has_fast_bfloat16(self.device)
        return InPrecision(network, use_bfloat16=use_bfloat16)

    @property
    def _advice(self) -> str:
        return (
            f"The checkpoint in {self.run_dir} is from before; continue with a lower learning rate"
            " in another folder, or look for an image that is not as the others."
        )


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints that are written beside and then renamed, and read without unpickling."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        try:
            with replacing(Path(path), is_alone=True) as beside, beside.open("wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            # Where the disk is full, PyTorch complains of what follows from that.
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise TrainingError(
                f"{path}: the checkpoint could not be written ({cause}). The one before is as it"
                " was: make room, then continue the training."
            ) from error

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]}). Remove"
                " it to start anew."
            ) from error


class _Averaging(pl.Callback):
    """Average the weights; Lightning calls the module's own hook only after a checkpoint."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: _Optimisation, *_: Any) -> None:
        if module.average is not None:
            module.update_average()


class _Logs(pl.Callback):
    """Write the means of losses and the validation as CSV; rows after a checkpoint are undone."""

    def __init__(self, config: TrainingConfig, run_dir: Path):
        self.config = config
        self.run_dir = run_dir
        self._sums: dict[str, Tensor] = {}
        self._n_summed = 0
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "n_summed": self._n_summed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._n_summed = state["sums"], state["n_summed"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for name in (TRAINING_LOG, VALIDATION_LOG):
                _keep_rows(self.run_dir / name, trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        for name, value in outputs.items():
            value = value.detach()
            previous = self._sums.get(name)
            self._sums[name] = value if previous is None else previous.to(value) + value
        self._n_summed += 1
        if trainer.global_step % self.config.log_every:
            return
        means = {
            name: trainer.strategy.reduce(total / self._n_summed, reduce_op="mean").item()
            for name, total in self._sums.items()
        }
        self._sums, self._n_summed = {}, 0
        if trainer.is_global_zero:
            times = {
                "seconds": round(time.monotonic() - self._start, 1),
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
            }
            _append_row(self.run_dir / TRAINING_LOG, trainer.global_step, times | means)
        module.log_dict({f"train/{name}": value for name, value in means.items()})

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # A slice that ends validates too, wherever it stands.
        is_due = trainer.global_step % self.config.validate_every == 0
        if trainer.is_global_zero and is_due:
            measures = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if not name.startswith("train/")
            }
            _append_row(self.run_dir / VALIDATION_LOG, trainer.global_step, measures)


def read_log(file: Path) -> list[dict[str, float]]:
    """
    Read a log of a training.

    Parameters
    ----------
    file : Path
        ``training.csv`` or ``validation.csv`` of a run.

    Returns
    -------
    list of dict
        Numbers by the name of their column, such as ``iteration``; none if there is no file.
    """
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        rows = csv.DictReader(stream)
        return [{name: float(value) for name, value in row.items() if value} for row in rows]


def _keep_rows(file: Path, iteration: int) -> None:
    """Remove the rows of iterations that are done again after a checkpoint."""
    rows = read_log(file)
    kept = [row for row in rows if row["iteration"] <= iteration]
    if len(kept) < len(rows):
        _write_rows(file, kept)


def _append_row(file: Path, iteration: int, numbers: dict[str, float]) -> None:
    row = {"iteration": iteration}
    row |= {name: float(f"{value:.6g}") for name, value in numbers.items()}
    _write_rows(file, [*read_log(file), row])
    LOGGER.info("%s", row)


def _write_rows(file: Path, rows: list[dict[str, float]]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)
    with replacing(file, is_alone=True) as beside, beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns))
        writer.writeheader()
        writer.writerows(row | {"iteration": int(row["iteration"])} for row in rows)


class _StopInTime(pl.Callback):
    """Stop after some minutes of this slice; Lightning's own timer counts those before too."""

    def __init__(self, max_minutes: float):
        self._end = time.monotonic() + 60 * max_minutes

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        is_over = time.monotonic() > self._end
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(is_over, all=False)


class _ProgressBar(TQDMProgressBar):
    """A bar over all iterations of the training, not over an epoch."""

    def __init__(self, n_iterations: int):
        super().__init__()
        self._n_iterations = n_iterations

    @property
    def total_train_batches(self) -> int:
        return self._n_iterations


def _trainer(
    config: TrainingConfig,
    run_dir: Path,
    processes: Processes,
    max_minutes: float,
    shows_progress: bool,
) -> pl.Trainer:
    callbacks: list[pl.Callback] = [
        _Averaging(),
        _Logs(config, run_dir),
        ModelCheckpoint(
            run_dir,
            CHECKPOINT_NAME.removesuffix(".ckpt"),
            train_time_interval=timedelta(minutes=config.checkpoint_minutes),
            save_top_k=1,
            enable_version_counter=False,
        ),
    ]
    if math.isfinite(max_minutes):
        callbacks.append(_StopInTime(max_minutes))
    if shows_progress:
        callbacks.append(_ProgressBar(config.n_iterations))
    accelerator, _, index = processes.device.partition(":")
    plugins: list[Any] = [_WholeFiles()]
    if SLURMEnvironment.detect():
        # Who requeues is the batch script, which also continues from the newest checkpoint.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return pl.Trainer(
        accelerator=accelerator,
        devices=[int(index)] if index else processes.n_devices,
        num_nodes=processes.n_nodes,
        max_steps=config.n_iterations,
        max_epochs=-1,
        val_check_interval=config.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=plugins,
        logger=TensorBoardLogger(run_dir, name="logs", version=""),
        log_every_n_steps=config.log_every,
        enable_progress_bar=shows_progress,
        enable_model_summary=False,
        # All images are of one size.
        benchmark=accelerator != "cpu" and torch.cuda.is_available(),
        # PyTorch synchronises batch statistics on GPUs alone.
        sync_batchnorm=processes.n_devices * processes.n_nodes > 1
        and accelerator != "cpu"
        and torch.cuda.is_available(),
        use_distributed_sampler=True,
    )
