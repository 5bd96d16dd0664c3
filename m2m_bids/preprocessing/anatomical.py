"""
Bias field, brain mask and tissue classes of a T1w image.

The default brain comes from the MNI152 template that nilearn ships (ICBM 2009a, nonlinear,
symmetric, skull-stripped), so that nothing is downloaded.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.preprocessing.ants_bridge import (
    Registration,
    Stage,
    finite_data,
    parallel_grid,
    register,
    resample_onto,
    same_grid,
    to_ants,
    working_copy,
)
from m2m_bids.preprocessing.mutual_information import MutualInformation, climb, pose_matrix
from m2m_bids.preprocessing.precomputed import check_transform
from m2m_bids.preprocessing.synthstrip import sha256_of, synthstrip_mask
from m2m_bids.preprocessing.tissues import fit_classes
from m2m_bids.spatial.conform import to_ras
from m2m_bids.spatial.images import load_image, require_3d
from m2m_bids.spatial.templates import embedded_template

# On simulated heads three levels (200, 100, 50 mm between control points) and a loose tolerance
# leave a quarter of the bias; a fourth level or a tight one follows anatomy and leaves more.
BIAS_SPACING_MM = 5.0
BIAS_SPLINE_MM = 200
BIAS_CONVERGENCE = {"iters": [50, 50, 50], "tol": 1e-3}
SEARCH_SPACING_MM = 8.0
WARP_SPACING_MM = 3.0
MASK_SPACING_MM = 1.5
TISSUE_SPACING_MM = 1.2
# A head has scalp and muscle in the shell around the brain, a stripped image has next to nothing.
STRIPPED_SHELL_FRACTION = 0.15
BY_TEMPLATE = "By registration of the MNI152 template (ICBM 2009a symmetric) with ANTs."
BY_SIGNAL = "Where the image has signal: it came without skull."
GIVEN = "Found by another program."

AFFINE_STAGE = Stage("Affine[0.1]", "MI[{},1,32,Regular,0.5]", "[100x50,1e-6,10]", "2x1", "2x1mm")
WARP_STAGE = Stage("SyN[0.3,3,0]", "MI[{},1,32]", "[30x15,1e-5,8]", "2x1", "1x0mm")


class BrainExtraction(NamedTuple):
    """
    Where the brain is.

    Attributes
    ----------
    mask : Nifti1Image, uint8
        1 in the brain with its ventricles and sulci, on the grid of the image.
    template2anat : ndarray, shape (4, 4)
        Affine that maps points of the MNI152 world to points of the image's world, RAS+ mm.
    is_skull_stripped : bool
        Whether the image came without skull.
    method : str
        How the mask was found, in words.
    """

    mask: nb.Nifti1Image
    template2anat: np.ndarray
    is_skull_stripped: bool
    method: str = GIVEN


@cache
def _template_copy(part: str, spacing_mm: float, *, dilation_mm: int = 0) -> nb.Nifti1Image:
    """Copy a part of the template to an isotropic grid; the mask may be dilated."""
    image = embedded_template(part)
    if not dilation_mm:
        return working_copy(image, spacing_mm)
    distance = ndimage.distance_transform_edt(np.asarray(image.dataobj) == 0)
    return working_copy(image, spacing_mm, data=(distance <= dilation_mm).astype(np.float32))


def load_t1w(file: Path | str) -> nb.Nifti1Image:
    """
    Load a T1w image, its axes reordered to RAS+ without interpolation.

    Parameters
    ----------
    file : Path or str

    Returns
    -------
    Nifti1Image, shape (I, J, K)

    Raises
    ------
    ImageError
        If the file cannot be read, the image is not 3-D or has no signal; the message names it.
    """
    image = require_3d(load_image(file), file)
    image.set_filename(str(file))  # messages name it
    finite_data(image)
    return to_ras(image)


def correct_bias_field(
    image: nb.Nifti1Image, mask: nb.Nifti1Image | None = None
) -> nb.Nifti1Image:
    """
    Divide an image by its smooth bias field, found by N4 [Tustison et al., IEEE TMI 2010].

    The field is estimated on every fifth millimetre (sampled, not smoothed: N4 sharpens the
    histogram, which smoothing would blur) and evaluated at every voxel. Its geometric mean is 1 in
    the region of the estimate, so that intensities keep their scale. Negative voxels become 0.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        T1w image.
    mask : Nifti1Image, optional
        Where to estimate the field, on the grid of ``image``. Without it, in the whole head,
        which was the more accurate way on simulated heads and is the recommended one.

    Returns
    -------
    Nifti1Image
        float32 image on the same grid.

    Raises
    ------
    ImageError
        If the image is not 3-D or has no signal, or if the mask is empty or on another grid.
    """
    import ants

    data = np.maximum(finite_data(image), 0)
    shape, affine = parallel_grid(image.shape, image.affine, BIAS_SPACING_MM)
    coarse = resample_onto(data, image.affine, shape, affine)
    if mask is None:
        region = coarse > 0.1 * np.percentile(data[data > 0], 95)
        opened = ndimage.binary_opening(region)
        region = opened if opened.any() else region
    else:
        inside = same_grid(mask, image).astype(np.float32)
        region = (resample_onto(inside, image.affine, shape, affine) > 0.5) & (coarse > 0)
    field = ants.n4_bias_field_correction(
        to_ants(nb.Nifti1Image(coarse, affine)),
        mask=to_ants(nb.Nifti1Image(region.astype(np.float32), affine)),
        shrink_factor=1,
        convergence=BIAS_CONVERGENCE,
        spline_param=BIAS_SPLINE_MM,
        return_bias_field=True,
    )
    log_field = np.log(np.maximum(field.numpy(), 1e-3))
    log_field -= log_field[region].mean()
    data /= np.exp(resample_onto(log_field, affine, image.shape, image.affine))
    return nb.Nifti1Image(data, image.affine)


def extract_brain(
    image: nb.Nifti1Image,
    *,
    source: Literal["auto", "template", "skip", "synthstrip"] = "auto",
    synthstrip_model: Path | str | None = None,
    random_seed: int = 0,
    n_threads: int = 0,
) -> BrainExtraction:
    """
    Find the brain in a T1w image with or without skull, neck and face.

    Without SynthStrip, the template is searched in the image by mutual information over many
    poses, refined by an affine and a coarse SyN registration [Avants et al., Med Image Anal 2008],
    and its mask brought to the image and cleaned. An image that came skull-stripped keeps its own
    outline.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        T1w image, bias-corrected or not. Its header may be off by several centimetres.
    source : {"auto", "template", "skip", "synthstrip"}
        Tell from the image whether it came without skull, or take it that it has one, or that it
        has none: its mask is then where it has signal. "auto" is by SynthStrip where its model is
        given, "synthstrip" always, also for images without skull.
    synthstrip_model : Path or str, optional
        Weights of SynthStrip, as of `m2m_bids.preprocessing.synthstrip.load_synthstrip`.
    n_threads : int
        Threads of SynthStrip; 0 leaves them as they are.
    random_seed : int
        Seed of ANTs. The template's mask repeats exactly on one ITK thread, to a Dice of 0.998 on
        two.

    Returns
    -------
    BrainExtraction
        Mask and affine to the template.

    Raises
    ------
    ImageError
        If the image is not 3-D or has no signal, or SynthStrip finds no brain.
    SynthStripError
        If SynthStrip is asked for, and its network or weights are missing.
    """
    data = _clipped(image)
    if source == "synthstrip" or (source == "auto" and synthstrip_model is not None):
        if synthstrip_model is None:
            raise ValueError("source='synthstrip' needs synthstrip_model, a file of its weights")
        mask = synthstrip_mask(image, synthstrip_model, n_threads=n_threads)
        brain = align_template(image, mask, random_seed=random_seed)
        if brain.is_skull_stripped and source == "auto":
            return brain._replace(mask=_signal_mask(image, data), method=BY_SIGNAL)
        return brain._replace(method=f"By SynthStrip, weights {sha256_of(synthstrip_model)}.")
    moving = working_copy(image, WARP_SPACING_MM, data=data)
    fixed, options = _template_brain(random_seed)
    affine = _template_affine(image, data, random_seed)
    if source == "skip" or (source == "auto" and _is_stripped(moving, affine)):
        return BrainExtraction(_signal_mask(image, data), affine, True, BY_SIGNAL)
    short = AFFINE_STAGE._replace(convergence="[20x10,1e-6,10]")
    result = register(fixed, moving, [short, WARP_STAGE], fixed2moving=affine, **options)
    grid = working_copy(image, MASK_SPACING_MM, data=data)
    brain = _clean(_warped_mask(result, fixed.affine, grid))
    soft = resample_onto(brain, grid.affine, image.shape, image.affine, order=1)
    return BrainExtraction(_as_mask(soft > 0.5, image), affine, False, BY_TEMPLATE)


def align_template(
    image: nb.Nifti1Image, mask: nb.Nifti1Image, *, random_seed: int = 0
) -> BrainExtraction:
    """
    Register the template to a brain whose mask is known, by an affine.

    This is the first part of `extract_brain`, inside of the mask; nothing is warped.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        T1w image.
    mask : Nifti1Image
        Brain mask on its grid.
    random_seed : int
        Seed of ANTs.

    Returns
    -------
    BrainExtraction
        The given mask, the affine, and whether the image came without skull.

    Raises
    ------
    ImageError
        If the image is not 3-D or has no signal, or the mask is empty or on another grid.
    """
    inside = same_grid(mask, image)
    data = _clipped(image)
    affine = _template_affine(image, data * inside, random_seed)
    return BrainExtraction(mask, affine, is_stripped(image, affine))


def affine_of_transform(file: Path | str, mask: nb.Nifti1Image) -> np.ndarray:
    """
    Fit an affine to a transform from the template to a T1w image, over the template's brain.

    Parameters
    ----------
    file : Path or str
        ITK transform (``.h5`` or ``.txt``) that maps points of MNI space to points of the image,
        as ``from-T1w_to-MNI*_mode-image_xfm`` does.
    mask : Nifti1Image
        Brain mask of the image, to check against.

    Returns
    -------
    ndarray, shape (4, 4)
        template2anat, least squares.

    Raises
    ------
    ImageError
        As `m2m_bids.preprocessing.precomputed.check_transform`.
    ValueError
        If the file cannot be read.
    """
    points, mapped = check_transform(file, _template_copy("mask", 4.0), mask)
    homogeneous = np.column_stack([points, np.ones(len(points))])
    affine = np.eye(4)
    affine[:3] = np.linalg.lstsq(homogeneous, mapped, rcond=None)[0].T
    return affine


def is_stripped(image: nb.Nifti1Image, template2anat: np.ndarray) -> bool:
    """
    Tell whether a T1w image came without skull: whether the shell around its brain is dark.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        T1w image.
    template2anat : ndarray, shape (4, 4)
        Affine that maps points of the MNI152 world to points of the image's.
    """
    data = _clipped(image)
    return _is_stripped(working_copy(image, WARP_SPACING_MM, data=data), template2anat)


def _clipped(image: nb.Nifti1Image) -> np.ndarray:
    """Return data without negative and very bright voxels, (I, J, K)."""
    data = np.maximum(finite_data(image), 0)
    return np.minimum(data, np.percentile(data[data > 0], 99.5))


def _template_brain(random_seed: int) -> tuple[nb.Nifti1Image, dict[str, Any]]:
    """Template to register, and the options of it: the region that counts, and the seed."""
    region = _template_copy("mask", WARP_SPACING_MM, dilation_mm=5)
    region = nb.Nifti1Image(np.rint(np.asarray(region.dataobj)), region.affine)
    fixed = _template_copy("t1", WARP_SPACING_MM)
    return fixed, {"fixed_mask": region, "random_seed": random_seed}


def _template_affine(image: nb.Nifti1Image, data: np.ndarray, random_seed: int) -> np.ndarray:
    """Search the template in the data of an image; return the affine template2anat, (4, 4)."""
    start = _find_template(working_copy(image, SEARCH_SPACING_MM * 0.75, data=data))
    moving = working_copy(image, WARP_SPACING_MM, data=data)
    fixed, options = _template_brain(random_seed)
    return register(fixed, moving, [AFFINE_STAGE], fixed2moving=start, **options).fixed2moving


def _find_template(image: nb.Nifti1Image) -> np.ndarray:
    """Search for the template brain in a head; return the affine template2anat, (4, 4)."""
    fixed = _template_copy("t1", SEARCH_SPACING_MM)
    region = np.asarray(_template_copy("mask", SEARCH_SPACING_MM, dilation_mm=6).dataobj) > 0.5
    points = nb.affines.apply_affine(fixed.affine, np.argwhere(region))
    centre = points.mean(axis=0)
    data = np.asarray(image.dataobj)
    score = MutualInformation(points, np.asarray(fixed.dataobj)[region], data, image.affine)
    shift = nb.affines.apply_affine(image.affine, ndimage.center_of_mass(data)) - centre
    # The neck draws the centre of mass down and the face forward.
    poses = [
        np.concatenate([np.add(shift, (0, y, z)), [np.deg2rad(pitch), 0, 0, scale]])
        for z in (-20, 0, 20, 40, 60)
        for y in (-20, 0, 20)
        for pitch in (-30, 0, 30)
        for scale in (-0.1, 0.1)
    ]
    poses.sort(key=lambda pose: -score(pose_matrix(pose, centre)))
    found = [climb(score, pose, centre, n_evaluations=500) for pose in poses[:8]]
    return pose_matrix(max(found, key=lambda item: item[1])[0], centre)


def _is_stripped(image: nb.Nifti1Image, template2anat: np.ndarray) -> bool:
    """Say whether the shell 4-14 mm outside the template's upper brain is almost dark."""
    brain = _template_copy("mask", 4.0)
    inside = np.asarray(brain.dataobj) > 0.5
    distance_mm = 4.0 * ndimage.distance_transform_edt(~inside)
    points = [
        nb.affines.apply_affine(brain.affine, np.argwhere(part))
        for part in ((distance_mm > 4) & (distance_mm < 14), inside)
    ]
    shell, core = [
        ndimage.map_coordinates(
            np.asarray(image.dataobj),
            nb.affines.apply_affine(np.linalg.inv(image.affine) @ template2anat, part).T,
            order=1,
        )
        for part in (points[0][points[0][:, 2] > 0], points[1])
    ]
    return bool(np.mean(shell > 0.15 * np.median(core)) < STRIPPED_SHELL_FRACTION)


def _signal_mask(image: nb.Nifti1Image, data: np.ndarray) -> nb.Nifti1Image:
    """Outline a skull-stripped image: largest part with signal, holes filled."""
    signal = data > 0.02 * np.percentile(data[data > 0], 90)
    return _as_mask(ndimage.binary_fill_holes(_largest(signal)), image)


def _warped_mask(
    result: Registration, template_affine: np.ndarray, grid: nb.Nifti1Image
) -> np.ndarray:
    """Bring the template's brain mask to a working copy; soft values in [0, 1], (I, J, K)."""
    ijk = np.indices(grid.shape, dtype=np.float32).reshape(3, -1)

    def transform(matrix, points):
        return matrix[:3, :3].astype(np.float32) @ points + matrix[:3, 3:].astype(np.float32)

    points = transform(np.linalg.inv(result.fixed2moving) @ grid.affine, ijk)
    voxels = transform(np.linalg.inv(template_affine), points)
    for axis in range(3):
        offset = result.inverse_displacement_mm[..., axis]
        points[axis] += ndimage.map_coordinates(offset, voxels, order=1)
    mask = embedded_template("mask")
    voxels = transform(np.linalg.inv(mask.affine), points)
    soft = ndimage.map_coordinates(np.asarray(mask.dataobj), voxels, order=1)
    return soft.reshape(grid.shape)


def _clean(soft: np.ndarray) -> np.ndarray:
    """Drop what hangs on by a thin bridge, fill holes and smooth; soft values, (I, J, K)."""
    mask = soft > 0.5
    depth = MASK_SPACING_MM * ndimage.distance_transform_edt(mask)
    core = _largest(depth > 4.0)
    reach = MASK_SPACING_MM * ndimage.distance_transform_edt(~core)
    mask &= reach < 6.0
    mask = ndimage.binary_fill_holes(mask)
    return ndimage.gaussian_filter(mask.astype(np.float32), 1.5 / MASK_SPACING_MM)


def _largest(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected part of a mask."""
    labels, n_labels = ndimage.label(mask)
    if n_labels <= 1:
        return mask
    return labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1


def _as_mask(mask: np.ndarray, image: nb.Nifti1Image) -> nb.Nifti1Image:
    """Wrap a boolean array as a uint8 image on the grid of another image."""
    return nb.Nifti1Image(mask.astype(np.uint8), image.affine)


class Tissues(NamedTuple):
    """
    The tissues of a brain, on the grid of its T1w image.

    Attributes
    ----------
    labels : Nifti1Image, uint8
        The most probable tissue: 0 outside, 1 GM, 2 WM, 3 CSF (the order of BIDS).
    probabilities : tuple of Nifti1Image, float32
        Of GM, WM and CSF: posterior, 1 together in the brain, 0 outside.
    """

    labels: nb.Nifti1Image
    probabilities: tuple[nb.Nifti1Image, ...]


def segment_tissues(
    image: nb.Nifti1Image, mask: nb.Nifti1Image, template2anat: np.ndarray | None = None
) -> Tissues:
    """
    Find grey matter, white matter and cerebrospinal fluid inside a brain mask.

    A mixture of three Gaussians with a Markov random field, fitted by expectation maximisation on
    a copy no finer than 1.2 mm; see `m2m_bids.preprocessing.tissues.fit_classes`.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K)
        Bias-corrected T1w image.
    mask : Nifti1Image
        Brain mask on the grid of ``image``.
    template2anat : ndarray, shape (4, 4), optional
        Affine that maps points of the MNI152 world to the image's world, as `extract_brain`
        gives it. With it, the template's tissue maps are a weak prior (they help to tell deep grey
        matter from white matter, which is little brighter); without it, intensities decide alone.

    Returns
    -------
    Tissues

    Raises
    ------
    ImageError
        If the image has no signal, or the mask is empty or on another grid.
    """
    inside = same_grid(mask, image)
    data = finite_data(image)
    box = tuple(slice(max(0, i.min() - 2), i.max() + 3) for i in np.nonzero(inside))
    affine = image.affine @ nb.affines.from_matvec(np.eye(3), [part.start for part in box])
    cropped = nb.Nifti1Image(data[box] * inside[box], affine)
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    spacing_mm = max(TISSUE_SPACING_MM, float(zooms.min()))
    grid = working_copy(cropped, spacing_mm, data=data[box])
    grid_mask = resample_onto(
        inside[box].astype(np.float32), affine, grid.shape, grid.affine, order=1
    )
    fit_mask = grid_mask > 0.5
    prior = None if template2anat is None else _tissue_prior(grid, fit_mask, template2anat)
    posterior = fit_classes(np.asarray(grid.dataobj), fit_mask, prior, spacing_mm=spacing_mm)
    fine = np.stack(
        [resample_onto(part, grid.affine, inside[box].shape, affine) for part in posterior]
    )
    # The coarse copy ends within the brain here and there: what is left of a voxel is all of it,
    # and where nothing is left the tissues at the rim, grey matter, are taken.
    fine[0] += fine.sum(axis=0) <= 0
    fine *= inside[box] / fine.sum(axis=0)
    images = []
    for part in (np.where(inside[box], np.argmax(fine, axis=0) + 1, 0).astype(np.uint8), *fine):
        whole = np.zeros(image.shape, dtype=part.dtype)
        whole[box] = part
        images.append(nb.Nifti1Image(whole, image.affine))
    return Tissues(images[0], tuple(images[1:]))


def _tissue_prior(grid: nb.Nifti1Image, mask: np.ndarray, template2anat: np.ndarray) -> np.ndarray:
    """Bring the template's tissue maps into a mask; return probabilities, (3, n_voxels)."""
    points = np.linalg.inv(template2anat) @ grid.affine
    parts = []
    for name in ("gm", "wm"):
        part = _template_copy(name, 2.0)
        voxels = nb.affines.apply_affine(np.linalg.inv(part.affine) @ points, np.argwhere(mask))
        parts.append(ndimage.map_coordinates(np.asarray(part.dataobj), voxels.T, order=1))
    grey, white = np.clip(parts, 0, 1)
    return np.stack([grey, white, np.clip(1 - grey - white, 0, 1)])
