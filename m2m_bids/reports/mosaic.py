"""Choose the slices of a figure, place them on a canvas and sample images there."""

from dataclasses import dataclass
from typing import NamedTuple

import nibabel as nb
import numpy as np

TILE_WIDTH_PX = 240
N_SLICES = 7
MARGIN_MM = 10.0
# Share of the brain's extent at the first and the last slice: none is a mere sliver of cortex.
FIRST_SLICE, LAST_SLICE = 0.13, 0.87


class Plane(NamedTuple):
    """A viewing plane; axes count 0 right, 1 anterior, 2 superior."""

    name: str
    across: int
    up: int
    through: int
    labels: tuple[str, str, str, str]  # left, right, top, bottom edge of the tile


PLANES = (
    Plane("axial", 0, 1, 2, ("L", "R", "A", "P")),
    Plane("coronal", 0, 2, 1, ("L", "R", "S", "I")),
    Plane("sagittal", 1, 2, 0, ("P", "A", "S", "I")),
)


@dataclass(frozen=True, eq=False)
class Tile:
    """One slice on the canvas."""

    plane: Plane
    x_px: int
    y_px: int
    points: np.ndarray  # (height, width, 3) world RAS+ mm of the pixel centres
    position_mm: float  # world coordinate along `plane.through` at the tile's centre

    @property
    def height_px(self) -> int:
        """Rows of pixels."""
        return self.points.shape[0]

    @property
    def width_px(self) -> int:
        """Columns of pixels."""
        return self.points.shape[1]


@dataclass(frozen=True, eq=False)
class Mosaic:
    """Slices of a brain in three planes, a row each, in neurological display."""

    tiles: tuple[Tile, ...]
    width_px: int
    height_px: int
    obliquity_deg: float  # largest angle between an image axis and the world axis nearest to it

    def sample(
        self, image: nb.Nifti1Image, *, cval: float = 0.0, order: int = 1
    ) -> list[np.ndarray]:
        """
        Interpolate an image at the pixels of every tile.

        Parameters
        ----------
        image : Nifti1Image
            3-D image in the same world as the mosaic; its grid may be any. NaN counts as `cval`.
        cval : float
            Value outside the image.
        order : int
            1 for linear interpolation, 0 to show voxels as they are.

        Returns
        -------
        list of ndarray, shape (height, width), float32
        """
        from scipy.ndimage import map_coordinates

        data = np.nan_to_num(np.asanyarray(image.dataobj).astype(np.float32), nan=cval)
        ras2vox = np.linalg.inv(image.affine)
        return [
            map_coordinates(
                data,
                np.moveaxis(tile.points @ ras2vox[:3, :3].T + ras2vox[:3, 3], -1, 0),
                order=order,
                mode="constant",
                cval=cval,
            )
            for tile in self.tiles
        ]

    def canvas(self, tiles: list[np.ndarray]) -> np.ndarray:
        """
        Lay tiles out on a black canvas.

        Parameters
        ----------
        tiles : list of ndarray, shape (height, width) or (height, width, 3), uint8
            One array per tile, in order.

        Returns
        -------
        ndarray, shape (height_px, width_px[, 3]), uint8
        """
        page = np.zeros((self.height_px, self.width_px, *tiles[0].shape[2:]), np.uint8)
        for tile, pixels in zip(self.tiles, tiles, strict=True):
            page[tile.y_px : tile.y_px + tile.height_px, tile.x_px : tile.x_px + tile.width_px] = (
                pixels
            )
        # A black rim: a browser that scales two stacked images blends their edges.
        page[[0, -1]] = page[:, [0, -1]] = 0
        return page


def make_mosaic(mask: nb.Nifti1Image, *, n_slices: int = N_SLICES) -> Mosaic:
    """
    Choose slices through a brain mask.

    Slices follow the axes of the mask's own grid, reoriented to the nearest right, anterior and
    superior (``nibabel.as_closest_canonical``), evenly spaced over the mask's bounding box; voxels
    of any shape are drawn in true proportions. The choice depends on the mask alone, so that all
    figures of one anatomy show the same slices.

    Parameters
    ----------
    mask : Nifti1Image
        Brain mask, 3-D, positive inside.
    n_slices : int
        Slices per plane.

    Returns
    -------
    Mosaic

    Raises
    ------
    ValueError
        If the mask is not 3-D or is empty.
    """
    bounds, vox2ras = mask_bounds(mask)
    zooms_mm = np.linalg.norm(vox2ras[:3, :3], axis=0)
    tiles, y_px = [], 0
    for plane in PLANES:
        row = _row_of_tiles(plane, y_px, bounds, zooms_mm, vox2ras, n_slices=n_slices)
        tiles += row
        y_px += row[0].height_px
    return Mosaic(tuple(tiles), n_slices * TILE_WIDTH_PX, y_px, obliquity_deg(vox2ras))


def mask_bounds(mask: nb.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """
    Find the box of a mask along its own axes.

    Parameters
    ----------
    mask : Nifti1Image
        3-D, positive inside.

    Returns
    -------
    bounds : ndarray, shape (3, 2)
        First and last voxel to the right, to the front and upwards.
    vox2ras : ndarray, shape (4, 4)
        Affine of those voxels (``nibabel.as_closest_canonical``), RAS+ mm.

    Raises
    ------
    ValueError
        If the mask is not 3-D or is empty.
    """
    if len(mask.shape) != 3:
        raise ValueError(f"mask has shape {mask.shape}: expected a 3-D image")
    canonical = nb.as_closest_canonical(mask)
    inside = np.asanyarray(canonical.dataobj) > 0
    if not inside.any():
        raise ValueError("mask is empty: there is no brain to draw")
    others = ((1, 2), (0, 2), (0, 1))
    bounds = [np.flatnonzero(inside.any(axis=axes))[[0, -1]] for axes in others]
    return np.array(bounds), canonical.affine


def obliquity_deg(vox2ras: np.ndarray) -> float:
    """Measure the largest angle between the axes of a canonical affine and the world's."""
    directions = vox2ras[:3, :3] / np.linalg.norm(vox2ras[:3, :3], axis=0)
    return float(np.rad2deg(np.arccos(np.clip(np.diag(directions), -1, 1)).max()))


def _row_of_tiles(plane, y_px, bounds, zooms_mm, vox2ras, *, n_slices):
    """Tiles of one plane; `bounds` (3, 2) is the mask's bounding box in voxels."""
    lower = (bounds[:, 0] - 0.5) * zooms_mm - MARGIN_MM
    upper = (bounds[:, 1] + 0.5) * zooms_mm + MARGIN_MM
    size_mm = upper - lower
    pixel_mm = size_mm[plane.across] / TILE_WIDTH_PX
    height_px = int(np.ceil(size_mm[plane.up] / pixel_mm))
    across_mm = lower[plane.across] + (np.arange(TILE_WIDTH_PX) + 0.5) * pixel_mm
    up_mm = upper[plane.up] - (np.arange(height_px) + 0.5) * pixel_mm  # top row is the highest
    first, last = bounds[plane.through]
    slices = np.rint(first + (last - first) * np.linspace(FIRST_SLICE, LAST_SLICE, n_slices))
    row = []
    for column, index in enumerate(slices):
        grid_mm = np.empty((height_px, TILE_WIDTH_PX, 3))
        grid_mm[..., plane.across] = across_mm
        grid_mm[..., plane.up] = up_mm[:, None]
        grid_mm[..., plane.through] = index * zooms_mm[plane.through]
        points = (grid_mm / zooms_mm) @ vox2ras[:3, :3].T + vox2ras[:3, 3]
        position_mm = float(points[height_px // 2, TILE_WIDTH_PX // 2, plane.through])
        row.append(Tile(plane, column * TILE_WIDTH_PX, y_px, points, position_mm))
    return row
