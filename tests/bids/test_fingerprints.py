"""Files that were replaced by others of the same size."""

import gzip
import os
import shutil

import numpy as np
import pytest

from m2m_bids.bids.fingerprints import ABSENT, fingerprint, fingerprints

KIB = 2**10


def noise(seed, size):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("place", [0, 700 * KIB, -1], ids=["first", "middle", "last"])
def test_any_byte_counts_up_to_one_mebibyte(tmp_path, place):
    file = tmp_path / "image.nii"
    content = bytearray(noise(1, 1024 * KIB))
    file.write_bytes(content)
    before = fingerprint(file)
    content[place] ^= 1
    file.write_bytes(content)
    assert fingerprint(file) != before
    assert fingerprint(file).startswith("1048576:")


@pytest.mark.parametrize("name", ["image.nii.gz", "orig.mgz"])
def test_one_voxel_of_a_compressed_image_counts(tmp_path, name):
    """Stored, so that it keeps its size: its ends are the same but for the checksum."""
    content = bytearray(noise(2, 3000 * KIB))
    file, marks, sizes = tmp_path / name, set(), set()
    for value in (0, 1):
        content[1500 * KIB] = value
        file.write_bytes(gzip.compress(content, 0, mtime=0))
        marks.add(fingerprint(file))
        sizes.add(file.stat().st_size)
    assert len(sizes) == 1
    assert len(marks) == 2


def test_another_large_image_of_the_same_size_is_seen(tmp_path):
    file, marks = tmp_path / "image.nii", []
    header = bytes(352)
    for seed in (3, 4):
        file.write_bytes(header + noise(seed, 4000 * KIB))
        marks.append(fingerprint(file))
    assert marks[0] != marks[1]


def test_copies_and_links_are_the_same(tmp_path):
    file = tmp_path / "image.nii.gz"
    file.write_bytes(noise(5, 200 * KIB))
    (tmp_path / "link.nii.gz").symlink_to(file)
    shutil.copyfile(file, tmp_path / "copy.nii.gz")
    os.utime(tmp_path / "copy.nii.gz", (1, 1))
    marks = {fingerprint(tmp_path / name) for name in ("image.nii.gz", "copy.nii.gz")}
    assert marks == {fingerprint(tmp_path / "link.nii.gz")}


def test_what_cannot_be_read_is_absent(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("none", "link", "."):
        assert fingerprint(tmp_path / name) == ABSENT


def test_an_empty_file_has_a_mark(tmp_path):
    (tmp_path / "empty").touch()
    assert fingerprint(tmp_path / "empty").startswith("0:")


def test_names_are_uris(tmp_path):
    (tmp_path / "raw").mkdir()
    inside, outside = tmp_path / "raw" / "a.nii", tmp_path / "b.pt"
    inside.write_bytes(b"a")
    outside.write_bytes(b"b")
    found = fingerprints([inside, outside], tmp_path / "out", {"raw": tmp_path / "raw"})
    assert found == {"bids:raw:a.nii": fingerprint(inside), str(outside): fingerprint(outside)}
