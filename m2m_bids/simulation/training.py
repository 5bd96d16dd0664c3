"""Train a network on simulated subjects; needs torch, lightning, numpy and safetensors.

``python -m m2m_bids.simulation.training RUN_DIR`` trains the default weights: first the two
coarse scales on a 6 mm grid, then all three on the 3 mm grid. It continues where an earlier call
stopped.
"""

import argparse
import json
import logging
import platform
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.m2m import CyclePairs, ObjectiveConfig, objective_losses
from m2m_bids.registration.maps import warp
from m2m_bids.registration.networks.gradicon import COMPACT, GradICON
from m2m_bids.registration.weights import WeightsCard, load_weights, save_weights
from m2m_bids.simulation.anatomy import (
    TEMPLATE_CHANNELS,
    Subject,
    Template,
    deformed_subject,
    load_template,
    random_coordinates,
    random_subject,
    uniform,
)
from m2m_bids.simulation.contrast import (
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


class SubjectImages(NamedTuple):
    """Images of one subject, each (1, 1, n, n, n), and template coordinates, (1, 3, n, n, n)."""

    t1w: Tensor
    pet: Tensor
    fa: Tensor
    fa_distorted: Tensor
    brain: Tensor
    coordinates: Tensor
    coordinates_distorted: Tensor


class Placed(NamedTuple):
    """An image in a random pose, with the template coordinates and brain of its voxels."""

    image: Tensor
    coordinates: Tensor
    brain: Tensor


class Cycle(NamedTuple):
    """One training example: the images of a cycle and what is known of S, T and the bridge."""

    pairs: CyclePairs
    s: Placed
    t: Placed
    bridge: Placed


def simulate_images(
    template: Template, subject: Subject, generator: torch.Generator
) -> SubjectImages:
    """
    Simulate all images of one subject.

    Parameters
    ----------
    template : Template
    subject : Subject
    generator : torch.Generator

    Returns
    -------
    SubjectImages
    """
    spacing_mm = template.spacing_mm
    distortion = echo_planar_displacement(subject, template.extent_mm, generator)
    distorted = deformed_subject(subject, distortion)
    return SubjectImages(
        t1w=simulate_t1w(subject, spacing_mm, generator),
        pet=simulate_pet(subject, spacing_mm, generator),
        fa=simulate_fa(subject, spacing_mm, generator),
        fa_distorted=simulate_fa(distorted, spacing_mm, generator),
        brain=(subject.tissues.sum(1, keepdim=True) > 0.5).float(),
        coordinates=subject.coordinates,
        coordinates_distorted=distorted.coordinates,
    )


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
    iterations_per_subject : int
        After so many iterations the oldest subject makes room for a new one.
    """

    def __init__(
        self,
        template: Template,
        *,
        seed: int,
        batch_size: int = 1,
        n_subjects: int = 48,
        iterations_per_subject: int = 4,
    ):
        self.template = template
        self.seed = seed
        self.batch_size = batch_size
        self.n_subjects = n_subjects
        self.iterations_per_subject = iterations_per_subject
        self._subject = lru_cache(maxsize=n_subjects + 2)(self._make_subject)
        self._template_bridges = {
            modality: Placed(
                torch.cat(template_bridge(template, modality), 1),
                identity_map(template.size),
                (template.data[:, [TEMPLATE_CHANNELS.index("mask")]] > 0.5).float(),
            )
            for modality in MODALITIES
        }

    def __call__(self, share: "Share") -> list[Cycle]:
        """
        Draw the cycles of an iteration, each in a modality and direction of its own.

        Parameters
        ----------
        share : Share

        Returns
        -------
        list of Cycle
            On the CPU; `fit` moves them.
        """
        generator = self._generator(2 * (share.iteration * share.n_ranks + share.rank))
        newest = share.iteration // self.iterations_per_subject
        return [self._draw(newest, generator) for _ in range(self.batch_size)]

    def _generator(self, number: int) -> torch.Generator:
        # The CPU's generator takes 32 bits; bit 30 marks subjects that are never trained on.
        if not (0 <= self.seed < 16 and 0 <= number < 1 << 26):
            raise ValueError(f"seed {self.seed} must be below 16, and draw {number} below 2**26")
        return torch.Generator().manual_seed((self.seed << 26) + number)

    def _make_subject(self, number: int) -> SubjectImages:
        generator = self._generator(2 * number + 1)
        strength = uniform(generator, 0.3, 1.5)
        subject = random_subject(self.template, generator, strength=strength)
        return simulate_images(self.template, subject, generator)

    def _draw(self, newest: int, generator: torch.Generator) -> Cycle:
        chosen = torch.randperm(self.n_subjects, generator=generator)[:3].tolist()
        first, second, bridge = (self._subject(newest + number) for number in chosen)
        modality = MODALITIES[int(uniform(generator, 0, 1) < 0.5)]
        # Users align a person's own images more often than those of two people.
        is_within = uniform(generator, 0, 1) < 0.35
        moving = self._functional(first, modality, generator, is_within=is_within)
        anatomical = first if is_within else second
        moving = self._place(*moving, first.brain, generator, is_within=is_within)
        fixed = self._place(anatomical.t1w, anatomical.coordinates, anatomical.brain, generator)
        if uniform(generator, 0, 1) < TEMPLATE_BRIDGE_SHARE:
            paired = self._template_bridges[modality]
        else:
            both = torch.cat((getattr(bridge, modality), bridge.t1w), 1)
            paired = self._place(both, bridge.coordinates, bridge.brain, generator)
        functional, t1w = paired.image.split(1, dim=1)
        if uniform(generator, 0, 1) < 0.5:
            return Cycle(
                CyclePairs(moving.image, fixed.image, functional, t1w, True), moving, fixed, paired
            )
        return Cycle(
            CyclePairs(fixed.image, moving.image, t1w, functional, True), fixed, moving, paired
        )

    def _functional(
        self, subject: SubjectImages, modality: str, generator: torch.Generator, *, is_within: bool
    ) -> tuple[Tensor, Tensor]:
        if modality == "fa" and uniform(generator, 0, 1) < 0.7:
            image, coordinates = subject.fa_distorted, subject.coordinates_distorted
        else:
            image, coordinates = getattr(subject, modality), subject.coordinates
        if is_within and uniform(generator, 0, 1) < 0.5:
            # A further warp, as of an image that something else has deformed.
            extra = random_coordinates(
                self.template, generator, strength=uniform(generator, 0.1, 1.2), affine_sd=0.01
            )
            image = warp(image, extra)
            coordinates = sample(coordinates, extra)
        return image, coordinates

    def _place(
        self,
        image: Tensor,
        coordinates: Tensor,
        brain: Tensor,
        generator: torch.Generator,
        *,
        is_within: bool = False,
    ) -> Placed:
        """Flip left to right, put in a random affine pose, change the contrast a little."""
        linear = torch.eye(3) + (0.015 if is_within else 0.03) * torch.randn(
            (3, 3), generator=generator
        )
        shift = torch.randn(3, generator=generator) * 1.5 / self.template.extent_mm
        points = identity_map(image.shape[-1]) - 0.5
        points = (
            torch.einsum("de,neijk->ndijk", linear, points)
            + 0.5
            + shift[None, :, None, None, None]
        )
        stacked = sample(torch.cat((image, brain), 1), points, padding="zeros")
        coordinates = sample(coordinates, points)
        if uniform(generator, 0, 1) < 0.5:
            # The template is symmetric: a mirrored subject is another subject.
            stacked, coordinates = stacked.flip(2), coordinates.flip(2)
            coordinates = torch.cat((1 - coordinates[:, :1], coordinates[:, 1:]), 1)
        gamma = uniform(generator, 0.75, 1.3)
        return Placed(stacked[:, :-1].clamp(0, 1).pow(gamma), coordinates, stacked[:, -1:])


def supervised_loss(phi: Tensor, moving: Placed, fixed: Placed, *, extent_mm: float) -> Tensor:
    r"""
    Compare template coordinates through a map: :math:`X_S(\varphi_{ST}(x)) = X_T(x)`.

    Parameters
    ----------
    phi : Tensor, shape (1, 3, n, n, n)
        Map from the fixed grid to unit coordinates of the moving image.
    moving, fixed : Placed
    extent_mm : float
        Length of one unit.

    Returns
    -------
    Tensor, shape ()
        Mean distance within the fixed brain, mm.
    """
    error = (sample(moving.coordinates, phi) - fixed.coordinates) * extent_mm
    distance = (error.square().sum(1, keepdim=True) + 1e-4).sqrt()
    return (distance * fixed.brain).sum() / fixed.brain.sum().clamp_min(1)


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

    def objective(network, cycles: list[Cycle]) -> dict[str, Tensor]:
        stacked = CyclePairs(
            *(torch.cat([cycle.pairs[i] for cycle in cycles]) for i in range(4)), is_aligned=True
        )
        losses, maps = objective_losses(network, stacked, config)
        distances = []
        for index, cycle in enumerate(cycles):
            own = slice(index, index + 1)
            for phi, moving, fixed in (
                (maps.st, cycle.s, cycle.t),
                (maps.t_bridge_s, cycle.t, cycle.bridge),
                (maps.bridge_t_s, cycle.bridge, cycle.s),
            ):
                distances.append(supervised_loss(phi[own], moving, fixed, extent_mm=extent_mm))
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
    device: str = "auto",
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
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns
    -------
    network : GradICON
        With averaged weights.
    is_done : bool
    """
    from m2m_bids.registration.training import Processes, TrainingTask, fit

    is_coarse = network.config.n_scales < COMPACT.n_scales
    if is_coarse:
        template = template.pooled()
    cycles = CohortCycles(template, seed=1 if is_coarse else 2, batch_size=2 if is_coarse else 1)
    objective_config = ObjectiveConfig(
        regularity_weight=0.0, gradcycon_weight=0.2, lncc_sigma_voxels=1.25 if is_coarse else 2.5
    )
    objective = cohort_objective(objective_config, template.extent_mm)
    network = network.to(memory_format=torch.channels_last_3d)
    task = TrainingTask(network, objective, cycles)
    return fit(task, config, run_dir, processes=Processes(device), max_minutes=minutes)


def make_network(n_scales: int, start_from: Path | None) -> GradICON:
    """
    Make a compact network, new or with the scales that a weights folder has.

    Parameters
    ----------
    n_scales : int
    start_from : Path, optional
        Weights folder of a compact network.

    Returns
    -------
    GradICON
    """
    torch.manual_seed(0)
    network = GradICON(replace(COMPACT, n_scales=n_scales))
    if start_from:
        known, _ = load_weights(start_from)
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
        " tissue maps under random diffeomorphisms, with random T1w, PET and FA contrast; no"
        " image of a person",
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
    parser.add_argument("--coarse-iterations", type=int, default=12000)
    parser.add_argument("--fine-iterations", type=int, default=20000)
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="weights that a new run starts from"
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
    coarse = TrainingConfig(args.coarse_iterations, learning_rate=1e-3, **common)
    fine = TrainingConfig(args.fine_iterations, learning_rate=5e-4, **common)
    network, is_done = train_stage(
        make_network(COMPACT.n_scales - 1, args.start_from),
        template,
        args.run_dir / "coarse",
        coarse,
        minutes=args.minutes,
        device=args.device,
    )
    if is_done:
        whole = make_network(COMPACT.n_scales, args.start_from)
        whole.load_state_dict(whole.state_dict() | network.state_dict())
        network, is_done = train_stage(
            whole, template, args.run_dir / "fine", fine, minutes=args.minutes, device=args.device
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
