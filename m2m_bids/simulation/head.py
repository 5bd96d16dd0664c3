"""A head round a simulated brain: skull, scalp, face and neck, by distance shells.

Anatomy world is the RAS+ millimetre space of a subject's grid, about that of the MNI template. The
face has no eyes: the head is there for registration and brain extraction to cope with.
"""

from dataclasses import dataclass

import numpy as np
import torch
from nibabel.affines import from_matvec
from scipy import ndimage
from torch import Tensor

from m2m_bids.registration.grids import sample
from m2m_bids.registration.similarity import smooth
from m2m_bids.simulation.anatomy import random_field, uniform
from m2m_bids.simulation.truth import grid_positions, world2unit

_SPACING_MM = 2.5
# The head's corners in anatomy world: from below the chin to above the scalp.
_LOW_MM = np.array([-110.0, -142.5, -172.5])
_HIGH_MM = np.array([110.0, 125.0, 122.5])
_CLOSING_MM = 12.0


@dataclass(frozen=True, eq=False)
class Head:
    """
    Distances that place the layers of a head.

    Parameters
    ----------
    world2unit : ndarray, shape (4, 4)
        Map from anatomy world to unit coordinates of the distances' grid.
    distances_mm : Tensor, shape (1, 2, I, J, K)
        Distance outwards from the brain's hull, negative inside; and depth below the skin,
        negative in the air.
    """

    world2unit: np.ndarray
    distances_mm: Tensor

    def distances(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """
        Interpolate both distances.

        Parameters
        ----------
        points : Tensor, shape (1, 3, I, J, K)
            Anatomy world, mm.

        Returns
        -------
        from_brain_mm, depth_mm : Tensor, shape (I, J, K)
            Continued beyond the grid by the value at its border, so that the neck goes on.
        """
        matrix = torch.from_numpy(self.world2unit.astype(np.float32))
        # The axes of the grid are those of the world.
        scale, shift = matrix.diagonal()[:3], matrix[:3, 3]
        positions = points * scale[:, None, None, None] + shift[:, None, None, None]
        from_brain, depth = sample(self.distances_mm, positions)[0]
        return from_brain, depth


def simulate_head(brain: Tensor, affine: np.ndarray, generator: torch.Generator) -> Head:
    """
    Grow a head round a brain.

    Parameters
    ----------
    brain : Tensor, shape (1, 1, n, n, n)
        Share of brain in each voxel.
    affine : ndarray, shape (4, 4)
        Voxel to anatomy world of the brain.
    generator : torch.Generator

    Returns
    -------
    Head
        Skull and scalp follow the brain's hull at a varying distance; face and neck are ellipsoids
        and a cylinder of random size below it.
    """
    shape = np.ceil((_HIGH_MM - _LOW_MM) / _SPACING_MM).astype(int) + 1
    grid_affine = from_matvec(np.eye(3) * _SPACING_MM, _LOW_MM)
    to_brain = world2unit(affine, brain.shape[2:]) @ grid_affine
    mask = sample(brain, grid_positions(shape, to_brain), padding="zeros")[0, 0].numpy() > 0.5
    # Closing fills sulci and the gaps between cerebellum, brainstem and temporal lobes.
    grown = _distance_to(mask) < _CLOSING_MM
    hull = _distance_to(~grown) > _CLOSING_MM
    distance = (_distance_to(hull) - _distance_to(~hull)).astype(np.float32)
    from_brain = torch.from_numpy(ndimage.gaussian_filter(distance, 2.0))
    points = grid_positions(shape, grid_affine)
    thickness = uniform(generator, 11, 15) + 1.2 * _noise(points, 50.0, generator)
    skin = _smooth_union(from_brain - thickness, _face_and_neck(points, generator), 25.0)
    return Head(world2unit(grid_affine, shape), torch.stack([from_brain, -skin])[None])


def simulate_head_t1w(head: Head, points: Tensor, generator: torch.Generator) -> Tensor:
    """
    Simulate what a T1w image shows of a head, but for the brain.

    Parameters
    ----------
    head : Head
    points : Tensor, shape (1, 3, I, J, K)
        Voxels of the image, anatomy world, mm.
    generator : torch.Generator

    Returns
    -------
    Tensor, shape (I, J, K)
        Intensity relative to white matter: fat bright, muscle in between, compact bone and air
        dark, cerebrospinal fluid where the brain is.
    """
    from_brain, depth = head.distances(points)
    fine = _noise(points, 9.0, generator)
    coarse = _noise(points, 30.0, generator)
    image = uniform(generator, 0.38, 0.5) * (1 + 0.12 * fine)
    # Fat fills the planes between muscles.
    image[fine + 0.5 * coarse > 1.1] = uniform(generator, 0.7, 0.9)
    _add_spine(image, points, from_brain)
    _add_airways(image, points, coarse)
    fat_mm = uniform(generator, 3, 5) * (1 + 0.25 * coarse)
    is_fat = (depth < 1.5 + fat_mm) & (from_brain > 6)
    image = torch.where(is_fat, 0.85 + 0.08 * fine, image)
    image[depth < 1.5] = 0.45
    _add_skull(image, from_brain, coarse, generator)
    image[from_brain < 2.0] = uniform(generator, 0.12, 0.25)
    image[depth < 0] = 0
    return smooth(image[None, None], 0.6)[0, 0]


def scalp_uptake(head: Head, points: Tensor) -> Tensor:
    """
    Say where soft tissue outside the skull takes up tracer.

    Parameters
    ----------
    head : Head
    points : Tensor, shape (1, 3, I, J, K)
        Anatomy world, mm.

    Returns
    -------
    Tensor, shape (I, J, K)
        One in the scalp, less in the deeper tissue of face and neck, zero elsewhere.
    """
    from_brain, depth = head.distances(points)
    soft = ((depth > 0) & (from_brain > 7)).float()
    return soft * torch.where(depth < 9, 1.0, 0.6)


def _add_skull(
    image: Tensor, from_brain: Tensor, coarse: Tensor, generator: torch.Generator
) -> None:
    """Put two dark tables and the marrow between them round the brain, in place."""
    half_mm = uniform(generator, 2.3, 3.2) + 0.4 * coarse
    offset = (from_brain - 2.0 - half_mm).abs()
    bone = 0.06 + uniform(generator, 0.3, 0.5) * torch.exp(-((offset / 1.1) ** 2))
    is_bone = offset < half_mm
    image[is_bone] = bone[is_bone]


def _add_spine(image: Tensor, points: Tensor, from_brain: Tensor) -> None:
    """Put spine and cord under the brainstem, in place."""
    x, y, z = points[0]
    radius = torch.hypot(x, y + 46 + 0.12 * (z + 70))
    radius[(z > -60) | (from_brain < 0)] = torch.inf
    is_spine = radius < 19
    image[is_spine] = 0.425 + 0.125 * torch.cos(z[is_spine] * (2 * np.pi / 18))
    image[radius < 9] = 0.2
    image[radius < 5] = 0.85


def _add_airways(image: Tensor, points: Tensor, coarse: Tensor) -> None:
    """Put nasal cavity, sinuses and pharynx under the front of the brain, in place."""
    x, y, z = points[0]
    nose = (x / 15) ** 2 + ((y - 58) / 32) ** 2 + ((z + 48) / 24) ** 2
    sinuses = ((x.abs() - 30) / 13) ** 2 + ((y - 58) / 17) ** 2 + ((z + 60) / 16) ** 2
    throat = torch.hypot(x / 1.3, y - 2 + 0.15 * (z + 70)) / 8
    image[(nose + 0.25 * coarse < 1) | (sinuses + 0.2 * coarse < 1)] = 0.06
    image[(throat < 1) & (z < -55)] = 0.04


def _face_and_neck(points: Tensor, generator: torch.Generator) -> Tensor:
    """Signed distance, about, from the skin of face and neck: negative inside."""
    x, y, z = points[0]
    size = uniform(generator, 0.93, 1.07)
    front = y + 38 - 0.2 * (z + 90)
    neck = (torch.hypot(x / (60 * size), front / (64 * size)) - 1) * 60
    neck = torch.maximum(neck, z + 40)
    cheeks = _ellipsoid(points, (0, 14, -58), (76 * size, 74 * size, 62 * size))
    chin = _ellipsoid(points, (0, 48, -92), (46 * size, 40 * size, 44 * size))
    nose = _ellipsoid(points, (0, 90 * size, -52), (13, 20, 22))
    face = _smooth_union(_smooth_union(cheeks, chin, 25.0), nose, 10.0)
    return _smooth_union(neck, face, 30.0)


def _ellipsoid(points: Tensor, center: tuple[float, ...], radii: tuple[float, ...]) -> Tensor:
    """Distance from an ellipsoid's surface, about; negative inside."""
    scaled = torch.stack([(points[0, d] - center[d]) / radii[d] for d in range(3)])
    return (scaled.norm(dim=0) - 1) * min(radii)


def _smooth_union(a: Tensor, b: Tensor, width_mm: float) -> Tensor:
    """Signed distance of two bodies merged, with a fillet where they meet."""
    share = (0.5 + 0.5 * (b - a) / width_mm).clamp(0, 1)
    return b + (a - b) * share - width_mm * share * (1 - share)


def _noise(points: Tensor, scale_mm: float, generator: torch.Generator) -> Tensor:
    """Smooth noise of unit variance at points of anatomy world, (1, 3, I, J, K)."""
    extent_mm = 320.0
    size = min(96, round(3 * extent_mm / scale_mm))
    field = random_field(size, scale_mm * size / extent_mm, generator)
    return sample(field, points / extent_mm + 0.5)[0, 0]


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Distance to a mask from outside, mm; zero inside."""
    return ndimage.distance_transform_edt(~mask, sampling=_SPACING_MM)
