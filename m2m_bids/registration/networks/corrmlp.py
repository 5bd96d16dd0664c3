"""CorrMLP: coarse-to-fine registration by perceptrons that see local correlations.

Source: Meng et al., Correlation-aware Coarse-to-fine MLPs for Deformable Medical Image
Registration, CVPR 2024, in the size that M2M-Reg trains.

Departures from the paper's network; its parameters are as many.

- Where windows reach beyond the grid, the gate reads zeros. The original pads the windows' input
  with zeros, which its biases turn into constants before the gate reads them.
- The convolution that joins features and correlation is kept as two, one for each; so each of them
  starts at a scale of its own.
- Halvings round up, so that the grid need not be a multiple of 8.
- The displacement is returned in unit coordinates; between the levels it is in voxels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from m2m_bids.registration.grids import pool
from m2m_bids.registration.maps import map_from_displacement, warp
from m2m_bids.registration.networks.convolution import Convolution
from m2m_bids.registration.networks.family import NetworkFamily, check_size
from m2m_bids.registration.networks.layer_norm import ChannelNorm, normalize_channels

N_NEIGHBOURS = 27


@dataclass(frozen=True)
class CorrMLPConfig:
    """
    Sizes of the network; the defaults are the paper's, at the widths of M2M-Reg.

    Parameters
    ----------
    encoder_width, decoder_width : int
        Channels at full resolution; they double from level to level. The decoder's is a multiple
        of four.
    n_levels : int
        Resolutions, each half of the one before.
    windows : tuple of int
        Edges of the cubic windows, in voxels, within which perceptrons mix positions.
    """

    encoder_width: int = 4
    decoder_width: int = 8
    n_levels: int = 4
    windows: tuple[int, ...] = (3, 5, 7)

    def __post_init__(self):
        # JSON cards hold lists.
        object.__setattr__(self, "windows", tuple(self.windows))
        if self.encoder_width < 1:
            raise ValueError(f"encoder_width must be at least 1, got {self.encoder_width}")
        if self.decoder_width < 4 or self.decoder_width % 4:
            raise ValueError(f"decoder_width must be a multiple of 4, got {self.decoder_width}")
        if self.n_levels < 1:
            raise ValueError(f"n_levels must be at least 1, got {self.n_levels}")
        if not self.windows or min(self.windows) < 1:
            raise ValueError(f"windows must hold sizes of at least 1, got {self.windows}")

    @property
    def smallest_image(self) -> int:
        """Voxels along an axis, so that the coarsest level has several."""
        return 2 ** (self.n_levels - 1) + 1


COMPACT = CorrMLPConfig(windows=(3, 5))


class CorrMLP(nn.Module):
    """
    Encode each image alone, then warp, correlate and refine from the coarsest level to the finest.

    Parameters
    ----------
    config : CorrMLPConfig, optional
    """

    def __init__(self, config: CorrMLPConfig | None = None):
        super().__init__()
        self.config = config = config or CorrMLPConfig()
        encoder_widths = [config.encoder_width * 2**level for level in range(config.n_levels)]
        widths = [config.decoder_width * 2**level for level in range(config.n_levels)]
        # Finest level first.
        self.encoder = nn.ModuleList(
            _encoder_block(n_in, n_out)
            for n_in, n_out in zip([1, *encoder_widths], encoder_widths, strict=False)
        )
        self.match = nn.ModuleList(
            CorrelationMLP(n_in, n_out, windows=config.windows)
            for n_in, n_out in zip(encoder_widths, widths, strict=True)
        )
        self.expand = nn.ModuleList(PatchExpansion(width) for width in widths[1:])
        self.fuse = nn.ModuleList(
            CorrelationMLP(width, width, windows=config.windows) for width in widths[:-1]
        )
        self.heads = nn.ModuleList(Convolution(width, 3) for width in widths)
        for head in self.heads:
            nn.init.normal_(head.weight, std=1e-5)
            nn.init.zeros_(head.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """
        Register image pairs.

        Parameters
        ----------
        moving, fixed : Tensor, shape (N, 1, n, n, n)
            Images in [0, 1]; ``n`` is any size above ``2 ** (n_levels - 1)``, so that the
            coarsest level has several voxels: 9 or more for the default configuration.

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
        features = self._encode(moving, fixed)
        moving_features, fixed_features = features.pop()
        x = self.match[-1](fixed_features, moving_features)
        disp = self.heads[-1](x).float()
        for level in reversed(range(len(features))):
            moving_features, fixed_features = features[level]
            disp = 2 * functional.interpolate(
                disp, fixed_features.shape[2:], mode="trilinear", align_corners=True
            )
            moving_features = warp(moving_features.float(), _to_map(disp))
            matched = self.match[level](fixed_features, moving_features)
            n_voxels = matched.shape[-1]
            expanded = self.expand[level](x)[:, :, :n_voxels, :n_voxels, :n_voxels]
            x = self.fuse[level](matched, expanded)
            disp = disp + self.heads[level](x).float()
        return disp / (moving.shape[-1] - 1)

    def _encode(self, moving: Tensor, fixed: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the features of the moving and the fixed image at each level, finest first."""
        x = torch.cat((moving, fixed))
        levels = []
        for i, block in enumerate(self.encoder):
            x = block(pool(x) if i else x)
            levels.append(x.chunk(2))
        return levels


class CorrelationMLP(nn.Module):
    """
    Join two feature maps and their local correlation, then mix positions and channels.

    Parameters
    ----------
    n_in, n_out : int
        Channels of each of the two feature maps, and of the result.
    windows : tuple of int
        Edges of the windows, voxels.
    """

    def __init__(self, n_in: int, n_out: int, *, windows: tuple[int, ...]):
        super().__init__()
        # The sum of two convolutions is one of the joined channels, which need not be copied then.
        self.features_conv = Convolution(2 * n_in, n_out)
        self.correlation_conv = Convolution(N_NEIGHBOURS, n_out, bias=False)
        self.mix = MultiWindowMLP(n_out, windows)
        self.attend = ChannelAttention(n_out)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """
        Compare features.

        Parameters
        ----------
        a, b : Tensor, shape (N, C, n, n, n)

        Returns
        -------
        Tensor, shape (N, C', n, n, n)
        """
        a, b = a.contiguous(), b.to(a.dtype).contiguous()
        features = torch.cat((a, b), 1).contiguous(memory_format=torch.channels_last_3d)
        correlation = self.correlation_conv(local_correlation(a, b))
        joined = self.features_conv(features) + correlation
        x = joined.permute(0, 2, 3, 4, 1)
        if torch.is_grad_enabled():
            # Its many intermediate tensors are quicker to compute again than worth keeping.
            x = checkpoint(self.mix, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.mix(x)
        return joined + self.attend(x).permute(0, 4, 1, 2, 3)


class MultiWindowMLP(nn.Module):
    """
    Gated perceptrons of several window sizes side by side, weighted by what the image needs.

    Parameters
    ----------
    width : int
        Channels.
    windows : tuple of int
        Edges of the windows, voxels.
    """

    def __init__(self, width: int, windows: tuple[int, ...]):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.mixers = nn.ModuleList(WindowMLP(width, window) for window in windows)
        self.weigh = nn.Sequential(
            nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, len(windows) * width)
        )
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """
        Mix positions.

        Parameters
        ----------
        x : Tensor, shape (N, I, J, K, C)

        Returns
        -------
        Tensor, shape (N, I, J, K, C)
        """
        normed = self.norm(x)
        # Every mixer normalises its input once more; that much they share.
        standard = normalize_channels(normed)
        gated = [mixer(standard) for mixer in self.mixers]
        projections = [mixer.project for mixer in self.mixers]

        # A mixer's output is `normed + projection(gated)`, so that its mean needs only the means,
        means = len(gated) * normed.mean((1, 2, 3))
        for projection, y in zip(projections, gated, strict=True):
            means = means + projection(y.mean((1, 2, 3)))
        weights = self.weigh(means).unflatten(-1, (-1, len(gated))).softmax(-1).unbind(-1)

        # and the weighted sum, whose weights add up to one, only scales the projections' rows.
        mixed = normed.flatten(1, 3)
        for projection, weight, y in zip(projections, weights, gated, strict=True):
            scaled = weight[:, :, None] * projection.weight
            mixed = torch.baddbmm(mixed, y.flatten(1, 3), scaled.mT)
        bias = sum(w * projection.bias for w, projection in zip(weights, projections, strict=True))
        return x + self.project(mixed + bias[:, None]).view_as(x)


class WindowMLP(nn.Module):
    """
    Gated perceptron: half of the channels, mixed across a window, scale the other half.

    Parameters
    ----------
    width : int
        Channels.
    window : int
        Edge of the window, voxels.
    """

    def __init__(self, width: int, window: int):
        super().__init__()
        self.window = window
        self.norm = ChannelNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.gate_norm = ChannelNorm(width)
        self.gate = nn.Linear(window**3, window**3)
        self.project = nn.Linear(width, width)

    def forward(self, standard: Tensor) -> Tensor:
        """
        Gate the voxels' channels; what is left to do is to `project` them and add the input.

        Parameters
        ----------
        standard : Tensor, shape (N, I, J, K, C)
            Input with zero mean and unit variance over the channels.

        Returns
        -------
        Tensor, shape (N, I, J, K, C)
        """
        weight = self.widen.weight * self.norm.weight
        bias = functional.linear(self.norm.bias, self.widen.weight, self.widen.bias)
        # Two products rather than the halves of one, which would need copies.
        values, gates = (
            functional.gelu(functional.linear(standard, w, b))
            for w, b in zip(weight.chunk(2), bias.chunk(2), strict=True)
        )
        gates = self._mix_positions(self.gate_norm(gates))
        return torch.addcmul(values, values, gates)

    def _mix_positions(self, x: Tensor) -> Tensor:
        """Apply the linear layer `gate` to the positions of each window, for each channel."""
        w = self.window
        grid = x.shape[1:4]
        i, j, k = (-size % w for size in grid)
        if i or j or k:
            x = functional.pad(x, (0, 0, 0, k, 0, j, 0, i))
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, w)).unflatten(1, (-1, w))
        x = self.gate(x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5))
        x = x.unflatten(-1, (w, w, w)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x[:, : grid[0], : grid[1], : grid[2]]


class ChannelAttention(nn.Module):
    """
    Two convolutions whose channels are scaled by their means, added to the input.

    Parameters
    ----------
    width : int
        Channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.convs = nn.Sequential(
            Convolution(width, width),
            nn.LeakyReLU(0.2, inplace=True),
            Convolution(width, width),
        )
        self.scale = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """
        Mix neighbours and channels.

        Parameters
        ----------
        x : Tensor, shape (N, I, J, K, C)

        Returns
        -------
        Tensor, shape (N, I, J, K, C)
        """
        y = self.convs(self.norm(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return torch.addcmul(x, y, self.scale(y.mean((1, 2, 3), keepdim=True)))


class PatchExpansion(nn.Module):
    """
    Double the resolution of features and halve their channels.

    Parameters
    ----------
    width : int
        Channels before.
    """

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.ConvTranspose3d(width, width // 2, 2, stride=2)
        self.norm = ChannelNorm(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """
        Expand features.

        Parameters
        ----------
        x : Tensor, shape (N, C, n, n, n)

        Returns
        -------
        Tensor, shape (N, C / 2, 2 n, 2 n, 2 n)
        """
        return self.norm(self.up(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def local_correlation(a: Tensor, b: Tensor) -> Tensor:
    r"""
    Correlate the features of each voxel with those of the other map's 27 nearest voxels.

    .. math:: r_s(x) = \frac{1}{C} \sum_c a_c(x)\, b_c(x + s), \quad s \in \{-1, 0, 1\}^3

    Parameters
    ----------
    a, b : Tensor, shape (N, C, I, J, K)
        Features; those of ``b`` are zero beyond the border.

    Returns
    -------
    Tensor, shape (N, 27, I, J, K)
        In the channels-last memory format; the last axis of the offset varies fastest.
    """
    return _LocalCorrelation.apply(a, b)


class _LocalCorrelation(torch.autograd.Function):
    """Correlation one offset at a time: neither pass holds 27 copies of the features."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        n_images, n_channels, *grid = a.shape
        result = a.new_empty(n_images, *grid, N_NEIGHBOURS)
        rows = a.new_empty(N_NEIGHBOURS, *grid)
        for image, image_a, image_b in zip(result, a, functional.pad(b, (1,) * 6), strict=True):
            for row, shifted in zip(rows, _shifted_views(image_b), strict=True):
                torch.sum(image_a * shifted, 0, out=row)
            # As matrices, which are transposed several times faster than images.
            image.view(-1, N_NEIGHBOURS).copy_(rows.div_(n_channels).flatten(1).t())
        return result.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        padded = functional.pad(b, (1,) * 6)
        grad_a, grad_padded = torch.zeros_like(a), torch.zeros_like(padded)
        rows = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        grad = grad.contiguous(memory_format=torch.channels_last_3d) / a.shape[1]
        images = zip(grad, a, padded, grad_a, grad_padded, strict=True)
        for image, image_a, image_b, image_grad_a, image_grad_b in images:
            rows.flatten(1).copy_(image.flatten(1))
            views = zip(rows, _shifted_views(image_b), _shifted_views(image_grad_b), strict=True)
            for row, shifted, grad_shifted in views:
                image_grad_a.addcmul_(row, shifted)
                grad_shifted.addcmul_(row, image_a)
        return grad_a, grad_padded[:, :, 1:-1, 1:-1, 1:-1]


def _shifted_views(padded: Tensor) -> list[Tensor]:
    """View the unpadded grid of (C, I + 2, J + 2, K + 2) moved by each of the 27 offsets."""
    i, j, k = (size - 2 for size in padded.shape[1:])
    return [
        padded[:, di : di + i, dj : dj + j, dk : dk + k]
        for di in range(3)
        for dj in range(3)
        for dk in range(3)
    ]


def _encoder_block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        Convolution(n_in, n_out),
        nn.LeakyReLU(0.2, inplace=True),
        nn.InstanceNorm3d(n_out),
        Convolution(n_out, n_out),
        nn.LeakyReLU(0.2, inplace=True),
        nn.InstanceNorm3d(n_out),
    )


def _to_map(disp: Tensor) -> Tensor:
    """Turn a displacement in voxels into a map in unit coordinates."""
    return map_from_displacement(disp / (disp.shape[-1] - 1))


FAMILY = NetworkFamily(name="corrmlp", config=CorrMLPConfig, network=CorrMLP, compact=COMPACT)
