import gzip
import os
import resource
import stat

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.spatial.images import (
    ImageError,
    data_bytes,
    load_image,
    replacing,
    require_3d,
    save_image,
)

AFFINE = np.array([[-2.0, 0.1, 0, 10], [0.1, 2.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


@pytest.fixture
def image(rng):
    return nb.Nifti1Image(rng.normal(size=(6, 7, 8)).astype(np.float32), AFFINE)


def edited(file, image, **fields):
    """Write an uncompressed image with raw header fields that nibabel would not write."""
    image.to_filename(file)
    header = image.header_class.from_fileobj(file.open("rb"), check=False)
    for name, value in fields.items():
        header[name] = value
    content = bytearray(file.read_bytes())
    content[: len(header.binaryblock)] = header.binaryblock
    file.write_bytes(content)
    return file


def test_round_trip(tmp_path, image):
    file = save_image(image, tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    loaded = load_image(str(file))
    np.testing.assert_array_equal(loaded.dataobj, image.dataobj)
    np.testing.assert_allclose(loaded.affine, AFFINE, atol=1e-6)
    assert isinstance(loaded.dataobj, np.ndarray)
    assert os.listdir(file.parent) == [file.name]


def test_saved_files_follow_umask(tmp_path, image):
    before = os.umask(0o022)
    try:
        file = save_image(image, tmp_path / "a.nii.gz")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.nii.gz"
    file.write_text("old")

    def fail():
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_save_rejects_other_suffix(tmp_path, image):
    with pytest.raises(ValueError, match=r"\.nii or \.nii\.gz"):
        save_image(image, tmp_path / "a.mgz")


@pytest.mark.parametrize("dtype", ["uint8", ">i2", "int64", "float32", ">f8"])
def test_types_are_kept_in_native_order(tmp_path, dtype):
    dtype = np.dtype(dtype)
    data = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    header = nb.Nifti1Header(endianness=">" if dtype.byteorder == ">" else "<")
    nb.Nifti1Image(data, AFFINE, header, dtype=dtype).to_filename(tmp_path / "a.nii")
    loaded = load_image(tmp_path / "a.nii")
    assert loaded.dataobj.dtype == dtype.newbyteorder("=")
    np.testing.assert_array_equal(loaded.dataobj, data)
    save_image(loaded, tmp_path / "b.nii")
    np.testing.assert_array_equal(load_image(tmp_path / "b.nii").dataobj, data)


def test_scaled_integers_become_float32(tmp_path, image):
    image.set_data_dtype(np.int16)
    image.to_filename(tmp_path / "a.nii.gz")
    loaded = load_image(tmp_path / "a.nii.gz")
    assert loaded.dataobj.dtype == loaded.get_data_dtype() == np.float32
    # int16 steps over a range of about six.
    np.testing.assert_allclose(loaded.dataobj, image.dataobj, atol=1e-4)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_truncated_gzip(tmp_path, image, kept):
    image.to_filename(tmp_path / "a.nii.gz")
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ImageError, match=r"a\.nii\.gz: .*Convert or copy the file again"):
        load_image(tmp_path / "a.nii.gz")


def test_truncated_voxels_say_how_much_is_expected(tmp_path, image):
    image.to_filename(tmp_path / "a.nii")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes())[:-200])
    (tmp_path / "a.nii").write_bytes((tmp_path / "a.nii").read_bytes()[:-5])
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(
            ImageError, match=f"{name}: truncated or corrupt .*expected 1344 bytes"
        ):
            load_image(tmp_path / name)


def test_flipped_bytes_in_gzip(tmp_path, image):
    image.to_filename(tmp_path / "a.nii.gz")
    content = bytearray((tmp_path / "a.nii.gz").read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 20)
    content[middle] = bytes(255 - value for value in content[middle])
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(ImageError, match="corrupt"):
        load_image(tmp_path / "a.nii.gz")


def test_missing_files(tmp_path):
    with pytest.raises(ImageError, match=r"a\.nii\.gz: no such file"):
        load_image(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").symlink_to(tmp_path / "absent")
    with pytest.raises(ImageError, match="link to a file that is not there"):
        load_image(tmp_path / "b.nii.gz")


def test_not_an_image(tmp_path):
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "text.nii").write_text("not an image " * 100)
    (tmp_path / "text.nii.gz").write_text("not an image " * 100)
    for name in ("empty.nii.gz", "text.nii", "text.nii.gz"):
        with pytest.raises(ImageError, match="not a readable image"):
            load_image(tmp_path / name)
    nb.MGHImage(np.zeros((2, 2, 2), "f4"), np.eye(4)).to_filename(tmp_path / "a.mgz")
    with pytest.raises(ImageError, match="MGHImage: expected NIfTI"):
        load_image(tmp_path / "a.mgz")


def test_zero_voxel_size_is_not_read_as_one(tmp_path, image):
    image.set_sform(None, 0)
    file = edited(tmp_path / "a.nii", image, pixdim=[1, 2, 0, 3, 1, 1, 1, 1])
    assert nb.load(file).header.get_zooms()[1] == 1  # what nibabel makes of it
    with pytest.raises(ImageError, match=r"a\.nii: voxel size 2 x 0 x 3 mm: expected three"):
        load_image(file)


@pytest.mark.parametrize("size", [-2.0, np.nan, np.inf])
def test_voxel_size_must_be_positive_and_finite(tmp_path, image, size):
    file = edited(tmp_path / "a.nii", image, pixdim=[1, size, 2, 3, 1, 1, 1, 1])
    with pytest.raises(ImageError, match="voxel size"):
        load_image(file)


@pytest.mark.parametrize(
    ("row", "message"), [([np.nan, 0, 0, 0], "not finite"), ([0, 0, 0, 0], "inverted")]
)
def test_unusable_affine(tmp_path, image, row, message):
    file = edited(tmp_path / "a.nii", image, srow_x=row, sform_code=1)
    with pytest.raises(ImageError, match=rf"a\.nii: affine .*{message}.*Correct sform"):
        load_image(file)


@pytest.mark.parametrize("kind", ["RGB", "complex64"])
def test_voxels_must_be_real_numbers(tmp_path, kind):
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    data = np.zeros((3, 4, 5), dtype=rgb if kind == "RGB" else kind)
    nb.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(ImageError, match=f"{kind} voxels: expected one real number"):
        load_image(tmp_path / "a.nii.gz")


def test_empty_axis(tmp_path, image):
    file = edited(tmp_path / "a.nii", image, dim=[3, 6, 0, 8, 1, 1, 1, 1])
    with pytest.raises(ImageError, match="6 x 0 x 8"):
        load_image(file)


def test_require_3d_squeezes_trailing_axes(image):
    data = np.asarray(image.dataobj)
    for shape in ((6, 7, 8), (6, 7, 8, 1), (6, 7, 8, 1, 1)):
        squeezed = require_3d(nb.Nifti1Image(data.reshape(shape), AFFINE), "a.nii")
        assert squeezed.shape == squeezed.header.get_data_shape() == (6, 7, 8)
        np.testing.assert_array_equal(squeezed.dataobj, data)
    assert require_3d(nb.Nifti1Image(data[:, :, :1], AFFINE), "a.nii").shape == (6, 7, 1)


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 8, 2), (6, 7, 8, 1, 3)])
def test_require_3d_rejects_other_shapes(shape):
    image = nb.Nifti1Image(np.zeros(shape, "f4"), AFFINE)
    message = rf"a\.nii: {len(shape)}-D image \({' x '.join(map(str, shape))}\): expected 3-D"
    with pytest.raises(ImageError, match=message):
        require_3d(image, "a.nii")


def test_doubtful_orientation_is_reported(tmp_path, image, caplog):
    save_image(image, tmp_path / "good.nii")
    load_image(tmp_path / "good.nii")
    image.set_qform(AFFINE, 1)
    image.set_sform(image.get_qform(), 1)
    save_image(image, tmp_path / "agree.nii")
    load_image(tmp_path / "agree.nii")
    assert not caplog.records
    image.set_qform(image.get_sform() + np.eye(4, k=3) * 7, 1)
    save_image(image, tmp_path / "differ.nii")
    load_image(tmp_path / "differ.nii")
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    save_image(image, tmp_path / "none.nii")
    load_image(tmp_path / "none.nii")
    assert "sform and qform differ by 7.0 mm" in caplog.messages[0]
    assert "no orientation" in caplog.messages[1]


def test_real_images_load(shared_data):
    file = next((shared_data / "real-bids").rglob("*_dwimap.nii.gz"))
    image = require_3d(load_image(file), file)
    np.testing.assert_allclose(image.affine, nb.load(file).affine)
    np.testing.assert_allclose(image.dataobj, nb.load(file).get_fdata(), rtol=1e-6)


def test_data_bytes(tmp_path, image):
    for name in ("a.nii", "b.nii.gz"):
        image.to_filename(tmp_path / name)
        assert data_bytes(tmp_path / name) == 6 * 7 * 8 * 4
    nb.Nifti2Image(np.zeros((2, 3, 4), np.float64), AFFINE).to_filename(tmp_path / "c.nii")
    assert data_bytes(tmp_path / "c.nii") == 2 * 3 * 4 * 8
    (tmp_path / "d.nii").write_text("no image")
    assert data_bytes(tmp_path / "d.nii") == 0
    assert data_bytes(tmp_path / "e.nii") == 0


def test_more_voxels_than_memory(tmp_path, image):
    file = edited(tmp_path / "a.nii", image, dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=r"a\.nii: 131072\.0 GB of voxels by its header"):
        load_image(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kB


def test_header_without_end(tmp_path, image):
    file = edited(tmp_path / "a.nii", image, vox_offset=1e9)
    with pytest.raises(ImageError, match=r"a\.nii: header that says to be 1000000000 bytes long"):
        load_image(file)


def test_more_content_than_the_header_says(tmp_path, image):
    """A bomb: a hundred megabytes of zeros behind the voxels, in a tenth of a megabyte."""
    image.to_filename(tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    file = tmp_path / "b.nii.gz"
    file.write_bytes(gzip.compress(content + bytes(100_000_000), 9))
    assert file.stat().st_size < 200_000
    with pytest.raises(
        ImageError, match=r"b\.nii\.gz: .*more than .* bytes where 1696 are expect"
    ):
        load_image(file)


def test_some_bytes_behind_the_voxels_are_allowed(tmp_path, image):
    image.to_filename(tmp_path / "a.nii")
    file = tmp_path / "b.nii.gz"
    file.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes() + bytes(1000)))
    np.testing.assert_array_equal(load_image(file).dataobj, image.dataobj)


def test_qform_that_is_no_rotation(tmp_path, image, caplog):
    image.set_sform(AFFINE, 1)
    file = edited(tmp_path / "a.nii", image, qform_code=1, quatern_b=1e16)
    np.testing.assert_allclose(load_image(file).affine, AFFINE, atol=1e-6)
    assert "a.nii: the qform cannot be read" in caplog.text


def test_type_that_does_not_exist(tmp_path, image):
    file = edited(tmp_path / "a.nii", image, datatype=6)
    assert data_bytes(file) == 0
    with pytest.raises(ImageError, match=r"a\.nii: not a readable image"):
        load_image(file)
