"""Sampling agrees with SciPy, which knows nothing of `grid_sample`."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

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


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_sampling_in_slabs_of_the_threads_is_the_same(image, positions, n_threads, monkeypatch):
    whole = sample(image.expand(2, -1, -1, -1, -1), positions.expand(2, -1, -1, -1, -1))[:1]
    positions = positions.transpose(2, 3)  # six slices, which two and three divide
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    torch.testing.assert_close(sample(image, positions), whole.transpose(2, 3))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_sampling_gives_the_same_bytes_on_any_number_of_threads(needs_gradient):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, 2, 12, 12, 12), generator=generator, requires_grad=needs_gradient)
    positions = torch.rand((1, 3, 24, 24, 24), generator=generator, requires_grad=True)
    weights = torch.rand((1, 2, 24, 24, 24), generator=generator)
    found = []
    before = torch.get_num_threads()
    for n_threads in (1, 2, 3, 4):
        torch.set_num_threads(n_threads)
        sampled = sample(image, positions)
        wanted = [image, positions] if needs_gradient else [positions]
        found.append([sampled, *torch.autograd.grad(sampled, wanted, weights)])
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))
