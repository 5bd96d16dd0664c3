"""CorrMLP: its correlation and its windows against loops, its levels and its units."""

import itertools

import pytest
import torch
from torch.nn import functional

from m2m_bids.registration.networks.corrmlp import (
    COMPACT,
    CorrelationMLP,
    CorrMLP,
    CorrMLPConfig,
    MultiWindowMLP,
    PatchExpansion,
    local_correlation,
)
from m2m_bids.registration.networks.layer_norm import _Standardize, normalize_channels

TINY = CorrMLPConfig(encoder_width=2, decoder_width=4, n_levels=2, windows=(2, 3))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlation_by_loops(a, b):
    n, n_channels, *grid = a.shape
    result = a.new_zeros(n, 27, *grid)
    offsets = list(itertools.product((-1, 0, 1), repeat=3))
    for voxel in itertools.product(*map(range, grid)):
        for s, offset in enumerate(offsets):
            other = tuple(x + d for x, d in zip(voxel, offset, strict=True))
            if all(0 <= x < size for x, size in zip(other, grid, strict=True)):
                products = a[(slice(None), slice(None), *voxel)] * b[(..., *other)]
                result[(slice(None), s, *voxel)] = products.sum(1) / n_channels
    return result


def test_correlation_is_that_of_loops():
    a, b = noise(2, 3, 4, 3, 5), noise(2, 3, 4, 3, 5, seed=1)
    torch.testing.assert_close(local_correlation(a, b), correlation_by_loops(a, b))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_gradient_of_the_correlation(memory_format):
    a, b = (
        noise(2, 2, 2, 3, 1, seed=seed, dtype=torch.float64).requires_grad_() for seed in (0, 1)
    )

    def correlation(a, b):
        # The gradient comes back in the memory format of what follows.
        return local_correlation(a, b).contiguous(memory_format=memory_format).square()

    assert torch.autograd.gradcheck(correlation, (a, b))


def test_correlation_finds_a_shift():
    b = noise(1, 16, 7, 7, 7)
    a = b.roll((-1, 0, 1), (2, 3, 4))  # a(x) = b(x + (1, 0, -1))
    best = local_correlation(a, b)[0, :, 1:-1, 1:-1, 1:-1].argmax(0)
    shift = list(itertools.product((-1, 0, 1), repeat=3)).index((1, 0, -1))
    # Sixteen channels of noise match elsewhere by chance now and then.
    assert (best == shift).float().mean() > 0.95


def perceptron_by_loops(mixer, x):
    """Gate each window by itself; beyond the grid, the gate reads zeros."""
    wide = functional.gelu(mixer.widen(mixer.norm(x)))
    values, gates = wide.chunk(2, -1)
    gates = mixer.gate_norm(gates)
    n, *grid, width = x.shape
    w = mixer.window
    mixed = torch.zeros_like(x)
    for image, channel in itertools.product(range(n), range(width)):
        for corner in itertools.product(*(range(0, size, w) for size in grid)):
            inside = (image, *(slice(c, c + w) for c in corner), channel)
            cube = torch.zeros(w, w, w)
            found = gates[inside]
            cube[tuple(map(slice, found.shape))] = found
            cube = (mixer.gate.weight @ cube.flatten() + mixer.gate.bias).view(w, w, w)
            mixed[inside] = cube[tuple(map(slice, found.shape))]
    return x + mixer.project(values * (1 + mixed))


def test_standardized_channels_are_pytorchs():
    x = noise(2, 3, 4, 8, dtype=torch.float64).mul(3).add(1).requires_grad_()
    torch.testing.assert_close(_Standardize.apply(x), functional.layer_norm(x, (8,)))
    assert torch.autograd.gradcheck(_Standardize.apply, x)


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 8), (1, 17, 16, 17, 3), (1, 1)])
def test_voxels_of_few_channels_are_normalised_as_by_pytorch(shape, has_weights):
    x = noise(*shape, dtype=torch.float64).mul(3).add(1).requires_grad_()
    inputs = [x]
    if has_weights:
        inputs += [noise(shape[-1], dtype=torch.float64).requires_grad_() for _ in range(2)]
    ours = normalize_channels(*inputs)
    theirs = functional.layer_norm(x, shape[-1:], *inputs[1:])
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad)
    )


@pytest.mark.parametrize("grid", [(4, 2, 6), (3, 5, 4), (1, 2, 1)])
def test_perceptrons_are_those_of_loops(grid):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MultiWindowMLP(4, (2, 3))
        for parameter in layer.parameters():  # norms that do nothing would hide mistakes
            parameter.data.add_(0.5 * torch.randn(parameter.shape))
    x = noise(2, *grid, 4)
    with torch.no_grad():
        normed = layer.norm(x)
        outputs = torch.stack([perceptron_by_loops(mixer, normed) for mixer in layer.mixers], -1)
        weights = layer.weigh(outputs.sum(-1).mean((1, 2, 3))).view(2, 1, 1, 1, 4, 2).softmax(-1)
        expected = x + layer.project((weights * outputs).sum(-1))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_windows_do_not_mix():
    layer = MultiWindowMLP(4, (3,))
    # The means over the grid, which weigh the windows, see all of it: with one size they do not
    # matter.
    x = noise(1, 6, 5, 4, 4).requires_grad_()
    seen = torch.autograd.grad(layer(x)[0, 4, 4, 0].sum(), x)[0].abs().sum((0, -1)) > 1e-12
    expected = torch.zeros(6, 5, 4, dtype=torch.bool)
    expected[3:, 3:, :3] = True
    assert not (seen & ~expected).any()
    assert seen[4, 4, 0]
    assert seen.sum() > 1


def test_same_gradients_with_and_without_recomputation(monkeypatch):
    layer = CorrelationMLP(2, 4, windows=(2, 3))
    a, b = noise(1, 2, 5, 5, 5), noise(1, 2, 5, 5, 5, seed=1)
    gradients = []
    for is_kept in (False, True):
        if is_kept:
            monkeypatch.setattr(
                "m2m_bids.registration.networks.corrmlp.checkpoint",
                lambda function, x, **options: function(x),
            )
        layer.zero_grad()
        layer(a, b).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for recomputed, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_expansion_doubles_the_grid():
    assert PatchExpansion(8)(noise(1, 8, 3, 3, 3)).shape == (1, 4, 6, 6, 6)


def constant_heads(network, voxels):
    for head, shift in zip(network.heads, voxels, strict=True):
        torch.nn.init.zeros_(head.weight)
        head.bias.data.copy_(torch.tensor(shift))
    return network


def test_levels_add_up_in_voxels_and_leave_in_unit_coordinates():
    # The coarse level's voxels are two of the fine ones.
    network = constant_heads(CorrMLP(TINY), [[1.0, -2.0, 3.0], [0.5, 1.0, -0.25]])
    with torch.no_grad():
        disp = network(*torch.rand(2, 1, 1, 9, 9, 9))
    expected = (torch.tensor([2.0, 0.0, 2.5]) / 8).view(1, 3, 1, 1, 1).expand(1, 3, 9, 9, 9)
    torch.testing.assert_close(disp, expected)


def test_fine_level_sees_the_moving_features_where_the_coarse_one_puts_them(monkeypatch):
    network = constant_heads(CorrMLP(TINY), [[0.0, 0.0, 0.0], [1.0, 0.0, -0.5]])
    moving, fixed = torch.rand(2, 1, 1, 8, 8, 8)
    seen = []
    fine = network.match[0]
    monkeypatch.setattr(
        fine, "forward", lambda a, b: (seen.append(b), torch.zeros(1, 4, 8, 8, 8))[1]
    )
    with torch.no_grad():
        network(moving, fixed)
        features = network.encoder[0](moving)
    # features(x + (2, 0, -1)) in voxels
    torch.testing.assert_close(seen[0][:, :, :-2, :, 1:], features[:, :, 2:, :, :-1])


@pytest.mark.parametrize("size", range(3, 10))
def test_every_size_above_the_smallest(size):
    with torch.no_grad():
        disp = CorrMLP(TINY)(*torch.rand(2, 1, 1, size, size, size))
    assert disp.shape == (1, 3, size, size, size)
    assert torch.isfinite(disp).all()


@pytest.mark.parametrize(("config", "size"), [(TINY, 2), (COMPACT, 8), (CorrMLPConfig(), 8)])
def test_smallest_size_is_named(config, size):
    with torch.device("meta"):
        network = CorrMLP(config)
    with pytest.raises(ValueError, match=f"larger than {size} voxels, got {size}"):
        network(*torch.zeros(2, 1, 1, size, size, size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_width": 0}, "encoder_width must be at least 1"),
        ({"decoder_width": 6}, "multiple of 4"),
        ({"decoder_width": 0}, "multiple of 4"),
        ({"n_levels": 0}, "n_levels must be at least 1"),
        ({"windows": ()}, "windows must hold"),
        ({"windows": (3, 0)}, "windows must hold"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        CorrMLPConfig(**changes)
