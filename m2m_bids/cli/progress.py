"""What happened to nodes while a workflow ran, and why some failed."""

import logging
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from m2m_bids.cli.durations import Durations, clock
from m2m_bids.cli.live import LiveLines, is_terminal
from m2m_bids.cli.steps import step_of

LOGGER = logging.getLogger(__name__)
ERROR_LINE = re.compile(r"^\s*(?:[\w.]+\.)?(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Warning))"
                        r"(?:: (?P<message>.*))?$")  # fmt: skip


class Progress:
    """
    Follow nodes through Nipype's status callback, and show what is running.

    Parameters
    ----------
    nodes : iterable of str
        Full names of the nodes that are to run.
    logs_nodes : bool
        Log the start and end of each node, rather than of each scan and T1w image.

    Attributes
    ----------
    seconds : dict of str to tuple of float
        First start and last end of the nodes of each workflow, by its name.
    """

    def __init__(self, nodes: Iterable[str] = (), *, logs_nodes: bool = False) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._logs_nodes = logs_nodes
        self._lock = threading.Lock()
        self._pending = dict.fromkeys(nodes)
        self._n_nodes = len(self._pending)
        self._n_left = Counter(step_of(name).image for name in self._pending)
        self._images: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._failed: set[str] = set()
        self._durations = Durations()
        self._begin = time.monotonic()
        self._is_interrupted = False

    def __call__(self, node, status: str) -> None:
        """Take note of a node's start, end or exception."""
        if self._is_interrupted:
            raise KeyboardInterrupt
        now, name = time.monotonic(), node.fullname
        with self._lock:
            if status == "start":
                self._start(name, now)
            else:
                self._end(name, now, status)
        if name not in self._started:
            # Nipype ends nodes too that were never run: from the cache, or after a failure.
            return
        if self._logs_nodes or status == "exception":
            words = {"start": "started ", "end": "finished"}
            LOGGER.info("%s %s", words.get(status, "FAILED  "), name.partition(".")[2])
        for workflow in name.split(".")[:-1]:
            first, _ = self.seconds.get(workflow, (now, now))
            self.seconds[workflow] = (first, now)

    def _start(self, name: str, now: float) -> None:
        image = step_of(name).image
        if image not in self._images and not self._logs_nodes:
            LOGGER.info("started  %s", image)
        self._images.setdefault(image, now)
        self._started[name] = self._running[name] = now
        self._pending.pop(name, None)

    def _end(self, name: str, now: float, status: str) -> None:
        self._pending.pop(name, None)
        begin = self._running.pop(name, None)
        if begin is not None:
            self._durations.add(name, now - begin)
        image = step_of(name).image
        self._n_left[image] -= 1
        if status == "exception":
            self._failed.add(image)
        is_told = image in self._images and image not in self._failed and not self._logs_nodes
        if is_told and self._n_left[image] == 0:
            LOGGER.info("finished %s (%s)", image, clock(now - self._images[image]))

    def elapsed_s(self, workflow: str) -> float | None:
        """Wall time from a workflow's first start to its last end; None if nothing ran."""
        if workflow not in self.seconds:
            return None
        first, last = self.seconds[workflow]
        return last - first

    @contextmanager
    def watching(self, stream: TextIO) -> Iterator[None]:
        """
        Draw what is running for as long as a context lasts, if a stream is a terminal.

        An interruption ends the run: Nipype alone takes it for the failure of one node, and goes
        on with the others.
        """
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with LiveLines(stream, self.lines) if is_terminal(stream) else nullcontext():
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: object) -> None:
        self._is_interrupted = True
        # Workers are interrupted too; each one's future would say so, with a traceback.
        logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
        raise KeyboardInterrupt

    def lines(self, columns: int, rows: int) -> list[str]:
        """
        Describe the running nodes, a line each, and below them all of the run.

        Parameters
        ----------
        columns, rows : int
            Space that there is.

        Returns
        -------
        list of str
        """
        now = time.monotonic()
        with self._lock:
            running = list(self._running.items())[: max(rows - 1, 0)]
            lines = [self._node_line(name, now - begin, columns) for name, begin in running]
            return [*lines, self._total_line(now, columns)]

    def _node_line(self, name: str, elapsed_s: float, columns: int) -> str:
        step = step_of(name)
        times = clock(elapsed_s)
        if expected_s := self._durations.seen(name):
            times += f" of about {clock(expected_s)}"
        words = f"{step.image}  {step.stage}: {step.words}"
        width = max(columns - len(times) - 2, 0)
        if len(words) > width:
            words = words[: max(width - 3, 0)] + "..."
        return f"{words.ljust(width)}  {times}"[: max(columns, 0)]

    def _total_line(self, now: float, columns: int) -> str:
        n_done = self._n_nodes - len(self._pending) - len(self._running)
        text = f"{n_done} of {self._n_nodes} steps, {clock(now - self._begin)}"
        remaining_s = self._durations.remaining_s(
            self._pending, {name: now - begin for name, begin in self._running.items()},
            now - self._begin,
        )  # fmt: skip
        if remaining_s is not None:
            text += f", about {clock(remaining_s)} left"
        width = min(columns - len(text) - 3, 40)
        if width < 10 or not self._n_nodes:
            return text
        filled = round(width * n_done / self._n_nodes)
        return f"[{'#' * filled}{'-' * (width - filled)}] {text}"


def crash_reasons(crash_dir: Path) -> dict[str, str]:
    """
    Read why nodes failed from Nipype's text crash files.

    Parameters
    ----------
    crash_dir : Path
        Folder of the crash files; it need not exist.

    Returns
    -------
    dict of str to str
        The exception's message, in one line, by the full name of the node.
    """
    reasons = {}
    for file in sorted(crash_dir.glob("crash-*.txt")):
        lines = file.read_text(errors="replace").splitlines()
        reasons[node_of(lines)] = _reason(lines)
    return reasons


def node_of(lines: Iterable[str]) -> str:
    """Read the full name of the node from the lines of a crash file."""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Node:")), "")


def _reason(lines: list[str]) -> str:
    """Find the last exception of a traceback; our own say all in their message."""
    matches = [match for match in map(ERROR_LINE.match, lines) if match]
    if not matches:
        return lines[-1].strip() if lines else "unknown"
    last = matches[-1]
    message = (last["message"] or "").strip()
    own = (
        *("ImageError", "WeightsError", "DeviceError", "QueryError", "CohortError"),
        "SynthStripError",
    )
    if last["kind"] in own and message:
        return message
    return f"{last['kind']}: {message}" if message else last["kind"]
