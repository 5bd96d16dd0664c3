"""An ADNI-like BIDS dataset, as Clinica makes it, of simulated subjects with known transforms.

The truth is under ``sourcedata/truth/``, which BIDS tools leave alone. For each scan there is a
folder of its name with the transform ``from-scan_to-T1w_mode-image_xfm.h5`` (ITK; it maps points
of the T1w image to points of the scan), ``landmarks.tsv`` and ``dseg.nii.gz`` on the scan's grid;
for each T1w image a ``dseg.nii.gz``.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import nibabel as nb
import numpy as np
import torch
from nibabel.affines import apply_affine, from_matvec
from torch import Tensor
from tqdm import tqdm

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.simulation.anatomy import (
    TEMPLATE_CHANNELS,
    Subject,
    Template,
    random_coordinates,
    random_field,
    subject_from_coordinates,
    uniform,
)
from m2m_bids.simulation.contrast import simulate_fa, simulate_pet
from m2m_bids.simulation.head import Head, scalp_uptake, simulate_head, simulate_head_t1w
from m2m_bids.simulation.pairs import cached_template
from m2m_bids.simulation.truth import (
    choose_landmarks,
    field_between,
    grid_positions,
    image_of,
    label_map,
    random_displacement,
    random_pose,
    unseen_generator,
    world2unit,
)
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.images import save_image
from m2m_bids.spatial.itk import write_composite
from m2m_bids.spatial.landmarks import Landmarks, write_landmarks

LOGGER = logging.getLogger(__name__)

SESSION = "M000"
PET_ENTITIES = "trc-18FFDG_rec-coregiso"
TRUTH_FOLDER = Path("sourcedata") / "truth"
TRUTH_XFM = "from-scan_to-T1w_mode-image_xfm.h5"

_EXTENT_MM = 220.5
_FIELD_SPACING_MM = 3.0
_READ_ME = """Simulated subjects for m2m-bids: the MNI152 (ICBM 2009a symmetric) template under
random diffeomorphisms, with simulated heads, contrast, noise and artefacts.
No image shows a person.

sourcedata/truth/ holds the true transforms, landmarks and labels of every scan.
"""


@dataclass(frozen=True)
class CohortOptions:
    """
    What makes a cohort harder or easier.

    Parameters
    ----------
    spacing_mm : float
        Resolution of the anatomies.
    t1w_mm, scan_mm : float
        Isotropic voxel size of the T1w images, and of PET and FA.
    warp_mm : float
        Mean length of each scan's smooth displacement within the brain; 0 for rigid motion alone.
        FA has echo-planar distortion in either case.
    n_landmarks : int
        Landmarks of a scan, at most.
    """

    spacing_mm: float = 1.5
    t1w_mm: float = 1.0
    scan_mm: float = 2.0
    warp_mm: float = 3.0
    n_landmarks: int = 200


@dataclass(frozen=True, eq=False)
class _Person:
    """A subject with a head, and the pose of its T1w image."""

    subject: Subject
    head: Head
    template: Template
    t1w_pose: np.ndarray
    generator: torch.Generator
    options: CohortOptions

    def positions(
        self, grid: nb.Nifti1Image, pose: np.ndarray, displacement: Tensor | None = None
    ) -> Tensor:
        """
        Find the voxels of an image on the subject's grid.

        Returns
        -------
        Tensor, shape (1, 3, I, J, K)
            Unit coordinates, displaced as a scan displaces its anatomy.
        """
        shape = (self.template.size,) * 3
        vox2unit = world2unit(self.template.affine, shape) @ np.linalg.inv(pose) @ grid.affine
        positions = grid_positions(grid.shape, vox2unit)
        if displacement is None:
            return positions
        return positions + sample(displacement, positions)


@dataclass(frozen=True, eq=False)
class _Scan:
    """A scan, where it is, and the truth about it."""

    image: nb.Nifti1Image
    labels: nb.Nifti1Image
    landmarks: Landmarks
    chain: tuple[np.ndarray, DisplacementField, np.ndarray]


def write_cohort(
    out_dir: Path,
    *,
    n_subjects: int = 3,
    seed: int = 0,
    options: CohortOptions | None = None,
) -> list[Path]:
    """
    Write a simulated cohort.

    Parameters
    ----------
    out_dir : Path
        New or empty folder of the BIDS dataset.
    n_subjects : int
        Number of subjects, each with T1w, FDG PET, and FA under ``derivatives/dti``.
    seed : int
        A subject is the same for the same seed and number.
    options : CohortOptions, optional
        Resolution and difficulty.

    Returns
    -------
    list of Path
        The scans: PET and FA of each subject.

    Raises
    ------
    ValueError
        If the folder is not empty, there is to be no subject, or the seed is negative.
    """
    out_dir, options = Path(out_dir), options or CohortOptions()
    if n_subjects < 1:
        raise ValueError(f"n_subjects must be at least 1, got {n_subjects}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir}: not empty. Give a new folder, or remove this one.")
    labels = [f"ADNI011S{number:04d}" for number in range(1, n_subjects + 1)]
    _write_descriptions(out_dir, labels)
    scans = []
    for number, label in enumerate(tqdm(labels, "simulating", unit="subject", disable=None)):
        LOGGER.info("simulating sub-%s (%d of %d)", label, number + 1, n_subjects)
        scans += write_subject(out_dir, label, seed=1000 * seed + number, options=options)
    return scans


def write_subject(out_dir: Path, label: str, *, seed: int, options: CohortOptions) -> list[Path]:
    """
    Write the images of one simulated subject and the truth about them.

    Parameters
    ----------
    out_dir : Path
        The BIDS dataset.
    label : str
        Participant label, without ``sub-``.
    seed : int
        Of this subject alone.
    options : CohortOptions

    Returns
    -------
    list of Path
        The PET and the FA image.
    """
    person = _make_person(seed, options)
    stem = f"sub-{label}_ses-{SESSION}"
    folder = Path(f"sub-{label}") / f"ses-{SESSION}"
    t1w, t1w_labels = _t1w_image(person)
    save_image(t1w, out_dir / folder / "anat" / f"{stem}_T1w.nii.gz")
    save_image(t1w_labels, out_dir / TRUTH_FOLDER / f"{stem}_T1w" / "dseg.nii.gz")
    files = {
        "pet": out_dir / folder / "pet" / f"{stem}_{PET_ENTITIES}_pet.nii.gz",
        "fa": out_dir / "derivatives" / "dti" / folder / "dwi" / f"{stem}_param-FA_dwimap.nii.gz",
    }
    for modality, file in files.items():
        scan = _scan(person, modality)
        save_image(scan.image, file)
        truth_dir = out_dir / TRUTH_FOLDER / file.name.removesuffix(".nii.gz")
        save_image(scan.labels, truth_dir / "dseg.nii.gz")
        write_composite(scan.chain, truth_dir / TRUTH_XFM)
        write_landmarks(scan.landmarks, truth_dir / "landmarks.tsv")
    return list(files.values())


def _make_person(seed: int, options: CohortOptions) -> _Person:
    """Draw a subject, its head and the pose of its T1w image."""
    template = cached_template(round(_EXTENT_MM / options.spacing_mm) + 1, options.spacing_mm)
    # Apart from the pairs of the same seed.
    generator = unseen_generator(seed + (1 << 29))
    strength = uniform(generator, 0.5, 1.2)
    coordinates = random_coordinates(template, generator, strength=strength, affine_sd=0.025)
    subject = subject_from_coordinates(template, coordinates, generator)
    head = simulate_head(subject.tissues.sum(1, keepdim=True), template.affine, generator)
    pose = random_pose(generator, max_shift_mm=5, max_angle_deg=6)
    return _Person(subject, head, template, pose, generator, options)


def _t1w_image(person: _Person) -> tuple[nb.Nifti1Image, nb.Nifti1Image]:
    """Simulate the T1w image of a whole head, and its labels, slightly oblique."""
    generator, spacing_mm = person.generator, person.options.t1w_mm
    oblique = random_pose(generator, max_shift_mm=0, max_angle_deg=6, is_far=True)
    grid = _empty_image((192, 240, 240), (0, -13, -14), spacing_mm, oblique)
    points = grid_positions(grid.shape, np.linalg.inv(person.t1w_pose) @ grid.affine)
    positions = person.positions(grid, person.t1w_pose)
    csf, gm, wm = sample(person.subject.tissues, positions, padding="zeros")[0]
    grey = uniform(generator, 0.6, 0.75)
    fluid = uniform(generator, 0.12, 0.25)
    t1 = person.subject.template[:, [TEMPLATE_CHANNELS.index("t1")]]
    share = uniform(generator, 0.15, 0.4)
    image = fluid * csf + grey * gm + wm
    image = (1 - share) * image + share * sample(t1, positions, padding="zeros")[0, 0]
    image += (1 - csf - gm - wm) * simulate_head_t1w(person.head, points, generator)
    bias = sample(random_field(24, 8, generator), positions)[0, 0]
    image *= torch.exp(uniform(generator, 0.04, 0.12) * bias)
    # Magnitude images have Rician noise: the root of the squares of two channels.
    noise = uniform(generator, 0.015, 0.035) * torch.randn((2, *grid.shape), generator=generator)
    image = torch.hypot(image + noise[0], noise[1])
    data = (image * 450).clamp(0, 4095).to(torch.int16).numpy()
    labels = label_map(person.subject, positions)
    return image_of(data, grid.affine), image_of(labels, grid.affine)


def _scan(person: _Person, modality: str) -> _Scan:
    """Simulate a PET or FA scan of a person, displaced and in a pose of its own."""
    generator, subject, extent_mm = person.generator, person.subject, person.template.extent_mm
    size = round(extent_mm / _FIELD_SPACING_MM) + 1
    coarse = identity_map(size)
    volumes = (subject.coordinates, subject.tissues, subject.template)
    coarse_subject = Subject(*(sample(volume, coarse) for volume in volumes))
    displacement = random_displacement(
        coarse_subject,
        extent_mm,
        generator,
        mean_mm=person.options.warp_mm,
        has_epi_distortion=modality == "fa",
    )
    is_pet = modality == "pet"
    # Clinica re-centres the headers of PET and T1w images, not those of diffusion images.
    pose = random_pose(
        generator,
        max_shift_mm=10 if is_pet else 45,
        max_angle_deg=10 if is_pet else 15,
        is_far=True,
    )
    pose = pose @ person.t1w_pose
    image, positions = (_pet_image if is_pet else _fa_image)(person, pose, displacement)
    field_affine = person.template.affine.copy()
    field_affine[:3, :3] = np.eye(3) * (extent_mm / (size - 1))
    maps = (coarse, coarse + displacement)
    truth = field_between(*maps, field_affine)
    brain = coarse_subject.tissues[0].sum(0).numpy() > 0.5
    landmarks = choose_landmarks(
        maps, truth, brain, generator, n_points=person.options.n_landmarks
    )
    return _Scan(
        image,
        image_of(label_map(subject, positions), image.affine),
        Landmarks(
            apply_affine(person.t1w_pose, landmarks.fixed), apply_affine(pose, landmarks.moving)
        ),
        (pose, truth, np.linalg.inv(person.t1w_pose)),
    )


def _pet_image(
    person: _Person, pose: np.ndarray, displacement: Tensor
) -> tuple[nb.Nifti1Image, Tensor]:
    """Simulate a PET scan, its first axis from right to left, and the positions of its voxels."""
    generator, template = person.generator, person.template
    points = grid_positions((template.size,) * 3, template.affine)
    glow = scalp_uptake(person.head, points)[None, None]
    uptake = simulate_pet(person.subject, template.spacing_mm, generator, glow=glow)
    grid = _empty_image((220, 240, 170), (0, -15, 4), person.options.scan_mm, np.eye(4), flip=True)
    positions = person.positions(grid, pose, displacement)
    image = sample(uptake, positions, padding="zeros")[0, 0].numpy()
    image = image + 0.004 * torch.randn(image.shape, generator=generator).abs().numpy()
    scale = uniform(generator, 6000, 14000)
    return image_of((image * scale).astype(np.int16), grid.affine), positions


def _fa_image(
    person: _Person, pose: np.ndarray, displacement: Tensor
) -> tuple[nb.Nifti1Image, Tensor]:
    """Simulate an FA map, with failures of the fit at its rim, and the positions of its voxels."""
    generator = person.generator
    fa = 0.85 * simulate_fa(person.subject, person.template.spacing_mm, generator)
    tilt = random_pose(generator, max_shift_mm=0, max_angle_deg=8, is_far=True)
    center = pose @ (0, -17, 5, 1)
    grid = _empty_image((220, 240, 180), center[:3], person.options.scan_mm, tilt)
    positions = person.positions(grid, pose, displacement)
    image = sample(fa, positions, padding="zeros")[0, 0].numpy()
    brain = sample(person.subject.tissues, positions, padding="zeros")[0].sum(0).numpy()
    image[brain < 0.3] = 0
    rim = np.flatnonzero((brain > 0.3) & (brain < 0.6))
    failed = torch.randperm(len(rim), generator=generator)[: len(rim) // 100].numpy()
    spikes = 0.7 + 0.5 * torch.rand(len(failed), generator=generator).numpy()
    image.flat[rim[failed]] = spikes
    return image_of(image, grid.affine), positions


def _empty_image(
    extent_mm: tuple[float, float, float],
    center_mm: tuple[float, float, float] | np.ndarray,
    spacing_mm: float,
    rotation: np.ndarray,
    *,
    flip: bool = False,
) -> nb.Nifti1Image:
    """Image of zeros that covers a box of its world; its axes are turned by a pose."""
    shape = np.rint(np.asarray(extent_mm) / spacing_mm).astype(int)
    axes = rotation[:3, :3] * (spacing_mm * np.array([-1 if flip else 1, 1, 1]))
    affine = from_matvec(axes, np.asarray(center_mm) - axes @ ((shape - 1) / 2))
    return nb.Nifti1Image(np.zeros(shape, dtype=np.uint8), affine)


def _write_descriptions(out_dir: Path, labels: list[str]) -> None:
    """Write what describes the dataset and its participants."""
    raw = {"Name": "Simulated ADNI-like cohort", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    derived = {
        "Name": "Simulated FA maps",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "m2m-bids-simulate"}],
    }
    dti = out_dir / "derivatives" / "dti"
    dti.mkdir(parents=True)
    for folder, content in ((out_dir, raw), (dti, derived)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / "dataset_description.json").write_text(text)
    (out_dir / "README").write_text(_READ_ME)
    rows = ["participant_id", *(f"sub-{label}" for label in labels)]
    (out_dir / "participants.tsv").write_text("\n".join(rows) + "\n")
    for label in labels:
        folder = out_dir / f"sub-{label}"
        folder.mkdir()
        # Clinica writes such a table for each subject.
        (folder / f"sub-{label}_sessions.tsv").write_text(f"session_id\nses-{SESSION}\n")
