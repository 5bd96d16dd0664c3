import nibabel as nb
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from m2m_bids.preprocessing.precomputed import take_mask, take_tissues
from m2m_bids.spatial.conform import to_ras
from m2m_bids.spatial.images import ImageError

AFFINE = nb.affines.from_matvec(
    [[1.2, -0.2, 0.1], [0.2, 1.6, -0.3], [0.1, 0.2, 2.0]], [-9, -20, 30]
)
SHAPE = (8, 9, 10)


def image(data, affine=AFFINE):
    return nb.Nifti1Image(data, affine)


@pytest.fixture
def labels(rng):
    labels = rng.integers(0, 4, SHAPE).astype(np.uint8)
    labels[0] = 0
    return labels


@pytest.fixture
def t1w(labels):
    """T1w intensities of fluid, grey and white matter."""
    return image(np.array([0, 60, 100, 20], np.float32)[labels])


def flipped(data, file):
    """Write an image of the same world in another order of axes."""
    orientation = np.array([[2, -1], [0, 1], [1, -1]])
    moved = apply_orientation(data, orientation)
    image(moved, AFFINE @ inv_ornt_aff(orientation, data.shape)).to_filename(file)
    return file


def test_mask_in_another_order_of_axes(labels, t1w, tmp_path):
    mask = take_mask(flipped((labels > 0).astype(np.float32), tmp_path / "m.nii.gz"), t1w)
    assert np.array_equal(mask.dataobj, labels > 0)
    assert np.allclose(mask.affine, to_ras(t1w).affine, atol=1e-5)
    assert mask.get_data_dtype() == np.uint8


@pytest.mark.parametrize(
    ("data", "message"),
    [(np.zeros(SHAPE), "empty"), (np.ones((8, 9, 11)), "grid"), (np.ones((*SHAPE, 2)), "3-D")],
)
def test_bad_mask(t1w, tmp_path, data, message):
    image(data.astype(np.float32)).to_filename(tmp_path / "m.nii.gz")
    with pytest.raises(ImageError, match=rf"m\.nii\.gz.*{message}"):
        take_mask(tmp_path / "m.nii.gz", t1w)


def test_labels_inside_the_mask(labels, t1w, tmp_path):
    inside = labels > 0
    inside[4:6] = False
    file = flipped(labels, tmp_path / "dseg.nii.gz")
    dseg = take_tissues([file], t1w, image(inside.astype(np.uint8)))
    assert np.array_equal(dseg.dataobj, labels * inside)


def test_probabilities(labels, t1w, tmp_path):
    files = [
        flipped(np.where(labels == tissue, 0.6, 0.1 * (labels > 0)), tmp_path / f"{tissue}.nii.gz")
        for tissue in (1, 2, 3)
    ]
    dseg = take_tissues(files, t1w, image((labels > 0).astype(np.uint8)))
    assert np.array_equal(dseg.dataobj, labels)


def test_other_order_of_tissues_is_told(labels, t1w, tmp_path):
    fast = np.array([0, 2, 3, 1], np.uint8)[labels]  # FSL's: fluid 1, grey 2, white 3
    file = flipped(fast, tmp_path / "dseg.nii.gz")
    with pytest.raises(ImageError, match=r"dseg\.nii\.gz: tissues .*numbered otherwise"):
        take_tissues([file], t1w, image((labels > 0).astype(np.uint8)))


def test_other_labels_are_told(labels, t1w, tmp_path):
    file = flipped(labels * 10, tmp_path / "dseg.nii.gz")
    with pytest.raises(ImageError, match=r"labels \[0, 10, 20, 30\]: expected 1 grey"):
        take_tissues([file], t1w, image((labels > 0).astype(np.uint8)))
