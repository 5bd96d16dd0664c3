"""Coordinate maps: composition, integration of velocities, Jacobians."""

import torch
from torch import Tensor

from m2m_bids.registration.grids import identity_map, sample


def map_from_displacement(disp: Tensor) -> Tensor:
    """
    Add the identity to a displacement.

    Parameters
    ----------
    disp : Tensor, shape (N, 3, n, n, n)
        Displacement, unit coordinates.

    Returns
    -------
    Tensor, shape (N, 3, n, n, n)
        The map ``x + disp(x)``, unit coordinates.
    """
    return identity_map(disp.shape[-1], like=disp) + disp


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    r"""
    Compose two coordinate maps.

    .. math:: \varphi_{AC}(x) = \varphi_{AB}(\varphi_{BC}(x))

    The displacement of the outer map is interpolated, and continued beyond the border by its value
    there.

    Parameters
    ----------
    outer : Tensor, shape (N, 3, n, n, n)
        Map :math:`\varphi_{AB}` on B's grid, unit coordinates of A.
    inner : Tensor, shape (N, 3, m, m, m)
        Map :math:`\varphi_{BC}` on C's grid, unit coordinates of B.

    Returns
    -------
    Tensor, shape (N, 3, m, m, m)
        Map :math:`\varphi_{AC}` on C's grid, unit coordinates of A.

    Raises
    ------
    ValueError
        If the batch sizes differ.
    """
    return inner + sample(outer - identity_map(outer.shape[-1], like=outer), inner)


def warp(image: Tensor, phi: Tensor) -> Tensor:
    """
    Pull an image back through a map: ``warp(image_a, phi_ab)(x) = image_a(phi_ab(x))``.

    Parameters
    ----------
    image : Tensor, shape (N, C, n, n, n)
        Images of A.
    phi : Tensor, shape (N, 3, m, m, m)
        Map from B's grid to unit coordinates of A.

    Returns
    -------
    Tensor, shape (N, C, m, m, m)
        Images on B's grid; zero where the map leaves A's grid.
    """
    return sample(image, phi, padding="zeros")


def integrate_velocity(velocity: Tensor, *, n_squarings: int = 6) -> Tensor:
    r"""
    Integrate a stationary velocity over unit time by scaling and squaring.

    Parameters
    ----------
    velocity : Tensor, shape (N, 3, n, n, n)
        Velocity, unit coordinates.
    n_squarings : int
        The displacement of the first of ``2 ** n_squarings`` time steps is the scaled velocity.

    Returns
    -------
    Tensor, shape (N, 3, n, n, n)
        Displacement of :math:`\exp(v)`, unit coordinates; that of :math:`\exp(-v)` is its inverse.
    """
    disp = velocity / 2**n_squarings
    identity = identity_map(velocity.shape[-1], like=velocity)
    for _ in range(n_squarings):
        disp = disp + sample(disp, identity + disp)
    return disp


def invert(phi: Tensor, *, n_iterations: int = 30) -> Tensor:
    """
    Invert a diffeomorphic map by fixed-point iteration.

    Parameters
    ----------
    phi : Tensor, shape (N, 3, n, n, n)
        Map, unit coordinates.
    n_iterations : int
        Iterations of ``inverse <- identity - disp(inverse)``; they converge where the
        displacement's derivative is below one, and are damped by one half so that they also do
        somewhat beyond.

    Returns
    -------
    Tensor, shape (N, 3, n, n, n)
        The inverse map on the same grid.
    """
    identity = identity_map(phi.shape[-1], like=phi)
    disp = phi - identity
    inverse = identity - disp
    for _ in range(n_iterations):
        inverse = 0.5 * (inverse + identity - sample(disp, inverse))
    return inverse


def jacobian(phi: Tensor) -> Tensor:
    r"""
    Differentiate maps by forward differences.

    Parameters
    ----------
    phi : Tensor, shape (N, 3, n, n, n)
        Map, unit coordinates.

    Returns
    -------
    Tensor, shape (N, 3, 3, n - 1, n - 1, n - 1)
        Element ``[:, d, e]`` is :math:`\partial \varphi_d / \partial x_e`.
    """
    n_steps = phi.shape[-1] - 1
    base = phi[:, :, :-1, :-1, :-1]
    columns = (
        phi[:, :, 1:, :-1, :-1] - base,
        phi[:, :, :-1, 1:, :-1] - base,
        phi[:, :, :-1, :-1, 1:] - base,
    )
    return torch.stack(columns, dim=2) * n_steps


def jacobian_determinant(phi: Tensor) -> Tensor:
    """
    Return the Jacobian determinant of maps, by forward differences.

    The determinant is the same in unit coordinates and in world millimetres, since one affine
    takes both the map's argument and its value from one to the other.

    Parameters
    ----------
    phi : Tensor, shape (N, 3, n, n, n)
        Map, unit coordinates.

    Returns
    -------
    Tensor, shape (N, n - 1, n - 1, n - 1)
        One for the identity; not positive where the map folds.
    """
    a, b, c = jacobian(phi).unbind(2)
    return (torch.linalg.cross(a, b, dim=1) * c).sum(1)
