"""Layer normalisation over the last axis, which holds channels, in float32 at least.

In bfloat16 PyTorch's kernel on the CPU adds up the gradients of weight and bias voxel by voxel,
which leaves nothing of them where voxels are many. On a GPU autocast takes float32 by itself.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from m2m_bids.registration.grids import can_be_compiled

# So few that layer normalisation of PyTorch's on the CPU takes longer than a loop.
_FEW_CHANNELS = 16


class LayerNorm(nn.LayerNorm):
    """Layer normalisation by PyTorch's kernels, which are made for many channels."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Normalise each voxel.

        Parameters
        ----------
        x : Tensor, shape (..., C)

        Returns
        -------
        Tensor, shape (..., C)
        """
        return super().forward(_in_float32_at_least(x))


def _in_float32_at_least(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the last axis, which holds few channels."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Normalise each voxel.

        Parameters
        ----------
        x : Tensor, shape (..., C)

        Returns
        -------
        Tensor, shape (..., C)
        """
        return normalize_channels(x, self.weight, self.bias)


def normalize_channels(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """
    Apply layer normalisation to the last axis.

    PyTorch's kernels are made for many channels: with eight, that on a GPU takes several times as
    long as its sums and products one after the other, and that on the CPU as a compiled loop.

    Parameters
    ----------
    x : Tensor, shape (..., C)
    weight, bias : Tensor, shape (C,), optional

    Returns
    -------
    Tensor, shape (..., C)
        In float32 at least.
    """
    n_channels = x.shape[-1]
    x = _in_float32_at_least(x)
    if can_be_compiled(x) and n_channels <= _FEW_CHANNELS:
        from m2m_bids.registration.volumes import normalize_voxels

        if weight is None:
            weight, bias = x.new_ones(n_channels), x.new_zeros(n_channels)
        return normalize_voxels(x, weight, bias)
    if x.device.type == "cpu":
        return functional.layer_norm(x, (n_channels,), weight, bias)
    standard = _Standardize.apply(x)
    return standard if weight is None else torch.addcmul(bias, standard, weight)


class _Standardize(torch.autograd.Function):
    """Zero mean and unit variance over the last axis."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + 1e-5)
        standard = (x - mean).mul_(scale)
        ctx.save_for_backward(standard, scale)
        return standard

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        standard, scale = ctx.saved_tensors
        along = (grad * standard).mean(-1, keepdim=True)
        across = grad - grad.mean(-1, keepdim=True)
        return across.addcmul_(standard, along, value=-1).mul_(scale)
