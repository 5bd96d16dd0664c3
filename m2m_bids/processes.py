"""Processes that end with the one that started them, however that ends."""

import contextlib
import fcntl
import os
import signal
import sys
from multiprocessing.connection import wait


def end_with_parent(pipe: int, *, with_group: bool = False) -> None:
    """
    End this process when the other end of a pipe is closed; on Linux, elsewhere do nothing.

    The kernel tells it by SIGIO, which ends a process that has no handler, also in the midst of a
    library that keeps Python's lock.

    Parameters
    ----------
    pipe : int
        Descriptor of the end to read, to whose other end nothing is written: the process that
        started this one holds that alone.
    with_group : bool
        Whether the whole process group ends: the programs that this process has started too, as
        long as they have the pipe from it, even where it was killed before.
    """
    if sys.platform != "linux":
        return
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp() if with_group else os.getpid())
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
    if wait([pipe], timeout=0):
        # It ended while this process started, which is told by no signal.
        os._exit(1)


def end_group(pid: int) -> None:
    """End what is left of the process group of a process that led it and may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
