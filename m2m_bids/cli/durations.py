"""How long nodes took, and how long the others may take."""

from collections import defaultdict
from collections.abc import Collection, Mapping

# Seconds on two cores with the default options; only their ratios matter.
_TYPICAL_S = {
    "register_m2m": 45.0,
    "extract_brain": 38.0,
    "register_rigid": 21.0,
    "resample_m2m": 12.0,
    "quantify_scan": 12.0,
    "segment_tissues": 11.0,
    "draw_registration": 8.0,
    "resample_rigid": 7.0,
    "correct_bias": 6.0,
}
_OTHERS_S = 1.0
_CACHED_S = 0.05
# What has taken less says nothing of the speed of a machine.
_LEAST_S = 5.0


class Durations:
    """Durations of nodes by their kind: the last part of their names."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, seconds: float) -> None:
        """Take note of how long a node took, unless its result was there already."""
        if seconds < _CACHED_S:
            return
        self._seconds[_kind(name)].append(seconds)

    def seen(self, name: str) -> float | None:
        """Mean duration of the nodes of the same kind; None if there was none."""
        seconds = self._seconds.get(_kind(name))
        return sum(seconds) / len(seconds) if seconds else None

    def remaining_s(
        self, pending: Collection[str], running: Mapping[str, float], elapsed_s: float
    ) -> float | None:
        """
        Estimate how long a run goes on.

        Parameters
        ----------
        pending : collection of str
            Names of nodes that have not begun.
        running : mapping of str to float
            Seconds since others have begun.
        elapsed_s : float
            Seconds since the run began.

        Returns
        -------
        float or None
            Seconds, if as many nodes go on running at the same time as before; None as long as
            nothing can be said.
        """
        done_s = sum(map(sum, self._seconds.values()))
        if done_s < _LEAST_S or elapsed_s <= 0:
            return None
        typical_s = sum(len(s) * _typical_s(kind) for kind, s in self._seconds.items())
        speed = done_s / typical_s

        def expected_s(name: str) -> float:
            seen = self.seen(name)
            return speed * _typical_s(_kind(name)) if seen is None else seen

        left_s = [max(expected_s(name) - since_s, 0) for name, since_s in running.items()]
        at_once = max((done_s + sum(running.values())) / elapsed_s, 1.0)
        total_s = sum(left_s) + sum(map(expected_s, pending))
        return max(total_s / at_once, *left_s, 0)


def clock(seconds: float) -> str:
    """
    Write a time as hours, minutes and seconds.

    Examples
    --------
    >>> [clock(seconds) for seconds in (7.4, 62, 3723)]
    ['0:07', '1:02', '1:02:03']
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _typical_s(kind: str) -> float:
    return _TYPICAL_S.get(kind, _OTHERS_S)
