"""Intervals and tests for numbers that methods have on the same pairs of images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
N_RESAMPLES = 9999
MIN_VALUES = 5
"""Values below which there is no interval: resampling fewer gives little but their range."""


class Interval(NamedTuple):
    """Confidence interval, in the unit of the values."""

    low: float
    high: float


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> Interval | None:
    """
    Compute a 95 % confidence interval of the mean by bootstrap.

    Bias-corrected and accelerated [Efron, J Am Stat Assoc 82, 1987], with 9999 resamples, as
    `scipy.stats.bootstrap` does it.

    Parameters
    ----------
    values : sequence of float
        Finite and independent: of pairs of images that share no participant. For others see
        `shared_bootstrap_interval`.
    seed : int
        The same values have the same interval with the same seed.

    Returns
    -------
    Interval or None
        None for fewer than `MIN_VALUES`. Equal values have an interval of no length.
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < MIN_VALUES:
        return None
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]))
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=N_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def shared_bootstrap_interval(
    values: Sequence[float], participants: Sequence[tuple[str, str]], *, seed: int = 0
) -> Interval | None:
    """
    Compute a 95 % confidence interval of the mean over pairs that share participants.

    A participant who is hard to register is so in every pair. So participants are drawn instead
    of pairs, 9999 times, and a pair counts as often as its two participants were drawn together
    [Snijders and Borgatti, Connections 22, 1999]; the interval has the percentiles of the means.

    Parameters
    ----------
    values : sequence of float
        One for each pair of images, finite.
    participants : sequence of tuple of str
        The two participants of each pair, the same twice where both images are of one.
    seed : int
        The same values have the same interval with the same seed.

    Returns
    -------
    Interval or None
        That of `bootstrap_interval` where no two pairs share a participant. Otherwise None for
        fewer than three participants, which cannot tell.

    Raises
    ------
    ValueError
        If the lengths differ.
    """
    if len(values) != len(participants):
        raise ValueError(
            f"each value needs its participants, got {len(values)} and {len(participants)}"
        )
    taking_part = [name for pair in participants for name in set(pair)]
    names, places = np.unique(taking_part, return_inverse=True)
    if len(names) == len(places):
        return bootstrap_interval(values, seed=seed)
    if len(names) < 3:
        return None
    first, second = (np.searchsorted(names, some) for some in zip(*participants, strict=True))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), N_RESAMPLES)
    weights = np.where(first == second, drawn[:, first], drawn[:, first] * drawn[:, second])
    # The participants that were drawn may have no pair together.
    weights = weights[weights.any(1)]
    means = weights @ np.asarray(values, dtype=float) / weights.sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def paired_p_value(values: Sequence[float], references: Sequence[float]) -> float | None:
    """
    Test whether paired differences lie around zero, by Wilcoxon's signed-rank test.

    Parameters
    ----------
    values, references : sequence of float
        Of one length, in the same order of pairs of images; finite. Pairs are taken as
        independent: where they share participants the p value is too small.

    Returns
    -------
    float or None
        Two-sided p value; pairs without a difference are left out, and if there is no other it
        is 1. Exact for up to 50 differences of different sizes; otherwise, from 14 on, by the
        normal approximation. None without pairs.

    Raises
    ------
    ValueError
        If the lengths differ.

    Examples
    --------
    All of five pairs are better: of 32 assignments of signs, two are as extreme.

    >>> paired_p_value([0.6, 0.7, 0.8, 0.5, 0.9], [0.5, 0.5, 0.5, 0.1, 0.4])
    0.0625
    """
    if len(values) != len(references):
        raise ValueError(f"values must be paired, got {len(values)} and {len(references)}")
    if not len(values):
        return None
    differences = np.subtract(values, references, dtype=float)
    # With zeros among them SciPy would take the normal approximation, which for the few
    # differences of a method that seldom acts gives p values below the least possible.
    differences = differences[differences != 0]
    return float(stats.wilcoxon(differences).pvalue) if len(differences) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Adjust p values of several tests for their number [Holm, Scand J Stat 6, 1979].

    Parameters
    ----------
    p_values : sequence of float

    Returns
    -------
    list of float
        In the same order. Those below a level hold together with at most that probability of any
        false one.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.take(p_values, order) * factors))
    return adjusted.tolist()
