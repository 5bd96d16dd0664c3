"""Images of simulated anatomies: T1w, PET and FA with random contrast, resolution and artefacts.

Pure PyTorch; images are (1, 1, n, n, n) in [0, 1], on the grid of the subject.
"""

import torch
from torch import Tensor

from m2m_bids.registration.similarity import smooth
from m2m_bids.simulation.anatomy import (
    TEMPLATE_CHANNELS,
    Subject,
    Template,
    random_field,
    uniform,
)

FWHM_TO_SIGMA = 1 / 2.3548
PET_FWHM_MM = 6
# Brightness of grey matter, white matter and fluid.
Weights = tuple[float, float, float]
FDG_WEIGHTS: Weights = (1.0, 0.35, 0.0)
WHITE_MATTER_WEIGHTS: Weights = (0.6, 1.0, 0.15)
"""Of a tracer that white matter takes up more of than grey matter, as amyloid tracers are."""


def _channel(subject: Subject, name: str) -> Tensor:
    return subject.template[:, [TEMPLATE_CHANNELS.index(name)]]


def _unit_range(image: Tensor) -> Tensor:
    """Clip at zero and the 99.9th percentile, and divide by that, as the app does."""
    image = image.clamp_min(0)
    positive = image[image > 0]
    if len(positive) == 0:
        return image
    rank = max(1, round(0.999 * len(positive)))
    top = positive.kthvalue(rank).values
    return (image / top.clamp_min(1e-6)).clamp_max(1)


def _add_noise(
    image: Tensor, sd: float, sigma_voxels: float, generator: torch.Generator
) -> Tensor:
    noise = smooth(torch.randn(image.shape, generator=generator), sigma_voxels)
    return image + sd * noise / noise.std()


def simulate_t1w(subject: Subject, spacing_mm: float, generator: torch.Generator) -> Tensor:
    """
    Simulate a skull-stripped T1w image.

    Parameters
    ----------
    subject : Subject
    spacing_mm : float
        Voxel size.
    generator : torch.Generator

    Returns
    -------
    Tensor, shape (1, 1, n, n, n)
        Fluid dark, grey matter in between, white matter bright; in part the template's own
        contrast; a bias field, blur, noise, and here and there a brain mask that lost or kept
        too much.
    """
    size = subject.tissues.shape[-1]
    white = uniform(generator, 0.8, 1.0)
    grey = white * uniform(generator, 0.55, 0.82)
    fluid = grey * uniform(generator, 0.05, 0.5)
    csf, gm, wm = subject.tissues.split(1, dim=1)
    image = fluid * csf + grey * gm + white * wm
    share = uniform(generator, 0.0, 0.6)
    image = (1 - share) * image + share * _channel(subject, "t1") * (csf + gm + wm)
    bias = random_field(size, uniform(generator, 50, 110) / spacing_mm, generator)
    image = image * torch.exp(uniform(generator, 0.0, 0.15) * bias)
    if uniform(generator, 0, 1) < 0.4:
        # A brain mask's errors: remains of the meninges, or cortex cut off, in patches.
        brain = _channel(subject, "mask")
        rim = smooth(brain, 2.5 / spacing_mm)
        patches = random_field(size, uniform(generator, 15, 40) / spacing_mm, generator)
        remains = (rim > 0.15) & (brain < 0.5) & (patches > 1.0)
        image = image + remains * uniform(generator, 0.1, 0.7)
        image = image * ~((rim < 0.7) & (patches < -1.3))
    noisy = _add_noise(
        smooth(image, uniform(generator, 0.0, 1.2) / spacing_mm),
        uniform(generator, 0.0, 0.04),
        0.0,
        generator,
    )
    return _unit_range(noisy * (image > 0.03))


def simulate_pet(
    subject: Subject,
    spacing_mm: float,
    generator: torch.Generator,
    *,
    is_white_matter_tracer: bool = False,
    glow: Tensor | None = None,
) -> Tensor:
    """
    Simulate a PET image.

    Parameters
    ----------
    subject : Subject
    spacing_mm : float
        Voxel size.
    generator : torch.Generator
    is_white_matter_tracer : bool
        White matter is the brightest, as with amyloid tracers; otherwise grey matter, as with FDG.
    glow : Tensor, shape (1, 1, n, n, n), optional
        Where the scalp takes up tracer; a shell around the brain by default.

    Returns
    -------
    Tensor, shape (1, 1, n, n, n)
        Three tissues, regions of more and less uptake in grey matter, 4-9 mm FWHM blur, noise,
        scalp glow.
    """
    size = subject.tissues.shape[-1]
    csf, gm, wm = subject.tissues.split(1, dim=1)
    regions = random_field(size, uniform(generator, 25, 60) / spacing_mm, generator)
    grey = torch.exp(uniform(generator, 0.05, 0.3) * regions).clamp(0.35, 1.6)
    if is_white_matter_tracer:
        grey = grey * uniform(generator, 0.45, 0.85)
        white, fluid = uniform(generator, 0.9, 1.1), uniform(generator, 0.05, 0.3)
    else:
        white, fluid = uniform(generator, 0.2, 0.5), uniform(generator, 0.0, 0.15)
    image = grey * gm + white * wm + fluid * csf
    if glow is None:
        halo = smooth(_channel(subject, "mask"), 10 / spacing_mm)
        glow = ((halo > 0.01) & (halo < 0.2)).to(image.dtype)
    patches = 1 + 0.4 * random_field(size, 30 / spacing_mm, generator)
    image = image + uniform(generator, 0.0, 0.3) * patches.clamp_min(0) * glow
    image = smooth(image, uniform(generator, 4, 9) * FWHM_TO_SIGMA / spacing_mm)
    grain = uniform(generator, 3, 6) * FWHM_TO_SIGMA / spacing_mm
    return _unit_range(_add_noise(image, uniform(generator, 0.0, 0.06), grain, generator))


def simulate_fa(subject: Subject, spacing_mm: float, generator: torch.Generator) -> Tensor:
    """
    Simulate a fractional anisotropy map.

    Parameters
    ----------
    subject : Subject
    spacing_mm : float
        Voxel size.
    generator : torch.Generator

    Returns
    -------
    Tensor, shape (1, 1, n, n, n)
        Bright along the white matter's core with the texture of its bundles, a thin floor in
        grey matter, noise where diffusion is isotropic.
    """
    size = subject.tissues.shape[-1]
    csf, gm, wm = subject.tissues.split(1, dim=1)
    core = smooth(wm, uniform(generator, 2.0, 4.0) / spacing_mm)
    bundles = random_field(size, uniform(generator, 9, 22) / spacing_mm, generator)
    crossing = torch.sigmoid(
        uniform(generator, 1.0, 2.5) * (bundles + uniform(generator, 0.0, 1.5))
    )
    # White matter of the template that is sure is callosum or capsule: the most anisotropic of
    # all.
    deep = _channel(subject, "wm").pow(3)
    fibres = wm * (0.25 + uniform(generator, 0.3, 0.7) * core.pow(uniform(generator, 0.7, 2.0)))
    image = fibres * (0.45 + 0.55 * crossing) * (1 + uniform(generator, 0.0, 0.4) * deep)
    image = image + uniform(generator, 0.04, 0.14) * gm + uniform(generator, 0.02, 0.12) * csf
    image = smooth(image, uniform(generator, 1.5, 3.5) * FWHM_TO_SIGMA / spacing_mm)
    brain = (subject.tissues.sum(1, keepdim=True) > 0.3).to(image.dtype)
    noisy = _add_noise(image, uniform(generator, 0.01, 0.06), 0.5, generator)
    return _unit_range(noisy * brain)


def echo_planar_displacement(
    subject: Subject, extent_mm: float, generator: torch.Generator, *, axis: int = 1
) -> Tensor:
    """
    Draw the displacement that field inhomogeneity causes in echo-planar images.

    Parameters
    ----------
    subject : Subject
    extent_mm : float
        Length of one unit of the unit coordinates.
    generator : torch.Generator
    axis : int
        Phase-encoding axis of the array; 1 is posterior-anterior.

    Returns
    -------
    Tensor, shape (1, 3, n, n, n)
        Unit coordinates, along one axis: up to about 9 mm near the frontal sinuses and the ear
        canals, and a few millimetres of smooth distortion elsewhere.
    """
    size = subject.tissues.shape[-1]
    spacing_mm = extent_mm / (size - 1)
    smooth_part = random_field(size, 45 / spacing_mm, generator)
    height = subject.coordinates[:, 2:]
    front = subject.coordinates[:, 1:2]
    # Sinuses lie under the front of the brain, ear canals under its middle, in template
    # coordinates.
    sinus = torch.exp(-(((height - 0.36) / 0.09) ** 2) - ((front - 0.74) / 0.10) ** 2)
    canals = torch.exp(-(((height - 0.28) / 0.08) ** 2) - ((front - 0.48) / 0.10) ** 2)
    amplitude_mm = uniform(generator, -8, 8)
    shift = uniform(generator, 0.2, 1.2) * smooth_part + amplitude_mm * sinus
    shift = shift + 0.5 * uniform(generator, -8, 8) * canals
    disp = torch.zeros(1, 3, size, size, size)
    disp[:, axis] = shift[0] / extent_mm
    return disp


def fit_pet_weights(image: Tensor, tissues: Tensor, spacing_mm: float) -> Weights:
    """
    Find in what grey matter, white matter and fluid differ in a PET image.

    Parameters
    ----------
    image : Tensor, shape (1, 1, n, n, n)
        PET image, as well aligned as can be. Two simulated people's, aligned rigidly only, could
        make an FDG scan look as if grey and white matter were equally bright.
    tissues : Tensor, shape (1, 3, n, n, n)
        Shares of grey matter, white matter and fluid.
    spacing_mm : float
        Voxel size.

    Returns
    -------
    tuple of float
        `FDG_WEIGHTS` where grey matter is clearly brighter than white: a simulated image whose
        contrast is sharper than the scan's is the better one to register to. Otherwise the
        weights, by least squares, with which the blurred tissues add up to the image, as for
        amyloid tracers, which white matter takes up.
    """
    brain = tissues.sum(1)[0] > 0.5
    blurred = smooth(tissues, PET_FWHM_MM * FWHM_TO_SIGMA / spacing_mm)[0][:, brain].T
    observed = image[0, 0][brain][:, None]
    fitted = torch.linalg.lstsq(blurred, observed).solution[:, 0].clamp_min(0)
    grey, white, fluid = fitted.tolist()
    if white <= 0.8 * grey:
        return FDG_WEIGHTS
    return grey, white, fluid


def expected_contrast(
    tissues: Tensor, modality: str, spacing_mm: float, *, pet_weights: Weights = FDG_WEIGHTS
) -> Tensor:
    """
    Make what PET or FA would show of an anatomy, without noise.

    Parameters
    ----------
    tissues : Tensor, shape (1, 3, n, n, n)
        Shares of grey matter, white matter and fluid.
    modality : {"pet", "fa"}
    spacing_mm : float
        Voxel size.
    pet_weights : tuple of float
        How bright the tissues are in PET.

    Returns
    -------
    Tensor, shape (1, 1, n, n, n)
        PET is the blurred sum of the tissues; FA is white matter, brighter in its core.

    Raises
    ------
    ValueError
        If the modality is another.
    """
    gm, wm, _ = tissues.split(1, dim=1)
    if modality == "pet":
        weights = tissues.new_tensor(pet_weights).view(1, 3, 1, 1, 1)
        image = (weights * tissues).sum(1, keepdim=True)
        return _unit_range(smooth(image, PET_FWHM_MM * FWHM_TO_SIGMA / spacing_mm))
    if modality == "fa":
        return _unit_range(wm * (0.3 + 0.7 * smooth(wm, 4 / spacing_mm)) + 0.08 * gm)
    raise ValueError(f'modality must be "pet" or "fa", got {modality!r}')


def template_bridge(
    template: Template, modality: str, *, pet_weights: Weights = FDG_WEIGHTS
) -> tuple[Tensor, Tensor]:
    """
    Make an aligned bridge pair of the template: its T1w, and what PET or FA would show of it.

    Parameters
    ----------
    template : Template
    modality : {"pet", "fa"}
    pet_weights : tuple of float
        How bright the tissues are in PET.

    Returns
    -------
    functional, t1w : Tensor, shape (1, 1, n, n, n)
        The first is its `expected_contrast`.

    Raises
    ------
    ValueError
        If the modality is another.
    """
    gm, wm, mask = (
        template.data[:, [TEMPLATE_CHANNELS.index(name)]] for name in ("gm", "wm", "mask")
    )
    tissues = torch.cat((gm, wm, (mask - gm - wm).clamp_min(0)), 1)
    functional = expected_contrast(tissues, modality, template.spacing_mm, pet_weights=pet_weights)
    return functional, _unit_range(template.data[:, :1] * mask)
