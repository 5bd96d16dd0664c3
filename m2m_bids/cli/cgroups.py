"""Limits of memory that containers, batch systems and systemd set to a process, on Linux."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Mount(NamedTuple):
    """Where a hierarchy of control groups is seen, and from which of its groups on."""

    folder: Path
    root: PurePosixPath
    is_v2: bool


def memory_limit(root: Path = Path("/")) -> int | None:
    """
    Return the smallest limit of the control groups that this process is in, and of those above.

    A limit of any group above holds as well: a job may have none of its own within a user's slice
    or a pod that has one. Both versions of control groups count, also where both are mounted.

    Parameters
    ----------
    root : Path
        Folder that has ``proc`` and ``sys``.

    Returns
    -------
    int or None
        Bytes; None where no limit can be read. Version 1 writes a number beyond any memory where
        there is none.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = list(_mounts(root))
    except OSError:
        return None
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in groups if line.count(":") >= 2):
        is_v2 = not controllers
        if is_v2 or "memory" in controllers.split(","):
            for mount in mounts:
                if mount.is_v2 == is_v2:
                    limits += _limits(mount, PurePosixPath(path))
    return min(limits, default=None)


def _mounts(root: Path) -> Iterator[_Mount]:
    """Find the hierarchies that control memory."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        kind, _, *options = what.split()
        is_v1 = kind == "cgroup" and "memory" in options[-1].split(",")
        if kind == "cgroup2" or is_v1:
            group, folder = where.split()[3:5]
            yield _Mount(root / folder.lstrip("/"), PurePosixPath(group), not is_v1)


def _limits(mount: _Mount, path: PurePosixPath) -> Iterator[int]:
    """Yield the limits of a group and of all above it that can be seen."""
    # A container may be told a path of its host, of which it sees its own group as the first.
    inner = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath()
    name = "memory.max" if mount.is_v2 else "memory.limit_in_bytes"
    group = mount.folder / inner
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount.folder):
            yield from _numbers(folder / name, 0)
    if not mount.is_v2:
        # Of those above that cannot be seen too.
        yield from _numbers(group / "memory.stat", 1, "hierarchical_memory_limit")


def _numbers(file: Path, column: int, key: str = "") -> Iterator[int]:
    """Yield the number in a column of the lines that begin with a key; ``max`` is none."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return
    for words in lines:
        if len(words) > column and words[0].startswith(key) and words[column].isdigit():
            yield int(words[column])
