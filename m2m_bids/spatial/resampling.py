"""Resampling of images through transforms, with one interpolation."""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nb
import numpy as np
from nibabel.affines import from_matvec

from m2m_bids.spatial.fields import grid_points
from m2m_bids.spatial.images import save_image
from m2m_bids.spatial.interpolation import interpolate, prefilter
from m2m_bids.spatial.transforms import Transform, as_chain, map_points

_POINTS_PER_SLAB = 1_000_000


def resample(
    image: nb.Nifti1Image,
    transforms: Transform | Sequence[Transform],
    reference_image: nb.Nifti1Image,
    *,
    order: int = 3,
    cval: float = 0.0,
) -> nb.Nifti1Image:
    """
    Bring an image through a chain onto the grid of another, with one interpolation.

    ``output(x) = image(transforms(x))`` at the voxels x of the reference. Voxels of the image that
    are not finite count as zero, except with order 0. Spline overshoot is clipped to the range of
    the image. The image is not smoothed, also where the reference is coarser.

    Parameters
    ----------
    image : Nifti1Image, 3-D or 4-D
        Moving image; the frames of a 4-D image are resampled one by one.
    transforms : Transform or sequence of Transform
        Chain from points of the reference to points of the image, outermost first; may be empty.
    reference_image : Nifti1Image
        Gives shape (first three axes) and affine of the output.
    order : int
        Order of the spline: 0 nearest voxel (label maps), 1 linear, 3 cubic.
    cval : float
        Value where the chain leaves the image.

    Returns
    -------
    Nifti1Image
        Float32, or of the image's own type with order 0.

    Raises
    ------
    ValueError
        If the image is not 3-D or 4-D, or the reference has fewer than three axes.
    """
    if len(image.shape) not in (3, 4) or len(reference_image.shape) < 3:
        raise ValueError(
            "image must be 3-D or 4-D, on a reference of three axes or more, "
            f"got {image.shape} on {reference_image.shape}"
        )
    data = np.asanyarray(image.dataobj).reshape(*image.shape[:3], -1)
    frames = [_Frame.of(data[..., t], order) for t in range(data.shape[3])]
    shape = reference_image.shape[:3]
    output = np.empty((data.shape[3], *shape), dtype=data.dtype if order == 0 else np.float32)
    chain = (np.linalg.inv(image.affine), *as_chain(transforms), reference_image.affine)
    step = max(1, _POINTS_PER_SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        slab = slice(start, min(start + step, shape[0]))
        offset = from_matvec(np.eye(3), (start, 0, 0))
        ijk = map_points(chain, grid_points((slab.stop - start, *shape[1:]), offset))
        for frame, values in zip(frames, output, strict=True):
            values[slab] = frame.sample(ijk, order, cval)
    output = np.moveaxis(output, 0, -1).reshape(*shape, *image.shape[3:])
    return _on_grid_of(reference_image, output, image)


def resample_frames(
    image: nb.Nifti1Image,
    chains: Sequence[Sequence[Transform]],
    reference_image: nb.Nifti1Image,
    file: Path,
) -> Path:
    """
    Bring each frame of an image through a chain of its own, with one cubic interpolation.

    One frame is in memory at a time, as in `resample`; the result grows on disk.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K, T)
        Moving image.
    chains : sequence of sequence of Transform, length T
        For each frame, chain from points of the reference to points of the frame, outermost
        first.
    reference_image : Nifti1Image
        Gives shape (first three axes) and affine of the output.
    file : Path
        Destination, ``.nii`` or ``.nii.gz``.

    Returns
    -------
    Path
        The destination, float32.

    Raises
    ------
    ValueError
        If the image is not 4-D, or there is not one chain per frame.
    """
    if image.ndim != 4 or image.shape[3] != len(chains):
        raise ValueError(f"expected a 4-D image of {len(chains)} frames, got {image.shape}")
    shape = (*reference_image.shape[:3], len(chains))
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        # In the order of NIfTI, where a frame is one block.
        frames = Path(folder) / "frames"
        with frames.open("wb") as stream:
            # Space that is not there is told here; written to a map, it ends the process.
            os.posix_fallocate(stream.fileno(), 0, 4 * math.prod(shape))
        output = np.memmap(frames, np.float32, "r+", shape=shape, order="F")
        for index, chain in enumerate(chains):
            frame = nb.Nifti1Image(np.asanyarray(image.dataobj[..., index]), image.affine)
            output[..., index] = resample(frame, chain, reference_image).dataobj
        return save_image(_on_grid_of(reference_image, output, image), file)


@dataclass(frozen=True, eq=False)
class _Frame:
    """A volume ready for interpolation, with its range."""

    coefficients: np.ndarray
    lowest: float
    highest: float

    @classmethod
    def of(cls, volume: np.ndarray, order: int) -> "_Frame":
        if order == 0:
            return cls(np.ascontiguousarray(volume), volume.min(), volume.max())
        volume = np.array(volume, dtype=np.float32, order="C")
        np.nan_to_num(volume, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return cls(prefilter(volume, order), volume.min(), volume.max())

    def sample(self, ijk: np.ndarray, order: int, cval: float) -> np.ndarray:
        if order == 0:
            return interpolate(self.coefficients, ijk, order=0, cval=cval)
        values = interpolate(self.coefficients, ijk, order=order, cval=np.nan, is_prefiltered=True)
        np.clip(values, self.lowest, self.highest, out=values)
        values[np.isnan(values)] = cval
        return values


def _on_grid_of(
    reference_image: nb.Nifti1Image, data: np.ndarray, image: nb.Nifti1Image
) -> nb.Nifti1Image:
    """Image with the reference's orientation and the source's time step."""
    output = nb.Nifti1Image(data, reference_image.affine, dtype=data.dtype)
    _, qform_code = reference_image.get_qform(coded=True)
    _, sform_code = reference_image.get_sform(coded=True)
    output.set_qform(reference_image.affine, int(qform_code))
    output.set_sform(reference_image.affine, int(sform_code) or 1)
    _, time_unit = image.header.get_xyzt_units()
    output.header.set_xyzt_units("mm", time_unit)
    if data.ndim == 4:
        output.header.set_zooms((*output.header.get_zooms()[:3], image.header.get_zooms()[3]))
    return output
