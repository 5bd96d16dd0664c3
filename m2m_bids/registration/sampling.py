"""Which pairs and bridges an iteration of a training sees, and how they are augmented."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.m2m import CyclePairs
from m2m_bids.registration.training import Share

POSE_SD = 0.05  # of every entry of the random affine, coordinates of [-1, 1]


class CohortError(ValueError):
    """A cohort that cannot be trained on; the message says what it lacks."""


@dataclass(frozen=True)
class TrainingScan:
    """
    A PET or FA image and its subject's T1w image, rigidly registered, on the network's grid.

    Parameters
    ----------
    name : str
        Of the scan.
    subject : str
    modality : str
        ``"pet"`` or ``"fa"``.
    folder : Path
        Holds ``functional.npy``, ``t1w.npy`` (float16, (n, n, n), in [0, 1]) and, where labels are
        known, ``labels.npy`` (uint8).
    """

    name: str
    subject: str
    modality: str
    folder: Path

    @property
    def has_labels(self) -> bool:
        """Whether the T1w's labels are known."""
        return (self.folder / "labels.npy").is_file()

    def read(self, name: str) -> Tensor:
        """
        Read one image; the files are mapped into memory, and the system keeps what fits.

        Parameters
        ----------
        name : {"functional", "t1w", "labels"}

        Returns
        -------
        Tensor, shape (1, n, n, n)
            float32; labels uint8.

        Raises
        ------
        CohortError
            If the file is missing or is no array.
        """
        file = self.folder / f"{name}.npy"
        try:
            data = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CohortError(
                f"{file}: cannot be read ({error}). Remove its folder, so that it is made again."
            ) from error
        tensor = torch.from_numpy(np.array(data))[None]
        return tensor if name == "labels" else tensor.float()


def choose_pre_aligned(subjects: Sequence[str], amount: str, *, seed: int) -> frozenset[str]:
    """
    Choose the subjects whose own pair may be a pre-aligned bridge (Sec. 2.4).

    Parameters
    ----------
    subjects : sequence of str
        Subjects to train on.
    amount : str
        A number (``"3"``) or a share (``"10%"``, rounded, at least one unless it is 0).
    seed : int

    Returns
    -------
    frozenset of str

    Raises
    ------
    CohortError
        If the amount is neither, or more than there are.

    Examples
    --------
    >>> [len(choose_pre_aligned("abcdefghij", n, seed=0)) for n in ("0", "3", "25%", "100%")]
    [0, 3, 2, 10]
    """
    ordered = sorted(subjects)
    try:
        if amount.endswith("%"):
            percent = float(amount[:-1])
            n_chosen = round(percent / 100 * len(ordered)) or int(percent > 0)
            n_chosen = n_chosen if 0 <= percent <= 100 else -1
        else:
            n_chosen = int(amount)
    except ValueError:
        n_chosen = -1
    if not 0 <= n_chosen <= len(ordered):
        raise CohortError(
            f"{amount!r} pre-aligned pairs: expected a number from 0 to {len(ordered)}, the"
            " subjects to train on, or a share from 0% to 100%"
        )
    generator = np.random.default_rng(seed)
    return frozenset(ordered[i] for i in generator.permutation(len(ordered))[:n_chosen])


@dataclass(frozen=True)
class SamplingConfig:
    """
    How cycles are drawn.

    Parameters
    ----------
    batch_size : int
        Cycles of an iteration, in each process.
    seed : int
    has_bridge : bool
        Whether the objective has a bridge (M2M-Reg) or looks at pairs alone.
    pre_aligned : frozenset of str
        Subjects whose own pair may be the bridge.
    aligned_share : float
        How often the bridge of an iteration is a pre-aligned pair, where there are any. The paper
        then takes no others (1).
    pose_sd : float
        Standard deviation of every entry of the random affine, coordinates of [-1, 1].
    """

    batch_size: int = 1
    seed: int = 0
    has_bridge: bool = True
    pre_aligned: frozenset[str] = frozenset()
    aligned_share: float = 1.0
    pose_sd: float = POSE_SD

    def n_subjects(self) -> int:
        """Count the subjects that one cycle needs."""
        if not self.has_bridge:
            return 2
        return 3 if self.pre_aligned and self.aligned_share >= 1 else 4


class _Drawn(NamedTuple):
    """An image of a cycle: the scan, and whether its functional or its T1w image is meant."""

    scan: TrainingScan
    is_functional: bool
    flip: bool
    pose: Tensor


class CycleSampler:
    """
    Draw cycles from a cohort, each by its number alone.

    Source, target and bridge images are of different subjects, but for a pre-aligned bridge, whose
    two images are of one. Every image is flipped left to right with probability one half and put
    into a random affine pose, both images of a pre-aligned bridge together.

    Parameters
    ----------
    scans : sequence of TrainingScan
    config : SamplingConfig

    Raises
    ------
    CohortError
        If no modality has enough subjects.
    """

    def __init__(self, scans: Sequence[TrainingScan], config: SamplingConfig):
        self.config = config
        self._scans: dict[str, dict[str, list[TrainingScan]]] = {}
        for scan in sorted(scans, key=lambda scan: scan.name):
            subjects = self._scans.setdefault(scan.modality, {})
            subjects.setdefault(scan.subject, []).append(scan)
        needed = config.n_subjects()
        counts = {modality: len(subjects) for modality, subjects in self._scans.items()}
        if not counts or min(counts.values()) < needed:
            found = ", ".join(f"{number} with {name}" for name, number in counts.items())
            advice = ["more subjects"]
            if needed == 4:
                advice.append("pre-aligned pairs (--pre-aligned), with which three suffice")
            if len(counts) > 1:
                advice.append("one kind of image alone (--modality)")
            raise CohortError(
                f"to train on there are {found or 'none'}; one cycle needs {needed} different"
                " subjects, each with a T1w image and the other modality. Give"
                f" {', or '.join(advice)}."
            )
        for modality, subjects in self._scans.items():
            if config.pre_aligned and not config.pre_aligned & set(subjects):
                raise CohortError(
                    f"none of the pre-aligned subjects has {modality}; take more (--pre-aligned)"
                )

    def __call__(self, share: Share) -> CyclePairs:
        """
        Draw the cycles of a share of an iteration.

        Parameters
        ----------
        share : Share

        Returns
        -------
        CyclePairs
            On the share's device. The bridge images are None where the objective has no bridge.
        """
        config = self.config
        decision = self._generator(share.iteration, 1)
        is_aligned = bool(config.pre_aligned) and (
            torch.rand((), generator=decision).item() < config.aligned_share
        )
        cycles = [
            self._draw(number, is_aligned=is_aligned)
            for number in share.numbers(config.batch_size)
        ]
        roles = [_placed(list(drawn), share.device) for drawn in zip(*cycles, strict=True)]
        if not config.has_bridge:
            roles += [None, None]
        return CyclePairs(*roles, is_aligned=is_aligned)

    def _generator(self, number: int, kind: int) -> torch.Generator:
        # PyTorch's CPU generator uses 32 bits of its seed: mix before.
        mixed = np.random.SeedSequence((self.config.seed, number, kind)).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    def _draw(self, number: int, *, is_aligned: bool) -> list[_Drawn]:
        """Draw S, T and, with a bridge, S' and T'."""
        generator = self._generator(number, 0)
        by_subject = _pick(generator, list(self._scans.values()))
        is_functional = _pick(generator, [True, False])
        aligned = [name for name in by_subject if name in self.config.pre_aligned]
        bridge = _pick(generator, aligned) if is_aligned else None
        others = [name for name in by_subject if name != bridge]
        order = torch.randperm(len(others), generator=generator).tolist()
        subjects = [others[i] for i in order[:4]]
        drawn = [
            self._place(by_subject[subjects[0]], generator, is_functional=is_functional),
            self._place(by_subject[subjects[1]], generator, is_functional=not is_functional),
        ]
        if bridge is not None:
            one = self._place(by_subject[bridge], generator, is_functional=is_functional)
            drawn += [one, one._replace(is_functional=not is_functional)]
        elif self.config.has_bridge:
            drawn += [
                self._place(by_subject[subjects[2]], generator, is_functional=is_functional),
                self._place(by_subject[subjects[3]], generator, is_functional=not is_functional),
            ]
        return drawn

    def _place(
        self, scans: list[TrainingScan], generator: torch.Generator, *, is_functional: bool
    ) -> _Drawn:
        scan = _pick(generator, scans)
        flip = _pick(generator, [False, True])
        noise = self.config.pose_sd * torch.randn((3, 4), generator=generator)
        return _Drawn(scan, is_functional, flip, torch.eye(3, 4) + noise)


def _pick(generator: torch.Generator, choices: list):
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _placed(drawn: list[_Drawn], device: torch.device) -> Tensor:
    """Read images and bring them into their poses, on the device; zero outside."""
    images = torch.stack(
        [item.scan.read("functional" if item.is_functional else "t1w") for item in drawn]
    ).to(device)
    poses = torch.stack([item.pose for item in drawn]).to(device)
    mirror = torch.tensor([[-1.0 if item.flip else 1.0] for item in drawn], device=device)
    # The pose first, then the mirror of the first axis, left to right.
    linear = poses[:, :, :3] * torch.nn.functional.pad(mirror, (0, 2), value=1.0)[:, None]
    points = 2 * identity_map(images.shape[-1], like=images) - 1
    # By voxel: a matrix product rounds by the size of the batch and the number of threads.
    moved = poses[:, :, 3, None, None, None]
    for axis in range(3):
        moved = moved + linear[:, :, axis, None, None, None] * points[:, axis, None]
    return sample(images, (moved + 1) / 2, padding="zeros").clamp(0, 1)
