"""Numbers of one registered scan, from its images alone.

Similarities are measured in the brain of the T1w on voxels of 2 mm, of the scan where its header
puts it (``initial``), after rigid alignment (``rigid``) and by the transform that was used (no
ending). What each number means, and when to worry, is in ``data/qc.json``.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import nibabel as nb
import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.stats import rankdata

from m2m_bids.quality.sides import compare_sides
from m2m_bids.spatial.conform import grid_with_spacing
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import Chain, map_points

SPACING_MM = 2.0
N_BINS = 32
GREY, WHITE = 1, 2
# Share of the brain whose gradients of the T1w are strongest: its edges.
EDGE_SHARE = 0.2

Numbers = dict[str, float]


class Anatomy(NamedTuple):
    """
    A T1w and what is known of it, on one grid.

    Parameters
    ----------
    t1w, mask, dseg : Nifti1Image
        Image, brain, and tissues: 1 grey matter, 2 white matter, 3 fluid.
    template2fixed : ndarray, shape (4, 4)
        Affine map from points of the symmetric template to points of the T1w, RAS+ mm.
    """

    t1w: nb.Nifti1Image
    mask: nb.Nifti1Image
    dseg: nb.Nifti1Image
    template2fixed: np.ndarray


def measure_scan(
    scan: nb.Nifti1Image,
    anatomy: Anatomy,
    *,
    modality: Literal["pet", "fa"],
    rigid: np.ndarray,
    used: Chain,
) -> Numbers:
    """
    Measure how a registered scan lies on its T1w.

    Parameters
    ----------
    scan : Nifti1Image, 3-D
        Static image on its native grid.
    anatomy : Anatomy
        What it was registered to.
    modality : {"pet", "fa"}
    rigid : ndarray, shape (4, 4)
        Rigid map from points of the T1w to points of the scan, RAS+ mm.
    used : tuple of transforms
        The chain that was used, from points of the T1w to points of the scan, outermost first.

    Returns
    -------
    dict of str to float
        Names of ``data/qc.json``; NaN where a number cannot be had.
    """
    grid = grid_with_spacing(anatomy.t1w, [SPACING_MM] * 3)
    t1w = _on(grid, anatomy.t1w, (), order=1)
    mask = _on(grid, anatomy.mask, (), order=0) > 0
    tissues = _on(grid, anatomy.dseg, (), order=0)
    own_brain = nb.Nifti1Image(scan_brain(scan, modality).astype(np.float32), scan.affine)
    numbers: Numbers = {}
    for ending, chain in {"_initial": (), "_rigid": (rigid,), "": used}.items():
        moved = _on(grid, scan, chain, order=1)
        overlap = dice(mask, _on(grid, own_brain, chain, order=1) > 0.5)
        numbers[f"brain_dice{ending}"] = overlap
        numbers[f"nmi{ending}"] = normalized_mutual_information(t1w[mask], moved[mask])
        numbers[f"edge_agreement{ending}"] = edge_agreement(t1w, moved, mask)
        if ending != "_initial":
            numbers[f"white_above_grey{ending}"] = probability_above(
                moved[mask & (tissues == WHITE)], moved[mask & (tissues == GREY)]
            )
    points = apply_affine(grid.affine, np.argwhere(mask))
    sides = compare_sides(
        scan,
        anatomy.dseg,
        anatomy.mask,
        fixed2moving=rigid,
        template2fixed=anatomy.template2fixed,
    )
    return {
        **numbers,
        "side_gap": sides.gap,
        # A deformable map fills what is missing with what is near.
        "fov_cut_percent": cut_percent(scan, map_points((rigid,), points)),
        "noise_percent": noise_percent(scan, np.asarray(own_brain.dataobj) > 0),
        **motion_by_header(rigid, points.mean(axis=0)),
    }


def _on(grid: nb.Nifti1Image, image: nb.Nifti1Image, chain: Sequence, *, order: int) -> np.ndarray:
    return np.asarray(resample(image, chain, grid, order=order).dataobj)


def scan_brain(scan: nb.Nifti1Image, modality: Literal["pet", "fa"]) -> np.ndarray:
    """
    Find the brain in a scan by the scan alone, roughly.

    Parameters
    ----------
    scan : Nifti1Image, shape (I, J, K)
    modality : {"pet", "fa"}
        FA maps are zero outside the brain; in PET it is the largest bright piece by Otsu's
        threshold.

    Returns
    -------
    ndarray of bool, shape (I, J, K)
    """
    from dipy.segment.threshold import otsu

    data = np.nan_to_num(np.asarray(scan.dataobj, dtype=np.float32))
    is_bright = data > 0
    if modality == "pet" and is_bright.any():
        top = np.percentile(data[is_bright], 99.5)
        is_bright = data > otsu(np.clip(data, 0, top))
    pieces, n_pieces = ndimage.label(is_bright)
    if n_pieces == 0:
        return is_bright
    sizes = np.bincount(pieces.ravel())[1:]
    return ndimage.binary_fill_holes(pieces == 1 + sizes.argmax())


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Dice overlap of two masks; NaN where both are empty."""
    total = first.sum() + second.sum()
    return float(2 * (first & second).sum() / total) if total else float("nan")


def normalized_mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """
    Return Studholme's normalised mutual information, (H(A) + H(B)) / H(A, B), 1 to 2.

    Parameters
    ----------
    first, second : ndarray, shape (N,)
        Values of two images at the same places; each is clipped to its 0.5th to 99.5th percentile.

    Returns
    -------
    float
        NaN where one of both is constant.
    """
    ranges = [np.percentile(values, [0.5, 99.5]) for values in (first, second)]
    if any(low == high for low, high in ranges):
        return float("nan")
    clipped = [np.clip(v, *r) for v, r in zip((first, second), ranges, strict=True)]
    joint, _, _ = np.histogram2d(*clipped, bins=N_BINS, range=ranges)
    joint /= joint.sum()
    return (_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))) / _entropy(joint)


def _entropy(probabilities: np.ndarray) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def edge_agreement(t1w: np.ndarray, moved: np.ndarray, mask: np.ndarray) -> float:
    """
    Compare the directions of edges: mean squared cosine between gradients of two images.

    Parameters
    ----------
    t1w, moved : ndarray, shape (I, J, K)
        On one grid with cubic voxels.
    mask : ndarray of bool, shape (I, J, K)
        Brain; its outer edge is left out.

    Returns
    -------
    float
        Over the fifth of the brain where the T1w's gradient is strongest: 1/3 for unrelated
        images, 1 for edges that are everywhere parallel, whatever their contrast. NaN without
        edges.
    """
    inside = ndimage.binary_erosion(mask, iterations=2)
    if not inside.any():
        return float("nan")
    first, second = (_gradients(image)[:, inside] for image in (t1w, moved))
    strength = np.linalg.norm(first, axis=0)
    is_edge = strength >= np.quantile(strength, 1 - EDGE_SHARE)
    lengths = strength * np.linalg.norm(second, axis=0)
    is_edge &= lengths > 0
    if not is_edge.any():
        return float("nan")
    cosines = (first * second).sum(axis=0)[is_edge] / lengths[is_edge]
    return float((cosines**2).mean())


def _gradients(image: np.ndarray) -> np.ndarray:
    orders = np.eye(3, dtype=int)
    return np.stack([ndimage.gaussian_filter(image, 1.0, order=order) for order in orders])


def probability_above(first: np.ndarray, second: np.ndarray) -> float:
    """Return how often a value of the first sample is above one of the second (AUC)."""
    if not (len(first) and len(second)):
        return float("nan")
    ranks = rankdata(np.concatenate((first, second)))[: len(first)]
    above = ranks.sum() - len(first) * (len(first) + 1) / 2
    return float(above / (len(first) * len(second)))


def cut_percent(scan: nb.Nifti1Image, points: np.ndarray) -> float:
    """
    Return the share of points that the scan's field of view leaves out, in percent.

    Parameters
    ----------
    scan : Nifti1Image, 3-D
        Its field of view is the box around all voxels that are not zero, as some are padded.
    points : ndarray, shape (N, 3)
        Points of the brain in the scan's world, mm.

    Returns
    -------
    float
    """
    corners = np.argwhere(np.nan_to_num(np.asarray(scan.dataobj)) != 0)
    if len(corners) == 0:
        return 100.0
    voxels = apply_affine(np.linalg.inv(scan.affine), points)
    is_inside = (voxels > corners.min(axis=0) - 0.5) & (voxels < corners.max(axis=0) + 0.5)
    return float(100 * (1 - is_inside.all(axis=1).mean()))


def noise_percent(scan: nb.Nifti1Image, brain: np.ndarray) -> float:
    """
    Estimate the noise of a scan, in percent of its median in the brain.

    Parameters
    ----------
    scan : Nifti1Image, 3-D
    brain : ndarray of bool
        On its grid.

    Returns
    -------
    float
        Standard deviation of voxels that neighbours do not explain: of second differences along
        each axis, by their median, so that edges do not count. Noise that is smoother than two
        voxels, as that of reconstructed PET is in part, is not seen. NaN without a brain.
    """
    data = np.nan_to_num(np.asarray(scan.dataobj, dtype=np.float64))
    level = np.median(data[brain]) if brain.any() else 0.0
    spreads = []
    for axis in range(3):
        if data.shape[axis] < 3:
            continue
        rolled = np.moveaxis(data, axis, 0)
        inside = np.moveaxis(brain, axis, 0)
        second = rolled[:-2] - 2 * rolled[1:-1] + rolled[2:]
        values = second[inside[:-2] & inside[1:-1] & inside[2:]]
        if len(values):
            # Independent noise of variance 1 has second differences of variance 6.
            spreads.append(1.4826 * np.median(np.abs(values)) / np.sqrt(6))
    if not spreads or level <= 0:
        return float("nan")
    # The axis of the largest: along the others noise may be correlated.
    return float(100 * max(spreads) / level)


def motion_by_header(rigid: np.ndarray, centre: np.ndarray) -> Numbers:
    """
    Say how far the scan's header was off.

    Parameters
    ----------
    rigid : ndarray, shape (4, 4)
        Linear map from points of the T1w to points of the scan.
    centre : ndarray, shape (3,)
        Centre of the brain, T1w mm.

    Returns
    -------
    dict of str to float
        ``header_shift_mm`` of the brain's centre, ``header_rotation_deg``.
    """
    left, _, right = np.linalg.svd(rigid[:3, :3])
    cosine = np.clip((np.trace(left @ right) - 1) / 2, -1, 1)
    shift = apply_affine(rigid, centre) - centre
    return {
        "header_shift_mm": float(np.linalg.norm(shift)),
        "header_rotation_deg": float(np.degrees(np.arccos(cosine))),
    }


def deformation_numbers(quality: Mapping[str, float | None]) -> Numbers:
    """
    Name the numbers of the deformable step as ``data/qc.json`` does.

    Parameters
    ----------
    quality : mapping
        Fields of `m2m_bids.api.Quality`; empty where there was no such step.

    Returns
    -------
    dict of str to float
        Empty where there was no such step.
    """
    names = {"disagreement_mm": "cycle_error_mm"}
    return {
        names.get(name, name): float(value) for name, value in quality.items() if value is not None
    }
