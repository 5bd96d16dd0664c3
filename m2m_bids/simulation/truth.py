"""True transforms, landmarks and labels of simulated scans.

A scan shows its subject's anatomy displaced and in a pose of its own. Its header's world and
anatomy world (that of the subject's grid, near MNI's) are RAS+ millimetres; all subjects share the
template's unit coordinates.
"""

from collections.abc import Sequence

import nibabel as nb
import numpy as np
import torch
from nibabel.affines import apply_affine, from_matvec
from torch import Tensor

from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.maps import compose, integrate_velocity
from m2m_bids.simulation.anatomy import TEMPLATE_CHANNELS, Subject, random_field, uniform
from m2m_bids.simulation.contrast import echo_planar_displacement
from m2m_bids.spatial.conform import BRAIN_CENTER_MM
from m2m_bids.spatial.fields import DisplacementField, invert_displacement
from m2m_bids.spatial.landmarks import Landmarks

LABELS = {"GM": 1, "WM": 2, "CSF": 3, "ventricles": 4}
"""Values of the label maps; CSF is that outside the lateral ventricles."""

# The CPU generator of PyTorch uses the lower 32 bits of a seed alone. Those of the training's
# seeds are small numbers, so that bit 30 keeps these subjects apart from the training's.
_TEST_SEED = 1 << 30


def unseen_generator(seed: int) -> torch.Generator:
    """
    Make a generator whose subjects are not among those of the default weights' training.

    Parameters
    ----------
    seed : int
        From 0 to 2**30 - 1.

    Raises
    ------
    ValueError
        If the seed is outside that range.
    """
    if not 0 <= seed < _TEST_SEED:
        raise ValueError(f"seed must be from 0 to {_TEST_SEED - 1}, got {seed}")
    return torch.Generator().manual_seed(_TEST_SEED + seed)


def random_pose(
    generator: torch.Generator, *, max_shift_mm: float, max_angle_deg: float, is_far: bool = False
) -> np.ndarray:
    """
    Draw a rigid motion of the brain.

    Parameters
    ----------
    generator : torch.Generator
    max_shift_mm : float
        Length of the longest translation of the brain's centre.
    max_angle_deg : float
        Largest angle, about a random axis.
    is_far : bool
        Whether both are at least half of their largest value.

    Returns
    -------
    ndarray, shape (4, 4)
        Map from anatomy world to the posed world.
    """
    low = 0.5 if is_far else 0.0
    vectors = torch.randn((2, 3), generator=generator).double()
    axis, direction = torch.nn.functional.normalize(vectors).numpy()
    angle = np.deg2rad(uniform(generator, low, 1) * max_angle_deg)
    cross = np.cross(np.eye(3), -axis)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    shift = uniform(generator, low, 1) * max_shift_mm * direction
    center = np.asarray(BRAIN_CENTER_MM)
    return from_matvec(rotation, center - rotation @ center + shift)


def random_displacement(
    subject: Subject,
    extent_mm: float,
    generator: torch.Generator,
    *,
    mean_mm: float = 0.0,
    has_epi_distortion: bool = False,
) -> Tensor:
    """
    Draw how a scan displaces its subject's anatomy.

    Parameters
    ----------
    subject : Subject
        On a grid of about 3 mm.
    extent_mm : float
        Length of one unit.
    generator : torch.Generator
    mean_mm : float
        Mean length, within the brain, of a smooth diffeomorphic displacement.
    has_epi_distortion : bool
        Whether the distortion of echo-planar images comes on top.

    Returns
    -------
    Tensor, shape (1, 3, n, n, n)
        The scan shows at x the anatomy at ``x + disp(x)``; unit coordinates, zero at the border.
    """
    size = subject.tissues.shape[-1]
    identity = identity_map(size)
    phi = identity
    if mean_mm > 0:
        velocity = torch.zeros(1, 3, size, size, size)
        for scale_mm, amplitude in ((80.0, 1.0), (40.0, 0.5)):
            noise = random_field(size, scale_mm * (size - 1) / extent_mm, generator, n_channels=3)
            velocity += amplitude * noise
        brain = subject.tissues.sum(1, keepdim=True) > 0.5
        length_mm = velocity.norm(dim=1, keepdim=True)[brain].mean()
        phi = identity + integrate_velocity(velocity * (mean_mm / (length_mm * extent_mm)))
    if has_epi_distortion:
        # Echo-planar images are distorted after the head has taken its shape.
        distortion = echo_planar_displacement(subject, extent_mm, generator)
        phi = compose(phi, identity + distortion)
    to_border = torch.minimum(identity, 1 - identity).amin(1, keepdim=True)
    ramp = (to_border / 0.08).clamp_max(1)
    return (phi - identity) * ramp.square() * (3 - 2 * ramp)


def field_between(
    fixed_coordinates: Tensor, moving_coordinates: Tensor, affine: np.ndarray
) -> DisplacementField:
    r"""
    Find the true map from one image to another, both on one grid of anatomy world.

    .. math:: X_M(\varphi(x)) = X_F(x)

    Parameters
    ----------
    fixed_coordinates, moving_coordinates : Tensor, shape (1, 3, n, n, n)
        What each voxel of an image shows: unit coordinates of a common anatomy.
    affine : ndarray, shape (4, 4)
        Voxel to anatomy world of the grid.

    Returns
    -------
    DisplacementField
        Of :math:`\varphi`, points of the fixed to points of the moving image.
    """
    fixed = _world_field(fixed_coordinates, affine)
    inverse, _ = invert_displacement(_world_field(moving_coordinates, affine), tolerance_mm=0.005)
    points = fixed.points()
    targets = points + fixed.data
    moved = targets + inverse.displacement(targets, is_continued=True)
    return DisplacementField(moved - points, affine)


def choose_landmarks(
    coordinates: tuple[Tensor, Tensor],
    truth: DisplacementField,
    brain: np.ndarray,
    generator: torch.Generator,
    *,
    n_points: int = 200,
) -> Landmarks:
    """
    Spread landmarks through a brain, and find them in another image.

    Parameters
    ----------
    coordinates : tuple of Tensor, each of shape (1, 3, n, n, n)
        Of the fixed and of the moving image, as in `field_between`.
    truth : DisplacementField
        Result of `field_between`.
    brain : ndarray of bool, shape (n, n, n)
        The fixed brain.
    generator : torch.Generator
    n_points : int

    Returns
    -------
    Landmarks
        In anatomy world, far from one another; exact to 0.01 mm, which the interpolated field is
        not. Points for which that is not reached are left out.
    """
    fixed_field, moving_field = (_world_field(phi, truth.affine) for phi in coordinates)
    candidates = apply_affine(truth.affine, np.argwhere(brain))
    order = torch.randperm(len(candidates), generator=generator)[: 20 * n_points].numpy()
    # Off the grid points, where the truth is interpolated as well.
    jitter = torch.rand((len(order), 3), generator=generator).numpy() - 0.5
    candidates = candidates[order] + jitter @ truth.affine[:3, :3].T
    chosen = [0]
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < min(n_points, len(candidates)):
        step = np.linalg.norm(candidates - candidates[chosen[-1]], axis=1)
        distance = np.minimum(distance, step)
        chosen.append(int(distance.argmax()))
    fixed = candidates[chosen]
    target = fixed + fixed_field.displacement(fixed, is_continued=True)
    moving = truth.map(fixed)
    for _ in range(200):
        error = moving + moving_field.displacement(moving, is_continued=True) - target
        moving = moving - 0.6 * error
    is_found = np.linalg.norm(error, axis=1) < 0.01
    return Landmarks(fixed[is_found], moving[is_found])


def grid_positions(shape: Sequence[int], vox2frame: np.ndarray) -> Tensor:
    """
    Return where the voxels of a grid are in another frame.

    Parameters
    ----------
    shape : sequence of 3 int
        Voxels along each axis.
    vox2frame : ndarray, shape (4, 4)
        Voxel to that frame.

    Returns
    -------
    Tensor, float32, shape (1, 3, I, J, K)
    """
    # A sum of three vectors by broadcasting is twenty times as fast as a product with each point.
    i, j, k = (torch.arange(n, dtype=torch.float32) for n in shape)
    matrix = torch.from_numpy(np.asarray(vox2frame, dtype=np.float32)[:3])
    rows = [
        (a * i)[:, None, None] + (b * j)[:, None] + (c * k + shift) for a, b, c, shift in matrix
    ]
    return torch.stack(rows)[None]


def world2unit(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the (4, 4) map from a grid's world to its unit coordinates; voxel to world given."""
    return np.diag([*(1 / (np.asarray(shape) - 1)), 1.0]) @ np.linalg.inv(affine)


def label_map(subject: Subject, positions: Tensor) -> np.ndarray:
    """
    Label a subject's tissues.

    Parameters
    ----------
    subject : Subject
    positions : Tensor, shape (1, 3, I, J, K)
        Unit coordinates of the subject's grid.

    Returns
    -------
    ndarray, uint8, shape (I, J, K)
        The most probable of `LABELS`; 0 outside the brain.
    """
    csf, gm, wm = sample(subject.tissues, positions, padding="zeros")[0].numpy()
    channel = TEMPLATE_CHANNELS.index("ventricles")
    ventricles = sample(subject.template[:, [channel]], positions, padding="zeros")[0, 0].numpy()
    classes = np.stack([1 - csf - gm - wm, gm, wm, csf]).argmax(0)
    is_ventricle = (classes == LABELS["CSF"]) & (ventricles > 0.4)
    return np.where(is_ventricle, LABELS["ventricles"], classes).astype(np.uint8)


def image_of(data: np.ndarray, affine: np.ndarray) -> nb.Nifti1Image:
    """Make an image whose header states its world as a scanner's does: sform and qform, mm."""
    image = nb.Nifti1Image(data, affine, dtype=data.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    return image


def _world_field(phi: Tensor, affine: np.ndarray) -> DisplacementField:
    """Displacement of a unit map on its own grid, in world millimetres."""
    size = phi.shape[-1]
    disp = (phi - identity_map(size))[0].numpy() * (size - 1)
    return DisplacementField(np.moveaxis(disp, 0, -1) @ affine[:3, :3].T, affine)
