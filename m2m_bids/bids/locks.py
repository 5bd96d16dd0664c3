"""Locks between runs that share an output or a work folder, and what killed runs left there."""

import contextlib
import fcntl
import logging
import os
import re
import resource
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
# Of a run, beside its locks.
_OTHER_OPEN_FILES = 1024


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

    Raises
    ------
    ValueError
        If there are more than the system lets a process have open files.
    """
    folders, labels = list(folders), sorted(participants)
    _allow_open_files(len(labels) * len(folders))
    with contextlib.ExitStack() as stack:
        # In one order, so that no two runs wait for each other.
        for label in labels:
            for folder in folders:
                file = folder / f".sub-{label}.lock"
                stack.enter_context(locked(file, f"sub-{label} in {folder}"))
                remove_unfinished(folder, label)
        yield


@contextlib.contextmanager
def hold_level(level: str, folders: Iterable[Path]) -> Iterator[None]:
    """
    Keep other runs of a level off folders.

    Parameters
    ----------
    level : str
        ``group``, ``evaluate`` or ``train``.
    folders : iterable of Path
        In the same order for all runs of the level.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(locked(level_lock(level, folder), f"{level} in {folder}"))
        yield


def level_lock(level: str, folder: Path) -> Path:
    """Name the lock of a level in a folder."""
    return folder / f".{level}.lock"


def remove_unfinished(folder: Path, participant: str) -> None:
    """Remove files and folders of one participant that a killed run had not yet renamed."""
    subject = f"sub-{participant}"
    _remove(
        *folder.glob(f".m2m-bids-{subject}.*"),
        *folder.glob(f".{subject}.*.part"),
        *folder.glob(f".{subject}_*"),
        *(folder / subject).rglob(".*"),
    )


def remove_all_unfinished(folder: Path) -> None:
    """Remove what a killed run had not yet renamed in a folder that this run alone writes to."""
    _remove(*folder.rglob(".*"))


def empty_work_folder(folder: Path, own: Iterable[str]) -> None:
    """
    Remove the content of a work folder.

    Parameters
    ----------
    folder : Path
    own : iterable of str
        Names of locks in it that this process holds, which stay.

    Raises
    ------
    ValueError
        If another run holds a lock in it; then nothing is removed.
    """
    content = [path for path in folder.iterdir() if path.name not in set(own)]
    for path in content:
        if path.name.endswith(".lock") and is_held(path):
            raise ValueError(
                f"--clean-workdir: another run works in {folder} ({path.name}). Wait for it, or"
                " give another --work-dir."
            )
    for path in content:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
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


def _remove(*paths: Path) -> None:
    """Remove those that have a name from before they are renamed."""
    for path in paths:
        if _UNFINISHED.fullmatch(path.name):
            logger.info("removed what a killed run left: %s", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _allow_open_files(n_locks: int) -> None:
    """Let this process have a lock's file open for each, beside what it opens otherwise."""
    wanted = n_locks + _OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ValueError(
            f"{n_locks} locks of participants need {wanted} open files, and the system allows"
            f" {hard} (ulimit -Hn): give fewer participants at once, by --participant-label"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
