"""Transforms of NiftyReg: direction and frame of what is read."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.baselines.niftyreg import read_displacement
from m2m_bids.spatial.fields import grid_points

# Rotated, mirrored and not in the middle of its world.
OBLIQUE = from_matvec(
    Rotation.from_euler("xyz", [10, 20, -30], degrees=True).as_matrix() @ np.diag([-3, 2, 4]),
    [30, -20, 10],
)
SHAPE = (12, 15, 10)


@pytest.fixture
def reference(tmp_path):
    file = tmp_path / "reference.nii"
    nb.Nifti1Image(np.ones(SHAPE, dtype=np.float32), OBLIQUE).to_filename(file)
    return file


@pytest.mark.usefixtures("niftyreg")
def test_affine_takes_reference_points_to_floating_points(reference, tmp_path):
    # "Affine*Reference=Floating", as NiftyReg says of its files.
    matrix = from_matvec(
        Rotation.from_euler("z", 40, degrees=True).as_matrix() @ np.diag([1.1, 0.9, 1]), [5, -8, 3]
    )
    np.savetxt(tmp_path / "affine.txt", matrix)
    found = read_displacement(tmp_path / "affine.txt", reference)
    points = grid_points(SHAPE, OBLIQUE)
    assert found.shape == (*SHAPE, 3)
    np.testing.assert_allclose(points + found, apply_affine(matrix, points), atol=1e-3)


@pytest.mark.usefixtures("niftyreg")
def test_field_of_positions_becomes_offsets(reference, tmp_path, rng):
    offsets = rng.uniform(-5, 5, (*SHAPE, 3)).astype(np.float32)
    positions = (grid_points(SHAPE, OBLIQUE) + offsets).astype(np.float32)
    image = nb.Nifti1Image(positions[:, :, :, None], OBLIQUE)
    image.header.set_intent("vector", name="NREG_TRANS")
    image.header["intent_p1"] = 0  # a deformation field
    image.to_filename(tmp_path / "positions.nii")
    found = read_displacement(tmp_path / "positions.nii", reference)
    np.testing.assert_allclose(found, offsets, atol=1e-3)


@pytest.mark.usefixtures("niftyreg")
def test_failure_of_a_program_is_an_error(reference, tmp_path):
    with pytest.raises(RuntimeError, match=r"reg_transform wrote no displacement\.nii .*5D image"):
        read_displacement(reference, reference)
    (tmp_path / "empty.nii").touch()
    # This ends by a signal.
    with pytest.raises(RuntimeError, match=r"exit status [^0]"):
        read_displacement(reference, tmp_path / "empty.nii")
