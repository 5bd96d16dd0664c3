"""Unit coordinate grids, and sampling: the only place that knows how it is done where."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

# The library needs PyTorch alone; with Numba it is faster on the CPU.
HAS_NUMBA = find_spec("numba") is not None


def can_be_compiled(x: Tensor) -> bool:
    """
    Tell whether what is computed from a tensor may take loops that Numba compiles.

    Parameters
    ----------
    x : Tensor

    Returns
    -------
    bool
    """
    return HAS_NUMBA and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def identity_map(size: int, *, like: Tensor | None = None) -> Tensor:
    """
    Return the identity map of a cubic grid.

    Parameters
    ----------
    size : int
        Number of voxels along every axis.
    like : Tensor, optional
        Takes dtype and device from this tensor; float32 on the CPU without it.

    Returns
    -------
    Tensor, shape (1, 3, size, size, size)
        Position of each voxel centre, unit coordinates ``ijk / (size - 1)``.

    Examples
    --------
    >>> identity_map(3)[0, :, 0, 1, 2]
    tensor([0.0000, 0.5000, 1.0000])
    """
    options = {} if like is None else {"dtype": like.dtype, "device": like.device}
    axis = torch.linspace(0, 1, size, **options)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]


def sample(
    image: Tensor,
    positions: Tensor,
    *,
    padding: Literal["border", "zeros"] = "border",
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Tensor:
    """
    Sample images at unit coordinates by trilinear (``"bilinear"``) or nearest interpolation.

    Parameters
    ----------
    image : Tensor, shape (N, C, I, J, K)
        Images, displacements or maps; a batch of one is used for every batch of positions.
    positions : Tensor, shape (N, 3, I', J', K')
        Where to sample, unit coordinates of the image's grid.
    padding : {"border", "zeros"}
        Value outside the grid: that of the nearest voxel on the border, or zero.
    mode : {"bilinear", "nearest"}
        Interpolation, by the names of `torch.nn.functional.grid_sample`.

    Returns
    -------
    Tensor, shape (N, C, I', J', K')

    Raises
    ------
    ValueError
        If the batch sizes differ, or positions do not have three components.
    """
    if positions.shape[1] != 3:
        raise ValueError(f"positions must be (N, 3, I, J, K), got {tuple(positions.shape)}")
    if image.shape[0] not in (1, positions.shape[0]):
        raise ValueError(f"batch sizes differ: {image.shape[0]} and {positions.shape[0]}")
    if image.dtype in (torch.float16, torch.bfloat16):
        image = image.float()
    if mode == "bilinear" and can_be_compiled(image):
        from m2m_bids.registration.trilinear import sample_trilinearly

        return sample_trilinearly(
            image, positions.to(image.dtype), is_zero_outside=padding == "zeros"
        )
    image = image.expand(positions.shape[0], *image.shape[1:])
    # grid_sample orders components last axis first, in [-1, 1].
    i, j, k = (2 * positions - 1).to(image.dtype).unbind(1)
    grid = torch.stack((k, j, i), -1)
    return functional.grid_sample(image, grid, mode=mode, padding_mode=padding, align_corners=True)


def resize(image: Tensor, size: int) -> Tensor:
    """
    Interpolate images trilinearly to another cubic grid on the same field of view.

    Parameters
    ----------
    image : Tensor, shape (N, C, n, n, n)
    size : int

    Returns
    -------
    Tensor, shape (N, C, size, size, size)
        `sample` at the `identity_map` of the new grid, faster.
    """
    n = image.shape[-1]
    if n == size:
        return image
    # More voxels are made faster by products; fewer are not.
    if image.device.type == "cpu" and n < size and image.dtype in (torch.float32, torch.float64):
        with torch.autocast("cpu", enabled=False):
            return multiply_axes(image, *[_interpolation(n, size, image.dtype)] * 3)
    return functional.interpolate(image, size=(size,) * 3, mode="trilinear", align_corners=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for training too
def _interpolation(n: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix, shape (size, n), that interpolates an axis."""
    columns = torch.eye(n, dtype=dtype)[None]
    return functional.interpolate(columns, size=size, mode="linear", align_corners=True)[0].T


def multiply_axes(image: Tensor, i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    """
    Multiply the last three axes of images with a matrix each.

    Parameters
    ----------
    image : Tensor, shape (..., I, J, K)
    i, j, k : Tensor, shape (I', I), (J', J) and (K', K)

    Returns
    -------
    Tensor, shape (..., I', J', K')
    """
    planes = j @ (image @ k.T)
    return (i @ planes.flatten(-2)).unflatten(-1, planes.shape[-2:])


def pool(image: Tensor) -> Tensor:
    """
    Halve the resolution of images by average pooling, as GradICON does between its scales.

    Parameters
    ----------
    image : Tensor, shape (N, C, I, J, K)

    Returns
    -------
    Tensor, shape (N, C, ceil(I / 2), ceil(J / 2), ceil(K / 2))
    """
    return functional.avg_pool3d(image, 2, ceil_mode=True)
