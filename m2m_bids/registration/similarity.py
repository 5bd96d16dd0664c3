"""Image similarity losses."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def _gaussian_band(size: int, sigma: float, radius: int, device: torch.device) -> Tensor:
    """Return the banded matrix that convolves an axis with a truncated Gaussian, zero padding."""
    offsets = torch.arange(size, dtype=torch.float64)
    distance = offsets[:, None] - offsets[None]
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).double() ** 2)
    band = torch.exp(-0.5 * (distance / sigma) ** 2) / taps.sum()
    band[distance.abs() > radius] = 0
    return band.float().to(device)


def smooth(image: Tensor, sigma_voxels: float, *, radius_voxels: int | None = None) -> Tensor:
    """
    Smooth images with a Gaussian, as three products with a banded matrix.

    Parameters
    ----------
    image : Tensor, shape (..., I, J, K)
    sigma_voxels : float
        Standard deviation; zero returns the image.
    radius_voxels : int, optional
        Taps on either side of the centre; ``round(2 * sigma)`` (at least 1) by default. The kernel
        sums to one, and the image is padded with zeros.

    Returns
    -------
    Tensor, shape (..., I, J, K)
    """
    if sigma_voxels <= 0:
        return image
    radius = max(1, round(2 * sigma_voxels)) if radius_voxels is None else radius_voxels
    i, j, k = (
        _gaussian_band(n, float(sigma_voxels), radius, image.device).to(image.dtype)
        for n in image.shape[-3:]
    )
    image = image @ k
    image = j @ image
    return (i @ image.flatten(-2)).unflatten(-1, image.shape[-2:])


def local_correlation(a: Tensor, b: Tensor, *, sigma_voxels: float = 5.0) -> Tensor:
    r"""
    Return the local normalised cross-correlation (LNCC) at every voxel.

    .. math::

        \frac{\mathrm{cov}(a, b)}
        {\sqrt{(\mathrm{var}(a) + \epsilon)(\mathrm{var}(b) + \epsilon)}}

    with moments in a Gaussian window of ``4 * sigma + 1`` taps, zero padding and :math:`\epsilon =
    10^{-5}` (the similarity of Eqs. 1 and 2 of the M2M-Reg paper, with the window of its public
    code).

    Parameters
    ----------
    a, b : Tensor, shape (N, 1, I, J, K)
        Images in [0, 1].
    sigma_voxels : float
        Standard deviation of the window.

    Returns
    -------
    Tensor, shape (N, 1, I, J, K)
        Between -1 and 1; near 0 where either image is flat, such as in the background.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    moments = smooth(torch.stack((a, b, a * a, b * b, a * b)), sigma_voxels)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = moments
    var_a = (mean_aa - mean_a * mean_a).clamp_min(0) + 1e-5
    var_b = (mean_bb - mean_b * mean_b).clamp_min(0) + 1e-5
    return (mean_ab - mean_a * mean_b) * torch.rsqrt(var_a * var_b)


def lncc_loss(a: Tensor, b: Tensor, *, sigma_voxels: float = 5.0) -> Tensor:
    """
    Return one minus the mean of `local_correlation`, which has the parameters and the errors.

    Returns
    -------
    Tensor, shape ()
        Between 0, for images equal up to a local affine intensity map, and 2; where either image
        is flat a voxel counts as 1.
    """
    return 1 - local_correlation(a, b, sigma_voxels=sigma_voxels).mean()
