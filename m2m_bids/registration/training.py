"""The optimisation of a network: checkpoints, resume, a log."""

import copy
import csv
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LOGGER = logging.getLogger(__name__)
CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "training.csv"

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingConfig:
    """
    How to optimise.

    Parameters
    ----------
    n_iterations : int
        Of the whole training, whose learning rate falls along half a cosine to a hundredth.
    learning_rate : float
        Adam's, after a linear warm-up of 200 iterations.
    average_decay : float
        Of the moving average of the weights, which is what training gives.
    gradient_norm : float
        Gradients are scaled down to this norm.
    checkpoint_minutes : float
        Between checkpoints.
    use_bfloat16 : bool, optional
        Autocast to bfloat16 in the network; by default where the device computes in it
        (`has_fast_bfloat16`), so that a run can go on on another machine.
    """

    n_iterations: int
    learning_rate: float = 1e-3
    average_decay: float = 0.999
    gradient_norm: float = 1.0
    checkpoint_minutes: float = 3.0
    use_bfloat16: bool | None = None


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


class Trainer:
    """
    Optimise a network in slices; the state between them is one checkpoint file.

    Parameters
    ----------
    network : Module
        Optimised in place.
    objective : callable
        Takes a network-like callable and a batch to named loss terms, whose sum is minimised.
    batches : callable
        Takes an iteration's number to its batch, always the same one.
    config : TrainingConfig
    run_dir : Path
        Holds the checkpoint and the log; a checkpoint there is continued.

    Raises
    ------
    ValueError
        If a checkpoint there was trained with another configuration.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Callable[[Callable, Any], Losses],
        batches: Callable[[int], Any],
        config: TrainingConfig,
        run_dir: Path,
    ):
        self.network = network
        self.objective = objective
        self.batches = batches
        self.config = config
        self.run_dir = Path(run_dir)
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
        self.iteration = 0
        self.use_bfloat16 = config.use_bfloat16
        if self.use_bfloat16 is None:
            self.use_bfloat16 = has_fast_bfloat16(next(network.parameters()).device)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if (self.run_dir / CHECKPOINT_NAME).is_file():
            self._load()

    def run(self, *, max_minutes: float = math.inf) -> bool:
        """
        Optimise until the end or until the time is up, then write a checkpoint.

        Parameters
        ----------
        max_minutes : float

        Returns
        -------
        bool
            True when all iterations are done.

        Raises
        ------
        FloatingPointError
            If the loss or a gradient is not finite; the last checkpoint stays as it is.
        """
        start = last_save = time.monotonic()
        sums: dict[str, float] = {}
        n_summed = 0
        self.network.train()
        while self.iteration < self.config.n_iterations:
            for name, value in self._step().items():
                sums[name] = sums.get(name, 0.0) + value
            n_summed += 1
            now = time.monotonic()
            if n_summed == 100:
                self._log({name: value / n_summed for name, value in sums.items()}, now - start)
                sums, n_summed = {}, 0
            if now - last_save > 60 * self.config.checkpoint_minutes:
                self._save()
                last_save = now
            if now - start > 60 * max_minutes:
                break
        self._save()
        return self.iteration >= self.config.n_iterations

    def learning_rate(self) -> float:
        """Return the learning rate of the current iteration."""
        progress = self.iteration / self.config.n_iterations
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        return self.config.learning_rate * cosine * min(1.0, (self.iteration + 1) / 200)

    def _step(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        losses = self.objective(self._predict, self.batches(self.iteration))
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            terms = {name: loss.item() for name, loss in losses.items()}
            raise FloatingPointError(
                f"iteration {self.iteration}: the loss is not finite ({terms}). The checkpoint in"
                f" {self.run_dir} is from before; continue with a lower learning rate."
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self._clip_gradients()
        self.optimizer.step()
        self.iteration += 1
        decay = min(self.config.average_decay, self.iteration / (self.iteration + 10))
        with torch.no_grad():
            for averaged, current in zip(
                self.average.state_dict().values(), self.network.state_dict().values(), strict=True
            ):
                if averaged.is_floating_point():
                    averaged.lerp_(current, 1 - decay)
                else:
                    averaged.copy_(current)
        return {name: loss.item() for name, loss in losses.items()}

    def _clip_gradients(self) -> None:
        try:
            nn.utils.clip_grad_norm_(
                self.network.parameters(), self.config.gradient_norm, error_if_nonfinite=True
            )
        except RuntimeError as error:
            raise FloatingPointError(
                f"iteration {self.iteration}: the gradients are not finite. The checkpoint in"
                f" {self.run_dir} is from before; continue with a lower learning rate."
            ) from error

    def _predict(self, moving: Tensor, fixed: Tensor) -> Tensor:
        with torch.autocast(moving.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            return self.network(moving, fixed).float()

    def _log(self, means: dict[str, float], seconds: float) -> None:
        file = self.run_dir / LOG_NAME
        row = {
            "iteration": self.iteration,
            "seconds": round(seconds, 1),
            "lr": self.learning_rate(),
        }
        row |= {name: round(value, 5) for name, value in means.items()}
        is_new = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        LOGGER.info("%s", row)

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "config": asdict(self.config),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        beside = self.run_dir / f".{CHECKPOINT_NAME}.partial"
        torch.save(state, beside)
        os.replace(beside, self.run_dir / CHECKPOINT_NAME)

    def _load(self) -> None:
        state = torch.load(self.run_dir / CHECKPOINT_NAME, map_location="cpu", weights_only=True)
        if state["config"] != asdict(self.config):
            raise ValueError(
                f"{self.run_dir}: its checkpoint was trained with {state['config']}, not with"
                f" {asdict(self.config)}. Continue with the same, or start in another folder."
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        LOGGER.info("continuing %s at iteration %d", self.run_dir, self.iteration)
