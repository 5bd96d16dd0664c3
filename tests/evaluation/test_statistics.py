"""Intervals and tests against exact enumeration, known coverage and closed testing."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from m2m_bids.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_p_value,
    shared_bootstrap_interval,
)


def test_interval_of_normal_values_is_that_of_the_normal_theory(rng):
    values = rng.normal(0.6, 0.1, 200)
    low, high = bootstrap_interval(values)
    half = stats.t.ppf(0.975, 199) * values.std(ddof=1) / np.sqrt(200)
    # Ends of a bootstrap of 9999 resamples scatter by some percent of the half length.
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_holds_the_true_mean_as_often_as_it_says(rng):
    # Skewed values, as Hausdorff distances are; 95 % less what BCa is known to lack at this size.
    found = [bootstrap_interval(values) for values in rng.gamma(2, 3, (200, 40))]
    coverage = np.mean([low <= 6 <= high for low, high in found])
    assert 0.88 <= coverage <= 0.99


def test_interval_leans_with_skewed_values(rng):
    values = rng.gamma(1, 3, 60)
    low, high = bootstrap_interval(values)
    assert high - values.mean() > values.mean() - low > 0


def test_interval_depends_on_the_seed_alone(rng):
    values = rng.normal(size=30).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([0.4, 0.5, 0.6, 0.7], None), ([0.0] * 9, (0, 0)), ([0.1] * 5, (0.1, 0.1))],
)
def test_interval_of_few_or_equal_values(values, expected):
    assert bootstrap_interval(values) == expected


def test_interval_of_folds_that_one_pair_alone_has():
    low, high = bootstrap_interval([0.0] * 9 + [1.0])
    assert 0 <= low <= 0.1 < high <= 0.5


PEOPLE = [f"{i:02d}" for i in range(12)]
CROSSED = [(moving, fixed) for moving in PEOPLE for fixed in PEOPLE if moving != fixed]


def test_interval_of_shared_participants_holds_the_true_mean_as_often_as_it_says(rng):
    hits, naive_hits = 0, 0
    for _ in range(100):
        hard_to_move, hard_to_reach = rng.normal(0, 1, (2, len(PEOPLE)))
        values = [
            5 + hard_to_move[int(moving)] + hard_to_reach[int(fixed)] + rng.normal(0, 0.5)
            for moving, fixed in CROSSED
        ]
        low, high = shared_bootstrap_interval(values, CROSSED)
        hits += low <= 5 <= high
        low, high = bootstrap_interval(values)
        naive_hits += low <= 5 <= high
    # 95 % less what percentiles lack with twelve participants; 132 pairs alone say too much.
    assert hits >= 85
    assert naive_hits < 75


def test_interval_of_participants_that_differ_in_nothing_is_that_of_pairs(rng):
    values = rng.normal(0, 1, len(CROSSED))
    low, high = shared_bootstrap_interval(values, CROSSED)
    naive_low, naive_high = bootstrap_interval(values)
    # Drawing participants also draws how many pairs there are: a little wider, by twice at most.
    assert 0.8 < (high - low) / (naive_high - naive_low) < 2


def test_interval_of_scans_of_few_people_is_that_of_their_means(rng):
    # Ten scans each of eight people which are all alike: eight independent values.
    means = rng.normal(0, 1, 8)
    values = np.repeat(means, 10)
    pairs = [(name, name) for name in PEOPLE[:8] for _ in range(10)]
    low, high = shared_bootstrap_interval(values, pairs)
    expected = stats.bootstrap((means,), np.mean, method="percentile", rng=rng).confidence_interval
    assert (low, high) == pytest.approx(expected, abs=0.05)


def test_interval_of_pairs_that_share_nobody_is_the_usual_one(rng):
    values = rng.normal(size=6)
    pairs = [(PEOPLE[2 * i], PEOPLE[2 * i + 1]) for i in range(6)]
    assert shared_bootstrap_interval(values, pairs, seed=3) == bootstrap_interval(values, seed=3)


def test_two_participants_cannot_tell():
    assert shared_bootstrap_interval([0.5, 0.6], [("01", "02"), ("02", "01")]) is None
    with pytest.raises(ValueError, match="each value needs its participants, got 2 and 1"):
        shared_bootstrap_interval([0.5, 0.6], [("01", "02")])


def signed_rank_p(differences):
    """Enumerate all signs of differences that are not zero."""
    ranks = stats.rankdata(np.abs(differences))
    sums = [np.dot(signs, ranks) for signs in product((0, 1), repeat=len(ranks))]
    observed = ranks[np.greater(differences, 0)].sum()
    one_sided = min(np.mean(sums <= observed), np.mean(sums >= observed))
    return min(1, 2 * one_sided)


@pytest.mark.parametrize("shift", [0, 0.5, 1.5])
def test_p_value_is_that_of_all_signs(rng, shift):
    reference = rng.normal(size=9)
    values = reference + rng.normal(shift, 1, 9)
    assert paired_p_value(values, reference) == pytest.approx(
        signed_rank_p(values - reference), rel=1e-9
    )


def test_p_value_is_of_pairs_not_of_means(rng):
    # Far more between pairs than between methods, yet always in favour of one.
    reference = rng.normal(0, 10, 12)
    assert paired_p_value(reference + rng.uniform(0.01, 0.02, 12), reference) == 2 / 2**12
    assert paired_p_value(reference - rng.uniform(0.01, 0.02, 12), reference) == 2 / 2**12


@pytest.mark.parametrize("n_equal", [1, 5, 40])
def test_pairs_without_a_difference_are_left_out(rng, n_equal):
    differences = rng.normal(0.5, 1, 8)
    equal = np.zeros(n_equal)
    found = paired_p_value([*differences, *equal], np.zeros(8 + n_equal))
    assert found == pytest.approx(signed_rank_p(differences), rel=1e-9)
    assert paired_p_value(equal, equal) == 1


def test_p_value_of_many_or_tied_differences(rng):
    tied = rng.choice([-2, -1, 1, 1, 2, 2], 11)
    assert paired_p_value(tied, np.zeros(11)) == pytest.approx(signed_rank_p(tied), rel=1e-9)
    # Of many, the sum of positive ranks is normal with known mean and variance.
    many = rng.normal(0.2, 1, 80)
    total = stats.rankdata(np.abs(many))[many > 0].sum()
    z = (total - 80 * 81 / 4) / np.sqrt(80 * 81 * 161 / 24)
    assert paired_p_value(many, np.zeros(80)) == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_p_value_needs_pairs():
    assert paired_p_value([], []) is None
    assert paired_p_value([0.5], [0.4]) == 1
    with pytest.raises(ValueError, match="paired, got 2 and 1"):
        paired_p_value([0.5, 0.6], [0.4])


def closed_test(p_values):
    """Adjust by the closure of Bonferroni's test, of which Holm's is the short way."""
    tests = range(len(p_values))
    subsets = [s for size in tests for s in combinations(tests, size + 1)]
    return [
        min(1, max(len(s) * min(p_values[k] for k in s) for s in subsets if test in s))
        for test in tests
    ]


@pytest.mark.parametrize("n_tests", [1, 2, 5, 8])
def test_holm_is_the_closed_test_of_bonferroni(rng, n_tests):
    p_values = (rng.random(n_tests) ** 3).tolist()
    np.testing.assert_allclose(holm(p_values), closed_test(p_values))
    assert np.greater_equal(holm(p_values), p_values).all()


def test_holm_of_none_and_of_ties():
    assert holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([0.9, 0.8]) == [1, 1]
