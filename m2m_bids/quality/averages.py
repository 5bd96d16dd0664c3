"""Mean and standard deviation of many images on one grid, one image in memory at a time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import nibabel as nb
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from m2m_bids.quality.measures import scan_brain
from m2m_bids.spatial.images import load_image, require_3d


@dataclass
class Average:
    """
    Mean and standard deviation of images.

    Parameters
    ----------
    mean, sd : Nifti1Image, float32, or None
        By voxel; the standard deviation is of the sample. None of fewer than two images.
    n : int
        Images that are in it.
    left_out : list of str
        Images that are not, and why.
    """

    mean: nb.Nifti1Image | None
    sd: nb.Nifti1Image | None
    n: int
    left_out: list[str] = field(default_factory=list)


class _Grid(NamedTuple):
    """Shape of a 3-D image, and its affine by rows, to the micrometre."""

    shape: tuple[int, ...]
    affine: tuple[float, ...]


def average_images(files: Sequence[Path], modality: Literal["pet", "fa"]) -> Average:
    """
    Average images in one space, by Welford's recurrence.

    Parameters
    ----------
    files : sequence of Path
        3-D images. Those that are not on the grid that most of them have are left out.
    modality : {"pet", "fa"}
        PET images are divided by their mean in the brain, as the scan alone shows it, since doses
        and units differ.

    Returns
    -------
    Average
    """
    grid = _commonest_grid(files)
    affine = np.eye(4)
    mean = squares = np.zeros(0)
    n, left_out = 0, []
    for file in files:
        try:
            image = require_3d(load_image(file), file)
            data = _values(image, grid, modality)
        except (ValueError, OSError) as error:
            left_out.append(f"{file.name}: {str(error).removeprefix(f'{file}: ')}")
            continue
        if n == 0:
            affine = image.affine
            mean, squares = np.zeros_like(data), np.zeros_like(data)
        n += 1
        step = data - mean
        mean = mean + step / n
        squares = squares + step * (data - mean)
    if n < 2:
        return Average(None, None, n, left_out)
    images = (
        nb.Nifti1Image(values.astype(np.float32), affine)
        for values in (mean, np.sqrt(squares / (n - 1)))
    )
    return Average(*images, n, left_out)


def _commonest_grid(files: Sequence[Path]) -> _Grid | None:
    """Find the grid that most images are on, by their headers; of equals, that of the first."""
    grids = Counter(grid for file in files if (grid := _stored_grid(file)) is not None)
    return grids.most_common(1)[0][0] if grids else None


def _stored_grid(file: Path) -> _Grid | None:
    """Read the grid of an image; None of frames, and of what is no image."""
    try:
        image = nb.load(file)
        return _grid(image) if len(image.shape) == 3 else None
    except (OSError, ValueError, EOFError, ImageFileError, HeaderDataError):
        return None  # `load_image` says why


def _grid(image: nb.Nifti1Image) -> _Grid:
    return _Grid(image.shape, tuple(np.round(image.affine, 3).ravel() + 0.0))


def _values(
    image: nb.Nifti1Image, grid: _Grid | None, modality: Literal["pet", "fa"]
) -> np.ndarray:
    """
    Return an image's values as they are averaged.

    Raises
    ------
    ValueError
        If it is on another grid, or has no brain to be scaled by.
    """
    own = _grid(image)
    if (
        grid is None
        or own.shape != grid.shape
        or not np.allclose(own.affine, grid.affine, atol=2e-3)
    ):
        expected = "none" if grid is None else grid.shape
        raise ValueError(f"its grid {own.shape} is not that of most images, {expected}")
    data = np.nan_to_num(np.asarray(image.dataobj, dtype=np.float64))
    if modality == "fa":
        return data
    brain = scan_brain(image, modality)
    level = data[brain].mean() if brain.any() else 0.0
    if level <= 0:
        raise ValueError("no voxel is positive")
    return data / level
