"""Random anatomies: the MNI152 template's tissues under random diffeomorphisms.

Pure PyTorch, so that a network can be trained where only torch and numpy are installed. Images are
(1, C, n, n, n) on one cubic grid, and maps are in its unit coordinates.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m2m_bids.registration.grids import identity_map, pool, sample
from m2m_bids.registration.maps import integrate_velocity
from m2m_bids.registration.similarity import smooth

TISSUES = ("csf", "gm", "wm")
TEMPLATE_CHANNELS = ("t1", "csf", "gm", "wm", "mask", "ventricles")


@dataclass(frozen=True)
class Template:
    """
    The anatomy that every simulated subject deforms.

    Parameters
    ----------
    data : Tensor, shape (1, 6, n, n, n)
        Channels `TEMPLATE_CHANNELS`, all in [0, 1].
    affine : ndarray, shape (4, 4)
        Voxel to MNI world; isotropic.
    """

    data: Tensor
    affine: np.ndarray

    @property
    def size(self) -> int:
        """Voxels along every axis."""
        return self.data.shape[-1]

    @property
    def spacing_mm(self) -> float:
        """Voxel size."""
        return float(np.linalg.norm(self.affine[:3, 0]))

    @property
    def extent_mm(self) -> float:
        """Length of one unit of the unit coordinates."""
        return self.spacing_mm * (self.size - 1)

    def pooled(self) -> "Template":
        """Halve the resolution as the network does between its scales."""
        affine = self.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = self.affine[:3, :3].sum(1) * 0.5 + self.affine[:3, 3]
        return Template(pool(self.data), affine)

    def save(self, file: Path | str) -> None:
        """Write as compressed NumPy arrays, for machines without nilearn."""
        data = (self.data[0].numpy() * 255).round().astype(np.uint8)
        np.savez_compressed(file, data=data, affine=self.affine)

    @classmethod
    def load(cls, file: Path | str) -> "Template":
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            data = torch.from_numpy(arrays["data"].astype(np.float32) / 255)[None]
            return cls(data, arrays["affine"])


@dataclass(frozen=True)
class Subject:
    """
    One simulated anatomy.

    Parameters
    ----------
    coordinates : Tensor, shape (1, 3, n, n, n)
        Map from the subject's grid to unit coordinates of the template.
    tissues : Tensor, shape (1, 3, n, n, n)
        Fractions of `TISSUES`, sharper than the template's; their sum is the brain.
    template : Tensor, shape (1, 6, n, n, n)
        The template's channels at ``coordinates``.
    """

    coordinates: Tensor
    tissues: Tensor
    template: Tensor


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw one number between two bounds."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def random_field(
    size: int, scale_voxels: float, generator: torch.Generator, *, n_channels: int = 1
) -> Tensor:
    """
    Draw smooth noise of unit variance.

    Parameters
    ----------
    size : int
    scale_voxels : float
        Distance between independent values, about.
    generator : torch.Generator
    n_channels : int

    Returns
    -------
    Tensor, shape (1, n_channels, size, size, size)
    """
    n_knots = max(3, round(size / scale_voxels) + 1)
    knots = torch.randn((1, n_channels, n_knots, n_knots, n_knots), generator=generator)
    field = smooth(sample(knots, identity_map(size)), 0.4 * (size - 1) / (n_knots - 1))
    return field / field.std().clamp_min(1e-6)


def gradient(image: Tensor) -> Tensor:
    """
    Differentiate an image by central differences.

    Parameters
    ----------
    image : Tensor, shape (1, 1, n, n, n)

    Returns
    -------
    Tensor, shape (1, 3, n, n, n)
        Change per voxel along each axis.
    """
    return torch.cat(torch.gradient(image, dim=(2, 3, 4)), 1)


def random_coordinates(
    template: Template,
    generator: torch.Generator,
    *,
    strength: float = 1.0,
    affine_sd: float = 0.04,
) -> Tensor:
    """
    Draw a diffeomorphism from a subject's grid to the template: affine, several scales, atrophy.

    Velocities are drawn and integrated on a grid of 6 mm (or the template's, where coarser).

    Parameters
    ----------
    template : Template
    generator : torch.Generator
    strength : float
        Factor of all deformations beyond the affine.
    affine_sd : float
        Standard deviation of each entry of the affine's linear part, about the template's centre.

    Returns
    -------
    Tensor, shape (1, 3, n, n, n)
        Unit coordinates of the template.
    """
    extent = template.extent_mm
    size = min(template.size, round(extent / 6) + 1)
    coarse = identity_map(size)
    data = sample(template.data, coarse)
    voxel = extent / (size - 1)
    velocity = torch.zeros(1, 3, size, size, size)
    for scale_mm, amplitude_mm in ((70.0, 4.0), (35.0, 3.0), (18.0, 1.6)):
        amplitude = uniform(generator, 0.2, 1.0) * amplitude_mm
        velocity += amplitude * random_field(size, scale_mm / voxel, generator, n_channels=3)
    # A flow towards the ventricles' centre makes a subject's ventricles larger; one off the rim
    # shrinks the brain's parenchyma away from it.
    for channel, width_mm, low, high in (("ventricles", 9.0, -4.0, 9.0), ("wm", 6.0, -2.0, 2.0)):
        blurred = smooth(data[:, [TEMPLATE_CHANNELS.index(channel)]], width_mm / voxel)
        flow = gradient(blurred)
        flow = flow / flow.norm(dim=1).amax().clamp_min(1e-6)
        velocity += uniform(generator, low, high) * flow
    disp = sample(integrate_velocity(strength * velocity / extent), identity_map(template.size))
    linear = torch.eye(3) + affine_sd * torch.randn((3, 3), generator=generator)
    shift = torch.randn(3, generator=generator) * 2.0 / extent
    points = identity_map(template.size) + disp
    centred = torch.einsum("de,neijk->ndijk", linear, points - 0.5)
    return centred + 0.5 + shift[None, :, None, None, None]


def subject_from_coordinates(
    template: Template, coordinates: Tensor, generator: torch.Generator
) -> Subject:
    """
    Draw a subject's tissues at given template coordinates.

    The template is an average of many people and blurred; adding smooth noise to its tissue maps
    before sharpening them gives each subject cortical folds of its own, and a cortex of its own
    thickness.

    Parameters
    ----------
    template : Template
    coordinates : Tensor, shape (1, 3, n, n, n)
        Map from the subject's grid to the template.
    generator : torch.Generator

    Returns
    -------
    Subject
    """
    warped = sample(template.data, coordinates, padding="zeros")
    size = coordinates.shape[-1]
    spacing_mm = template.extent_mm / (size - 1)
    mask = warped[:, [TEMPLATE_CHANNELS.index("mask")]]
    maps = torch.cat((1 - mask, warped[:, 1:4]), 1)
    noise = random_field(size, uniform(generator, 5, 9) / spacing_mm, generator, n_channels=4)
    offsets = 0.06 * torch.randn((1, 4, 1, 1, 1), generator=generator)
    amplitude = uniform(generator, 0.03, 0.22)
    # The outside keeps its rim: noise there would grow brain in the air.
    weights = torch.tensor([0.2, 1.0, 1.0, 1.0])[None, :, None, None, None]
    sharpness = uniform(generator, 6.0, 18.0)
    fractions = torch.softmax(sharpness * (maps + weights * (amplitude * noise + offsets)), 1)
    return Subject(coordinates, fractions[:, 1:] * (mask > 0.02), warped)


def random_subject(
    template: Template, generator: torch.Generator, *, strength: float = 1.0
) -> Subject:
    """
    Draw a subject.

    Parameters
    ----------
    template : Template
    generator : torch.Generator
    strength : float
        Factor of the deformations beyond the affine.

    Returns
    -------
    Subject
    """
    coordinates = random_coordinates(template, generator, strength=strength)
    return subject_from_coordinates(template, coordinates, generator)


def deformed_subject(subject: Subject, displacement: Tensor) -> Subject:
    """
    Deform a subject: its anatomy at ``x + displacement(x)``.

    Parameters
    ----------
    subject : Subject
    displacement : Tensor, shape (1, 3, n, n, n)
        Unit coordinates.

    Returns
    -------
    Subject
    """
    points = identity_map(displacement.shape[-1]) + displacement
    return Subject(
        sample(subject.coordinates, points),
        sample(subject.tissues, points, padding="zeros"),
        sample(subject.template, points, padding="zeros"),
    )


def load_template(size: int = 64, spacing_mm: float = 3.0) -> Template:
    """
    Load the template of a grid: the packaged one, else one made from nilearn's images.

    Parameters
    ----------
    size : int
    spacing_mm : float

    Returns
    -------
    Template
        For 64 voxels of 3 mm, what `template_from_nilearn` gave; that file needs no nilearn.
    """
    if (size, spacing_mm) == (64, 3.0):
        return Template.load(Path(str(files("m2m_bids.data") / "mni152_64x3mm.npz")))
    return template_from_nilearn(size, spacing_mm)


def template_from_nilearn(size: int = 64, spacing_mm: float = 3.0) -> Template:
    """
    Build the template from the MNI152 (ICBM 2009a symmetric) images that nilearn ships.

    Parameters
    ----------
    size : int
    spacing_mm : float

    Returns
    -------
    Template
        On the grid of `m2m_bids.spatial.conform.template_grid`.
    """
    import nibabel as nb
    from nilearn import datasets
    from scipy import ndimage

    from m2m_bids.spatial.conform import sample_on_grid, template_grid

    t1, gm, wm, mask = (
        load(resolution=1)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_brain_mask,
        )
    )
    inside = mask.get_fdata() > 0
    csf = inside * np.clip(1 - gm.get_fdata() - wm.get_fdata(), 0, 1)
    # The lateral ventricles: the two large bodies of fluid deep inside and off the midline.
    depth_mm = ndimage.distance_transform_edt(inside)
    labels, n_labels = ndimage.label((csf > 0.5) & (depth_mm > 16))
    numbers = np.arange(1, n_labels + 1)
    volumes_mm3 = ndimage.sum_labels(labels > 0, labels, numbers)
    centres_mm = nb.affines.apply_affine(
        mask.affine, np.array(ndimage.center_of_mass(labels > 0, labels, numbers))
    )
    lateral = numbers[(volumes_mm3 > 2000) & (np.abs(centres_mm[:, 0]) > 5)]
    ventricles = ndimage.gaussian_filter(np.isin(labels, lateral).astype(float), 0.7)
    grid = template_grid(np.eye(4), size=size, spacing_mm=spacing_mm)
    channels = [
        sample_on_grid(t1.__class__(data.astype(np.float32), t1.affine), grid)
        for data in (t1.get_fdata(), csf, gm.get_fdata(), wm.get_fdata(), inside, ventricles)
    ]
    data = torch.from_numpy(np.stack(channels)).clamp(0, 1)[None]
    return Template(data, grid.affine)
