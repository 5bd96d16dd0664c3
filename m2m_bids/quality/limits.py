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
    min_spread : float
        Standard deviation, in its unit, below which scans do not differ in anything that matters.
    scale : {"linear", "log"}
        On which the numbers of good scans are spread evenly to both sides.
    limits : dict of str to float
        Values, "low" or "high", beyond which any scan asks for a look.
    between : tuple of float
        Two values within which any scan asks for a look; or empty.
    """

    title: str
    unit: str
    states: tuple[str, ...]
    meaning: str
    good: str
    worry: str
    worse: Literal["low", "high", "both"]
    min_spread: float
    scale: Literal["linear", "log"] = "linear"
    limits: dict[str, float] = field(default_factory=dict)
    between: tuple[float, ...] = ()

    def text(self, value: float) -> str:
        """Write a value with its unit."""
        return f"{value:.3g}{self._end}"

    @property
    def flagged(self) -> str:
        """Which values ask for a look, in words."""
        where = [
            f"{words} {self.limits[side]:g}{self._end}"
            for side, words in (("low", "below"), ("high", "above"))
            if side in self.limits
        ]
        if self.between:
            where.append("between {:g} and {:g}".format(*self.between) + self._end)
        return " or ".join(where) or "only far from its cohort"

    def is_flagged(self, value: float) -> bool:
        """Tell whether a value asks for a look."""
        low, high = self.limits.get("low", value), self.limits.get("high", value)
        start, end = self.between or (1.0, 0.0)
        return not low <= value <= high or start < value < end

    @property
    def _end(self) -> str:
        return f" {self.unit}" if self.unit else ""


@lru_cache(maxsize=1)
def definitions() -> dict[str, Definition]:
    """Read ``data/qc.json``: the numbers by name, in the order in which they are shown."""
    content = json.loads(files("m2m_bids.data").joinpath("qc.json").read_text("UTF-8"))
    return {
        name: Definition(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in entry.items()
            }
        )
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


WITHIN_A_PERSON = ("mean_displacement_mm", "likeness_gain", "side_gap")
"""Numbers that tell whether scan and T1w are of one person; a template is of no person, and may be
the mirror image of itself."""
OWN_ERROR_MM = 1.0
"""Mean displacement of a deformable step below which it is not used: its limit in
``data/quality.json``."""


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
    {'side_gap': 'left-right evidence is -0.08 (worry below 0.01)'}
    """
    found = {}
    for name, definition in definitions().items():
        value = numbers.get(name)
        if value is None or (name in WITHIN_A_PERSON and not is_same_person):
            continue
        if name == "decision_margin" and is_within_its_error(numbers):
            continue
        if definition.is_flagged(value):
            found[name] = (
                f"{definition.title} is {definition.text(value)} (worry {definition.flagged})"
            )
    return found


def is_within_its_error(numbers: Mapping[str, float | None]) -> bool:
    """
    Tell whether the deformable step moves the brain by less than its own error.

    Then it is not used, and nothing is wrong with the scan.
    """
    moved = numbers.get("mean_displacement_mm")
    return moved is not None and moved < OWN_ERROR_MM
