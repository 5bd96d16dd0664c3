"""Regularity losses on coordinate maps."""

import torch
from torch import Tensor

from m2m_bids.registration.maps import compose, jacobian


def jacobian_identity_loss(phi: Tensor) -> Tensor:
    r"""
    Penalise a map whose Jacobian is not the identity.

    .. math:: \| \nabla \varphi - I \|_F^2

    averaged over voxels. It is GradICON (Eq. 4) of :math:`\varphi_{ST} \circ \varphi_{TS}` and
    GradCyCon (Eq. 3) of the M2M-Reg cycle. The paper's code evaluates it at jittered points of a
    coarser grid by four compositions; here one composition on the whole grid is differentiated by
    forward differences.

    Parameters
    ----------
    phi : Tensor, shape (N, 3, n, n, n)
        Map, unit coordinates.

    Returns
    -------
    Tensor, shape ()
    """
    eye = torch.eye(3, dtype=phi.dtype, device=phi.device)[None, :, :, None, None, None]
    return (jacobian(phi) - eye).square().sum((1, 2)).mean()


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
