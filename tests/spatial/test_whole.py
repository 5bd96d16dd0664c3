import json
import time

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.images import save_image
from m2m_bids.spatial.itk import write_affine, write_composite
from m2m_bids.spatial.whole import is_whole

NAMES = ("image.nii.gz", "image.nii", "xfm.h5", "array.npy", "side.json", "table.tsv", "xfm.txt")


@pytest.fixture
def written(tmp_path, rng):
    """Write a file of each kind as the app does."""

    def write(name):
        file = tmp_path / name
        values = rng.normal(size=(9, 10, 11)).astype(np.float32)
        if ".nii" in name:
            image = nb.Nifti1Image(values, np.eye(4))
            image.header.extensions.append(nb.nifti1.Nifti1Extension("comment", b"by hand"))
            save_image(image, file)
        elif name.endswith(".h5"):
            field = DisplacementField(rng.normal(size=(6, 7, 8, 3)).astype(np.float32), np.eye(4))
            write_composite([np.eye(4), field], file)
        elif name.endswith(".npy"):
            np.save(file, values)
        elif name.endswith(".txt"):
            write_affine(np.eye(4), file)
        else:
            file.write_text(
                json.dumps({"Sources": ["a"]}) if "json" in name else "region\tmean\n1\t2\n"
            )
        return file

    return write


@pytest.mark.parametrize("name", ["image.nii.gz", "image.nii", "xfm.h5", "xfm.txt"])
def test_content_is_on_the_disk_before_it_has_its_name(written, name, renamed):
    """A power cut leaves a file whole or without its name."""
    file = written(name)
    assert renamed == {file: file.stat().st_size}


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_to_its_end(written, name):
    assert is_whole(written(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_cut(written, name, part):
    file = written(name)
    whole = file.read_bytes()
    file.write_bytes(whole[: min(int(part * len(whole)), len(whole) - 1)])
    assert not is_whole(file)


@pytest.mark.parametrize("name", ["image.nii.gz", "side.json", "table.tsv", "xfm.txt"])
def test_zeros_in_the_place_of_the_end(written, name):
    """As file systems leave it that know the size before the content."""
    file = written(name)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert not is_whole(file)


def test_absent_or_no_file_or_no_image(tmp_path):
    assert not is_whole(tmp_path / "image.nii.gz")
    (tmp_path / "image.nii.gz").symlink_to("content-that-was-dropped")
    assert not is_whole(tmp_path / "image.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    assert not is_whole(tmp_path / "folder.nii")
    (tmp_path / "nested.json").write_text("[" * 20000)
    assert not is_whole(tmp_path / "nested.json")
    (tmp_path / "other.nii.gz").write_text("no image\n")
    assert not is_whole(tmp_path / "other.nii.gz")


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "large.nii"
    header = nb.Nifti1Header()
    header.set_data_shape((2000, 2000, 500))
    header.set_data_dtype(np.float32)
    header["vox_offset"] = 352
    file.write_bytes(header.binaryblock + bytes(4))
    with file.open("r+b") as stream:
        stream.truncate(352 + 4 * 2000 * 2000 * 500)  # takes no room
    begin = time.process_time()
    assert is_whole(file)
    assert time.process_time() - begin < 0.5
