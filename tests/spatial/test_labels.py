"""Label images as files; how they are placed is tested with those to evaluate with."""

import gzip
import struct

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.labels import load_labels, whole_numbers

AFFINE = np.array([[-1.0, 0, 0, 4], [0, 0, 2, -3], [0, -1.5, 0, 5], [0, 0, 0, 1]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["x.nii.gz", "x.mgz"])
def test_numbers_and_places_are_kept(tmp_path, dtype, name):
    if name.endswith("mgz") and dtype is np.float64:
        pytest.skip("FreeSurfer has no such type")
    data = np.arange(120).reshape(4, 5, 6).astype(dtype)
    image_class = nb.MGHImage if name.endswith("mgz") else nb.Nifti1Image
    nb.save(image_class(data, AFFINE), tmp_path / name)
    found = load_labels(tmp_path / name)
    assert found.get_data_dtype().kind in "iu"
    np.testing.assert_array_equal(np.asarray(found.dataobj), data)
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)


def test_what_is_no_label_image_is_named(tmp_path):
    file = tmp_path / "x.nii.gz"
    nb.save(nb.Nifti1Image(np.full((3, 3, 3), 1.5, np.float32), AFFINE), file)
    with pytest.raises(ImageError, match=r"x\.nii\.gz: labels must be whole numbers"):
        load_labels(file)
    nb.save(nb.Nifti1Image(np.zeros((3, 3, 3, 2), np.uint8), AFFINE), file)
    with pytest.raises(ImageError, match=r"x\.nii\.gz.*4-D"):
        load_labels(file)
    (tmp_path / "x.mgz").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"x\.mgz: not a readable image"):
        load_labels(tmp_path / "x.mgz")


def damaged_mgz(tmp_path, damage):
    """Write an image of FreeSurfer whose header is damaged."""
    nb.save(nb.MGHImage(np.zeros((4, 5, 6), np.int32), AFFINE), tmp_path / "ok.mgz")
    data = bytearray(gzip.decompress((tmp_path / "ok.mgz").read_bytes()))
    damage(data)
    file = tmp_path / "aseg.mgz"
    file.write_bytes(gzip.compress(bytes(data)))
    return file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: struct.pack_into(">i", data, 20, 77), "not a readable image"),
        (lambda data: struct.pack_into(">i", data, 4, -5), "not a readable image"),
        (lambda data: struct.pack_into(">3i", data, 4, 30000, 30000, 3000), "GB of voxels"),
    ],
    ids=["unknown type", "negative size", "more than memory"],
)
def test_damaged_images_of_freesurfer_are_named(tmp_path, damage, message):
    with pytest.raises(ImageError, match=rf"aseg\.mgz: .*{message}"):
        load_labels(damaged_mgz(tmp_path, damage))


def test_damaged_compression_is_named(tmp_path):
    file = damaged_mgz(tmp_path, lambda data: None)
    content = bytearray(file.read_bytes())
    content[20:40] = bytes(range(200, 220))
    file.write_bytes(content)
    with pytest.raises(ImageError, match=r"aseg\.mgz: not a readable image"):
        load_labels(file)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_numbers_must_be_whole(value):
    with pytest.raises(ValueError, match="whole numbers"):
        whole_numbers(np.array([1.0, value]))
