"""Convolutions to or from few channels on the CPU, plane by plane of the first spatial axis.

Normalised images and a skip connection are joined where they are convolved. What is made of a
plane stays within the last-level cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def _windows(x: Tensor, skip: Tensor, affine: tuple[Tensor, Tensor] | None) -> Iterator[Tensor]:
    """
    Yield each plane of joined images with its neighbours: padded voxels, by plane and channel.

    Plane ``i`` is in place ``i % 3``: the tensor is one and the same.

    Parameters
    ----------
    x : Tensor, shape (C, I, J, K)
    skip : Tensor, shape (C', I', J', K')
    affine : tuple of Tensor, optional
        Slope and constant by which ``x`` is normalised.

    Yields
    ------
    Tensor, shape ((J' + 2) * (K' + 2), 3 * (C + C'))
    """
    n = len(x)
    _, n_i, n_j, n_k = skip.shape
    x, skip = x.permute(1, 2, 3, 0)[:, :n_j, :n_k], skip.permute(1, 2, 3, 0)
    ring = x.new_zeros(n_j + 2, n_k + 2, 3, n + skip.shape[3])
    for i in range(n_i + 1):
        place = ring[1:-1, 1:-1, i % 3]
        if i == n_i:
            place.zero_()
        else:
            place[..., n:] = skip[i]
            if affine is None:
                place[..., :n] = x[i]
            else:
                torch.addcmul(affine[1], x[i], affine[0], out=place[..., :n])
        if i > 0:
            yield ring.view(-1, 3 * ring.shape[3])


def _shifted(taps: Tensor, shape: torch.Size) -> Tensor:
    """View a padded plane of nine taps, shape (C * 9, J * K), where each tap meets a voxel."""
    n_j, n_k = shape[-2:]
    n = taps.shape[1]
    strides = 9 * n, 3 * n + n_k + 2, n + 1, n_k + 2, 1
    return taps.as_strided((len(taps) // 9, 3, 3, n_j, n_k), strides)


_LATER_TAPS = [(b, c) for b in range(3) for c in range(3)][1:]


def convolve_joined(
    x: Tensor, skip: Tensor, affine: tuple[Tensor, Tensor] | None, weight: Tensor
) -> Tensor:
    """
    Convolve joined images (kernel 3, padding 1): a product with all taps, then shifted sums.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)
    skip : Tensor, shape (N, C', I', J', K')
        On a grid no larger than that of ``x``, whose last voxels are left out.
    affine : tuple of Tensor, shape (C,), optional
        Slope and constant by which ``x`` is normalised.
    weight : Tensor, shape (C'', C + C', 3, 3, 3)

    Returns
    -------
    Tensor, shape (N, C'', I', J', K')
    """
    n_out = len(weight)
    by_plane = weight.permute(0, 3, 4, 2, 1).reshape(9 * n_out, 3, -1)
    # The window of plane i has plane i - 1 in place (i - 1) % 3.
    matrices = [by_plane.roll(turn - 1, 1).flatten(1) for turn in range(3)]
    y = x.new_empty(len(x), n_out, *skip.shape[2:])
    for image, image_skip, image_y in zip(x, skip, y, strict=True):
        for i, window in enumerate(_windows(image, image_skip, affine)):
            taps = _shifted(torch.mm(matrices[i % 3], window.t()), y.shape)
            # One after the other: `sum` is slow in this order.
            plane = image_y[:, i].copy_(taps[:, 0, 0])
            for b, c in _LATER_TAPS:
                plane.add_(taps[:, b, c])
    return y


def joined_weight_gradient(
    grad: Tensor, x: Tensor, skip: Tensor, affine: tuple[Tensor, Tensor] | None
) -> Tensor:
    """
    Return the gradient of `convolve_joined` with respect to the weights.

    Parameters
    ----------
    grad : Tensor, shape (N, C'', I', J', K')
    x, skip, affine
        As of `convolve_joined`.

    Returns
    -------
    Tensor, shape (C'', C + C', 3, 3, 3)
    """
    n_out, n_in = grad.shape[1], x.shape[1] + skip.shape[1]
    taps = grad.new_zeros(9 * n_out, (grad.shape[3] + 2) * (grad.shape[4] + 2))
    shifted = _shifted(taps, grad.shape)
    products = grad.new_zeros(3, 9 * n_out, 3 * n_in)
    for image, image_skip, image_grad in zip(x, skip, grad, strict=True):
        for i, window in enumerate(_windows(image, image_skip, affine)):
            shifted.copy_(image_grad[:, i, None, None])
            products[i % 3].addmm_(taps, window)
    products = products.view(3, n_out, 3, 3, 3, n_in)
    by_plane = sum(product.roll(1 - turn, 3) for turn, product in enumerate(products))
    return by_plane.permute(0, 4, 3, 1, 2).contiguous()
