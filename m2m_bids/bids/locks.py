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

# Hidden names of `whole_files.replacing` and `replacing_folder`, of `write_text`, of
# DerivativesDataSink and of reports, from before they are renamed.
_UNFINISHED = re.compile(
    r"\.[0-9a-f]{32}(\..+)?|\..+\.[0-9a-f]{32}|\..+\.[a-z0-9_]{8}\.tmp"
    r"|\.m2m-bids-sub-.+|\.sub-.+\.part"
)
# The same of what belongs to no participant: of `write_text`, of pages, and of settings.
_SHARED = re.compile(
    r"\.(?!sub-).+\.[a-z0-9_]{8}\.tmp|\.(?!sub-).+\.partial|\.m2m-bids-config\..+"
)
_SHARED_FOLDERS = ("", "logs", "caches/nipype")
# They are renamed within moments. Another run, also one on another machine, may be at it.
_SURELY_LEFT_S = 3600
_UNKNOWN = "another process"
# Of a run, beside its locks.
_OTHER_OPEN_FILES = 1024


@contextlib.contextmanager
def locked(file: Path, what: str = "") -> Iterator[None]:
    """
    Hold an exclusive lock; wait for another process that has it.

    The kernel gives a lock up with its process, however that ends. Where the file system has no
    locks, the block is entered with a warning; so it is where another machine has written that
    it holds the lock, and the file system gives it all the same.

    Parameters
    ----------
    file : Path
        Stands for the lock: made, with its folder. It names the process that holds it, and stays,
        empty, at the end: two files of one name in turn would be two locks.
    what : str
        What is locked, to log that it is waited for; by default nothing is logged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = _open_locked(file, what)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), stream:  # its folder may be gone
            stream.truncate(0)


@contextlib.contextmanager
def hold_participants(folders: Iterable[Path], participants: Iterable[str]) -> Iterator[None]:
    """
    Keep other runs off some participants of output and work folders.

    What a killed run left half-written of them is removed, and what belongs to none of them once
    it is an hour old.

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
        for folder in folders if labels else ():
            _remove_shared(folder, folder / f".sub-{labels[0]}.lock")
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
            file = level_lock(level, folder)
            stack.enter_context(locked(file, f"{level} in {folder}"))
            _remove_shared(folder, file)
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
    Remove the content of a work folder, but for the files of locks.

    Parameters
    ----------
    folder : Path
    own : iterable of str
        Names of locks in it that this process holds.

    Raises
    ------
    ValueError
        If another run holds a lock in it; then nothing is removed.
    """
    own = set(own)
    content = list(folder.iterdir())
    for path in content:
        if path.suffix == ".lock" and path.name not in own and (holder := holder_of(path)):
            raise ValueError(
                f"--clean-workdir: another run works in {folder}: {path.name} is held by {holder}."
                " Wait for it, or give another --work-dir; if it was killed and runs no more,"
                f" remove {path}."
            )
    for path in content:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink(missing_ok=True)


def is_held(file: Path) -> bool:
    """Tell whether a process holds a lock, or may hold it, see `holder_of`."""
    return bool(holder_of(file))


def holder_of(file: Path) -> str:
    """
    Name the process that holds a lock, or may hold it; empty where there is none.

    What the lock's file says counts where the file system cannot tell: it has no locks, or gives
    one that another machine has written to hold.
    """
    try:
        # Not to write: NFS gives exclusive locks to files that are open for it.
        with file.open("r+", encoding="utf-8") as stream:
            holder = stream.read()
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder or _UNKNOWN
            except OSError:
                return holder
            return holder if _is_elsewhere(holder) else ""
    except FileNotFoundError:
        return ""
    except OSError:  # of another user, who may be at it
        return _UNKNOWN


def _is_elsewhere(holder: str) -> bool:
    """Tell whether the content of a lock's file names another machine."""
    return bool(holder) and not holder.endswith(f" on {socket.gethostname()}")


def _remove_shared(folder: Path, lock: Path) -> None:
    """Remove old files and folders of no participant that a killed run had not yet renamed."""
    now = lock.stat().st_mtime  # just written: the clock of the file system
    for path in (path for part in _SHARED_FOLDERS for path in (folder / part).glob(".*")):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            if _SHARED.fullmatch(path.name) and now - path.stat().st_mtime > _SURELY_LEFT_S:
                _remove(path, names=_SHARED)


def _remove(*paths: Path, names: re.Pattern[str] = _UNFINISHED) -> None:
    """Remove those that have a name from before they are renamed."""
    for path in paths:
        if names.fullmatch(path.name):
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
    """Open and lock a file; write into it who has it."""
    stream = file.open("a+", encoding="utf-8")
    try:
        _lock(stream, what)
    except OSError as error:
        logger.warning("%s cannot be locked (%s): never run twice at once.", file, error)
    stream.seek(0)
    if _is_elsewhere(holder := stream.read()):
        logger.warning(
            "%s: %s has not given it up. It was killed, or it still runs and locks of this file"
            " system do not reach from one machine to another: then never run twice at once.",
            *(file, holder),
        )
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    os.fsync(stream.fileno())  # for other machines
    return stream


def _lock(stream: IO[str], what: str) -> None:
    """Lock an open file; say who has it before waiting."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if what:
            stream.seek(0)
            holder = stream.read() or _UNKNOWN
            logger.warning("waiting for another run (%s) that works on %s", holder, what)
        fcntl.flock(stream, fcntl.LOCK_EX)
