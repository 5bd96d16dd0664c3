import pytest

from m2m_bids.cli.durations import Durations

RIGID, M2M, OTHER = "a.register_rigid", "a.register_m2m", "a.save_scan"


def test_nothing_is_said_of_nothing():
    durations = Durations()
    assert durations.remaining_s([RIGID], {}, 10) is None
    durations.add(RIGID, 0.01)  # from the cache
    assert durations.seen(RIGID) is None
    assert durations.remaining_s([RIGID], {}, 10) is None


def test_kinds_that_were_seen_take_as_long_again():
    durations = Durations()
    for seconds in (10, 20):
        durations.add(RIGID, seconds)
    assert durations.seen("b.register_rigid") == 15
    assert durations.remaining_s(["b.register_rigid"] * 4, {}, 30) == 4 * 15


def test_a_slow_machine_is_slow_with_other_kinds_too():
    durations = Durations()
    durations.add(RIGID, 3 * 21)  # three times the typical time
    assert durations.remaining_s([M2M], {}, 63) == pytest.approx(3 * 45)


def test_as_many_as_before_run_at_once():
    durations = Durations()
    durations.add(RIGID, 30)
    durations.add(RIGID, 30)
    assert durations.remaining_s([RIGID] * 4, {}, 30) == 60
    # But what is running ends no sooner for that.
    assert durations.remaining_s([], {M2M: 0.0}, 30) == pytest.approx(45 * 30 / 21)


def test_what_takes_longer_than_expected_is_about_to_end():
    durations = Durations()
    durations.add(RIGID, 30)
    assert durations.remaining_s([], {RIGID: 100.0}, 130) == 0
