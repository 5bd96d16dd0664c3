"""What the numbers of all scans together say of each: which are far from the others."""

from collections.abc import Mapping, Sequence

import numpy as np

from m2m_bids.quality.limits import Definition, column_names, definitions

MIN_SCANS = 8
"""Scans of a kind below which none is called far from the others."""
MAX_DISTANCE = 3.5
"""Robust standard deviations from the median beyond which a scan of many asks for a look."""
SMALL_COHORT = 4
"""Scans of a kind for which that is doubled: the deviation of few is itself uncertain."""

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
        For each scan a sentence for each number that is more than 3.5 (1 + 4 / scans) robust
        standard deviations on its worse side of the median; none where fewer than 8 scans have
        it. That is 1.4826 times the median absolute deviation, of the logarithm where
        `Definition.scale` says so, and never less than `Definition.min_spread`.
    """
    flags: list[dict[str, str]] = [{} for _ in scans]
    for column, name in column_names(are_final=True).items():
        definition = definitions()[name]
        values = np.array([_number(scan.get(column)) for scan in scans])
        is_known = np.isfinite(values)
        n_known = int(is_known.sum())
        if n_known < MIN_SCANS:
            continue
        median = float(np.median(values[is_known]))
        distances = _distances(values, is_known, definition)
        limit = MAX_DISTANCE * (1 + SMALL_COHORT / n_known)
        for index in np.flatnonzero(np.abs(distances) > limit):
            distance = distances[index]
            side = "low" if distance < 0 else "high"
            if definition.worse in (side, "both"):
                flags[index][column] = (
                    f"{definition.title} is {definition.text(values[index])}, {side} in this"
                    f" cohort (median {median:.3g}, {abs(distance):.1f} robust SD away)"
                )
    return flags


def _distances(values: np.ndarray, is_known: np.ndarray, definition: Definition) -> np.ndarray:
    """
    Say how far each value is from the median.

    Returns
    -------
    ndarray
        In robust standard deviations, and in the least that matters: what is nearer to 0 of both.
        NaN where there is no value.
    """
    known = values[is_known]
    # Logarithms of a thousandth of the least spread at least: what is zero is no less far.
    tiny = 1e-3 * definition.min_spread
    scaled = np.log(np.maximum(values, tiny)) if definition.scale == "log" else values
    step = scaled - np.median(scaled[is_known])
    spread = 1.4826 * np.median(np.abs(step[is_known]))
    apart = (values - np.median(known)) / definition.min_spread
    robust = np.abs(step) / spread if spread > 0 else np.inf
    return np.sign(apart) * np.minimum(np.abs(apart), robust)


def _number(value: object) -> float:
    """Return a finite number, or NaN for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else float("nan")
