"""Brains on grids of every kind."""

import nibabel as nb
import numpy as np
import pytest

CENTRE_MM, RADII_MM = (0, -10, 5), (60, 75, 55)


def rotation(angle_deg):
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


# Axes and sizes of the voxels, and their number.
GRIDS = {
    "RAS": (np.diag([4.0, 4, 4]), (42, 48, 38)),
    "LPI": (np.diag([-4.0, -4, -4]), (42, 48, 38)),
    # Array axes are superior, right, posterior; voxels 2 x 6 x 3 mm.
    "permuted": (np.array([[0, 6.0, 0], [0, 0, -3], [2, 0, 0]]), (80, 30, 64)),
    "oblique": (rotation(17) @ np.diag([-4.0, 4, 5]), (48, 52, 32)),
}


def points_of(affine, shape):
    """World points of the voxels, RAS+ mm."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.fixture
def brain_on():
    """Make the mask of an ellipsoid in the middle of a grid: a name, or voxels and shape."""

    def make(grid, radii_mm=RADII_MM):
        matrix, shape = GRIDS[grid] if isinstance(grid, str) else grid
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = CENTRE_MM - matrix @ ((np.array(shape) - 1) / 2)
        scaled = (points_of(affine, shape) - CENTRE_MM) / radii_mm
        return nb.Nifti1Image(((scaled**2).sum(-1) <= 1).astype(np.uint8), affine)

    return make


@pytest.fixture(params=GRIDS)
def brain(request, brain_on):
    """Mask of a brain on each grid."""
    return brain_on(request.param)


@pytest.fixture
def image_of():
    """Make images of functions of world points."""

    def make(function, like):
        data = function(points_of(like.affine, like.shape[:3]))
        return nb.Nifti1Image(np.asarray(data, np.float32), like.affine)

    return make
