import numpy as np
import pytest

from m2m_bids.preprocessing.tissues import fit_classes


@pytest.fixture
def layers(rng):
    """Three thick layers, CSF, GM and WM, with noise and a gain that varies by a fifth."""
    truth = np.repeat([2, 0, 1], 10)[:, None, None] * np.ones((1, 30, 30), dtype=int)
    data = np.array([0.6, 0.9, 0.25])[truth] + rng.normal(scale=0.08, size=truth.shape)
    gain = 1 + 0.2 * np.linspace(-1, 1, 30)[None, None, :]
    return truth, np.maximum(data * gain, 0)


def test_classes_are_found_in_their_order_without_a_prior(layers):
    truth, data = layers
    mask = np.ones(truth.shape, dtype=bool)
    mask[:, :2] = False
    posterior = fit_classes(data, mask, None, spacing_mm=2.0)
    found = np.argmax(posterior, axis=0)
    assert np.mean(found[mask] == truth[mask]) > 0.97
    np.testing.assert_allclose(posterior.sum(axis=0)[mask], 1, atol=1e-5)
    assert not posterior[:, ~mask].any()


def test_prior_decides_where_intensity_does_not(rng):
    """Two regions of the same brightness between GM and WM, told apart by the prior alone."""
    truth = np.repeat([2, 0, 1, 0, 1], 8)[:, None, None] * np.ones((1, 16, 16), dtype=int)
    data = np.array([0.6, 0.9, 0.25])[truth]
    data[24:] = 0.75
    data = data + rng.normal(scale=0.02, size=data.shape)
    prior = np.full((3, *truth.shape), 0.05)
    np.put_along_axis(prior, truth[None], 0.9, axis=0)
    mask = np.ones(truth.shape, dtype=bool)
    found = np.argmax(fit_classes(data, mask, prior.reshape(3, -1), spacing_mm=2.0), axis=0)
    assert np.mean(found == truth) > 0.95
