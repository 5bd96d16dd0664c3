"""Sampling agrees with SciPy, and its gradients with PyTorch's."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.nn import functional

from m2m_bids.registration.grids import identity_map, pool, resize, sample

SHAPE = (9, 7, 12)  # no two axes alike, so that a swapped axis shows


@pytest.fixture
def image(rng):
    return torch.from_numpy(rng.random((1, 1, *SHAPE), dtype=np.float32))


@pytest.fixture
def positions(rng):
    """Random unit coordinates, a third of them outside the grid."""
    return torch.from_numpy(rng.uniform(-0.2, 1.2, (1, 3, 5, 6, 4)).astype(np.float32))


def scipy_sample(image, positions, **options):
    ijk = positions.double().numpy() * (np.array(SHAPE) - 1).reshape(3, 1, 1, 1)
    return map_coordinates(image[0, 0].double().numpy(), ijk[0], **options)


@pytest.mark.parametrize(
    ("padding", "scipy_mode"), [("border", "nearest"), ("zeros", "grid-constant")]
)
@pytest.mark.parametrize(("mode", "order"), [("bilinear", 1), ("nearest", 0)])
def test_sample_equals_scipy(image, positions, padding, scipy_mode, mode, order):
    ours = sample(image, positions, padding=padding, mode=mode)[0, 0]
    expected = scipy_sample(image, positions, order=order, mode=scipy_mode)
    # float32 positions are good to 1e-6 voxels, the image's slope is at most 1 per voxel.
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_sample_takes_any_number_of_channels(rng, positions):
    images = torch.from_numpy(rng.random((1, 4, *SHAPE), dtype=np.float32))
    together = sample(images, positions)
    for channel in range(4):
        torch.testing.assert_close(together[:, [channel]], sample(images[:, [channel]], positions))


def test_sampling_at_the_identity_changes_nothing(rng):
    image = torch.from_numpy(rng.random((2, 1, 8, 8, 8), dtype=np.float32))
    torch.testing.assert_close(sample(image, identity_map(8).expand(2, -1, -1, -1, -1)), image)


def test_sample_broadcasts_one_image_to_every_batch_of_positions(image, positions):
    two = torch.cat((positions, 1 - positions))
    together = sample(image, two)
    torch.testing.assert_close(together[1:], sample(image, two[1:]))


def test_sample_refuses_other_batch_sizes(image, positions):
    with pytest.raises(ValueError, match="batch sizes differ: 2 and 3"):
        sample(image.expand(2, -1, -1, -1, -1), positions.expand(3, -1, -1, -1, -1))


def test_sample_refuses_positions_that_are_not_points(image, positions):
    with pytest.raises(ValueError, match=r"positions must be \(N, 3, I, J, K\)"):
        sample(image, positions[:, :2])


def test_identity_map_is_ijk_over_n_minus_one():
    points = identity_map(5)
    assert points.shape == (1, 3, 5, 5, 5)
    np.testing.assert_array_equal(points[0, :, 1, 2, 4], [0.25, 0.5, 1.0])
    assert identity_map(5, like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("size", "halved"), [(8, 4), (7, 4), (2, 1)])
def test_pool_averages_what_there_is(size, halved):
    # At an odd size the last window is half outside; its mean is over the voxels inside.
    assert torch.equal(
        pool(torch.ones(1, 2, size, size, size)), torch.ones(1, 2, halved, halved, halved)
    )


def test_pool_is_the_mean_of_eight(rng):
    image = torch.from_numpy(rng.random((1, 1, 4, 4, 4)))
    expected = image.reshape(1, 1, 2, 2, 2, 2, 2, 2).mean((3, 5, 7))
    torch.testing.assert_close(pool(image), expected)


@pytest.mark.parametrize("size", [5, 8, 13])
def test_resize_is_sampling_at_the_new_grid(rng, size):
    image = torch.from_numpy(rng.random((2, 3, 8, 8, 8)))
    positions = identity_map(size, like=image).expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(resize(image, size), sample(image, positions))


def pytorch_sample(image, positions, padding):
    grid = torch.stack((2 * positions - 1).unbind(1)[::-1], -1)
    image = image.expand(len(positions), -1, -1, -1, -1)
    return functional.grid_sample(image, grid, padding_mode=padding, align_corners=True)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("n_images", [1, 2])
def test_gradients_of_sampling_are_those_of_pytorch(rng, padding, n_images):
    image = torch.from_numpy(rng.random((n_images, 3, *SHAPE)))
    # Twelve hundred positions: two whole blocks and a part; a third of them outside.
    positions = torch.from_numpy(rng.uniform(-0.3, 1.3, (2, 3, 10, 12, 10)))
    weights = torch.from_numpy(rng.standard_normal((2, 3, 10, 12, 10)))
    found = []
    for function in (
        lambda *x: sample(*x, padding=padding),
        lambda *x: pytorch_sample(*x, padding),
    ):
        leaves = [image.clone().requires_grad_(), positions.clone().requires_grad_()]
        found.append(torch.autograd.grad(function(*leaves), leaves, weights))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_positions_on_the_border_have_the_gradients_of_pytorch(padding):
    image = torch.arange(27.0).view(1, 1, 3, 3, 3) ** 2
    found = []
    for function in (sample, lambda *x, padding: pytorch_sample(*x, padding)):
        positions = identity_map(3).clone().requires_grad_()
        sampled = function(image, positions, padding=padding)
        found.append(torch.autograd.grad(sampled.sum(), positions)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(1, 7, 5), (6, 1, 5), (6, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_images_of_a_single_plane_are_sampled(rng, shape, padding):
    image = torch.from_numpy(rng.random((1, 2, *shape))).requires_grad_()
    positions = torch.from_numpy(rng.random((1, 3, 4, 4, 4)))
    sampled, expected = (
        sample(image, positions, padding=padding),
        pytorch_sample(image, positions, padding),
    )
    torch.testing.assert_close(sampled, expected)
    gradients = [torch.autograd.grad(x.square().sum(), image) for x in (sampled, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_positions_that_are_nowhere_read_no_other_memory(rng, value):
    image = torch.from_numpy(rng.random((1, 1, *SHAPE), dtype=np.float32))
    positions = torch.full((1, 3, 2, 2, 2), 0.5)
    positions[:, 1, 0, 0, 0] = value
    sampled = sample(image, positions)[0, 0]
    assert torch.isnan(sampled[0, 0, 0]) == np.isnan(value)
    assert sampled[1:].isfinite().all()


def test_sampling_takes_arrays_in_any_order(image, positions):
    turned = positions.permute(0, 1, 4, 2, 3)
    assert torch.equal(sample(image, turned), sample(image, turned.contiguous()))
    last = image.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(sample(last, positions), sample(image, positions))


def test_sampling_in_autocast_is_in_float32(image, positions):
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample(image.bfloat16(), positions)
    torch.testing.assert_close(sampled, sample(image.bfloat16().float(), positions))


def test_no_position_gives_no_sample(image):
    assert sample(image, torch.zeros(1, 3, 0, 4, 4)).shape == (1, 1, 0, 4, 4)


def test_the_library_samples_without_numba():
    code = (
        "import sys; sys.modules['numba'] = None; import torch;"
        "from m2m_bids.registration import grids;"
        "print(grids.sample(torch.eye(2).expand(1, 1, 2, 2, 2), torch.full((1, 3, 1, 1, 1), 0.5)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "tensor([[[[[0.5000]]]]])\n"


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_sampling_gives_the_same_bytes_on_any_number_of_threads(
    needs_gradient, same_on_any_threads
):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, 2, 12, 12, 12), generator=generator, requires_grad=needs_gradient)
    # Enough for four threads, and no whole number of blocks for each.
    positions = torch.rand((1, 3, 55, 55, 55), generator=generator, requires_grad=True)
    weights = torch.rand((1, 2, 55, 55, 55), generator=generator)

    def sampled():
        samples = sample(image, positions)
        wanted = [image, positions] if needs_gradient else [positions]
        return [samples, *torch.autograd.grad(samples, wanted, weights)]

    same_on_any_threads(sampled)


def test_enlarging_gives_the_same_bytes_on_any_number_of_threads(same_on_any_threads):
    image = torch.rand((1, 3, 32, 32, 32), generator=torch.Generator().manual_seed(0))
    same_on_any_threads(lambda: [resize(image, 64)])


def test_enlarging_in_autocast_is_in_float32(rng):
    image = torch.from_numpy(rng.random((1, 3, 5, 5, 5), dtype=np.float32))
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize(image, 9)
    assert torch.equal(resized, resize(image, 9))


def test_enlarging_serves_training_after_inference():
    """A matrix that was first made for inference could not be kept for a gradient."""
    image = torch.rand(1, 1, 3, 3, 3)
    with torch.inference_mode():
        resize(image, 11)
    image.requires_grad_()
    resize(image, 11).sum().backward()
    assert image.grad.isfinite().all()
