"""What happened to nodes while a workflow ran, and why some failed."""

import logging
import re
import time
from pathlib import Path

LOGGER = logging.getLogger(__name__)
ERROR_LINE = re.compile(r"^\s*(?:[\w.]+\.)?(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Warning))"
                        r"(?:: (?P<message>.*))?$")  # fmt: skip


class Progress:
    """
    Follow nodes through Nipype's status callback.

    Attributes
    ----------
    seconds : dict of str to tuple of float
        First start and last end of the nodes of each workflow, by its name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._started: set[str] = set()

    def __call__(self, node, status: str) -> None:
        """Take note of a node's start, end or exception."""
        now = time.monotonic()
        name = node.fullname
        if status == "start":
            self._started.add(name)
        elif name not in self._started:
            # Nipype ends nodes too that were never run: from the cache, or after a failure.
            return
        words = {"start": "started ", "end": "finished"}
        LOGGER.info("%s %s", words.get(status, "FAILED  "), name.partition(".")[2])
        for workflow in name.split(".")[:-1]:
            first, _ = self.seconds.get(workflow, (now, now))
            self.seconds[workflow] = (first, now)

    def elapsed_s(self, workflow: str) -> float | None:
        """Wall time from a workflow's first start to its last end; None if nothing ran."""
        if workflow not in self.seconds:
            return None
        first, last = self.seconds[workflow]
        return last - first


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
        node = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("Node:")), ""
        )
        reasons[node] = _reason(lines)
    return reasons


def _reason(lines: list[str]) -> str:
    """Find the last exception of a traceback; our own say all in their message."""
    matches = [match for match in map(ERROR_LINE.match, lines) if match]
    if not matches:
        return lines[-1].strip() if lines else "unknown"
    last = matches[-1]
    message = (last["message"] or "").strip()
    own = ("ImageError", "WeightsError", "DeviceError", "QueryError", "CohortError")
    if last["kind"] in own and message:
        return message
    return f"{last['kind']}: {message}" if message else last["kind"]
