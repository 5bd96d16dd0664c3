import numpy as np
import pytest

from m2m_bids.preprocessing.pet_timing import frame_timing


def test_usable_timing_is_read():
    timing = frame_timing({"FrameTimesStart": [0, 60.5], "FrameDuration": (60.5, 100)}, 2)
    np.testing.assert_array_equal(timing.starts_s, [0, 60.5])
    np.testing.assert_array_equal(timing.durations_s, [60.5, 100])
    assert timing.starts_remark == timing.durations_remark == ""


@pytest.mark.parametrize(
    ("value", "remark"),
    [
        (None, "is missing"),
        (60, "is no list"),
        ("n/a", "is no list"),
        ({"a": 1}, "is no list"),
        ([], "has 0 values for 2 frames"),
        ([1, 2, 3], "has 3 values for 2 frames"),
        ([1, "2"], "has a value that is no finite number"),
        ([1, None], "has a value that is no finite number"),
        ([1, True], "has a value that is no finite number"),
        ([[1], [2]], "has a value that is no finite number"),
        ([1, float("nan")], "has a value that is no finite number"),
        ([1, float("inf")], "has a value that is no finite number"),
        ([1, 10**400], "has a value that is no finite number"),
    ],
)
@pytest.mark.parametrize("name", ["FrameTimesStart", "FrameDuration"])
def test_unusable_timing_is_told(name, value, remark):
    timing = frame_timing({name: value}, 2)
    found = {
        "FrameTimesStart": (timing.starts_s, timing.starts_remark),
        "FrameDuration": (timing.durations_s, timing.durations_remark),
    }
    assert found[name] == (None, f"{name} {remark}")


@pytest.mark.parametrize("values", [[0, 60], [-5, 60]])
def test_durations_are_positive(values):
    timing = frame_timing({"FrameDuration": values}, 2)
    assert timing.durations_s is None
    assert timing.durations_remark == "FrameDuration has a value that is not positive"


def test_starts_increase():
    timing = frame_timing({"FrameTimesStart": [60, 0]}, 2)
    assert timing.starts_s is None
    assert timing.starts_remark == "FrameTimesStart does not increase"
    # Times count from the injection, before which a scan may begin.
    assert frame_timing({"FrameTimesStart": [-60, 0]}, 2).starts_s is not None


def test_one_frame_needs_no_list():
    timing = frame_timing({"FrameTimesStart": 3000, "FrameDuration": 1200.0}, 1)
    assert (timing.starts_s, timing.durations_s) == ([3000], [1200])
    assert frame_timing({"FrameDuration": "n/a"}, 1).durations_remark == (
        "FrameDuration has a value that is no finite number"
    )


def test_frames_do_not_overlap():
    """Durations that are ends of frames, as in the public dataset pet003."""
    times = {"FrameTimesStart": [0, 20, 40, 100], "FrameDuration": [20, 40, 100, 160]}
    timing = frame_timing(times, 4)
    assert timing.durations_s is None
    assert timing.durations_remark == (
        "FrameDuration, 40 s from 20 s, goes beyond the start of the next frame at 40 s"
    )
    np.testing.assert_array_equal(timing.starts_s, times["FrameTimesStart"])


def test_gaps_and_rounded_times_are_no_overlap():
    rounded = {"FrameTimesStart": [0, 10, 20, 90], "FrameDuration": [10.4, 10.4, 10.4, 60]}
    assert frame_timing(rounded, 4).durations_remark == ""
