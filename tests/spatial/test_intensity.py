import numpy as np
import pytest

from m2m_bids.spatial.intensity import normalize


def test_percentile_becomes_one(rng):
    data = rng.uniform(0, 200, size=(20, 20, 20))
    result = normalize(data, upper_percentile=90)
    assert result.dtype == np.float32
    assert result.min() == 0
    assert result.max() == 1
    low, high = data.min(), np.percentile(data, 90)
    expected = np.clip((data - low) / (high - low), 0, 1)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_mask_decides_the_range():
    data = np.array([1.0, 2.0, 3.0, 50.0, 0.0])
    mask = np.array([1, 1, 1, 0, 0])
    np.testing.assert_allclose(normalize(data, mask, upper_percentile=100), [0, 0.5, 1, 1, 0])


def test_bad_values_become_zero_and_input_is_left_alone():
    data = np.array([np.nan, np.inf, -np.inf, -5.0, 0.0, 10.0], dtype=np.float32)
    before = data.copy()
    np.testing.assert_array_equal(normalize(data, upper_percentile=100), [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(data, before)


def test_few_positive_values_are_not_lost():
    data = np.zeros(10_000)
    data[3] = 4
    assert normalize(data)[3] == 1


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_nothing_positive(value):
    with pytest.raises(ValueError, match="no finite positive value in the image"):
        normalize(np.full((3, 3, 3), value))


def test_constant_and_bad_arguments():
    with pytest.raises(ValueError, match="all values equal 2"):
        normalize(np.full(5, 2.0))
    with pytest.raises(ValueError, match="in the mask"):
        normalize(np.arange(5.0), np.zeros(5))
    with pytest.raises(ValueError, match="mask must have shape"):
        normalize(np.arange(5.0), np.ones(4))
    with pytest.raises(ValueError, match="upper_percentile"):
        normalize(np.arange(5.0), upper_percentile=0)
