"""LNCC against a plain convolution with the whole three-dimensional window."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from m2m_bids.registration.similarity import lncc_loss, local_correlation, smooth


def gaussian_taps(sigma, radius):
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return torch.from_numpy(taps / taps.sum())


def depthwise(image, kernel):
    """Convolve every channel with one three-dimensional kernel, zero padding, float64."""
    n_channels = image.shape[1]
    weight = kernel.expand(n_channels, 1, *kernel.shape)
    return functional.conv3d(
        image.double(), weight, padding=[n // 2 for n in kernel.shape], groups=n_channels
    )


def plain_blur(image, sigma, radius):
    taps = gaussian_taps(sigma, radius)
    for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        image = depthwise(image, taps.reshape(shape))
    return image


def plain_lncc_loss(a, b, sigma=5, n_taps=21):
    def blur(image):
        return plain_blur(image, sigma, n_taps // 2)

    a, b = a.double(), b.double()
    covariance = blur(a * b) - blur(a) * blur(b)
    var_a, var_b = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2
    return (1 - covariance / torch.sqrt((var_a + 1e-5) * (var_b + 1e-5))).mean()


def texture(rng):
    image = smooth(torch.from_numpy(rng.random((2, 1, 26, 22, 29), dtype=np.float32)), 1.2)
    image = image - image.amin((1, 2, 3, 4), keepdim=True)
    return image / image.amax((1, 2, 3, 4), keepdim=True)


@pytest.fixture
def pair(rng):
    """Two textured images that share some of their texture; no two axes alike."""
    a = texture(rng)
    return a, 0.3 * a + 0.7 * texture(rng)


def test_lncc_equals_a_plain_convolution_with_21_taps(pair):
    ours = lncc_loss(*pair).item()
    assert ours == pytest.approx(plain_lncc_loss(*pair).item(), abs=2e-6)
    assert 0.02 < ours < 0.98


def test_lncc_equals_the_icon_project(pair):
    icon_registration = pytest.importorskip("icon_registration")
    assert lncc_loss(*pair).item() == pytest.approx(
        icon_registration.LNCC(5)(*pair).item(), abs=2e-6
    )


def test_lncc_of_other_windows(pair):
    ours = lncc_loss(*pair, sigma_voxels=2.5).item()
    assert ours == pytest.approx(plain_lncc_loss(*pair, sigma=2.5, n_taps=11).item(), abs=2e-6)


def test_lncc_gradient_equals_that_of_the_plain_convolution(pair):
    gradients = []
    for loss in (lncc_loss, plain_lncc_loss):
        a = pair[0].clone().requires_grad_()
        loss(a, pair[1]).backward()
        gradients.append(a.grad.double())
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    # Variances are differences of float32 moments.
    assert difference < 1e-3


def test_lncc_ignores_contrast(rng):
    # About zero, so that the padding adds no edge; epsilon is 1e-5 beside a variance of 0.08.
    a = torch.from_numpy(rng.random((1, 1, 24, 24, 24), dtype=np.float32)) - 0.5
    assert lncc_loss(a, a).item() == pytest.approx(0, abs=1e-3)
    assert lncc_loss(a, 0.5 * a).item() == pytest.approx(0, abs=2e-3)
    assert lncc_loss(a, -0.5 * a).item() == pytest.approx(2, abs=2e-3)


def test_local_correlation_is_that_of_each_place(rng):
    """Equal on one side, of opposite contrast on the other, flat in a corner."""
    a = torch.from_numpy(rng.random((1, 1, 24, 24, 24))).float()
    b = a.clone()
    b[:, :, 12:] = 1 - b[:, :, 12:]
    b[:, :, :, :8] = 0.5
    correlation = local_correlation(a, b, sigma_voxels=1.0)
    assert correlation.shape == a.shape
    assert correlation[..., 3:9, 12:20, 4:20].min() > 0.99
    assert correlation[..., 15:21, 12:20, 4:20].max() < -0.99
    assert correlation[..., 3:21, 3:5, 4:20].abs().max() < 0.05


def test_lncc_of_flat_images_is_finite():
    flat = torch.full((1, 1, 8, 8, 8), 0.3, requires_grad=True)
    loss = lncc_loss(flat, torch.zeros(1, 1, 8, 8, 8))
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(flat.grad).all()


def test_lncc_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        lncc_loss(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 5))


@pytest.mark.parametrize(("sigma", "radius"), [(1.5, None), (0.4, None), (1.0, 4)])
def test_smooth_equals_a_plain_convolution(rng, sigma, radius):
    image = torch.from_numpy(rng.random((2, 3, 9, 6, 11)))
    taps = gaussian_taps(sigma, radius or max(1, round(2 * sigma)))
    expected = depthwise(image, torch.einsum("i,j,k->ijk", taps, taps, taps))
    # The banded matrices are float32.
    torch.testing.assert_close(
        smooth(image, sigma, radius_voxels=radius), expected, rtol=0, atol=1e-6
    )


def test_smooth_with_sigma_zero_is_the_identity(rng):
    image = torch.from_numpy(rng.random((1, 1, 5, 5, 5)))
    assert smooth(image, 0) is image
