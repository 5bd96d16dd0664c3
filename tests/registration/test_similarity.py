"""Similarity losses against plain implementations, known values and what they ignore."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import BSpline
from torch.nn import functional

from m2m_bids.registration import grids
from m2m_bids.registration.similarity import (
    SIMILARITIES,
    lncc_loss,
    lncc_squared_loss,
    local_correlation,
    mind_ssc,
    mind_ssc_loss,
    mutual_information_loss,
    similarity_loss,
    smooth,
)

# Along random directions: one element at a time would take minutes.
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
gradgradcheck = partial(torch.autograd.gradgradcheck, fast_mode=True)


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
    torch.testing.assert_close(
        smooth(image, sigma, radius_voxels=radius), expected, rtol=0, atol=1e-14
    )


def test_smooth_of_long_axes_equals_scipy(rng):
    image = rng.random((2, 5, 100, 77))
    ours = smooth(torch.from_numpy(image), 5.0)
    for item, expected in zip(ours, image, strict=True):
        expected = ndimage.gaussian_filter(expected, 5.0, mode="constant", radius=10)
        np.testing.assert_allclose(item.numpy(), expected, rtol=0, atol=1e-14)


def test_smooth_with_sigma_zero_is_the_identity(rng):
    image = torch.from_numpy(rng.random((1, 1, 5, 5, 5)))
    assert smooth(image, 0) is image


def test_other_devices_take_the_same_shapes():
    image = torch.empty((2, 1, 80, 9, 100), device="meta")
    assert smooth(image, 2.0).shape == image.shape
    assert mind_ssc(image).shape == (2, 12, 80, 9, 100)
    assert mutual_information_loss(image, image).shape == ()


@pytest.mark.parametrize("function", [partial(smooth, sigma_voxels=2.5), mind_ssc])
def test_windows_without_numba_are_the_same(rng, function, monkeypatch):
    image = torch.from_numpy(rng.random((2, 1, 9, 6, 30)))
    expected = function(image)
    monkeypatch.setattr(grids, "HAS_NUMBA", False)
    torch.testing.assert_close(function(image), expected, rtol=0, atol=1e-13)


def test_windows_give_the_same_bytes_on_any_number_of_threads(same_on_any_threads):
    image = torch.rand(1, 1, 41, 40, 42, generator=torch.Generator().manual_seed(0))
    same_on_any_threads(lambda: [smooth(image, 5.0)])


def test_smooth_has_its_own_gradient(rng):
    image = torch.from_numpy(rng.random((2, 4, 5, 3))).requires_grad_()
    assert gradcheck(lambda x: smooth(x, 1.5), image)
    assert gradgradcheck(lambda x: smooth(x, 1.5).square(), image)


def small_pair(rng, shape=(2, 1, 6, 5, 7)):
    """Two float64 images in (0, 1) that ask for gradients."""
    return [torch.from_numpy(rng.random(shape)).requires_grad_() for _ in range(2)]


def test_local_correlation_equals_scipy(pair):
    a, b = (image.double().numpy()[:, 0] for image in pair)

    def mean(image):
        return np.stack(
            [ndimage.gaussian_filter(one, 2.0, mode="constant", radius=4) for one in image]
        )

    covariance = mean(a * b) - mean(a) * mean(b)
    variances = [mean(image**2) - mean(image) ** 2 + 1e-5 for image in (a, b)]
    expected = covariance / np.sqrt(variances[0] * variances[1])
    ours = local_correlation(*[image.double() for image in pair], sigma_voxels=2.0)
    np.testing.assert_allclose(ours[:, 0].numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("asks", [(True, False), (False, True), (True, True)])
def test_local_correlation_has_its_gradient(rng, asks):
    images = [image.requires_grad_(ask) for image, ask in zip(small_pair(rng), asks, strict=True)]
    assert gradcheck(lambda a, b: local_correlation(a, b, sigma_voxels=1.5), images)


def saved_images(loss, images):
    """Count the images' worth of memory that a loss keeps for the backward, but for its inputs."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(*images)
    inputs = {image.untyped_storage().data_ptr() for image in images}
    n_bytes = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in inputs)
    assert result.requires_grad
    return n_bytes / (images[0].numel() * images[0].element_size())


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(lncc_loss, 3), (lncc_squared_loss, 4), (mutual_information_loss, 0.5)],
)
def test_a_fixed_image_costs_no_memory(pair, loss, expected):
    a = pair[0].clone().requires_grad_()
    assert saved_images(loss, (a, pair[1])) <= expected


def test_lncc_squared_is_one_minus_the_mean_square(pair):
    expected = 1 - local_correlation(*pair).square().mean().item()
    assert lncc_squared_loss(*pair).item() == pytest.approx(expected, abs=1e-6)


def test_lncc_squared_ignores_the_sign(rng):
    a = torch.from_numpy(rng.random((1, 1, 24, 24, 24))) - 0.5
    b = 0.5 * a + 0.5 * torch.from_numpy(rng.random((1, 1, 24, 24, 24))) - 0.25
    loss = lncc_squared_loss(a, b).item()
    assert 0.1 < loss < 0.9
    assert lncc_squared_loss(a, -b).item() == pytest.approx(loss, abs=1e-12)
    assert lncc_squared_loss(a, -a).item() == pytest.approx(0, abs=2e-3)


def numpy_information(a, b, n_bins):
    """Mutual information of two images in nats, with SciPy's cubic B-spline windows."""
    knots = np.arange(-3, n_bins + 1)
    weights = [
        BSpline.design_matrix(image.ravel() * (n_bins - 3), knots, 3).toarray()[:, :n_bins]
        for image in (a, b)
    ]
    joint = weights[0].T @ weights[1] / a.size
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return (joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0])).sum()


@pytest.mark.parametrize("n_bins", [4, 16, 32])
def test_mutual_information_equals_numpy(pair, n_bins):
    a, b = (image.double() for image in pair)
    a[0, 0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    expected = [numpy_information(x.numpy(), y.numpy(), n_bins) for x, y in zip(a, b, strict=True)]
    ours = mutual_information_loss(a, b, n_bins=n_bins).item()
    assert ours == pytest.approx(-np.mean(expected), abs=1e-12)
    ours = mutual_information_loss(a.float(), b.float(), n_bins=n_bins).item()
    assert ours == pytest.approx(-np.mean(expected), abs=1e-5)


def test_mutual_information_of_normal_variables_is_known(rng):
    """It is -log(1 - rho^2) / 2 for correlation rho; the windows blur it by some percent."""
    rho = 0.8
    x, y = rng.standard_normal((2, 1, 1, 64, 64, 64))
    y = rho * x + np.sqrt(1 - rho**2) * y
    a, b = (torch.from_numpy(np.clip(0.5 + z / 8, 0, 1)) for z in (x, y))
    expected = 0.5 * np.log(1 - rho**2)
    ours = mutual_information_loss(a, b, n_bins=64).item()
    assert ours == pytest.approx(expected, rel=0.1)
    histogram = np.histogram2d(a.numpy().ravel(), b.numpy().ravel(), 32)[0] / a.numel()
    independent = np.outer(histogram.sum(1), histogram.sum(0))
    seen = histogram > 0
    information = (histogram[seen] * np.log(histogram[seen] / independent[seen])).sum()
    assert ours == pytest.approx(-information, rel=0.1)


def test_mutual_information_of_independent_images_is_none(rng):
    a, b = torch.from_numpy(rng.random((2, 1, 1, 64, 64, 64)))
    assert -1e-2 < mutual_information_loss(a, b).item() < 0


def test_mutual_information_ignores_inversion(pair):
    a, b = (image.double() for image in pair)
    loss = mutual_information_loss(a, b).item()
    assert loss < -0.1
    for inverted in ((1 - a, b), (a, 1 - b), (1 - a, 1 - b), (b, a)):
        assert mutual_information_loss(*inverted).item() == pytest.approx(loss, abs=1e-12)


def test_mutual_information_has_its_gradient(rng):
    images = small_pair(rng)
    assert gradcheck(lambda a, b: mutual_information_loss(a, b, n_bins=8), images)


def test_mutual_information_sees_all_voxels_of_large_images(rng):
    """More voxels than one chunk has: those of the second half count as those of the first."""
    half = torch.from_numpy(rng.random((2, 1, 1, 32, 32, 16)))
    a, b = torch.cat((half, half), -1)
    assert mutual_information_loss(a, b).item() == pytest.approx(
        mutual_information_loss(*half).item(), abs=1e-12
    )
    a = a.clone().requires_grad_()
    mutual_information_loss(a, b).backward()
    torch.testing.assert_close(a.grad[..., :16], a.grad[..., 16:], rtol=0, atol=1e-15)


def test_mutual_information_has_no_gradient_in_the_background():
    a = torch.zeros(1, 1, 8, 8, 8)
    a[..., 4:] = 0.7
    a.requires_grad_()
    mutual_information_loss(a, a.detach()).backward()
    assert torch.isfinite(a.grad).all()
    outside = torch.full((1, 1, 8, 8, 8), 1.5, requires_grad=True)
    mutual_information_loss(outside, a.detach()).backward()
    assert outside.grad.abs().max() == 0


def test_mutual_information_refuses():
    image = torch.zeros(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="n_bins must be at least 4, got 3"):
        mutual_information_loss(image, image, n_bins=3)
    with pytest.raises(ValueError, match="shapes differ"):
        mutual_information_loss(image, image[..., :3])


def loop_mind(image, radius, step):
    """MIND-SSC voxel by voxel, of a NumPy image (I, J, K)."""
    axes = np.eye(3, dtype=int)
    neighbours = [*axes, *-axes]
    pairs = [
        (p, q)
        for i, p in enumerate(neighbours)
        for q in neighbours[:i]
        if np.square(p - q).sum() == 2
    ]
    last = np.array(image.shape) - 1

    def value(at):
        return image[tuple(np.clip(at, 0, last))]

    distance = np.zeros((len(pairs), *image.shape))
    around = list(product(range(-radius, radius + 1), repeat=3))
    for at in np.ndindex(image.shape):
        for channel, (p, q) in enumerate(pairs):
            centres = [np.clip(np.add(at, shift), 0, last) for shift in around]
            squares = [(value(c + step * p) - value(c + step * q)) ** 2 for c in centres]
            distance[(channel, *at)] = np.mean(squares)
    distance -= distance.min(0)
    variance = distance.mean(0)
    variance = np.clip(variance, 0.001 * variance.mean(), 1000 * variance.mean())
    return np.exp(-distance / variance)


@pytest.mark.parametrize(("radius", "step"), [(1, 1), (1, 2)])
def test_mind_equals_a_loop(rng, radius, step):
    image = rng.random((5, 6, 4))
    image[:, :, :2] *= 1e-3  # where the variance is raised
    ours = mind_ssc(
        torch.from_numpy(image)[None, None], radius_voxels=radius, dilation_voxels=step
    )
    expected = loop_mind(image, radius, step)
    assert ours.shape == (1, 12, 5, 6, 4)
    # The pairs are in another order.
    np.testing.assert_allclose(
        np.sort(ours[0].numpy(), 0), np.sort(expected, 0), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("radius", "step"), [(2, 2), (1, 2), (1, 1)])
def test_mind_equals_the_icon_project(pair, radius, step):
    losses = pytest.importorskip("icon_registration.losses")
    gradients = []
    for loss in (
        losses.MINDSSC(radius, step),
        lambda a, b: mind_ssc_loss(a, b, radius_voxels=radius, dilation_voxels=step),
    ):
        a = pair[0][:1].clone().requires_grad_()
        value = loss(a, pair[1][:1])
        value.backward()
        gradients.append((value.item(), a.grad))
    assert gradients[1][0] == pytest.approx(gradients[0][0], abs=1e-6)
    difference = (gradients[1][1] - gradients[0][1]).norm() / gradients[0][1].norm()
    assert difference < 1e-4


def test_mind_ignores_affine_intensity(pair):
    a, b = (image.double() for image in pair)
    loss = mind_ssc_loss(a, b).item()
    assert 0.01 < loss < 1
    assert mind_ssc_loss(3 - 2 * a, 10 * b).item() == pytest.approx(loss, abs=1e-10)
    assert mind_ssc_loss(a, 0.5 - 0.1 * a).item() == pytest.approx(0, abs=1e-12)


def test_mind_has_its_gradient(rng):
    """But for the clamp of the variance, which counts as constant: none is clamped here."""
    a, b = small_pair(rng, (2, 1, 5, 4, 6))
    assert gradcheck(
        lambda *images: mind_ssc_loss(*images, radius_voxels=1, dilation_voxels=1), (a, b)
    )


def test_mind_of_flat_images_is_finite():
    flat = torch.full((1, 1, 8, 8, 8), 0.3, requires_grad=True)
    assert (mind_ssc(flat) == 1).all()
    loss = mind_ssc_loss(flat, torch.rand((1, 1, 8, 8, 8)))
    loss.backward()
    assert 0 < loss.item() < 1
    assert torch.isfinite(flat.grad).all()


def test_mind_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        mind_ssc_loss(torch.zeros(1, 1, 8, 8, 8), torch.zeros(2, 1, 8, 8, 8))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_batch_is_the_mean_of_its_items(pair, name):
    a, b = (image.double() for image in pair)
    a = torch.cat((a, 0.01 * a[:1]))
    b = torch.cat((b, 0.5 + 0.5 * b[:1]))
    items = [similarity_loss(name, a[i, None], b[i, None], lncc_sigma_voxels=2) for i in range(3)]
    whole = similarity_loss(name, a, b, lncc_sigma_voxels=2)
    assert 3 * whole.item() == pytest.approx(sum(items).item(), rel=1e-9)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_alike_is_lower_than_unlike(pair, name):
    a, b = pair
    same, blend, other = (similarity_loss(name, a, image).item() for image in (a, b, b.flip(2)))
    assert same < blend < other


def test_similarity_by_name(pair):
    assert set(SIMILARITIES) == {"lncc", "lncc2", "mi", "mind-ssc"}
    assert similarity_loss("lncc", *pair, lncc_sigma_voxels=2) == lncc_loss(*pair, sigma_voxels=2)
    assert similarity_loss("lncc2", *pair) == lncc_squared_loss(*pair)
    assert similarity_loss("mi", *pair) == mutual_information_loss(*pair)
    assert similarity_loss("mind-ssc", *pair) == mind_ssc_loss(*pair)


def test_similarity_refuses_unknown_names(pair):
    with pytest.raises(ValueError, match="'ssd'; expected one of lncc, lncc2, mi, mind-ssc"):
        similarity_loss("ssd", *pair)
