"""Tell whether a file was written to its end, without reading much of it."""

import math
import os
from pathlib import Path

import h5py
import numpy as np

from m2m_bids.json_files import read_json_object
from m2m_bids.spatial.images import READ_ERRORS, stored_header


def is_whole(file: Path) -> bool:
    """
    Tell whether a file is there and was written to its end, by how files of its kind end.

    After a power cut, or where a quota was reached, a file may have its name and lack its end, or
    have zeros in its place. What is missing in the midst of a file is not seen.

    Parameters
    ----------
    file : Path
        An image is held against its header, and gzip's last bytes, which tell how much was
        compressed; HDF5 and NumPy's arrays against the size that they state; JSON is read, and
        other text must end with a line's end.

    Returns
    -------
    bool
    """
    try:
        if not os.path.getsize(file):
            return False
        return _CHECKS.get(file.suffix, _ends_line)(file)
    except READ_ERRORS:
        return False


def _has_all_voxels(file: Path) -> bool:
    """Compare the size of an image with what its header says."""
    header = stored_header(file)
    if header is None:
        return False
    n_voxels = math.prod(int(size) for size in header.get_data_shape())
    n_bytes = int(header["vox_offset"]) + n_voxels * header.get_data_dtype().itemsize
    if file.suffix != ".gz":
        return os.path.getsize(file) >= n_bytes
    return int.from_bytes(_end(file, 4), "little") == n_bytes % 2**32


def _is_hdf5(file: Path) -> bool:
    # It compares the size of the file with the one in its first block.
    with h5py.File(file, "r", locking=False):
        return True


def _is_array(file: Path) -> bool:
    return np.load(file, mmap_mode="r", allow_pickle=False).size > 0


def _is_json(file: Path) -> bool:
    read_json_object(file)
    return True


def _ends_line(file: Path) -> bool:
    return _end(file, 1) == b"\n"


def _end(file: Path, n_bytes: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(-n_bytes, os.SEEK_END)
        return stream.read()


_CHECKS = {
    ".gz": _has_all_voxels,
    ".nii": _has_all_voxels,
    ".h5": _is_hdf5,
    ".npy": _is_array,
    ".json": _is_json,
}
