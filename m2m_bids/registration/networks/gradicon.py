"""GradICON's network: a cascade of U-Nets from coarse to fine, each refining the last.

Sources: Tian et al., GradICON, CVPR 2023; Greer et al., ICON, ICCV 2021. The tensors of the
full-size network map one to one onto those of the ICON project's three-step `tallUNet2` network
(`icon_names`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2m_bids.registration.grids import identity_map, pool, resize, sample
from m2m_bids.registration.networks.convolution import (
    add_doubled,
    channels_last,
    convolve,
    convolved_dtype,
    leading_channels,
)
from m2m_bids.registration.networks.family import NetworkFamily, check_size
from m2m_bids.registration.networks.normalization import normalize, normalize_and_convolve
from m2m_bids.registration.networks.recomputation import computed_again


@dataclass(frozen=True)
class GradICONConfig:
    """
    Sizes of the network; the defaults are the paper's.

    Parameters
    ----------
    down_widths, up_widths : tuple of int
        Channels after each halving, and after the doubling that undoes it, finest first.
    n_scales : int
        U-Nets of the cascade; the first works at ``1 / 2 ** (n_scales - 1)`` of the resolution.
    normalization : {"batch", "group"}
        After each doubling. ``"batch"`` is GradICON's; ``"group"`` (8 groups) does not mix
        subjects.
    n_last_steps : int
        Further U-Nets at full resolution after those of the scales; uniGradICON has one.
    """

    down_widths: tuple[int, ...] = (16, 32, 64, 256, 512)
    up_widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    n_scales: int = 3
    normalization: Literal["batch", "group"] = "batch"
    n_last_steps: int = 0

    def __post_init__(self):
        # JSON cards hold lists.
        object.__setattr__(self, "down_widths", tuple(self.down_widths))
        object.__setattr__(self, "up_widths", tuple(self.up_widths))
        if len(self.down_widths) != len(self.up_widths):
            raise ValueError(f"as many down_widths as up_widths, got {self}")
        if not self.down_widths:
            raise ValueError("down_widths must hold at least one width")
        if self.normalization not in ("batch", "group"):
            raise ValueError(
                f'normalization must be "batch" or "group", got {self.normalization!r}'
            )
        if self.n_scales < 1:
            raise ValueError(f"n_scales must be at least 1, got {self.n_scales}")
        if self.n_last_steps < 0:
            raise ValueError(f"n_last_steps must not be negative, got {self.n_last_steps}")

    @property
    def smallest_image(self) -> int:
        """Voxels along an axis, so that the last halving still finds two."""
        return 2 ** (self.n_scales + len(self.down_widths) - 2) + 1

    @property
    def n_unets(self) -> int:
        """Number of U-Nets of the cascade."""
        return self.n_scales + self.n_last_steps


COMPACT = GradICONConfig(
    down_widths=(16, 32, 64, 128), up_widths=(16, 32, 64, 64), normalization="group"
)


def _match_channels(x: Tensor, n_channels: int) -> Tensor:
    """Drop the last channels, or put zero channels in front."""
    if x.shape[1] >= n_channels:
        return leading_channels(x, n_channels)
    return functional.pad(x, (0, 0, 0, 0, 0, 0, n_channels - x.shape[1], 0))


class UNet(nn.Module):
    """
    U-Net with residual halvings and doublings (the ICON project's `UNet2`).

    Parameters
    ----------
    config : GradICONConfig
    """

    def __init__(self, config: GradICONConfig):
        super().__init__()
        down = (2, *config.down_widths)
        up = config.up_widths
        self.down_convs = nn.ModuleList(
            nn.Conv3d(a, b, 3, padding=1, stride=2) for a, b in pairwise(down)
        )
        into_up = [width + skip for width, skip in zip(down[1:], (*up[1:], 0), strict=True)]
        self.up_convs = nn.ModuleList(
            nn.ConvTranspose3d(a, b, 4, padding=1, stride=2)
            for a, b in zip(into_up, up, strict=True)
        )
        norm = nn.BatchNorm3d if config.normalization == "batch" else _GroupNorm
        self.norms = nn.ModuleList(norm(width) for width in up)
        self.last_conv = nn.Conv3d(2 + up[0], 3, 3, padding=1)
        nn.init.zeros_(self.last_conv.weight)
        nn.init.zeros_(self.last_conv.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """
        Predict a displacement; zero at initialisation.

        Parameters
        ----------
        moving, fixed : Tensor, shape (N, 1, n, n, n)

        Returns
        -------
        Tensor, shape (N, 3, n, n, n)
            Displacement on the fixed grid, unit coordinates.
        """
        x = torch.cat((moving, fixed), 1)
        if x.device.type == "cpu" or isinstance(self.norms[0], nn.BatchNorm3d):
            # On a GPU group normalisation would undo it, and batch normalisation needs it: the
            # other order leaves it one multiprocessor per channel.
            x = channels_last(x)
        dtype = convolved_dtype(x)
        skips = []
        for conv in self.down_convs:
            skips.append(x)
            rectified = _rectified(x, dtype)
            with computed_again(rectified, partial(_rectified, x.detach(), dtype)):
                y = convolve(conv, rectified)
            x = y + _match_channels(pool(x), y.shape[1])
        again = None
        for conv, norm in zip(reversed(self.up_convs), reversed(self.norms), strict=True):
            small = _match_channels(x, conv.out_channels)
            x = x.to(dtype)
            # In place: here x is not a skip, `small` a copy, and nothing else is left to use it.
            with computed_again(x, again and partial(_rectified_again, again, dtype)):
                y = add_doubled(convolve(conv, functional.leaky_relu_(x)), small)
            skip = skips.pop()
            if skips:
                x, again = normalize(norm, y, skip)
        return normalize_and_convolve(norm, y, skip, self.last_conv) / 10


def _rectified(x: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.leaky_relu(x).to(dtype)


def _rectified_again(again: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return functional.leaky_relu_(again().to(dtype))


class _GroupNorm(nn.GroupNorm):
    """
    Normalisation by eight groups, with the same result on any number of threads in use.

    PyTorch adds up images that are stored channels last one voxel after the other on each thread,
    which leaves four digits of the variance, and others on more threads.
    """

    def __init__(self, width: int):
        super().__init__(min(8, width), width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; on the CPU, where no gradient is wanted, channels first."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        return channels_last(super().forward(x.contiguous()))


class GradICON(nn.Module):
    """
    Cascade of U-Nets: warp the moving image by what is known, predict the rest, compose.

    Parameters
    ----------
    config : GradICONConfig, optional
    """

    def __init__(self, config: GradICONConfig | None = None):
        super().__init__()
        self.config = config or GradICONConfig()
        self.unets = nn.ModuleList(UNet(self.config) for _ in range(self.config.n_unets))

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """
        Register image pairs.

        Parameters
        ----------
        moving, fixed : Tensor, shape (N, 1, n, n, n)
            Images in [0, 1]; ``n`` is any size above ``2 ** (n_scales + len(down_widths) - 2)``,
            so that every halving still finds two voxels: 65 or more for the default configuration.

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
        pyramid = [(moving, fixed)]
        for _ in range(self.config.n_scales - 1):
            pyramid.append((pool(pyramid[-1][0]), pool(pyramid[-1][1])))
        levels = [*reversed(pyramid), *[pyramid[0]] * self.config.n_last_steps]
        fields: list[Tensor] = []
        for unet, (small_moving, small_fixed) in zip(self.unets, levels, strict=True):
            if fields:
                small_moving = sample(small_moving, _apply(fields, small_moving))
            fields.append(unet(small_moving, small_fixed).float())
        return _apply(fields, moving) - identity_map(moving.shape[-1], like=moving)


def _apply(fields: list[Tensor], image: Tensor) -> Tensor:
    """Compose displacements, coarsest outermost, into a map on the image's grid."""
    size = image.shape[-1]
    # The finest is wanted at the image's voxels.
    points = identity_map(size, like=image) + resize(fields[-1], size)
    for disp in reversed(fields[:-1]):
        points = points + sample(disp, points)
    return points


def icon_names(n_scales: int = 3, n_last_steps: int = 0) -> dict[str, str]:
    """
    Return the prefixes of this network's U-Nets in a state dict of the ICON project.

    Parameters
    ----------
    n_scales, n_last_steps : int
        U-Nets at a scale each, and those that follow at full resolution.

    Returns
    -------
    dict
        From ``"unets.0"`` (coarsest) and so on to the prefix of the same U-Net in the state dict
        of nested `TwoStepRegistration` and `DownsampleRegistration` modules.
    """
    names = {}
    prefix = ""
    for step in reversed(range(n_scales, n_scales + n_last_steps)):
        names[f"unets.{step}"] = f"{prefix}netPsi.net"
        prefix += "netPhi."
    for scale in reversed(range(1, n_scales)):
        names[f"unets.{scale}"] = f"{prefix}netPsi.net"
        prefix += "netPhi.net."
    names["unets.0"] = f"{prefix}net"
    return names


def from_icon(
    state: dict[str, Tensor], *, n_scales: int = 3, n_last_steps: int = 0
) -> dict[str, Tensor]:
    """
    Rename the tensors of an ICON state dict to those of `GradICON`.

    Parameters
    ----------
    state : dict
        State dict of the ICON network, without a ``regis_net.`` prefix.
    n_scales, n_last_steps : int
        As `icon_names` takes them.

    Returns
    -------
    dict
        State dict for `GradICON` with as many scales and last steps.

    Raises
    ------
    ValueError
        If a tensor has no counterpart.
    """
    parts = {
        "downConvs": "down_convs",
        "upConvs": "up_convs",
        "batchNorms": "norms",
        "lastConv": "last_conv",
    }
    prefixes = {theirs: ours for ours, theirs in icon_names(n_scales, n_last_steps).items()}
    renamed = {}
    for name, tensor in state.items():
        prefix = next((p for p in prefixes if name.startswith(f"{p}.")), None)
        part, _, rest = name[len(prefix or "") + 1 :].partition(".")
        if prefix is None or part not in parts:
            raise ValueError(
                f"{name}: no such tensor in a GradICON network of {n_scales} scales and"
                f" {n_last_steps} last steps"
            )
        renamed[f"{prefixes[prefix]}.{parts[part]}.{rest}"] = tensor
    return renamed


FAMILY = NetworkFamily(name="gradicon", config=GradICONConfig, network=GradICON, compact=COMPACT)
