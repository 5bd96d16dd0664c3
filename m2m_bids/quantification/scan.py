"""Everything that is measured in a registered scan."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np

from m2m_bids.quantification.names import Scheme, region_names
from m2m_bids.quantification.reference import (
    NoReferenceError,
    Reference,
    ReferenceRegion,
    reference_mean,
    reference_region,
)
from m2m_bids.quantification.smoothing import smooth
from m2m_bids.quantification.statistics import (
    Regional,
    acquired_timing,
    frame_times,
    regional,
)
from m2m_bids.quantification.suv import NoSUVError, suv_scale, weight_in_kg
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import Transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantification:
    """
    What is known of a scan, and what is asked for.

    Parameters
    ----------
    scheme : {"freesurfer", "tissues"}
        What the labels mean.
    metadata : mapping
        BIDS fields of the scan.
    is_pet : bool
        Whether there can be SUV and SUVR.
    weight, weight_units, weight_source : Any, Any, str
        Weight of the body as the dataset has it; without a value the source is the reason.
    suvr_region : str or None
        Reference region by name.
    suvr_mask : Nifti1Image or None
        Reference region as a mask in the world of the T1w, instead of a name.
    suvr_mask_label : int or None
        Its label in that mask, FreeSurfer's; None for all that is in the mask.
    suvr_reason : str
        Why there is neither.
    labels_reason : str
        Why there are no labels, where there are none.
    smooth_fwhm_mm : sequence of float
        Widths of the kernels of smoothed copies, see `smoothed_copies`.
    """

    scheme: Scheme
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_pet: bool = True
    weight: Any = None
    weight_units: Any = None
    weight_source: str = ""
    suvr_region: ReferenceRegion | None = None
    suvr_mask: nb.Nifti1Image | None = None
    suvr_mask_label: int | None = None
    suvr_reason: str = ""
    labels_reason: str = ""
    smooth_fwhm_mm: Sequence[float] = ()


class Quantities(NamedTuple):
    """
    What was measured.

    Attributes
    ----------
    regional : Regional or None
        By regions; None without labels.
    times : tuple of lists, or None
        Starts and ends of the frames, s.
    images : dict of str to Nifti1Image
        Further images by their ``desc``.
    facts : dict of str to dict
        What sidecars say of each image, and under "stat" why what is not there is not, and what of
        the timing of the frames could not be used.
    """

    regional: Regional | None
    times: tuple[list[float], list[float]] | None
    images: dict[str, nb.Nifti1Image]
    facts: dict[str, dict[str, Any]]


def quantify(
    image: nb.Nifti1Image,
    labels: nb.Nifti1Image | None,
    is_seen: np.ndarray,
    scan: Quantification,
) -> Quantities:
    """
    Measure a scan in the regions of its T1w, and express it as SUV and SUVR where that can be.

    Parameters
    ----------
    image : Nifti1Image, shape (I, J, K) or (I, J, K, T)
        Scan on the grid of the T1w.
    labels : Nifti1Image, shape (I, J, K), or None
        Labels on that grid.
    is_seen : ndarray of bool, shape (I, J, K)
        Field of view of the scan, see `field_of_view`.
    scan : Quantification

    Returns
    -------
    Quantities
    """
    n_frames = int(np.prod(image.shape[3:]))
    timing = acquired_timing(scan.metadata, n_frames)
    images, facts, reasons = {}, {}, {}
    remarks = [text for text in (timing.starts_remark, timing.durations_remark) if text]
    if scan.is_pet and remarks:
        reasons["TimingRemarks"] = remarks
    measured = None
    if labels is None:
        reasons["StatisticsNotComputed"] = scan.labels_reason
    else:
        numbers = np.unique(np.asanyarray(labels.dataobj))
        measured = regional(
            image,
            labels,
            region_names(numbers.tolist(), scan.scheme),
            is_seen=is_seen,
            frame_weights=timing.durations_s if n_frames > 1 else None,
        )
    if scan.is_pet:
        scales = {
            "SUV": lambda: suv_factors(scan, n_frames),
            "SUVR": lambda: _suvr(image, labels, is_seen, scan),
        }
        for name, scale in scales.items():
            try:
                factors, said = scale()
                images[f"preproc{name}"], facts[f"preproc{name}"] = _scaled(image, factors), said
            except (NoSUVError, NoReferenceError) as error:
                reasons[f"{name}NotComputed"] = str(error)
                level = logging.WARNING if _is_expected(name, scan) else logging.INFO
                logger.log(level, "%s is not computed: %s", name, error)
    times = frame_times(scan.metadata, n_frames)
    return Quantities(measured, times, images, {**facts, "stat": reasons})


def smoothed_copies(
    images: Mapping[str, nb.Nifti1Image], widths_mm: Sequence[float], is_seen: np.ndarray
) -> Iterator[tuple[str, float, nb.Nifti1Image]]:
    """
    Smooth images with each of some kernels, one copy in memory at a time.

    Parameters
    ----------
    images : mapping of str to Nifti1Image, shape (I, J, K) or (I, J, K, T)
        Images by their ``desc``.
    widths_mm : sequence of float
        Full widths at half maximum.
    is_seen : ndarray of bool, shape (I, J, K)
        Field of view of the scan, see `field_of_view`.

    Yields
    ------
    str, float, Nifti1Image
        The ``desc`` of the image, the width, and the copy.
    """
    for width_mm in widths_mm:
        for desc, image in images.items():
            yield desc, width_mm, smooth(image, width_mm, is_seen)


def field_of_view(
    native: nb.Nifti1Image, transforms: Sequence[Transform], grid: nb.Nifti1Image
) -> np.ndarray:
    """
    Find which voxels of a grid a scan shows.

    Parameters
    ----------
    native : Nifti1Image
        Scan on its native grid.
    transforms : sequence of Transform
        Chain from points of the grid to points of the scan, outermost first.
    grid : Nifti1Image
        Gives shape and affine.

    Returns
    -------
    ndarray of bool, shape (I, J, K)
    """
    inside = nb.Nifti1Image(np.ones(native.shape[:3], np.uint8), native.affine)
    return np.asanyarray(resample(inside, transforms, grid, order=0).dataobj) > 0


def _is_expected(name: str, scan: Quantification) -> bool:
    """Tell whether a body weight, or a reference region, lets users expect SUV or SUVR."""
    if name == "SUV":
        return scan.weight is not None
    return scan.suvr_region is not None or scan.suvr_mask is not None


def suv_factors(scan: Quantification, n_frames: int) -> tuple[np.ndarray, dict[str, Any]]:
    """
    Find the factors from image values to SUV, and what sidecars say of them.

    Parameters
    ----------
    scan : Quantification
    n_frames : int
        Frames of the image.

    Raises
    ------
    NoSUVError
        If there is no body weight, or metadata that are needed are missing or contradict others.
    """
    if scan.weight is None:
        raise NoSUVError(scan.weight_source)
    try:
        weight_kg = weight_in_kg(scan.weight, scan.weight_units)
    except NoSUVError as error:
        raise NoSUVError(f"{error} ({scan.weight_source})") from error
    scale = suv_scale(scan.metadata, weight_kg, n_frames)
    corrected = {}
    if not scan.metadata["ImageDecayCorrected"]:
        start = scan.metadata["InjectionStart"]
        corrected = {"ImageDecayCorrected": True, "ImageDecayCorrectionTime": start}
    return scale.factors, {
        **corrected,
        "Units": "g/mL",
        "BodyWeight": weight_kg,
        "BodyWeightUnits": "kg",
        "BodyWeightSource": scan.weight_source,
        "SUVInjectedRadioactivity": scale.injected_bq,
        "SUVDecayConvention": scale.convention,
        "SUVScaleFactor": scale.factors.tolist(),
    }


def _suvr(
    image: nb.Nifti1Image, labels: nb.Nifti1Image | None, is_seen: np.ndarray, scan: Quantification
) -> tuple[np.ndarray, dict[str, Any]]:
    if scan.suvr_mask is not None:
        grid = nb.Nifti1Image(is_seen.astype(np.uint8), image.affine)
        reference = _reference_of_mask(scan.suvr_mask, scan.suvr_mask_label, grid)
    elif scan.suvr_region is not None and labels is None:
        raise NoReferenceError(scan.labels_reason)
    elif scan.suvr_region is not None:
        reference = reference_region(labels, scan.scheme, scan.suvr_region)
    else:
        raise NoReferenceError(scan.suvr_reason)
    voxel_mm3 = float(abs(np.linalg.det(image.affine[:3, :3])))
    means = reference_mean(np.asanyarray(image.dataobj), reference, is_seen, voxel_mm3)
    without = np.flatnonzero(means <= 0).tolist()
    factors = np.divide(1, means, out=np.full(len(means), np.nan), where=means > 0)
    return factors, {
        "Units": "unitless",
        **({"FramesWithoutSUVR": without} if without else {}),
        "ReferenceRegion": reference.description,
        "ReferenceRegionMean": means.tolist(),
        "ReferenceRegionVolume": float(np.count_nonzero(reference.mask & is_seen) * voxel_mm3),
        "ReferenceRegionVolumeUnits": "mm3",
    }


def _reference_of_mask(mask: nb.Nifti1Image, label: int | None, grid: nb.Nifti1Image) -> Reference:
    """Bring a mask, or a label of it, to a grid."""
    data = np.asanyarray(resample(mask, (), grid, order=0).dataobj)
    if label is None:
        return Reference(data > 0, "mask given with --suvr-mask")
    (name,) = region_names([label], "freesurfer").values()
    return Reference(data == label, f"{name.lower()} (label {label})")


def _scaled(image: nb.Nifti1Image, factors: np.ndarray) -> nb.Nifti1Image:
    """Multiply each frame by its factor."""
    scale = factors.astype(np.float32).reshape((-1,) if len(image.shape) > 3 else ())
    data = np.multiply(np.asanyarray(image.dataobj), scale, dtype=np.float32)
    header = image.header.copy()
    header.set_data_dtype(np.float32)
    return nb.Nifti1Image(data, image.affine, header)
