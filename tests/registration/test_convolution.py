"""Layers computed another way on the CPU give what PyTorch's give, with their gradients."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from m2m_bids.registration import grids
from m2m_bids.registration.doubled import convolve_before_doubling
from m2m_bids.registration.networks import convolution
from m2m_bids.registration.networks.convolution import (
    Convolution,
    _double_by_products,
    add_doubled,
    channels_last,
    convolve,
    convolve_doubled,
    leading_channels,
)
from m2m_bids.registration.networks.normalization import (
    normalize,
    normalize_and_convolve,
    rectify_and_convolve,
)
from m2m_bids.registration.networks.recomputation import computed_again
from m2m_bids.registration.volumes import channel_sums, double_backward

DOWN = nn.Conv3d(64, 32, 3, padding=1, stride=2)
UP = nn.ConvTranspose3d(96, 16, 4, padding=1, stride=2)
WIDE_UP = nn.ConvTranspose3d(48, 40, 4, padding=1, stride=2)


@pytest.fixture(autouse=True, params=["AVX2", "AVX-512", "without Numba"])
def ways(request, monkeypatch):
    """Each test takes the ways of both kinds of processors, and those without Numba."""
    monkeypatch.setattr(convolution, "_is_pytorch_fast", lambda: request.param == "AVX-512")
    monkeypatch.setattr(grids, "HAS_NUMBA", request.param != "without Numba")


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (DOWN, (6, 6, 6)),
        (DOWN, (5, 7, 6)),
        (UP, (3, 4, 5)),
        (UP, (1, 1, 1)),
        (UP, (6, 5, 4)),
        (WIDE_UP, (4, 4, 4)),  # left to PyTorch
    ],
)
def test_convolutions_are_pytorchs(layer, shape, memory_format):
    layer = copy.deepcopy(layer).double()
    x = images(2, layer.in_channels, *shape)
    stored = x.contiguous(memory_format=memory_format)
    ours = convolve(layer, stored)
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    assert_same(ours, layer(x), [x, layer.weight, layer.bias])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 2, 3), (40, 40, 3)])
@pytest.mark.parametrize(("n_in", "n_out"), [(16, 3), (5, 5), (2, 9), (12, 8)])
def test_convolutions_at_one_resolution_are_pytorchs(n_in, n_out, shape, has_bias):
    layer = Convolution(n_in, n_out, bias=has_bias).double()
    x = images(2, n_in, *shape)
    theirs = nn.functional.conv3d(x, layer.weight, layer.bias, padding=1)
    assert_same(layer(x), theirs, [x, *layer.parameters()])


def test_convolution_in_float32_is_that_of_float64():
    layer = Convolution(8, 8)
    x = images(1, 8, 16, 16, 16)
    outputs, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype).zero_grad()
        y = layer(x.detach().to(dtype))
        y.square().sum().backward()
        outputs.append(y.double())
        gradients.append(layer.weight.grad.double())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("n_channels", [3, 5])
def test_leading_channels_are_a_copy(n_channels, size):
    x = images(1, 5, size, size, size)
    stored = channels_last(x)
    copied = leading_channels(stored, n_channels)
    assert_same(copied, x[:, :n_channels], [x])
    assert copied.data_ptr() != stored.data_ptr()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (9, 2, 3)])
def test_doubled_images_are_added(shape):
    small = images(2, 3, *shape)
    y = images(2, 3, *[2 * n for n in shape], seed=1)
    doubled = nn.functional.interpolate(
        small, scale_factor=2, mode="trilinear", align_corners=False
    )
    assert_same(
        add_doubled(channels_last(y).clone(), channels_last(small)), y + doubled, [y, small]
    )


def batch_norms():
    layer = nn.BatchNorm3d(6).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer, copy.deepcopy(layer)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("size", [4, 3], ids=["even", "cropped"])
def test_normalisation_and_end_are_pytorchs(size, is_training):
    ours, theirs = (layer.train(is_training) for layer in batch_norms())
    x, skip = images(2, 6, 4, 4, 4), images(2, 2, size, size, 4, seed=1)
    joined = torch.cat((theirs(x + 3)[:, :, :size, :size], skip), 1)
    assert_same(normalize(ours, channels_last(x + 3), skip)[0], joined, [x, skip])
    convolution_layer = nn.Conv3d(8, 2, 3, padding=1).double()
    inputs = [x, skip, *convolution_layer.parameters()]
    # Another batch: running statistics have moved twice.
    joined = torch.cat((theirs(2 * x)[:, :, :size, :size], skip), 1)
    assert_same(
        normalize_and_convolve(ours, channels_last(2 * x), skip, convolution_layer),
        convolution_layer(joined),
        inputs,
    )
    for mine, reference in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("size", [4, 3], ids=["even", "cropped"])
def test_end_after_another_normalisation_is_pytorchs(size):
    layer, end = nn.GroupNorm(2, 6).double(), nn.Conv3d(8, 2, 3, padding=1).double()
    x, skip = images(2, 6, 4, 4, 4), images(2, 2, size, size, 4, seed=1)
    joined = torch.cat((layer(x)[:, :, :size, :size], skip), 1)
    inputs = [x, skip, *layer.parameters(), *end.parameters()]
    assert_same(normalize_and_convolve(layer, x, skip, end), end(joined), inputs)


@pytest.mark.parametrize("is_training", [True, False])
def test_parameters_of_the_normalisation_get_pytorchs_gradients(is_training):
    ours, theirs = (layer.train(is_training) for layer in batch_norms())
    x, skip = images(2, 6, 4, 4, 4), images(2, 2, 4, 4, 4, seed=1)
    end = nn.Conv3d(8, 2, 3, padding=1).double()
    weights = images(2, 2, 4, 4, 4, seed=2).detach()
    (normalize_and_convolve(ours, x, skip, end) * weights).sum().backward()
    (end(torch.cat((theirs(x), skip), 1)) * weights).sum().backward()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 1, 2)])
def test_rectified_convolution_is_pytorchs(shape, has_bias):
    layer = Convolution(6, 4, bias=has_bias).double()
    x = images(2, 6, *shape)
    rectified = functional.leaky_relu(functional.instance_norm(x))
    theirs = functional.conv3d(rectified, layer.weight, layer.bias, padding=1)
    assert_same(rectify_and_convolve(layer, x), theirs, [x, *layer.parameters()])


def test_what_is_computed_again_is_not_kept():
    x, weight = images(1, 4, 6, 6, 6), images(2, 4, 3, 3, 3, seed=1)
    calls = []

    def again():
        calls.append(torch.is_grad_enabled())
        return functional.leaky_relu(x.detach())

    rectified = functional.leaky_relu(x)
    with computed_again(rectified, again):
        y = functional.conv3d(rectified, weight) + rectified.square().mean()
    kept = weakref.ref(rectified)
    del rectified
    gc.collect()
    assert kept() is None
    assert not calls
    theirs = functional.leaky_relu(x)
    assert_same(y, functional.conv3d(theirs, weight) + theirs.square().mean(), [x, weight])
    assert calls == [False]  # once for both, without a gradient


def test_normalised_images_are_computed_again_to_the_bit():
    layer = nn.BatchNorm3d(6).train()
    torch.nn.init.normal_(layer.weight)
    x, skip = (image.detach().float() for image in (images(2, 6, 5, 6, 7), images(2, 3, 4, 6, 6)))
    joined, again = normalize(layer, channels_last(x), channels_last(skip))
    statistics = copy.deepcopy(layer.state_dict())
    assert torch.equal(again(), joined)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in statistics.items())


def test_float32_statistics_do_not_lose_digits_to_the_order_of_voxels():
    x = 1 + 0.1 * torch.randn(1, 6, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    layer = nn.BatchNorm3d(6)
    skip = x[:, :0]
    expected = layer.double()(x.double())
    torch.testing.assert_close(
        normalize(layer.float(), channels_last(x), skip)[0].double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_doubling_by_products_is_pytorchs(order):
    x = images(2, 3, 4, 5, 3).contiguous(memory_format=order)
    expected = functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    doubled = _double_by_products(x)
    torch.testing.assert_close(doubled, expected)
    assert doubled.is_contiguous(memory_format=order)


@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (2, 2, 2), (3, 5, 4), (8, 9, 10), (47, 46, 2), (2, 2, 90)]
)
def test_convolution_of_doubled_images_is_that_of_the_finer_grid(shape):
    layer = Convolution(7, 5, bias=False).double()
    x = images(2, 7, *[(n + 1) // 2 for n in shape])
    i, j, k = shape
    for stored in (x, channels_last(x)):
        doubled = functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        theirs = functional.conv3d(doubled[:, :, :i, :j, :k], layer.weight, padding=1)
        ours = convolve_doubled(layer, stored, torch.Size(shape))
        assert ours.is_contiguous(memory_format=torch.channels_last_3d)
        assert_same(ours, theirs, [x, layer.weight])


def test_convolution_before_doubling_gives_the_same_bytes_on_any_number_of_threads(
    same_on_any_threads,
):
    x, weight = (
        image.detach().float() for image in (images(1, 8, 40, 40, 40), images(8, 8, 3, 3, 3))
    )

    def convolve_with_gradients():
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = convolve_before_doubling(*inputs, torch.Size((80, 80, 80)))
        return [y, *torch.autograd.grad(y, inputs, y.detach())]

    same_on_any_threads(convolve_with_gradients)


def test_passes_over_volumes_give_the_same_bytes_on_any_number_of_threads(same_on_any_threads):
    x = channels_last(torch.randn(1, 5, 48, 48, 48, generator=torch.Generator().manual_seed(0)))
    same_on_any_threads(lambda: [*channel_sums(x, x + 1), double_backward(x)])


def test_sums_of_channels_are_in_float64():
    x = 1e4 + torch.randn(2, 3, 20, 21, 22, generator=torch.Generator().manual_seed(0))
    sums, products = channel_sums(x, x)
    expected = x.double().sum((0, 2, 3, 4)), x.double().square().sum((0, 2, 3, 4))
    torch.testing.assert_close((sums, products), expected, rtol=1e-13, atol=0)
