"""Labels to evaluate with: their worlds, and labels that are of another image."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.evaluation.label_images import labels_in_scan, read_labels
from m2m_bids.interfaces.labels import PrepareLabels
from m2m_bids.spatial.images import ImageError, save_image
from m2m_bids.spatial.itk import write_affine
from m2m_bids.spatial.labels import labels_on_t1w

CENTRE_MM = np.array([5.0, -12.0, 20.0])
HIPPOCAMPUS, CORTEX = 17, 1035
# Conformed as FreeSurfer does: 1 mm voxels, left to right backwards, and axes in another order.
CONFORMED = np.array([[-1.0, 0, 0, 36], [0, 0, 1, -46], [0, -1, 0, 55], [0, 0, 0, 1]])
OBLIQUE = Rotation.from_euler("xz", [12, -20], degrees=True).as_matrix()


def ball(affine, shape, values=(HIPPOCAMPUS, CORTEX), dtype=np.int32):
    """Labels of a ball of 20 mm and the one of 10 mm inside it, about a point of the world."""
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    distance = np.linalg.norm(points - CENTRE_MM, axis=-1)
    inner, outer = values
    data = np.where(distance < 10, inner, np.where(distance < 20, outer, 0))
    return data.astype(dtype)


@pytest.fixture
def t1w():
    """A T1w of oblique voxels, about the same point."""
    axes = OBLIQUE * (1.5, 1.2, 2.0)
    shape = (40, 50, 30)
    affine = from_matvec(axes, CENTRE_MM - axes @ (np.array(shape) / 2))
    return nb.Nifti1Image(np.ones(shape, np.float32), affine)


@pytest.fixture
def mask(t1w):
    data = ball(t1w.affine, t1w.shape, values=(1, 1), dtype=np.uint8)
    return nb.Nifti1Image(data, t1w.affine)


@pytest.fixture
def mgz(tmp_path):
    """Labels as FreeSurfer writes them."""
    file = tmp_path / "aparc+aseg.mgz"
    nb.MGHImage(ball(CONFORMED, (72, 72, 72)), CONFORMED).to_filename(file)
    return file


def test_conformed_labels_come_to_the_grid_of_the_t1w(mgz, t1w, mask):
    labels = labels_on_t1w(read_labels(mgz, "freesurfer"), t1w, mask, mgz)
    expected = ball(t1w.affine, t1w.shape, values=(10, 2))
    found = np.asanyarray(labels.dataobj)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(labels.affine, t1w.affine)
    # By nearest voxel, only the rims differ.
    assert np.mean(found != expected) < 0.02
    for value in (2, 10):
        where = apply_affine(t1w.affine, np.argwhere(found == value)).mean(0)
        np.testing.assert_allclose(where, CENTRE_MM, atol=0.3)


@pytest.mark.parametrize("shift_mm", [(0, 0, 5), (30, 0, 0), (0, 0, 300)])  # of a ball of 40 mm
def test_labels_of_another_image_are_refused(mgz, t1w, mask, shift_mm):
    labels = read_labels(mgz, "freesurfer")
    moved = nb.Nifti1Image(labels.dataobj, from_matvec(np.eye(3), shift_mm) @ labels.affine)
    with pytest.raises(ImageError, match=r"aparc\+aseg.mgz: \d+ % of its labels"):
        labels_on_t1w(moved, t1w, mask, mgz)


def test_labels_follow_the_scan(t1w, mask):
    rigid = from_matvec(Rotation.from_euler("y", 70, degrees=True).as_matrix(), [9, -40, 3])
    moved = labels_in_scan(mask, rigid)
    inside = apply_affine(moved.affine, np.argwhere(np.asanyarray(moved.dataobj))).mean(0)
    in_t1w = apply_affine(t1w.affine, np.argwhere(np.asanyarray(mask.dataobj))).mean(0)
    np.testing.assert_allclose(inside, apply_affine(rigid, in_t1w), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable image"),
        (b"no image at all" * 100, "not a readable image"),
    ],
)
def test_unreadable_labels(tmp_path, content, message):
    file = tmp_path / "aseg.mgz"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=message) as error:
        read_labels(file, "freesurfer")
    assert str(file) in str(error.value)


def test_labels_of_another_scheme_are_named(tmp_path, mgz):
    with pytest.raises(ImageError, match=r"aparc\+aseg.mgz: .*none of the values"):
        read_labels(mgz, "tissues")


def test_interface(tmp_path, monkeypatch, mgz, t1w, mask):
    monkeypatch.chdir(tmp_path)
    files = {
        "t1w_file": str(save_image(t1w, tmp_path / "t1w.nii")),
        "mask_file": str(save_image(mask, tmp_path / "mask.nii")),
    }
    rigid = from_matvec(OBLIQUE, [30, 20, 10])
    xfm = str(write_affine(rigid, tmp_path / "rigid.txt"))
    labels = {"label_file": str(mgz), "scheme": "freesurfer"}
    own = nb.load(PrepareLabels(**labels).run().outputs.out_file)
    assert own.shape == (72, 72, 72)
    fixed = nb.load(PrepareLabels(**labels, **files).run().outputs.out_file)
    on_grid = np.asanyarray(fixed.dataobj)
    moving = nb.load(PrepareLabels(**labels, **files, rigid_xfm=xfm).run().outputs.out_file)
    np.testing.assert_array_equal(moving.dataobj, on_grid)
    np.testing.assert_allclose(moving.affine, rigid @ t1w.affine, atol=1e-5)
