"""Short marks of files, by which a later run knows one that was replaced."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from m2m_bids.bids.derivatives import file_uri

ABSENT = "absent"
_BLOCK = 2**16
# Compressed files end with a checksum of all their content, so that their ends tell of the rest.
_COMPRESSED = (".gz", ".mgz")
_N_BLOCKS = 16


def fingerprints(
    files: Iterable[Path], out_dir: Path, datasets: Mapping[str, Path]
) -> dict[str, str]:
    """
    List files by name, each with its fingerprint.

    Parameters
    ----------
    files : iterable of Path
    out_dir : Path
        Root of the output dataset.
    datasets : mapping of str to Path
        Input datasets by the name in BIDS URIs.

    Returns
    -------
    dict of str to str
        Fingerprints by BIDS URI, or by path where a file is in no dataset.
    """
    return {file_uri(file, out_dir, datasets): fingerprint(file) for file in files}


def fingerprint(file: Path) -> str:
    """
    Mark the content of a file: its size in bytes and a hash of parts of it.

    Times do not count: a dataset that was copied, or fetched again by DataLad, is the same one.
    Compressed files are read at both ends, the last of which holds a checksum of the whole; others
    in 16 blocks of 64 KiB, so that up to 1 MiB all is read, while a change of a few voxels in a
    larger uncompressed image may be missed.

    Parameters
    ----------
    file : Path
        A file, or a link to one.

    Returns
    -------
    str
        ``absent`` where it cannot be read: the step that needs it says so, and other scans go on.
    """
    try:
        status = file.stat()
        return _fingerprint(file, status.st_size, status.st_mtime_ns)
    except OSError:
        return ABSENT


@lru_cache(maxsize=10_000)
def _fingerprint(file: Path, size: int, _modified_ns: int) -> str:
    """Read a file once in a process, however many scans it belongs to."""
    parts = hashlib.sha256()
    with file.open("rb") as stream:
        for part in _parts(stream, size, 2 if file.suffix in _COMPRESSED else _N_BLOCKS):
            parts.update(part)
    return f"{size}:{parts.hexdigest()[:16]}"


def _parts(stream: BinaryIO, size: int, n_blocks: int) -> Iterator[bytes]:
    """Yield blocks at even distances, the first and the last one among them."""
    last = max(size - _BLOCK, 0)
    for place in sorted({last * number // (n_blocks - 1) for number in range(n_blocks)}):
        stream.seek(place)
        yield stream.read(_BLOCK)
