"""Train a network on simulated subjects; needs torch, lightning, numpy and safetensors.

``python -m m2m_bids.simulation.training RUN_DIR --workers 14`` trains weights like the default
ones: first the two coarse scales on a 6 mm grid, then all three on the 3 mm grid, in eight minutes
of an H100 GPU and 16 cores. It continues where an earlier call stopped. The default weights are
those of such a run and another, which starts from its weights and meets other subjects: ``...
OTHER_RUN_DIR --start-from RUN_DIR/weights --seed 1 --coarse-iterations 0 --fine-iterations 5889``.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.m2m import CyclePairs, ObjectiveConfig, objective_losses
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.weights import WeightsCard, load_weights, save_weights
from m2m_bids.simulation.anatomy import (
    TEMPLATE_CHANNELS,
    Template,
    deformed_subject,
    load_template,
    random_coordinates,
    random_subject,
    uniform,
)
from m2m_bids.simulation.contrast import (
    WHITE_MATTER_WEIGHTS,
    echo_planar_displacement,
    simulate_fa,
    simulate_pet,
    simulate_t1w,
    template_bridge,
)

if TYPE_CHECKING:
    from m2m_bids.registration.training import Share, TrainingConfig

LOGGER = logging.getLogger(__name__)
MODALITIES = ("pet", "fa")
SUPERVISED_WEIGHT_PER_MM = 0.2
TEMPLATE_BRIDGE_SHARE = 0.7
"""How often the bridge of a cycle is the template's, as in use, and not another subject's pair."""
CHANNELS = (
    *("t1w", "pet", "white_matter_pet", "fa", "fa_distorted", "brain"),
    *(f"{name}_{axis}" for name in ("anatomy", "anatomy_distorted", "warp") for axis in "ijk"),
)
"""
Of a simulated subject: images; displacements, in unit coordinates, to the template, of the
distorted FA too; and one that deforms some image further, as something else may have before.
"""
CONFIG = GradICONConfig(
    down_widths=(32, 64, 96, 128), up_widths=(32, 48, 64, 96), normalization="group"
)
"""Of the default weights."""
_CONTRASTS = {"fa": 0.45, "pet": 0.4, "white_matter_pet": 0.15}


class Placed(NamedTuple):
    """Images (N, 1, n, n, n) in random poses; template coordinates and brain of their voxels."""

    image: Tensor
    coordinates: Tensor
    brain: Tensor


class Cycles(NamedTuple):
    """Training examples: the images of cycles, and what is known of S, T and the bridge."""

    pairs: CyclePairs
    s: Placed
    t: Placed
    bridge: Placed


def simulate_subject(template: Template, generator: torch.Generator, *, strength: float) -> Tensor:
    """
    Simulate all images of one subject.

    Parameters
    ----------
    template : Template
    generator : torch.Generator
    strength : float
        Factor of the deformations beyond the affine.

    Returns
    -------
    Tensor, shape (len(CHANNELS), n, n, n)
        In half precision.
    """
    spacing_mm = template.spacing_mm
    subject = random_subject(template, generator, strength=strength)
    distortion = echo_planar_displacement(subject, template.extent_mm, generator)
    distorted = deformed_subject(subject, distortion)
    further = uniform(generator, 0.1, 1.2)
    identity = identity_map(template.size)
    channels = (
        simulate_t1w(subject, spacing_mm, generator),
        simulate_pet(subject, spacing_mm, generator),
        simulate_pet(subject, spacing_mm, generator, is_white_matter_tracer=True),
        simulate_fa(subject, spacing_mm, generator),
        simulate_fa(distorted, spacing_mm, generator),
        (subject.tissues.sum(1, keepdim=True) > 0.5).float(),
        subject.coordinates - identity,
        distorted.coordinates - identity,
        random_coordinates(template, generator, strength=further, affine_sd=0.01) - identity,
    )
    return torch.cat(channels, 1)[0].half()


def template_channels(template: Template) -> Tensor:
    """
    Make a subject of the template: its T1w and what other modalities would show of it.

    Parameters
    ----------
    template : Template

    Returns
    -------
    Tensor, shape (len(CHANNELS), n, n, n)
        As of `simulate_subject`, without distortion and further warp.
    """
    pet, t1w = template_bridge(template, "pet")
    white_matter_pet, _ = template_bridge(template, "pet", pet_weights=WHITE_MATTER_WEIGHTS)
    fa, _ = template_bridge(template, "fa")
    brain = (template.data[:, [TEMPLATE_CHANNELS.index("mask")]] > 0.5).float()
    displacements = torch.zeros(1, 9, *[template.size] * 3)
    channels = (t1w, pet, white_matter_pet, fa, fa, brain, displacements)
    return torch.cat(channels, 1)[0].half()


class CohortCycles:
    """
    Draw training cycles from simulated subjects, each iteration's by its number alone.

    Parameters
    ----------
    template : Template
    seed : int
    batch_size : int
        Cycles of an iteration, in each process.
    n_subjects : int
        Subjects to draw from at a time.
    iterations_per_subject : float
        After so many iterations the oldest subject makes room for a new one.
    n_workers : int
        Processes that simulate subjects ahead of the training; without any, it waits for them.
    """

    def __init__(
        self,
        template: Template,
        *,
        seed: int,
        batch_size: int = 1,
        n_subjects: int = 64,
        iterations_per_subject: float = 2,
        n_workers: int = 0,
    ):
        self.template = template
        self.seed = seed
        self.batch_size = batch_size
        self.n_subjects = n_subjects
        self.iterations_per_subject = iterations_per_subject
        self._simulated = _Ahead(_Simulation(template, seed), n_workers)
        # One place for each subject, and the last for the template.
        size = (n_subjects + 1, len(CHANNELS), *[template.size] * 3)
        self._subjects = torch.zeros(size, dtype=torch.float16)
        self._subjects[-1] = template_channels(template)
        self._numbers = [-1] * n_subjects

    def __call__(self, share: "Share") -> Cycles:
        """
        Draw the cycles of an iteration, each in a modality and direction of its own.

        Parameters
        ----------
        share : Share

        Returns
        -------
        Cycles
            On the share's device.
        """
        self._subjects = self._subjects.to(share.device)
        generator = _generator(self.seed, 2 * (share.iteration * share.n_ranks + share.rank))
        newest = int(share.iteration / self.iterations_per_subject)
        choices = [self._choose(newest, generator) for _ in range(self.batch_size)]
        moving, fixed, bridge, is_reversed = zip(*choices, strict=True)
        moving, fixed, bridge = (self._place(views) for views in (moving, fixed, bridge))
        functional, t1w = bridge.image.split(1, dim=1)
        moving, fixed = (placed._replace(image=placed.image[:, :1]) for placed in (moving, fixed))
        reverse = torch.tensor(is_reversed, device=share.device).view(-1, 1, 1, 1, 1)
        s = Placed(*(torch.where(reverse, b, a) for a, b in zip(moving, fixed, strict=True)))
        t = Placed(*(torch.where(reverse, a, b) for a, b in zip(moving, fixed, strict=True)))
        bridge_s = torch.where(reverse, t1w, functional)
        bridge_t = torch.where(reverse, functional, t1w)
        return Cycles(CyclePairs(s.image, t.image, bridge_s, bridge_t, True), s, t, bridge)

    def close(self) -> None:
        """End the processes."""
        self._simulated.close()

    def _choose(self, newest: int, generator: torch.Generator) -> tuple:
        """Choose the views of a cycle's moving, fixed and bridge subject, and its direction."""
        chosen = torch.randperm(self.n_subjects, generator=generator)[:4].tolist()
        first, second, bridge, other = (self._slot(newest, number) for number in chosen)
        contrast = _draw_one(_CONTRASTS, generator)
        # Users align a person's own images more often than those of two people.
        is_within = uniform(generator, 0, 1) < 0.35
        is_distorted = contrast == "fa" and uniform(generator, 0, 1) < 0.7
        is_warped = uniform(generator, 0, 1) < (0.5 if is_within else 0.3)
        suffix = "_distorted" if is_distorted else ""
        moving = _View(
            first,
            contrast + suffix,
            anatomy="anatomy" + suffix,
            warp_slot=other if is_warped else self.n_subjects,
            pose=_Pose.draw(generator, 0.015 if is_within else 0.03),
        )
        fixed = _View(
            first if is_within else second,
            "t1w",
            warp_slot=self.n_subjects,
            pose=_Pose.draw(generator),
        )
        paired = _View(bridge, contrast, warp_slot=self.n_subjects, pose=_Pose.draw(generator))
        if uniform(generator, 0, 1) < TEMPLATE_BRIDGE_SHARE:
            paired = paired._replace(slot=self.n_subjects, pose=_Pose())
        return moving, fixed, paired, uniform(generator, 0, 1) < 0.5

    def _slot(self, newest: int, place: int) -> int:
        """Give a place of the subjects, with the subject that is due there."""
        number = newest + (place - newest) % self.n_subjects
        if self._numbers[place] != number:
            will_need = range(newest, newest + 2 * self.n_subjects)
            self._subjects[place] = self._simulated(number, will_need)
            self._numbers[place] = number
        return place

    def _place(self, views: list["_View"]) -> Placed:
        """Flip left to right, put in a random affine pose, change the contrast a little."""
        device = self._subjects.device
        linear, shift_mm, flip, gamma = (
            torch.tensor([getattr(view.pose, name) for view in views], device=device)
            for name in _Pose._fields
        )
        points = identity_map(self.template.size, like=linear)
        points = torch.einsum("nde,eijk->ndijk", linear, points[0] - 0.5) + 0.5
        points = points + (shift_mm / self.template.extent_mm)[:, :, None, None, None]
        # The template is symmetric: a mirrored subject is another subject.
        flip, gamma = (values.view(-1, 1, 1, 1, 1) for values in (flip, gamma))
        points = torch.where(flip, points.flip(2), points)
        warp = self._channels([(view.warp_slot, *_axes("warp")) for view in views])
        points = points + sample(warp, points)
        anatomy = self._channels([(view.slot, *_axes(view.anatomy)) for view in views])
        coordinates = points + sample(anatomy, points)
        mirrored = torch.cat((1 - coordinates[:, :1], coordinates[:, 1:]), 1)
        images = self._channels([(view.slot, view.image, "t1w", "brain") for view in views])
        images = sample(images, points, padding="zeros")
        return Placed(
            images[:, :2].clamp(0, 1).pow(gamma),
            torch.where(flip, mirrored, coordinates),
            images[:, 2:],
        )

    def _channels(self, wanted: list[tuple]) -> Tensor:
        """Take channels of subjects, each given by its place and the channels' names."""
        device = self._subjects.device
        slots = torch.tensor([slot for slot, *_ in wanted], device=device)[:, None]
        channels = torch.tensor(
            [[CHANNELS.index(name) for name in names] for _, *names in wanted], device=device
        )
        return self._subjects[slots, channels].float()


def _axes(name: str) -> list[str]:
    return [f"{name}_{axis}" for axis in "ijk"]


class _Pose(NamedTuple):
    """How an image is placed: ``linear`` about the centre, a shift, a flip, a contrast."""

    linear: list[list[float]] = torch.eye(3).tolist()
    shift_mm: list[float] = (0.0, 0.0, 0.0)
    flip: bool = False
    gamma: float = 1.0

    @classmethod
    def draw(cls, generator: torch.Generator, linear_sd: float = 0.03) -> "_Pose":
        linear = torch.eye(3) + linear_sd * torch.randn((3, 3), generator=generator)
        shift_mm = 1.5 * torch.randn(3, generator=generator)
        flip = uniform(generator, 0, 1) < 0.5
        return cls(linear.tolist(), shift_mm.tolist(), flip, uniform(generator, 0.75, 1.3))


class _View(NamedTuple):
    """A subject's place, which of its images and displacements, and whose further warp."""

    slot: int
    image: str
    warp_slot: int
    pose: _Pose
    anatomy: str = "anatomy"


def _draw_one(shares: dict[str, float], generator: torch.Generator) -> str:
    value = uniform(generator, 0, 1)
    for name, share in shares.items():
        value -= share
        if value < 0:
            return name
    return name


def _generator(seed: int, number: int) -> torch.Generator:
    # The CPU's generator takes 32 bits; bit 30 marks subjects that are never trained on.
    if not (0 <= seed < 16 and 0 <= number < 1 << 26):
        raise ValueError(f"seed {seed} must be below 16, and draw {number} below 2**26")
    return torch.Generator().manual_seed((seed << 26) + number)


class _Simulation(NamedTuple):
    """Makes a subject of a cohort by its number."""

    template: Template
    seed: int

    def __call__(self, number: int) -> Tensor:
        generator = _generator(self.seed, 2 * number + 1)
        strength = uniform(generator, 0.3, 1.5)
        return simulate_subject(self.template, generator, strength=strength)


class _Ahead:
    """Calls a function of numbers, ahead of the need where there are processes for it."""

    def __init__(self, function: _Simulation, n_workers: int):
        self.function = function
        self.futures: dict[int, Future] = {}
        self.next_number = 0
        self.pool = None
        if n_workers:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(n_workers, context, _start_worker, (function,))

    def __call__(self, number: int, will_need: range) -> Tensor:
        """Give the value of a number, which is one of those that are needed from now on."""
        if self.pool is None:
            return self.function(number)
        for later in range(max(self.next_number, will_need.start), will_need.stop):
            self.futures[later] = self.pool.submit(_work, later)
        self.next_number = max(self.next_number, will_need.stop)
        for old in [known for known in self.futures if known < will_need.start]:
            self.futures.pop(old).cancel()
        if number not in self.futures:
            # Asked for before: another training begins.
            self.futures[number] = self.pool.submit(_work, number)
        return torch.from_numpy(self.futures.pop(number).result())

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _start_worker(function: _Simulation) -> None:
    global _function  # what a worker process calls
    _function = function
    torch.set_num_threads(1)


def _work(number: int) -> np.ndarray:
    return _function(number).numpy()


def supervised_loss(phi: Tensor, moving: Placed, fixed: Placed, *, extent_mm: float) -> Tensor:
    r"""
    Compare template coordinates through maps: :math:`X_S(\varphi_{ST}(x)) = X_T(x)`.

    Parameters
    ----------
    phi : Tensor, shape (N, 3, n, n, n)
        Maps from the fixed grids to unit coordinates of the moving images.
    moving, fixed : Placed
    extent_mm : float
        Length of one unit.

    Returns
    -------
    Tensor, shape ()
        Mean distance within the fixed brain, mm; the mean over the batch.
    """
    error = (sample(moving.coordinates, phi) - fixed.coordinates) * extent_mm
    distance = (error.square().sum(1, keepdim=True) + 1e-4).sqrt()
    inside = (distance * fixed.brain).sum((1, 2, 3, 4))
    return (inside / fixed.brain.sum((1, 2, 3, 4)).clamp_min(1)).mean()


def cohort_objective(config: ObjectiveConfig, extent_mm: float):
    """
    Return the objective of training: M2M-Reg (Eq. 6, aligned bridge) and the known coordinates.

    Parameters
    ----------
    config : ObjectiveConfig
    extent_mm : float

    Returns
    -------
    callable
        For `TrainingTask`.
    """

    def objective(network, cycles: Cycles) -> dict[str, Tensor]:
        losses, maps = objective_losses(network, cycles.pairs, config)
        _, s, t, bridge = cycles
        distances = [
            supervised_loss(phi, moving, fixed, extent_mm=extent_mm)
            for phi, moving, fixed in (
                (maps.st, s, t),
                (maps.t_bridge_s, t, bridge),
                (maps.bridge_t_s, bridge, s),
            )
        ]
        losses["supervised"] = SUPERVISED_WEIGHT_PER_MM * torch.stack(distances).mean()
        return losses

    return objective


def train_stage(
    network: GradICON,
    template: Template,
    run_dir: Path,
    config: "TrainingConfig",
    *,
    minutes: float,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 1,
    n_workers: int = 0,
) -> tuple[GradICON, bool]:
    """
    Train a network for some minutes, from where its run stands.

    Parameters
    ----------
    network : GradICON
        What a new run starts from. With fewer scales than the default weights have, it is trained
        at half the resolution.
    template : Template
        On the grid of the default weights.
    run_dir : Path
        Of this stage.
    config : TrainingConfig
    minutes : float
    seed : int
        Of the subjects.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    batch_size : int
        Cycles of an iteration.
    n_workers : int
        As `CohortCycles` takes it.

    Returns
    -------
    network : GradICON
        With averaged weights.
    is_done : bool
    """
    from m2m_bids.registration.training import Processes, TrainingTask, fit

    is_coarse = network.config.n_scales < CONFIG.n_scales
    if is_coarse:
        template = template.pooled()
    seed += 1 if is_coarse else 2
    cycles = CohortCycles(template, seed=seed, batch_size=batch_size, n_workers=n_workers)
    objective_config = ObjectiveConfig(
        regularity_weight=0.0, gradcycon_weight=0.2, lncc_sigma_voxels=1.25 if is_coarse else 2.5
    )
    objective = cohort_objective(objective_config, template.extent_mm)
    task = TrainingTask(network, objective, cycles, is_replayable=True)
    try:
        return fit(
            task,
            config,
            run_dir,
            processes=Processes(device),
            max_minutes=minutes,
            shows_progress=sys.stdout.isatty(),  # where Lightning draws it
        )
    finally:
        cycles.close()


def make_network(n_scales: int, start_from: Path | None) -> GradICON:
    """
    Make a network, new or with the sizes and the scales that a weights folder has.

    Parameters
    ----------
    n_scales : int
    start_from : Path, optional
        Weights folder of a GradICON network.

    Returns
    -------
    GradICON
    """
    torch.manual_seed(0)
    if not start_from:
        return GradICON(replace(CONFIG, n_scales=n_scales))
    known, _ = load_weights(start_from)
    network = GradICON(replace(known.config, n_scales=n_scales))
    network.load_state_dict(network.state_dict() | {
        name: tensor for name, tensor in known.state_dict().items()
        if name in network.state_dict()
    })  # fmt: skip
    return network


def write_weights(network: GradICON, template: Template, folder: Path, details: dict) -> None:
    """
    Write a weights folder for a network trained here.

    Parameters
    ----------
    network : GradICON
    template : Template
    folder : Path
    details : dict
        For the card.
    """
    card = WeightsCard(
        network="gradicon",
        config=asdict(network.config),
        grid_size=template.size,
        spacing_mm=template.spacing_mm,
        modalities=MODALITIES,
        training_data="simulated subjects: the MNI152 (ICBM 2009a symmetric) template and its"
        " tissue maps under random diffeomorphisms, with random T1w, PET (FDG, and tracers of"
        " white matter) and FA contrast; no image of a person",
        training_command="python -m m2m_bids.simulation.training " + " ".join(sys.argv[1:]),
        details={"torch": torch.__version__, "python": platform.python_version(), **details},
    )
    # Half precision halves the file; the loaded network computes in single precision.
    save_weights(network.to(torch.float16, memory_format=torch.contiguous_format), card, folder)


def main(argv: list[str] | None = None) -> int:
    """
    Train the default weights.

    Parameters
    ----------
    argv : list of str, optional

    Returns
    -------
    int
        Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m2m_bids.simulation.training", description=__doc__
    )
    parser.add_argument(
        "run_dir", type=Path, help="folder of checkpoints, logs and, at the end, weights/"
    )
    parser.add_argument("--coarse-iterations", type=int, default=4200)
    parser.add_argument("--fine-iterations", type=int, default=3000)
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="weights that a new run starts from"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulated subjects")
    parser.add_argument("--coarse-batch", type=int, default=16, help="cycles of an iteration")
    parser.add_argument("--fine-batch", type=int, default=8, help="cycles of an iteration")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that simulate ahead, such as 14"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    from m2m_bids.registration.training import TrainingConfig

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    template = load_template()
    common = {"schedule": "cosine", "average_decay": 0.999, "gradient_norm": 1.0}
    coarse = TrainingConfig(args.coarse_iterations, learning_rate=1.5e-3, **common)
    fine = TrainingConfig(args.fine_iterations, learning_rate=7e-4, **common)
    where = {
        "minutes": args.minutes,
        "seed": args.seed,
        "device": args.device,
        "n_workers": args.workers,
    }
    network, is_done = train_stage(
        make_network(CONFIG.n_scales - 1, args.start_from),
        template,
        args.run_dir / "coarse",
        coarse,
        batch_size=args.coarse_batch,
        **where,
    )
    if is_done:
        whole = make_network(CONFIG.n_scales, args.start_from)
        whole.load_state_dict(whole.state_dict() | network.state_dict())
        network, is_done = train_stage(
            whole, template, args.run_dir / "fine", fine, batch_size=args.fine_batch, **where
        )
        counts = {
            "coarse_iterations": args.coarse_iterations,
            "fine_iterations": args.fine_iterations,
        }
        write_weights(network, template, args.run_dir / "weights", counts)
    LOGGER.info("%s", json.dumps({"done": is_done, "run_dir": str(args.run_dir)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
