"""Regularity losses on coordinate maps."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import compose


class _SquaredGradient(torch.autograd.Function):
    """
    Mean over voxels of the squared forward differences of displacements, per unit length.

    It keeps the displacement, and differences of one axis at a time are in memory.
    """

    @staticmethod
    def forward(ctx, disp: Tensor) -> Tensor:
        ctx.save_for_backward(disp)
        base, *neighbours = _corners(disp)
        total = sum((neighbour - base).square_().sum() for neighbour in neighbours)
        # The square of n - 1 steps per unit, and (n - 1)^3 voxels.
        ctx.factor = 1 / (len(disp) * (disp.shape[-1] - 1))
        return total * ctx.factor

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (disp,) = ctx.saved_tensors
        result = torch.zeros_like(disp)
        base, *neighbours = _corners(disp)
        to_base, *to_neighbours = _corners(result)
        for neighbour, to_neighbour in zip(neighbours, to_neighbours, strict=True):
            difference = (neighbour - base).mul_(2 * ctx.factor * gradient)
            to_neighbour += difference
            to_base -= difference
        return result


def _corners(disp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the voxels that have a next one along every axis, and these three."""
    return (
        disp[:, :, :-1, :-1, :-1],
        disp[:, :, 1:, :-1, :-1],
        disp[:, :, :-1, 1:, :-1],
        disp[:, :, :-1, :-1, 1:],
    )


def jacobian_identity_loss(phi: Tensor) -> Tensor:
    r"""
    Penalise a map whose Jacobian is not the identity.

    .. math:: \| \nabla \varphi - I \|_F^2

    averaged over voxels. It is GradICON (Eq. 4) of :math:`\varphi_{ST} \circ \varphi_{TS}` and
    GradCyCon (Eq. 3) of the M2M-Reg cycle. The paper's code evaluates it at jittered points of a
    coarser grid by four compositions; here one composition on the whole grid is differentiated by
    forward differences. It can be differentiated once.

    Parameters
    ----------
    phi : Tensor, shape (N, 3, n, n, n)
        Map, unit coordinates.

    Returns
    -------
    Tensor, shape ()
        `diffusion_loss` of its displacement; exactly zero for `identity_map`.
    """
    return diffusion_loss(phi - identity_map(phi.shape[-1], like=phi))


def gradicon_loss(phi_ab: Tensor, phi_ba: Tensor) -> Tensor:
    """
    Return the GradICON loss (Eq. 4): the Jacobian of ``phi_ab(phi_ba(x))`` is the identity.

    Parameters
    ----------
    phi_ab, phi_ba : Tensor, shape (N, 3, n, n, n)
        Maps in both directions, unit coordinates.

    Returns
    -------
    Tensor, shape ()
    """
    return jacobian_identity_loss(compose(phi_ab, phi_ba))


def bending_loss(disp: Tensor) -> Tensor:
    """
    Return the mean squared second differences of a displacement or velocity, all six of them.

    Parameters
    ----------
    disp : Tensor, shape (N, 3, n, n, n)
        Displacement or velocity in any unit; the loss is in its square, per voxel step to the
        fourth.

    Returns
    -------
    Tensor, shape ()
        Zero for an affine displacement.
    """
    total = disp.new_zeros(())
    for axis in (2, 3, 4):
        first = disp.diff(dim=axis)
        total = total + first.diff(dim=axis).square().mean()
        for other in range(axis + 1, 5):
            total = total + 2 * first.diff(dim=other).square().mean()
    return total * disp.shape[1]


def diffusion_loss(disp: Tensor) -> Tensor:
    r"""
    Return the mean over voxels of the squared gradient of a displacement.

    .. math:: \| \nabla u \|_F^2

    By forward differences, at the voxels that have a next one along every axis. It can be
    differentiated once.

    Parameters
    ----------
    disp : Tensor, shape (N, 3, n, n, n)
        Displacement, unit coordinates.

    Returns
    -------
    Tensor, shape ()
        Per unit length, so without unit, and the same in voxels per voxel.
    """
    return _SquaredGradient.apply(disp)
