"""Locks between runs that share an output or a work folder, and what killed runs left there."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

# Hidden names of `spatial.images.replacing` and `replacing_folder`, of `write_text`, of
# DerivativesDataSink and of reports, from before they are renamed.
_UNFINISHED = re.compile(
    r"\.[0-9a-f]{32}(\..+)?|\..+\.[0-9a-f]{32}|\..+\.[a-z0-9_]{8}\.tmp"
    r"|\.m2m-bids-sub-.+|\.sub-.+\.part"
)


@contextlib.contextmanager
def locked(file: Path, what: str = "") -> Iterator[None]:
    """
    Hold an exclusive lock; wait for another process that has it.

    The kernel gives a lock up with its process, however that ends. Where the file system has no
    locks, the block is entered with a warning.

    Parameters
    ----------
    file : Path
        Stands for the lock: made, with its folder, and removed at the end.
    what : str
        What is locked, to log that it is waited for; by default nothing is logged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = _open_locked(file, what)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


@contextlib.contextmanager
def hold_participants(folders: Iterable[Path], participants: Iterable[str]) -> Iterator[None]:
    """
    Keep other runs off some participants of output and work folders.

    What a killed run left half-written of them is removed.

    Parameters
    ----------
    folders : iterable of Path
        Output and work folder.
    participants : iterable of str
        Labels, without ``sub-``.
    """
    folders = list(folders)
    with contextlib.ExitStack() as stack:
        # In one order, so that no two runs wait for each other.
        for label in sorted(participants):
            for folder in folders:
                file = folder / f".sub-{label}.lock"
                stack.enter_context(locked(file, f"sub-{label} in {folder}"))
                remove_unfinished(folder, label)
        yield


def remove_unfinished(folder: Path, participant: str) -> None:
    """Remove files and folders of one participant that a killed run had not yet renamed."""
    subject = f"sub-{participant}"
    found = [
        *folder.glob(f".m2m-bids-{subject}.*"),
        *folder.glob(f".{subject}.*.part"),
        *(folder / subject).rglob(".*"),
    ]
    for path in found:
        if _UNFINISHED.fullmatch(path.name):
            logger.info("removed what a killed run left: %s", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_held(file: Path) -> bool:
    """Tell whether a process holds a lock."""
    with contextlib.suppress(FileNotFoundError), file.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _open_locked(file: Path, what: str) -> IO[str]:
    """Open and lock a file; one that its holder has removed meanwhile is made again."""
    while True:
        stream = file.open("a+", encoding="utf-8")
        try:
            _lock(stream, what)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): never run twice at once.", file, error)
            return stream
        if _is_current(stream, file):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            return stream
        stream.close()


def _lock(stream: IO[str], what: str) -> None:
    """Lock an open file; say who has it before waiting."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if what:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            logger.warning("waiting for another run (%s) that works on %s", holder, what)
        fcntl.flock(stream, fcntl.LOCK_EX)


def _is_current(stream: IO[str], file: Path) -> bool:
    """Tell whether an open file is still the one of its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    return False
