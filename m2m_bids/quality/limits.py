"""What the numbers of a scan mean, and which of them ask for a look."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Literal


@dataclass(frozen=True)
class Definition:
    """
    A number of ``data/qc.json``.

    Parameters
    ----------
    title, unit : str
        As shown; the unit is empty for a plain number.
    states : tuple of str
        What is measured: the scan where its header puts it ("initial"), after "rigid" alignment,
        by the transform that was "used", the "native" image, or the "deformable" step.
    meaning, good, worry : str
        For readers: what it is, the range of good scans, when to worry.
    worse : {"low", "high", "both"}
        The side on which a scan that is far from its cohort asks for a look.
    limits : dict of str to float
        Values, "low" or "high", beyond which any scan asks for a look.
    """

    title: str
    unit: str
    states: tuple[str, ...]
    meaning: str
    good: str
    worry: str
    worse: Literal["low", "high", "both"]
    limits: dict[str, float] = field(default_factory=dict)

    def text(self, value: float) -> str:
        """Write a value with its unit."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{value:.3g}{unit}"


@lru_cache(maxsize=1)
def definitions() -> dict[str, Definition]:
    """Read ``data/qc.json``: the numbers by name, in the order in which they are shown."""
    content = json.loads(files("m2m_bids.data").joinpath("qc.json").read_text("UTF-8"))
    return {
        name: Definition(**{**entry, "states": tuple(entry["states"])})
        for name, entry in content.items()
    }


def column_names(*, are_final: bool = False) -> dict[str, str]:
    """
    List the numbers of a scan.

    Parameters
    ----------
    are_final : bool
        Whether to leave out those of a scan before the step that it is judged by.

    Returns
    -------
    dict of str to str
        Name of each column, which says the state that was measured, and of its definition.
    """
    names = {}
    for name, definition in definitions().items():
        for state in definition.states:
            ending = f"_{state}" if len(definition.states) > 1 and state != "used" else ""
            if not (ending and are_final):
                names[f"{name}{ending}"] = name
    return names


WITHIN_A_PERSON = ("mean_displacement_mm", "likeness_gain")
"""Numbers whose limits tell that scan and T1w may be of two people."""


def warnings_of(
    numbers: Mapping[str, float | None], *, is_same_person: bool = True
) -> dict[str, str]:
    """
    Say which numbers of a scan ask for a look, whatever its cohort.

    Parameters
    ----------
    numbers : mapping of str to float
        As `m2m_bids.quality.measures` names them; None and NaN say nothing.
    is_same_person : bool
        Whether the T1w is the scan's own person's, not a template's.

    Returns
    -------
    dict of str to str
        A sentence for each number that is beyond its limit.

    Examples
    --------
    >>> warnings_of({"side_gap": -0.08, "fov_cut_percent": 1.0})
    {'side_gap': 'left-right evidence is -0.08 (worry below 0)'}
    """
    found = {}
    for name, definition in definitions().items():
        value = numbers.get(name)
        if value is None or (name in WITHIN_A_PERSON and not is_same_person):
            continue
        low, high = definition.limits.get("low"), definition.limits.get("high")
        if low is not None and value < low:
            found[name] = f"{definition.title} is {definition.text(value)} (worry below {low:g})"
        if high is not None and value > high:
            found[name] = f"{definition.title} is {definition.text(value)} (worry above {high:g})"
    return found
