"""Synthetic heads made from the tissue maps that nilearn ships, with a known brain and pose."""

from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest
from nilearn import datasets
from scipy import ndimage
from scipy.spatial.transform import Rotation


class Head(NamedTuple):
    """A simulated person: images on one grid, and the tissue that is known."""

    t1w: nb.Nifti1Image
    brain: nb.Nifti1Image
    labels: nb.Nifti1Image
    pet: nb.Nifti1Image
    fa: nb.Nifti1Image


def make_head(spacing_mm, seed=0, warp_mm=5.0):
    """Deform the template smoothly and put it into a skull, a scalp and a neck."""
    rng = np.random.default_rng(seed)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = (-106, -146, -112)
    shape = tuple(np.ceil(np.array([212, 260, 232]) / spacing_mm).astype(int))
    ijk = np.indices(shape).astype(float)
    points = affine[:3, :3] @ ijk.reshape(3, -1) + affine[:3, 3:]
    for axis in range(3):
        field = ndimage.gaussian_filter(rng.normal(size=shape), 20 / spacing_mm)
        points[axis] += (field * warp_mm / np.abs(field).max()).ravel()

    def carried(template):
        voxels = np.linalg.inv(template.affine)
        voxels = voxels[:3, :3] @ points + voxels[:3, 3:]
        return ndimage.map_coordinates(template.get_fdata(), voxels, order=1).reshape(shape)

    grey = np.clip(carried(datasets.load_mni152_gm_template(resolution=2)), 0, 1)
    white = np.clip(carried(datasets.load_mni152_wm_template(resolution=2)), 0, 1)
    template = datasets.load_mni152_template(resolution=2)
    outline = ndimage.binary_fill_holes(template.get_fdata() > 0.05).astype(float)
    brain = carried(nb.Nifti1Image(outline, template.affine)) > 0.5
    csf = np.clip(1 - grey - white, 0, 1) * brain
    distance = ndimage.distance_transform_edt(~brain) * spacing_mm
    axial = affine[2, 2] * ijk[2] + affine[2, 3]
    column = np.hypot(points[0], points[1] + 35).reshape(shape) < 45
    neck = column & (axial < -50) & (distance > 8)
    scalp = ((distance > 9) & (distance < 17)) | neck
    t1w = 0.62 * grey + 0.95 * white + 0.2 * csf + 0.15 * ((distance > 0) & (distance < 3))
    t1w += 0.9 * scalp + 0.05 * ((distance >= 3) & (distance <= 9))
    bias = np.exp(0.25 * np.sin(ijk[0] / shape[0] * 3) + 0.25 * ijk[2] / shape[2])
    t1w = np.abs(t1w * bias + rng.normal(scale=0.03, size=shape))
    pet = ndimage.gaussian_filter(grey + 0.35 * white + 0.12 * scalp, 3 / spacing_mm)
    fa = brain * (0.65 * white**2 + 0.12 * grey + 0.02)
    tissue = np.stack([csf, grey, white])
    labels = np.where(brain, np.array([3, 1, 2])[np.argmax(tissue, axis=0)], 0)

    def image(data, dtype=np.float32):
        return nb.Nifti1Image(data.astype(dtype), affine)

    return Head(
        image(1000 * t1w),
        image(brain, np.uint8),
        image(labels, np.uint8),
        image(np.maximum(pet + rng.normal(scale=0.05, size=shape), 0)),
        image(np.clip(fa + brain * rng.normal(scale=0.04, size=shape), 0, 1)),
    )


def rigid_matrix(shift_mm, angles_deg):
    """Rotate about the world's origin, then shift: (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def mean_distance_mm(found, true, mask):
    """Mean distance of two point maps over a mask."""
    points = nb.affines.apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj) > 0))
    apart = nb.affines.apply_affine(found, points) - nb.affines.apply_affine(true, points)
    return np.linalg.norm(apart, axis=1).mean()


def dice(first, second):
    """Overlap of two boolean arrays."""
    return 2 * np.count_nonzero(first & second) / (first.sum() + second.sum())


@pytest.fixture(scope="session")
def head():
    """A head at 3 mm."""
    return make_head(3.0)


@pytest.fixture(scope="session")
def tools():
    """Functions that the tests of this folder share."""
    return {"rigid_matrix": rigid_matrix, "mean_distance_mm": mean_distance_mm, "dice": dice}
