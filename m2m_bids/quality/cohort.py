"""What the numbers of all scans together say of each: which are far from the others."""

from collections.abc import Mapping, Sequence

import numpy as np

from m2m_bids.quality.limits import column_names, definitions

MIN_SCANS = 8
"""Scans of a kind below which none is called far from the others."""
MAX_DISTANCE = 3.5
"""Robust standard deviations from the median beyond which a scan asks for a look."""

Numbers = Mapping[str, float | None]


def outliers(scans: Sequence[Numbers]) -> list[dict[str, str]]:
    """
    Find scans that are far from the others of their kind.

    Parameters
    ----------
    scans : sequence of mapping of str to float
        The numbers of each scan, all of one modality and tracer; None where there is none.

    Returns
    -------
    list of dict of str to str
        For each scan a sentence for each number that is more than 3.5 robust standard deviations
        (1.4826 times the median absolute deviation) on its worse side of the median; none where
        fewer than 8 scans have it, or half of all have the same value.
    """
    flags: list[dict[str, str]] = [{} for _ in scans]
    for column, name in column_names(are_final=True).items():
        definition = definitions()[name]
        values = np.array([_number(scan.get(column)) for scan in scans])
        is_known = np.isfinite(values)
        if is_known.sum() < MIN_SCANS:
            continue
        median = float(np.median(values[is_known]))
        spread = 1.4826 * float(np.median(np.abs(values[is_known] - median)))
        if spread == 0:
            continue
        for index in np.flatnonzero(is_known):
            distance = (values[index] - median) / spread
            side = "low" if distance < 0 else "high"
            if abs(distance) > MAX_DISTANCE and definition.worse in (side, "both"):
                flags[index][column] = (
                    f"{definition.title} is {definition.text(values[index])}, {side} in this"
                    f" cohort (median {median:.3g}, {abs(distance):.1f} robust SD away)"
                )
    return flags


def _number(value: object) -> float:
    """Return a finite number, or NaN for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else float("nan")
