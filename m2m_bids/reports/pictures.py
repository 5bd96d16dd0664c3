"""Draw what each method made of some pairs, side by side, as Fig. 3 of the M2M-Reg paper does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.reports.mosaic import Mosaic, make_mosaic
from m2m_bids.reports.svg import BRAIN_COLOR, FONT, contour, raster, slice_labels

FIXED_COLOR, MOVED_COLOR = BRAIN_COLOR, "#ff4df0"
PLANES_SHOWN = ("axial", "coronal")
SHARED_WINDOW = (0.5, 99.5)  # percentiles
WHITE_LEVEL = 200  # bright tissue stays darker than the outlines over it


class MovedImage(NamedTuple):
    """A moving image and its labels as a method brought them to the fixed image's world."""

    image: nb.Nifti1Image
    labels: nb.Nifti1Image | None = None


@dataclass(frozen=True, eq=False)
class ExamplePair:
    """
    A row of the grid of pictures.

    Parameters
    ----------
    pair : str
        As in the records.
    modality : str
        ``"pet"`` or ``"fa"``.
    fixed : Nifti1Image
        T1w, 3-D.
    mask : Nifti1Image
        Brain mask in the T1w's world, which alone chooses the slices.
    moved : mapping of str to MovedImage
        Results by method, as in the records; their grids may be any in the T1w's world.
    labels : Nifti1Image, optional
        Integer labels of the T1w.
    structures : mapping of str to sequence of int
        What to outline, by the name in the legend: the labels that make it up.
    """

    pair: str
    modality: str
    fixed: nb.Nifti1Image
    mask: nb.Nifti1Image
    moved: Mapping[str, MovedImage]
    labels: nb.Nifti1Image | None = None
    structures: Mapping[str, Sequence[int]] = field(default_factory=dict)


def draw_example(example: ExamplePair, methods: Mapping[str, str]) -> dict[str, str]:
    """
    Draw the fixed image and the results of the methods on the same slices.

    The grey levels of all results of a pair span the same values, so that they compare.

    Parameters
    ----------
    example : ExamplePair
    methods : mapping of str to str
        Title of each method to draw; those without a result are left out.

    Returns
    -------
    dict of str to str
        SVG elements: ``"fixed"``, then each method's.

    Raises
    ------
    ValueError
        If the brain mask is empty or not 3-D.
    """
    mosaic = _two_slices(example.mask)
    inside = [tile > 0.5 for tile in mosaic.sample(example.mask)]
    wanted = _outlines(mosaic, example.labels, example, FIXED_COLOR)
    fixed = mosaic.sample(example.fixed)
    name = f"{example.pair}: T1w"
    body = _raster(mosaic, fixed, _window([fixed], inside)) + wanted + slice_labels(mosaic, 0)
    drawn = {"fixed": _svg(body, mosaic, f"{name} (fixed image)")}
    results = {key: example.moved[key] for key in methods if key in example.moved}
    sampled = {key: mosaic.sample(result.image) for key, result in results.items()}
    window = _window(list(sampled.values()), inside)
    for key, result in results.items():
        lines = wanted + _outlines(mosaic, result.labels, example, MOVED_COLOR)
        body = _raster(mosaic, sampled[key], window) + lines
        drawn[key] = _svg(body, mosaic, f"{example.pair}: moved by {methods[key]}")
    return drawn


def _two_slices(mask: nb.Nifti1Image) -> Mosaic:
    """Middle slices of a brain, one above the other."""
    tiles, y_px = [], 0
    whole = make_mosaic(mask, n_slices=3)
    for plane in PLANES_SHOWN:
        middle = [tile for tile in whole.tiles if tile.plane.name == plane][1]
        tiles.append(replace(middle, x_px=0, y_px=y_px))
        y_px += middle.height_px
    return Mosaic(tuple(tiles), tiles[0].width_px, y_px, whole.obliquity_deg)


def _outlines(
    mosaic: Mosaic, labels: nb.Nifti1Image | None, example: ExamplePair, color: str
) -> str:
    """Outline the example's structures in a label image."""
    if labels is None:
        return ""
    data = np.rint(np.asanyarray(labels.dataobj))
    masks = (
        nb.Nifti1Image(np.isin(data, values).astype(np.uint8), labels.affine)
        for values in example.structures.values()
    )
    return "".join(contour(mosaic, mosaic.sample(mask), 0, color=color) for mask in masks)


def _window(images: list[list[np.ndarray]], inside: list[np.ndarray]) -> tuple[float, float]:
    """Grey level window of the values in the mask, pooled over images."""
    values = [tile[brain] for tiles in images for tile, brain in zip(tiles, inside, strict=True)]
    pooled = np.concatenate([*values, np.zeros(1)])
    lower, upper = np.percentile(pooled[np.isfinite(pooled)], SHARED_WINDOW)
    lower = min(float(lower), 0.0)
    return lower, max(float(upper), lower + 1e-6)


def _raster(mosaic: Mosaic, tiles: list[np.ndarray], window: tuple[float, float]) -> str:
    lower, upper = window
    scaled = [np.clip((tile - lower) / (upper - lower), 0, 1) for tile in tiles]
    return raster(
        mosaic.canvas([np.rint(WHITE_LEVEL * tile).astype(np.uint8) for tile in scaled]), 0
    )


def _svg(body: str, mosaic: Mosaic, description: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(description)}" '
        f'viewBox="0 0 {mosaic.width_px} {mosaic.height_px}" font-family="{FONT}">{body}</svg>'
    )
