"""TransMorph: a Swin transformer encoder and a convolutional decoder.

Source: Chen et al., TransMorph, Medical Image Analysis 2022, in the size that M2M-Reg trains.

Departures from the paper's network; its parameters are as many.

- Windows end at the border of the grid: a window larger than the grid is cut to it, and the
  padding of a grid that windows do not tile takes no part in the attention. There, the original
  attends to zeros.
- Grids need not be multiples of 32: every halving rounds up, and the decoder crops.
- The first convolution of a decoder block is kept as two, of the coarse and of the finer
  features; so each of them starts at a scale of its own.
- The displacement is returned in unit coordinates; the registration head still works in voxels.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from m2m_bids.registration.networks.convolution import (
    Convolution,
    channels_last,
    convolve_doubled,
)
from m2m_bids.registration.networks.family import NetworkFamily, check_size
from m2m_bids.registration.networks.layer_norm import LayerNorm
from m2m_bids.registration.networks.normalization import rectify, rectify_and_convolve

PATCH_SIZE = 4
MLP_RATIO = 4
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class TransMorphConfig:
    """
    Sizes of the network; the defaults are the paper's.

    Parameters
    ----------
    embed_width : int
        Channels of a token at the finest stage; they double from stage to stage.
    depths : tuple of int
        Transformer blocks of each stage, finest first.
    n_heads : tuple of int
        Attention heads of each stage.
    window_size : tuple of int
        Tokens along the three axes of an attention window.
    head_width : int
        Channels at full resolution, from which the displacement is predicted.
    drop_path : float
        Probability, in training, of leaving out a branch of the last block; it grows linearly
        from zero at the first block.
    """

    embed_width: int = 96
    depths: tuple[int, ...] = (2, 2, 4, 2)
    n_heads: tuple[int, ...] = (4, 4, 8, 8)
    window_size: Triple = (5, 6, 7)
    head_width: int = 16
    drop_path: float = 0.3

    def __post_init__(self):
        # JSON cards hold lists.
        for name in ("depths", "n_heads", "window_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.depths) != len(self.n_heads) or not self.depths:
            raise ValueError(f"as many n_heads as depths, and at least one, got {self}")
        if min(self.depths) < 1:
            raise ValueError(f"depths must be at least 1, got {self.depths}")
        if len(self.window_size) != 3 or min(self.window_size) < 1:
            raise ValueError(f"window_size must be three sizes, got {self.window_size}")
        if self.embed_width < 2 or self.embed_width % 2:
            raise ValueError(f"embed_width must be even, got {self.embed_width}")
        for width, n_heads in zip(self.widths, self.n_heads, strict=True):
            if n_heads < 1 or width % n_heads:
                raise ValueError(f"{width} channels cannot be shared by {n_heads} n_heads")
        if self.head_width < 1:
            raise ValueError(f"head_width must be at least 1, got {self.head_width}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")

    @property
    def smallest_image(self) -> int:
        """Voxels along an axis, so that the coarsest stage has several tokens."""
        return PATCH_SIZE * 2 ** len(self.depths) // 4 + 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_width * 2**stage for stage in range(len(self.depths)))


COMPACT = TransMorphConfig(
    embed_width=32,
    depths=(2, 2, 2),
    n_heads=(2, 4, 8),
    window_size=(4, 4, 4),
    drop_path=0.0,
)


class TransMorph(nn.Module):
    """
    Swin transformer on the concatenated pair, decoded to the resolution of the images.

    Parameters
    ----------
    config : TransMorphConfig, optional
    """

    def __init__(self, config: TransMorphConfig | None = None):
        super().__init__()
        self.config = config = config or TransMorphConfig()
        widths = config.widths
        half_width = config.embed_width // 2
        self.encoder = SwinEncoder(config)
        self.half_conv = Convolution(2, half_width, bias=False)
        self.full_conv = Convolution(2, config.head_width, bias=False)
        # Finest first, as the encoder's stages are; two more doublings undo the patches.
        up_widths = (config.head_width, half_width, *widths)
        self.decoder = nn.ModuleList(
            DecoderBlock(coarse, out=fine, is_skip_rectified=level < 2)
            for level, (fine, coarse) in enumerate(pairwise(up_widths))
        )
        self.head = Convolution(config.head_width, 3)
        nn.init.normal_(self.head.weight, std=1e-5)
        nn.init.zeros_(self.head.bias)
        self.decoder.to(memory_format=torch.channels_last_3d)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """
        Register image pairs.

        Parameters
        ----------
        moving, fixed : Tensor, shape (N, 1, n, n, n)
            Images in [0, 1]; ``n`` is any size above ``4 * 2 ** (len(depths) - 2)``, so that the
            decoder's coarsest instance normalisation still sees several voxels: 17 or more for
            the default configuration.

        Returns
        -------
        Tensor, shape (N, 3, n, n, n)
            Displacement on the fixed grid: ``warp(moving, x + disp) ~ fixed``, unit coordinates.

        Raises
        ------
        ValueError
            If the images are too small.
        """
        check_size(moving, self.config)
        images = channels_last(torch.cat((moving, fixed), 1))
        half_images = channels_last(functional.avg_pool3d(images, 3, stride=2, padding=1))
        *skips, x = self.full_conv(images), self.half_conv(half_images), *self.encoder(images)
        for block, skip in zip(reversed(self.decoder[1:]), reversed(skips[1:]), strict=True):
            x = rectify(block(x, skip))
        x = rectify_and_convolve(self.head, self.decoder[0](x, skips[0]))
        return x.float() / (moving.shape[-1] - 1)


class SwinEncoder(nn.Module):
    """
    Patch embedding, then stages of transformer blocks on ever coarser grids of tokens.

    Parameters
    ----------
    config : TransMorphConfig
    """

    def __init__(self, config: TransMorphConfig):
        super().__init__()
        widths = config.widths
        self.embed = nn.Conv3d(2, widths[0], PATCH_SIZE, stride=PATCH_SIZE)
        self.embed_norm = LayerNorm(widths[0])
        last = max(1, sum(config.depths) - 1)
        drop_paths = iter(config.drop_path * i / last for i in range(last + 1))
        shift = tuple(size // 2 for size in config.window_size)
        self.stages = nn.ModuleList()
        for width, depth, n_heads in zip(widths, config.depths, config.n_heads, strict=True):
            blocks = []
            for i in range(depth):
                attention = WindowAttention(
                    width,
                    n_heads,
                    window_size=config.window_size,
                    shift=shift if i % 2 else (0, 0, 0),
                )
                blocks.append(SwinBlock(attention, drop_path=next(drop_paths)))
            self.stages.append(nn.Sequential(*blocks))
        self.merges = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """
        Encode image pairs.

        Parameters
        ----------
        images : Tensor, shape (N, 2, n, n, n)

        Returns
        -------
        list of Tensor, shape (N, C, m, m, m)
            Normalised features of each stage, finest first, in the channels-last memory format.
        """
        padding = -images.shape[-1] % PATCH_SIZE
        x = self.embed(functional.pad(images, (0, padding) * 3))
        x = self.embed_norm(x.permute(0, 2, 3, 4, 1))
        features = []
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            if i:
                x = self.merges[i - 1](x)
            x = stage(x)
            features.append(norm(x).permute(0, 4, 1, 2, 3))
        return features


class SwinBlock(nn.Module):
    """
    Window attention and a two-layer perceptron, each on normalised tokens and added to them.

    Parameters
    ----------
    attention : WindowAttention
    drop_path : float
        Probability of leaving out either branch of a sample in training.

    Attributes
    ----------
    generator : torch.Generator or None
        Draws what is left out; None for PyTorch's own.
    """

    def __init__(self, attention: "WindowAttention", *, drop_path: float):
        super().__init__()
        width = attention.width
        self.drop_path = drop_path
        self.generator: torch.Generator | None = None
        self.attention_norm = LayerNorm(width)
        self.attention = attention
        self.mlp_norm = LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """
        Refine tokens.

        Parameters
        ----------
        x : Tensor, shape (N, I, J, K, C)

        Returns
        -------
        Tensor, shape (N, I, J, K, C)
        """
        x = x + self._drop(self.attention(self.attention_norm(x)))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        shape = (len(branch), 1, 1, 1, 1)
        kept = torch.rand(shape, generator=self.generator, device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)


class WindowAttention(nn.Module):
    r"""
    Multi-head self-attention within windows, with a bias that depends on the relative position.

    .. math:: \mathrm{softmax}(Q K^T / \sqrt{d} + B)\, V

    Parameters
    ----------
    width : int
        Channels.
    n_heads : int
    window_size : tuple of int
        Tokens along each axis of a window.
    shift : tuple of int
        The windows are moved by this many tokens towards the end of each axis; those at the
        border are cut off by it.
    """

    def __init__(self, width: int, n_heads: int, *, window_size: Triple, shift: Triple):
        super().__init__()
        self.width = width
        self.n_heads = n_heads
        self.window_size = window_size
        self.shift = shift
        n_offsets = prod(2 * size - 1 for size in window_size)
        self.bias_table = nn.Parameter(torch.empty(n_offsets, n_heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """
        Exchange information between the tokens of each window.

        Parameters
        ----------
        x : Tensor, shape (N, I, J, K, C)

        Returns
        -------
        Tensor, shape (N, I, J, K, C)
        """
        grid = tuple(x.shape[1:4])
        window = tuple(min(sizes) for sizes in zip(self.window_size, grid, strict=True))
        # One window along an axis has nothing to shift.
        shift = tuple(s * (w < g) for s, w, g in zip(self.shift, window, grid, strict=True))
        # Projected before padding, so that padding costs no projection.
        tokens = _to_windows(self.qkv(x), window, shift).unflatten(-1, (3, self.n_heads, -1))
        offsets = _offset_index(window, self.window_size, x.device)
        bias = functional.embedding(offsets, self.bias_table).permute(2, 0, 1).to(tokens.dtype)
        masks, kinds = _hidden(grid, window, shift, x.device)
        kinds = kinds.repeat(len(x))  # the same for every image
        is_exact = tokens.dtype in (torch.float32, torch.float64)
        attend = _Attention.apply if x.device.type == "cpu" and is_exact else _attend
        attended = attend(tokens, bias, masks, kinds)
        return self.project(_from_windows(attended.flatten(2), grid, window, shift))


def _attend(tokens: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    """
    Let the tokens of every window attend to each other.

    Parameters
    ----------
    tokens : Tensor, shape (N, L, 3, n_heads, D)
        Queries, keys and values of windows.
    bias : Tensor, shape (n_heads, L, L)
        Added to the logits.
    masks : Tensor, shape (n_kinds, L, L)
    kinds : Tensor, shape (N,)
        Which of the masks is each window's.

    Returns
    -------
    Tensor, shape (N, L, n_heads, D)
    """
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    biases = _masked(bias, masks)
    biases = biases.index_select(0, kinds) if len(biases) > 1 else biases
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=biases).transpose(1, 2)


def _masked(bias: Tensor, masks: Tensor) -> Tensor:
    """Return a bias for every kind of window, (n_kinds, n_heads, L, L)."""
    return bias.masked_fill(masks[:, None], -torch.inf)


class _Attention(torch.autograd.Function):
    """`_attend` on the CPU: one window after the other, computed again for the gradient."""

    @staticmethod
    def forward(ctx, tokens, bias, masks, kinds):
        ctx.save_for_backward(tokens, bias, masks, kinds)
        biases = _masked(bias, masks)
        attended = torch.empty_like(tokens[:, :, 0])
        for window, kind, out in zip(tokens, kinds.tolist(), attended, strict=True):
            q, k, v = window.permute(1, 2, 0, 3)
            out.copy_((_attention_weights(q, k, biases[kind]) @ v).transpose(0, 1))
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tokens, bias, masks, kinds = ctx.saved_tensors
        biases = _masked(bias, masks)
        grad_tokens, grad_bias = torch.empty_like(tokens), torch.zeros_like(bias)
        windows = zip(tokens, kinds.tolist(), grad, grad_tokens, strict=True)
        for window, kind, grad_out, grad_window in windows:
            q, k, v = window.permute(1, 2, 0, 3)
            grad_q, grad_k, grad_v = grad_window.permute(1, 2, 0, 3)
            weights = _attention_weights(q, k, biases[kind])
            grad_out = grad_out.transpose(0, 1)
            grad_v.copy_(weights.mT @ grad_out)
            grad_logits = torch.ops.aten._softmax_backward_data(
                grad_out @ v.mT, weights, -1, weights.dtype
            )
            # None of what is hidden.
            grad_bias += grad_logits
            grad_logits *= q.shape[-1] ** -0.5
            grad_q.copy_(grad_logits @ k)
            grad_k.copy_(grad_logits.mT @ q)
        return grad_tokens, grad_bias, None, None


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Return what each token (last axis but one) of a window takes of each, (n_heads, L, L)."""
    return torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)


class PatchMerging(nn.Module):
    """
    Halve a grid of tokens: eight neighbours become one token of twice the channels.

    Parameters
    ----------
    width : int
        Channels of the fine tokens.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(8 * width)
        self.reduce = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """
        Merge neighbours; zeros stand in for those beyond an odd end.

        Parameters
        ----------
        x : Tensor, shape (N, I, J, K, C)

        Returns
        -------
        Tensor, shape (N, ceil(I / 2), ceil(J / 2), ceil(K / 2), 2 C)
        """
        blocks = _split(_pad_to_multiple(x, (2, 2, 2)), (2, 2, 2))
        return self.reduce(self.norm(blocks.flatten(4)))


class DecoderBlock(nn.Module):
    """
    Double the resolution of features and join them with finer ones.

    Parameters
    ----------
    width, out : int
        Channels of the coarse features, and of the fine ones and the result.
    is_skip_rectified : bool
        The fine features are normalised and rectified before they are convolved.
    """

    def __init__(self, width: int, *, out: int, is_skip_rectified: bool):
        super().__init__()
        # The sum of two convolutions is one of the joined features, which need not be copied then.
        self.coarse_conv = Convolution(width, out, bias=False)
        self.skip_conv = Convolution(out, out, bias=False)
        self.is_skip_rectified = is_skip_rectified
        self.refine_conv = Convolution(out, out, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """
        Decode one level.

        Parameters
        ----------
        x : Tensor, shape (N, C, ceil(n / 2), ceil(n / 2), ceil(n / 2))
        skip : Tensor, shape (N, C', n, n, n)

        Returns
        -------
        Tensor, shape (N, C', n, n, n)
            Not normalised and rectified yet.
        """
        if self.is_skip_rectified:
            joined = rectify_and_convolve(self.skip_conv, skip)
        else:
            joined = self.skip_conv(skip)
        joined = joined + convolve_doubled(self.coarse_conv, x, skip.shape[2:])
        return rectify_and_convolve(self.refine_conv, joined)


def _pad_to_multiple(x: Tensor, window: Triple) -> Tensor:
    """Append zeros to the spatial axes of (N, I, J, K, C)."""
    i, j, k = (-size % step for size, step in zip(x.shape[1:4], window, strict=True))
    return functional.pad(x, (0, 0, 0, k, 0, j, 0, i)) if i or j or k else x


def _split(x: Tensor, window: Triple) -> Tensor:
    """View (N, I, J, K, C) as (N, I / a, J / b, K / c, a, b, c, C)."""
    (a, b, c), (i, j, k) = window, x.shape[1:4]
    x = x.unflatten(3, (k // c, c)).unflatten(2, (j // b, b)).unflatten(1, (i // a, a))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7)


def _to_windows(x: Tensor, window: Triple, shift: Triple) -> Tensor:
    """Pad and shift (N, I, J, K, C), and cut it into windows (N * n_windows, L, C)."""
    x = _pad_to_multiple(x, window)
    if any(shift):
        x = x.roll([-step for step in shift], (1, 2, 3))
    return _split(x, window).reshape(-1, prod(window), x.shape[-1])


def _from_windows(windows: Tensor, grid: Triple, window: Triple, shift: Triple) -> Tensor:
    """Undo `_to_windows`."""
    n_windows = [-(-size // step) for size, step in zip(grid, window, strict=True)]
    x = windows.view(-1, *n_windows, *window, windows.shape[-1])
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll(shift, (1, 2, 3))
    i, j, k = grid
    return x[:, :i, :j, :k]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for training too
def _offset_index(window: Triple, full_window: Triple, device: torch.device) -> Tensor:
    """Return the row of the bias table for each pair of a window's tokens, (L, L)."""
    axes = [torch.arange(size, device=device) for size in window]
    tokens = torch.cartesian_prod(*axes)
    index = torch.zeros((), dtype=torch.long, device=device)
    for axis, size in enumerate(full_window):
        offset = tokens[:, None, axis] - tokens[None, :, axis]
        index = index * (2 * size - 1) + offset + size - 1
    return index


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _hidden(
    grid: Triple, window: Triple, shift: Triple, device: torch.device
) -> tuple[Tensor, Tensor]:
    """
    Return which tokens (last axis) of a window each of them must not see.

    Those are the padding, and across the border that the cyclic shift joins. The first is a mask
    for each kind of window, (n_kinds, L, L), the other each window's kind, (n_windows,).
    """
    labels = torch.zeros(1, 1, 1, device=device, dtype=torch.long)
    for axis in range(3):
        positions = torch.arange(-(-grid[axis] // window[axis]) * window[axis], device=device)
        is_joined = positions < shift[axis]
        is_padding = positions >= grid[axis]
        shape = [1, 1, 1]
        shape[axis] = -1
        labels = 3 * labels + (is_joined + 2 * is_padding).view(shape)
    labels = _to_windows(labels[None, ..., None], window, shift)
    return torch.unique(labels != labels.transpose(1, 2), return_inverse=True, dim=0)


FAMILY = NetworkFamily(
    name="transmorph", config=TransMorphConfig, network=TransMorph, compact=COMPACT
)
