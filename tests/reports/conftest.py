"""Brains on grids of every kind."""

import nibabel as nb
import numpy as np
import pytest


def rotation(angle_deg):
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def centred(matrix, shape):
    """An affine whose centre voxel is at the ellipsoid's centre."""
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = np.array([0, -10, 5]) - matrix @ ((np.array(shape) - 1) / 2)
    return affine


OBLIQUE_GRIDS = {
    "RAS": (centred(np.diag([4.0, 4, 4]), (42, 48, 38)), (42, 48, 38)),
    # Array axes are superior, right, posterior; voxels 2 x 6 x 3 mm.
    "permuted": (
        centred(np.array([[0, 6.0, 0], [0, 0, -3], [2, 0, 0]]), (80, 30, 64)),
        (80, 30, 64),
    ),
    "oblique": (centred(rotation(17) @ np.diag([-4.0, 4, 5]), (48, 52, 32)), (48, 52, 32)),
}


def points_of(affine, shape):
    """World points of the voxels, RAS+ mm."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.fixture(params=OBLIQUE_GRIDS)
def brain(request):
    """Masks of an ellipsoid by grid, and what gives world points of an image."""
    affine, shape = OBLIQUE_GRIDS[request.param]
    scaled = (points_of(affine, shape) - (0, -10, 5)) / (60, 75, 55)
    inside = (scaled**2).sum(-1) <= 1
    return nb.Nifti1Image(inside.astype(np.uint8), affine)


@pytest.fixture
def image_of():
    """Make images of functions of world points."""

    def make(function, like):
        data = function(points_of(like.affine, like.shape[:3]))
        return nb.Nifti1Image(np.asarray(data, np.float32), like.affine)

    return make
