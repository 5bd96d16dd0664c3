"""Lines at the bottom of a terminal that are drawn anew while other output goes above them."""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import BinaryIO, NamedTuple, TextIO

_REFRESH_S = 0.25


def is_terminal(stream: TextIO) -> bool:
    """Tell whether lines can be drawn anew on a stream."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class LiveLines:
    """
    Draw lines at the bottom of a terminal for as long as a context lasts.

    What this process, its libraries and its children write to the terminal meanwhile goes above
    the lines, each line of it whole: it is collected in a file, which never blocks who writes.
    Nothing about the terminal is changed, so that even a killed process leaves it usable.

    Parameters
    ----------
    stream : text stream
        The terminal, as `is_terminal` tells.
    lines : callable
        Takes a number of columns and of rows; returns what to draw, which fits in.
    """

    def __init__(self, stream: TextIO, lines: Callable[[int, int], Sequence[str]]) -> None:
        self._stream = stream
        self._lines = lines
        self._saved: dict[int, int] = {}
        self._n_drawn = 0
        self._rest = b""
        self._is_over = threading.Event()

    def __enter__(self) -> "LiveLines":
        """Begin to draw."""
        _flush()
        self._terminal = os.dup(self._stream.fileno())
        for number in (1, 2):
            if os.isatty(number):
                self._saved[number] = os.dup(number)
                os.dup2(_collected().writer.fileno(), number)
        self._thread = threading.Thread(target=self._draw_often, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Erase the lines, and give the terminal back."""
        self._is_over.set()
        self._thread.join()
        _flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        with suppress(OSError):
            self._write([], is_last=True)
        os.close(self._terminal)

    def _draw_often(self) -> None:
        """Draw until all is over, or the terminal is gone: the run goes on without it."""
        with suppress(OSError):
            while not self._is_over.wait(_REFRESH_S):
                columns, rows = os.get_terminal_size(self._terminal)
                lines = self._lines(columns - 1, rows - 1)
                self._write([line[: columns - 1] for line in lines[: rows - 1]])

    def _write(self, lines: Sequence[str], *, is_last: bool = False) -> None:
        """Erase what was drawn, write what was collected, and draw."""
        *whole, self._rest = (self._rest + _collected().reader.read()).split(b"\n")
        above = b"".join(line + b"\n" for line in whole)
        if is_last and self._rest:
            above += self._rest + b"\n"
        erase = f"\r\x1b[{self._n_drawn}A\x1b[J" if self._n_drawn else ""
        drawn = "".join(f"{line}\n" for line in lines)
        text = erase.encode() + above + drawn.encode(errors="replace")
        while text:
            text = text[os.write(self._terminal, text) :]
        self._n_drawn = len(lines)


class _Collected(NamedTuple):
    """A file without name, once to append to and once to read what is new."""

    writer: BinaryIO
    reader: BinaryIO


@cache
def _collected() -> _Collected:
    """Open the file, one for the process: Nipype's fork server keeps it for all its workers."""
    with tempfile.NamedTemporaryFile() as file:
        return _Collected(open(file.name, "ab", 0), open(file.name, "rb", 0))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
