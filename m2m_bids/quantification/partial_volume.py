r"""
Correction for partial volume effects: geometric transfer matrix, and region-based voxelwise.

A scan is taken for the true image blurred by a Gaussian point spread function h, and the true
image for one of uniform regions, :math:`\sum_j T_j f_j`, where f are the fractions of the voxels
that belong to a region, with all that is in none as a further region.

- GTM (Rousset et al., J Nucl Med 1998): the means that are seen in the regions are
  :math:`m_i = \sum_j G_{ij} T_j` with
  :math:`G_{ij} = \sum_x f_i (f_j * h) / \sum_x f_i`, which is solved for T.
- RBV (Thomas et al., Eur J Nucl Med Mol Imaging 2011): with :math:`s = \sum_j T_j f_j` from GTM,
  the corrected image is the scan times :math:`s / (s * h)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nb
import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage, sparse

from m2m_bids.quantification.smoothing import voxel_sigmas
from m2m_bids.spatial.fields import grid_points
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.interpolation import interpolate
from m2m_bids.spatial.transforms import Transform, as_chain, map_points

_TRUNCATE = 4.0  # of the Gaussian, in standard deviations
_MAX_SUBDIVISION = 4
# The mean of what is in no region is taken where the regions spill into it, by more than this.
_MIN_SPILL = 0.01
_MAX_CONDITION = 1e4


@dataclass(frozen=True, eq=False)
class RegionFractions:
    """
    Fractions of the voxels of a scan that belong to regions.

    The box is parallel to the scan's grid, holds all regions and what they spill into, and may
    reach beyond the scan's field of view.

    Attributes
    ----------
    labels : tuple of int
        Labels of the regions, ascending.
    fractions : sparse matrix, shape (R, I * J * K)
        Of the voxels of the box.
    start : tuple of int
        First voxel of the box on the scan's grid; may be negative.
    shape : tuple of int
        Of the box.
    """

    labels: tuple[int, ...]
    fractions: sparse.csr_matrix
    start: tuple[int, int, int]
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Corrected:
    """
    Result of a correction.

    Attributes
    ----------
    labels : tuple of int
        Labels of the regions, ascending.
    values : ndarray, shape (T, R)
        Corrected mean of each region and frame (GTM); not a number for a region that is nowhere
        in the field of view.
    background : ndarray, shape (T,)
        The same of what is in no region.
    image : Nifti1Image or None
        Corrected image (RBV) on the grid of the scan.
    """

    labels: tuple[int, ...]
    values: np.ndarray
    background: np.ndarray
    image: nb.Nifti1Image | None


def region_fractions(
    labels: nb.Nifti1Image,
    scan: nb.Nifti1Image,
    scan2labels: Transform | Sequence[Transform],
    fwhm_mm: float | tuple[float, ...],
) -> RegionFractions:
    """
    Carry labels to a scan as fractions of its voxels.

    Voxels of the scan are divided into parts not larger than voxels of the labels, or in four
    along an axis at most, and the labels at their centres are counted.

    Parameters
    ----------
    labels : Nifti1Image, 3-D
        Labels on their own grid, of an integer type; 0 is no region.
    scan : Nifti1Image
        Gives the grid.
    scan2labels : Transform or sequence of Transform
        Chain from points of the scan to points of the labels, outermost first.
    fwhm_mm : float or tuple of 3 floats
        Width of the point spread function, which says how far regions spill.

    Returns
    -------
    RegionFractions

    Raises
    ------
    ImageError
        If no label is in or near the field of view of the scan.
    """
    margin = np.ceil(_TRUNCATE * voxel_sigmas(fwhm_mm, scan.affine)).astype(int) + 1
    chain = (np.linalg.inv(labels.affine), *as_chain(scan2labels), scan.affine)
    data = np.asanyarray(labels.dataobj)
    start, shape = _box(data, chain, np.array(scan.shape[:3]), margin)
    numbers, columns = np.unique(data, return_inverse=True)
    columns = columns.reshape(data.shape).astype(np.int32)
    is_region = numbers != 0
    spacing = [np.linalg.norm(image.affine[:3, :3], axis=0) for image in (scan, labels)]
    n_parts = np.clip(np.ceil(spacing[0] / spacing[1].min()), 1, _MAX_SUBDIVISION).astype(int)
    outside = np.searchsorted(numbers, 0) if (numbers == 0).any() else -1
    n_voxels = int(np.prod(shape))
    total = sparse.csr_matrix((len(numbers), n_voxels))
    for part in np.ndindex(*n_parts):
        offset = (np.array(part) + 0.5) / n_parts - 0.5
        ijk = map_points(chain, grid_points(shape, from_matvec(np.eye(3), start + offset)))
        rows = interpolate(columns, ijk, order=0, cval=outside).ravel()
        inside = np.flatnonzero(rows >= 0)
        ones = np.ones(len(inside), np.float32)
        total = total + sparse.csr_matrix((ones, (rows[inside], inside)), total.shape)
    fractions = (total[is_region] / np.prod(n_parts)).tocsr()
    return RegionFractions(
        tuple(numbers[is_region].tolist()), fractions, tuple(start.tolist()), tuple(shape.tolist())
    )


def correct(
    scan: nb.Nifti1Image,
    regions: RegionFractions,
    fwhm_mm: float | tuple[float, ...],
    *,
    voxelwise: bool,
) -> Corrected:
    """
    Correct a scan for partial volume effects.

    Parameters
    ----------
    scan : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        Scan on its native grid; each frame is corrected.
    regions : RegionFractions
        As `region_fractions` gives them for this scan and width.
    fwhm_mm : float or tuple of 3 floats
        Full width at half maximum of the point spread function: of all axes, or of the one that
        goes most to the right, to the front, and upwards.
    voxelwise : bool
        Whether the corrected image is made as well (RBV).

    Returns
    -------
    Corrected

    Raises
    ------
    ImageError
        If no region is in the field of view, or the regions cannot be told apart at this width.
    """
    sigmas = voxel_sigmas(fwhm_mm, scan.affine)
    data = np.asanyarray(scan.dataobj).reshape(*scan.shape[:3], -1)
    inside, native = _overlap(regions, data.shape[:3])
    seen = np.zeros(regions.shape, bool)
    seen[inside] = True
    # Regions that were not scanned count as background: nothing is known of them.
    weights = regions.fractions.multiply(seen.ravel()).tocsr()
    is_there = np.asarray(weights.sum(axis=1)).ravel() > 0
    if not is_there.any():
        raise ImageError("no region is in the field of view of the scan; check the alignment")
    kept = regions.fractions[is_there]
    matrix, background = _transfer_matrix(kept, weights[is_there], seen, sigmas)
    seen_means = np.empty((len(matrix), data.shape[3]))
    # One frame at a time, as a dynamic scan is large.
    for frame in range(data.shape[3]):
        observed = np.zeros(regions.shape)
        values = data[(*native, frame)]
        observed[inside] = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        seen_means[:, frame] = _weighted_means(weights[is_there], background, observed)
    if np.linalg.cond(matrix) > _MAX_CONDITION:
        raise ImageError(
            f"{matrix.shape[0] - 1} regions cannot be told apart at a resolution of {fwhm_mm} mm;"
            " give a smaller --psf-fwhm, or labels of fewer regions"
        )
    solved = np.linalg.solve(matrix, seen_means)
    values = np.full((data.shape[3], len(regions.labels)), np.nan)
    values[:, is_there] = solved[:-1].T
    image = None
    if voxelwise:
        corrected = np.array(data, dtype=np.float32)
        for frame, of_frame in enumerate(solved.T):
            ratio = _ratio(kept, of_frame, regions.shape, sigmas)
            corrected[(*native, frame)] *= ratio[inside].astype(np.float32)
        header = scan.header.copy()
        header.set_data_dtype(np.float32)
        image = nb.Nifti1Image(corrected.reshape(scan.shape), scan.affine, header)
    return Corrected(regions.labels, values, solved[-1], image)


def _transfer_matrix(
    fractions: sparse.csr_matrix, weights: sparse.csr_matrix, seen: np.ndarray, sigmas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Geometric transfer matrix, the background last, and the weights of the background."""
    n_regions = fractions.shape[0]
    shares = np.zeros((n_regions + 1, n_regions + 1))
    total = 1 - np.asarray(fractions.sum(axis=0)).reshape(seen.shape)
    spill = _blur(1 - total, sigmas)
    background = (total * (seen & (spill > _MIN_SPILL))).ravel()
    for column in range(n_regions):
        fraction = fractions[[column]].toarray().reshape(seen.shape)
        blurred = _blur(fraction, sigmas).ravel()
        shares[:-1, column] = weights @ blurred
        shares[-1, column] = background @ blurred
    sums = np.append(np.asarray(weights.sum(axis=1)).ravel(), background.sum())
    if sums[-1] == 0:
        sums[-1] = 1.0  # the scan shows regions only
    matrix = shares / sums[:, None]
    # A blurred whole is one everywhere.
    matrix[:, -1] = 1 - matrix[:, :-1].sum(axis=1)
    return matrix, background


def _weighted_means(
    weights: sparse.csr_matrix, background: np.ndarray, observed: np.ndarray
) -> np.ndarray:
    """Mean of a frame in each region, and in the background last."""
    values = observed.ravel()
    sums = np.asarray(weights.sum(axis=1)).ravel()
    of_background = background @ values / max(background.sum(), np.finfo(float).tiny)
    return np.append((weights @ values) / sums, of_background)


def _ratio(
    fractions: sparse.csr_matrix, values: np.ndarray, shape: tuple[int, ...], sigmas: np.ndarray
) -> np.ndarray:
    """Divide the true image of a frame by the blurred one, as GTM has them; 1 if unknown."""
    # Noise can make values of GTM negative, which no activity is.
    values = np.maximum(values, 0)
    # The background has no border in the box, so that it is taken out before blurring.
    above = (fractions.T @ (values[:-1] - values[-1])).reshape(shape)
    true, blurred = above + values[-1], _blur(above, sigmas) + values[-1]
    ratio = np.ones(shape)
    return np.divide(true, blurred, out=ratio, where=blurred > 1e-6 * values.max())


def _blur(data: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Blur what is zero outside of the box."""
    return ndimage.gaussian_filter(data.astype(float), sigmas, mode="constant", truncate=_TRUNCATE)


def _box(
    labels: np.ndarray, chain: Sequence[Transform], shape: np.ndarray, margin: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find where a padded grid meets labels, by its centres; start and shape with a margin."""
    ijk = map_points(chain, grid_points(shape + 2 * margin, from_matvec(np.eye(3), -margin)))
    found = np.nonzero(interpolate(labels, ijk, order=0, cval=0))
    if not found[0].size:
        raise ImageError("no label is in the field of view of the scan; check the alignment")
    low, high = (np.array([f(axis) for axis in found]) for f in (np.min, np.max))
    return low - 2 * margin, high - low + 1 + 2 * margin


def _overlap(
    regions: RegionFractions, shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the box and the scan overlap: on the box, and on the scan."""
    low = [max(0, start) for start in regions.start]
    high = [
        max(first, min(size, start + extent))
        for first, size, start, extent in zip(
            low, shape, regions.start, regions.shape, strict=True
        )
    ]
    native = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = tuple(
        slice(a - start, b - start) for a, b, start in zip(low, high, regions.start, strict=True)
    )
    return inside, native
