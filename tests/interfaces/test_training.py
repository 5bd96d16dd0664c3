"""The wrapper that writes images to train on: the frames of its transforms, and its files."""

import json

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.interfaces.training import SaveTrainingScan
from m2m_bids.spatial.conform import template_grid
from m2m_bids.spatial.itk import write_affine

# Large, and not commuting: T1w points to PET points, MNI points to T1w points.
RIGID = from_matvec(Rotation.from_euler("xz", [25, -60], degrees=True).as_matrix(), [12, -45, 8])
TEMPLATE = from_matvec(Rotation.from_euler("y", 40, degrees=True).as_matrix() * 1.1, [3, 4, 5])
CENTRE_MM = np.array([10.0, -20.0, 15.0])  # of a blob, MNI points


def blob_image(centre_mm, affine, shape=(60, 62, 64)):
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    data = np.exp(-0.5 * np.square((points - centre_mm) / 15).sum(-1))
    return nb.Nifti1Image(data.astype(np.float32), affine)


@pytest.fixture
def interface(tmp_path, monkeypatch):
    """Images of one blob at corresponding points of three worlds."""
    monkeypatch.chdir(tmp_path)
    in_t1w = apply_affine(TEMPLATE, CENTRE_MM)
    in_pet = apply_affine(RIGID, in_t1w)
    for name, centre in (("t1w", in_t1w), ("pet", in_pet)):
        spacing = np.array([3.5, 3.0, 4.0])
        affine = from_matvec(np.diag(spacing), centre - spacing * 30)
        image = blob_image(centre, affine)
        image.to_filename(tmp_path / f"{name}.nii")
        if name == "t1w":
            inside = (image.get_fdata() > 0.2).astype(np.uint8)
            nb.Nifti1Image(inside, affine).to_filename(tmp_path / "mask.nii")
            labels = inside + (image.get_fdata() > 0.6)
            nb.Nifti1Image(labels.astype(np.uint8), affine).to_filename(tmp_path / "dseg.nii")
    return SaveTrainingScan(
        moving_file=str(tmp_path / "pet.nii"),
        t1w_file=str(tmp_path / "t1w.nii"),
        mask_file=str(tmp_path / "mask.nii"),
        dseg_file=str(tmp_path / "dseg.nii"),
        rigid_xfm=str(write_affine(RIGID, tmp_path / "rigid.txt")),
        template2anat=str(write_affine(TEMPLATE, tmp_path / "template.txt")),
        description={"name": "scan", "subject": "01", "modality": "pet"},
        grid_size=40,
        spacing_mm=4.5,
        out_dir=str(tmp_path / "images" / "scan"),
    )


def centre_of(data):
    weights = np.clip(data.astype(float) - 0.3, 0, None)
    grid = template_grid(np.eye(4), size=40, spacing_mm=4.5)
    ijk = [(weights * axis).sum() / weights.sum() for axis in np.indices(data.shape)]
    return apply_affine(grid.affine, ijk)


def test_images_lie_where_the_transforms_say(interface, tmp_path):
    folder = tmp_path / "images" / "scan"
    assert interface.run().outputs.out_dir == str(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["scan"]
    assert json.loads((folder / "scan.json").read_text())["subject"] == "01"
    for name in ("functional", "t1w", "labels"):
        data = np.load(folder / f"{name}.npy")
        assert data.shape == (40, 40, 40)
        np.testing.assert_allclose(centre_of(data), CENTRE_MM, atol=0.5)
    assert set(np.unique(np.load(folder / "labels.npy"))) == {0, 1, 2}


def test_images_are_written_anew_as_a_whole(interface, tmp_path):
    folder = tmp_path / "images" / "scan"
    folder.mkdir(parents=True)
    (folder / "old.npy").touch()
    interface.run()
    assert not (folder / "old.npy").exists()
