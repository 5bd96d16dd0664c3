"""TransMorph: its attention against a loop over windows, its grids and its units."""

import itertools

import pytest
import torch

from m2m_bids.registration.networks.transmorph import (
    COMPACT,
    PatchMerging,
    SwinBlock,
    TransMorph,
    TransMorphConfig,
    WindowAttention,
    _attend,
    _Attention,
    _hidden,
)

TINY = TransMorphConfig(
    embed_width=8, depths=(1, 2), n_heads=(2, 2), window_size=(2, 3, 4), head_width=4, drop_path=0
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(*, shift, window_size=(2, 3, 4)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = WindowAttention(8, 2, window_size=window_size, shift=shift)
        torch.nn.init.normal_(layer.bias_table)
    return layer


def spans(size, window, shift):
    """Ranges of an axis that share a window; the border cuts the first and the last."""
    edges = sorted({0, size, *range(shift, size, window)})
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def attention_by_loops(layer, x):
    """Attend within each window and for each pair of its tokens, straight from the definition."""
    n, *grid, width = x.shape
    head_width = width // layer.n_heads
    window = [min(sizes) for sizes in zip(layer.window_size, grid, strict=True)]
    shift = [s if w < g else 0 for s, w, g in zip(layer.shift, window, grid, strict=True)]
    table = layer.bias_table.view(*(2 * w - 1 for w in layer.window_size), layer.n_heads)
    weights = layer.qkv.weight.view(3, layer.n_heads, head_width, width)
    result = torch.zeros_like(x)
    axes = [spans(*sizes) for sizes in zip(grid, window, shift, strict=True)]
    for image, ranges in itertools.product(range(n), itertools.product(*axes)):
        tokens = list(itertools.product(*ranges))
        for head in range(layer.n_heads):
            q, k, v = ([w[head] @ x[(image, *t)] for t in tokens] for w in weights)
            for i, here in enumerate(tokens):
                logits = []
                for j, there in enumerate(tokens):
                    offset = [
                        a - b + w - 1
                        for a, b, w in zip(here, there, layer.window_size, strict=True)
                    ]
                    logits.append(q[i] @ k[j] / head_width**0.5 + table[(*offset, head)])
                attended = torch.stack(logits).softmax(0) @ torch.stack(v)
                result[(image, *here)][head * head_width : (head + 1) * head_width] = attended
    return layer.project(result)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)])
@pytest.mark.parametrize(
    "grid",
    [
        (4, 3, 4),  # whole windows, one of them as wide as the grid
        (3, 4, 5),  # windows reach beyond each end
        (2, 2, 3),  # windows wider than the grid
    ],
)
def test_attention_is_that_of_loops(shift, grid):
    layer = attention(shift=shift)
    x = noise(2, *grid, 8)
    with torch.no_grad():
        # float32 sums in another order
        torch.testing.assert_close(layer(x), attention_by_loops(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)])
def test_attention_window_by_window_is_pytorchs(shift):
    masks, kinds = _hidden((4, 6, 5), (2, 3, 4), shift, torch.device("cpu"))
    tokens = noise(2 * len(kinds), 24, 3, 2, 5).double().requires_grad_()
    bias = noise(2, 24, 24, seed=1).double().requires_grad_()
    grad = noise(len(tokens), 24, 2, 5, seed=2).double()
    results = []
    for attend in (_Attention.apply, _attend):
        attended = attend(tokens, bias, masks, kinds.repeat(2))
        results.append([attended, *torch.autograd.grad(attended, (tokens, bias), grad)])
    torch.testing.assert_close(*results)
    assert len(masks) > 1


@pytest.mark.parametrize("grid", [(4, 6, 8), (5, 7, 9)])
def test_shifted_windows_do_not_reach_across_the_border(grid):
    layer = attention(shift=(1, 1, 2))
    x = noise(1, *grid, 8).requires_grad_()
    first = layer(x)[0, 0, 0, 0].sum()
    seen = torch.autograd.grad(first, x)[0].abs().sum((0, -1)) > 0
    # The first window is cut to the shift.
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[:1, :1, :2] = True
    assert torch.equal(seen, expected)


def test_masks_of_inference_serve_training():
    layer = attention(shift=(1, 1, 2))
    x = noise(1, 5, 4, 7, 8)  # a grid of no other test: nothing is cached yet
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected.clone())
    assert layer.bias_table.grad.abs().sum() > 0


def test_merging_reads_eight_neighbours():
    merge = PatchMerging(2)
    x = noise(1, 4, 3, 2, 2).requires_grad_()
    y = merge(x)
    assert y.shape == (1, 2, 2, 1, 4)
    seen = torch.autograd.grad(y[0, 1, 1, 0].square().sum(), x)[0].abs().sum((0, -1)) > 0
    expected = torch.zeros(4, 3, 2, dtype=torch.bool)
    expected[2:, 2:, :] = True
    assert torch.equal(seen, expected)


def test_branches_are_dropped_in_training_only():
    block = SwinBlock(attention(shift=(0, 0, 0)), drop_path=0.5)
    x = noise(1, 2, 3, 4, 8).expand(64, -1, -1, -1, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        difference = (block.train()(x) - x).flatten(1).abs().sum(1)
    untouched = int((difference == 0).sum())
    # A quarter of 64 on average, both branches dropped; 3.5 standard deviations.
    assert 4 <= untouched <= 28
    y = block.eval()(x)
    torch.testing.assert_close(y, y[:1].expand_as(y))


def test_drop_path_grows_from_the_first_to_the_last_block():
    with torch.device("meta"):
        encoder = TransMorph().encoder
    rates = [block.drop_path for stage in encoder.stages for block in stage]
    assert rates == pytest.approx([0.3 * i / 9 for i in range(10)])
    shifts = [block.attention.shift for block in encoder.stages[2]]
    assert shifts == [(0, 0, 0), (2, 3, 3)] * 2


def test_head_is_in_voxels_and_the_displacement_in_unit_coordinates():
    network = TransMorph(TINY)
    torch.nn.init.zeros_(network.head.weight)
    voxels = torch.tensor([1.0, -2.0, 3.0])
    network.head.bias.data.copy_(voxels)
    with torch.no_grad():
        disp = network(*torch.rand(2, 1, 1, 13, 13, 13))
    expected = (voxels / 12).view(1, 3, 1, 1, 1).expand(1, 3, 13, 13, 13)
    torch.testing.assert_close(disp, expected)


@pytest.mark.parametrize("size", range(5, 18))
def test_every_size_above_the_smallest(size):
    with torch.no_grad():
        disp = TransMorph(TINY)(*torch.rand(2, 1, 1, size, size, size))
    assert disp.shape == (1, 3, size, size, size)
    assert torch.isfinite(disp).all()


@pytest.mark.parametrize(("config", "size"), [(TINY, 4), (COMPACT, 8), (TransMorphConfig(), 16)])
def test_smallest_size_is_named(config, size):
    with torch.device("meta"):
        network = TransMorph(config)
    with pytest.raises(ValueError, match=f"larger than {size} voxels, got {size}"):
        network(*torch.zeros(2, 1, 1, size, size, size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": (2,)}, "as many n_heads as depths"),
        ({"depths": (), "n_heads": ()}, "at least one"),
        ({"depths": (1, 0)}, "depths must be at least 1"),
        ({"window_size": (2, 3)}, "three sizes"),
        ({"window_size": (2, 3, 0)}, "three sizes"),
        ({"embed_width": 9}, "must be even"),
        ({"n_heads": (2, 3)}, "16 channels cannot be shared by 3 n_heads"),
        ({"head_width": 0}, "head_width must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
    ],
)
def test_config_refuses(changes, message):
    sizes = {"embed_width": 8, "depths": (1, 2), "n_heads": (2, 2), **changes}
    with pytest.raises(ValueError, match=message):
        TransMorphConfig(**sizes)


def test_compact_size():
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in TransMorph(COMPACT).parameters())
    assert 1e6 < n_parameters < 2e6
