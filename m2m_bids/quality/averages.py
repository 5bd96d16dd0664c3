"""Mean and standard deviation of many images on one grid, one image in memory at a time."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import nibabel as nb
import numpy as np

from m2m_bids.quality.measures import scan_brain
from m2m_bids.spatial.images import load_image


@dataclass
class Average:
    """
    Mean and standard deviation of images.

    Parameters
    ----------
    mean, sd : Nifti1Image, float32
        By voxel; the standard deviation is of the sample.
    n : int
        Images that are in it.
    left_out : list of str
        Images that are not, and why.
    """

    mean: nb.Nifti1Image
    sd: nb.Nifti1Image
    n: int
    left_out: list[str] = field(default_factory=list)


def average_images(files: Iterable[Path], modality: Literal["pet", "fa"]) -> Average | None:
    """
    Average images in one space, by Welford's recurrence.

    Parameters
    ----------
    files : iterable of Path
        3-D images, all on the grid of the first that can be read.
    modality : {"pet", "fa"}
        PET images are divided by their mean in the brain, as the scan alone shows it, since doses
        and units differ.

    Returns
    -------
    Average or None
        None if there are fewer than two images.
    """
    first: nb.Nifti1Image | None = None
    mean = squares = np.zeros(0)
    n, left_out = 0, []
    for file in files:
        try:
            image = load_image(file)
            first = first or image
            data = _values(image, first, modality)
        except (ValueError, OSError) as error:
            left_out.append(f"{file.name}: {error}")
            continue
        if n == 0:
            mean, squares = np.zeros_like(data), np.zeros_like(data)
        n += 1
        step = data - mean
        mean = mean + step / n
        squares = squares + step * (data - mean)
    if first is None or n < 2:
        return None
    images = (
        nb.Nifti1Image(values.astype(np.float32), first.affine)
        for values in (mean, np.sqrt(squares / (n - 1)))
    )
    return Average(*images, n, left_out)


def _values(
    image: nb.Nifti1Image, first: nb.Nifti1Image, modality: Literal["pet", "fa"]
) -> np.ndarray:
    """
    Return an image's values as they are averaged.

    Raises
    ------
    ValueError
        If it is on another grid than the first, or has no brain to be scaled by.
    """
    if image.shape != first.shape or not np.allclose(image.affine, first.affine, atol=1e-3):
        raise ValueError(f"its grid {image.shape} is not that of the first, {first.shape}")
    data = np.nan_to_num(np.asarray(image.dataobj, dtype=np.float64))
    if modality == "fa":
        return data
    brain = scan_brain(image, modality)
    level = data[brain].mean() if brain.any() else 0.0
    if level <= 0:
        raise ValueError("no voxel is positive")
    return data / level
