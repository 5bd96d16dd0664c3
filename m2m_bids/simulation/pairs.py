"""Simulated pairs of a PET or FA scan and a T1w image, with what is known of them, in memory."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import nibabel as nb
import numpy as np
import torch
from nibabel.affines import apply_affine
from torch import Tensor

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.maps import compose
from m2m_bids.simulation.anatomy import (
    Subject,
    Template,
    random_subject,
    template_from_nilearn,
    uniform,
)
from m2m_bids.simulation.contrast import simulate_fa, simulate_pet, simulate_t1w
from m2m_bids.simulation.truth import (
    choose_landmarks,
    field_between,
    image_of,
    label_map,
    random_displacement,
    random_pose,
    unseen_generator,
)
from m2m_bids.spatial.landmarks import Landmarks
from m2m_bids.spatial.transforms import Chain

EXTENT_MM = 189.0

Modality = Literal["pet", "fa"]
Kind = Literal["within", "between"]


@dataclass(frozen=True, eq=False)
class SimulatedPair:
    """
    A scan, a T1w image, and the truth about both.

    Parameters
    ----------
    modality : {"pet", "fa"}
        Kind of the moving image.
    moving_image : Nifti1Image
        The scan, in [0, 1]; its header is off by a rigid motion.
    fixed_image : Nifti1Image
        The T1w image, skull-stripped, in [0, 1].
    moving_labels, fixed_labels : Nifti1Image
        Labels `m2m_bids.simulation.truth.LABELS`, uint8, each on its image's grid.
    landmarks : Landmarks
        In the worlds of the fixed and of the moving image.
    fixed2moving : tuple of Transform
        True chain, points of the fixed to points of the moving image.
    rigid_fixed2moving : ndarray, shape (4, 4)
        The rigid part of it: the motion between the headers.
    """

    modality: Modality
    moving_image: nb.Nifti1Image
    fixed_image: nb.Nifti1Image
    moving_labels: nb.Nifti1Image
    fixed_labels: nb.Nifti1Image
    landmarks: Landmarks
    fixed2moving: Chain
    rigid_fixed2moving: np.ndarray


def simulate_pair(
    seed: int,
    modality: Modality,
    *,
    spacing_mm: float = 3.0,
    kind: Kind = "between",
    warp_mm: float = 3.0,
) -> SimulatedPair:
    """
    Simulate a pair of images that no network was trained on.

    Parameters
    ----------
    seed : int
        Number of the pair, from 0; it has the same subjects in both modalities.
    modality : {"pet", "fa"}
        Kind of the moving image; FA has echo-planar distortion.
    spacing_mm : float
        Isotropic voxel size of both images.
    kind : {"within", "between"}
        Whether both images are of one subject, the scan then being displaced, or of two.
    warp_mm : float
        Mean length of the displacement of a pair within a subject.

    Returns
    -------
    SimulatedPair

    Raises
    ------
    ValueError
        If the modality or the kind is another, or the seed is negative.
    """
    if modality not in ("pet", "fa"):
        raise ValueError(f'modality must be "pet" or "fa", got {modality!r}')
    if kind not in ("within", "between"):
        raise ValueError(f'kind must be "within" or "between", got {kind!r}')
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    template = cached_template(round(EXTENT_MM / spacing_mm) + 1, spacing_mm)
    generator = unseen_generator(2 * seed + (kind == "within"))
    fixed = random_subject(template, generator, strength=uniform(generator, 0.5, 1.3))
    moving = fixed
    if kind == "between":
        moving = random_subject(template, generator, strength=uniform(generator, 0.5, 1.3))
    displacement = random_displacement(
        moving,
        template.extent_mm,
        generator,
        mean_mm=warp_mm if kind == "within" else 0.0,
        has_epi_distortion=modality == "fa",
    )
    return _assemble(modality, template, (fixed, moving), displacement, generator)


@lru_cache(maxsize=2)
def cached_template(size: int, spacing_mm: float) -> Template:
    """Build a template once: it takes seconds."""
    return template_from_nilearn(size, spacing_mm)


def _assemble(
    modality: Modality,
    template: Template,
    subjects: tuple[Subject, Subject],
    displacement: Tensor,
    generator: torch.Generator,
) -> SimulatedPair:
    """Simulate the images of a fixed and a moving subject, pose them and find the truth."""
    fixed, moving = subjects
    identity = identity_map(template.size)
    positions = identity + displacement
    simulate = {"pet": simulate_pet, "fa": simulate_fa}[modality]
    functional = sample(
        simulate(moving, template.spacing_mm, generator), positions, padding="zeros"
    )
    t1w = simulate_t1w(fixed, template.spacing_mm, generator)
    if moving is fixed:
        coordinates = (identity, positions)
    else:
        coordinates = (fixed.coordinates, compose(moving.coordinates, positions))
    truth = field_between(*coordinates, template.affine)
    brain = fixed.tissues[0].sum(0).numpy() > 0.5
    landmarks = choose_landmarks(coordinates, truth, brain, generator)
    fixed_pose = random_pose(generator, max_shift_mm=4, max_angle_deg=4)
    moving_pose = random_pose(generator, max_shift_mm=10, max_angle_deg=10, is_far=True)
    fixed_affine, moving_affine = (
        fixed_pose @ template.affine,
        moving_pose @ template.affine,
    )
    return SimulatedPair(
        modality,
        image_of(functional[0, 0].numpy(), moving_affine),
        image_of(t1w[0, 0].numpy(), fixed_affine),
        image_of(label_map(moving, positions), moving_affine),
        image_of(label_map(fixed, identity), fixed_affine),
        Landmarks(
            apply_affine(fixed_pose, landmarks.fixed), apply_affine(moving_pose, landmarks.moving)
        ),
        (moving_pose, truth, np.linalg.inv(fixed_pose)),
        moving_pose @ np.linalg.inv(fixed_pose),
    )
