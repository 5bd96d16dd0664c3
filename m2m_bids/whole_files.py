"""Write files that are whole, and on the disk, by the time that they have their names."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, *, is_alone: bool = False) -> Iterator[Path]:
    """
    Yield a hidden file name beside a destination; rename it to the destination on success.

    The content is on the disk by then, so that a power cut leaves no name with a part of it.

    Parameters
    ----------
    file : Path
        Destination; its folder is made if necessary.
    is_alone : bool
        Whether one process at a time writes this file. The hidden name is always the same then,
        so that the next one writes over what a killed one has left.

    Yields
    ------
    Path
        Name to write to, which ends in the destination's suffixes unless ``is_alone``. It is
        removed if the block fails.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    name = f"{file.name}.partial" if is_alone else uuid.uuid4().hex + "".join(file.suffixes[-2:])
    temporary = file.with_name(f".{name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def flush(file: Path | str) -> None:
    """Wait until the content of a file is on the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """
    Yield a new hidden folder beside a destination; put it in its place on success.

    Parameters
    ----------
    folder : Path
        Destination; its parent is made if necessary, and what it held before is removed.

    Yields
    ------
    Path
        Folder to write into. It is removed if the block fails.
    """
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
