"""A phantom of three regions on a T1w grid, and a scan of it on an oblique anisotropic grid."""

from types import SimpleNamespace

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

CENTRE_MM = np.array([5.0, -12.0, 20.0])
OUTER, INNER, BESIDE = 2, 1010, 47
# Points of the T1w to points of the scan.
RIGID = from_matvec(
    Rotation.from_euler("xyz", [9, -14, 21], degrees=True).as_matrix(), [6.0, -4.0, 9.0]
)


def centred_grid(shape, spacing_mm, angles, centre_mm):
    """Affine of an oblique grid about a point."""
    axes = Rotation.from_euler("xz", angles, degrees=True).as_matrix() * spacing_mm
    return from_matvec(axes, np.asarray(centre_mm) - axes @ ((np.array(shape) - 1) / 2))


def labels_at(points):
    """Labels of a ball in a larger ball, half of which is another region, at world points."""
    offset = points - CENTRE_MM
    distance = np.linalg.norm(offset, axis=-1)
    shell = np.where(offset[..., 0] + 0.3 * offset[..., 1] > 0, BESIDE, OUTER)
    return np.where(distance < 14, INNER, np.where(distance < 30, shell, 0)).astype(np.int32)


@pytest.fixture(scope="session")
def labels():
    """Labels on a T1w grid."""
    shape = (36, 40, 34)
    affine = centred_grid(shape, (2.0, 1.8, 2.2), [12, -20], CENTRE_MM)
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return nb.Nifti1Image(labels_at(points), affine)


@pytest.fixture(scope="session")
def scan_grid():
    """Shape and affine of a scan about the same point, in its own world."""
    shape = (26, 24, 22)
    affine = centred_grid(shape, (3.6, 4.0, 4.4), [-17, 8], apply_affine(RIGID, CENTRE_MM))
    # Stored with another order and sense of the axes, as scanners do.
    flip = np.array([[-1.0, 0, 0, shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return shape, affine @ flip


@pytest.fixture(scope="session")
def phantom():
    """What the phantom is made of."""
    return SimpleNamespace(
        centre_mm=CENTRE_MM,
        outer=OUTER,
        inner=INNER,
        beside=BESIDE,
        t1w2scan=RIGID,
        scan2t1w=np.linalg.inv(RIGID),
        labels_at=labels_at,
    )
