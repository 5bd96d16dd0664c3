"""Reference regions of SUVR, from the labels of a T1w."""

from typing import Literal, NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.quantification.names import Scheme

ReferenceRegion = Literal[
    "cerebellar-grey", "whole-cerebellum", "brainstem", "eroded-white-matter"
]
EROSION_MM = 4.0
"""Depth of eroded white matter: what is nearer to other tissue is left out."""
MIN_COVERAGE = 0.9
"""Share of a reference region that must be in the scan's field of view."""
MIN_VOLUME_MM3 = 500.0

_LABELS: dict[str, tuple[int, ...]] = {
    "cerebellar-grey": (8, 47),
    "whole-cerebellum": (7, 8, 46, 47),
    "brainstem": (16,),
    "eroded-white-matter": (2, 41),
}
_PONS = 174
# White matter that wmparc tells apart.
_WM_PARCELS = (3000, 5002)


class NoReferenceError(ValueError):
    """There is no such region; the message is the reason, for a log and a sidecar."""


class Reference(NamedTuple):
    """
    A reference region.

    Attributes
    ----------
    mask : ndarray of bool, shape (I, J, K)
        Its voxels.
    description : str
        What it is, with the labels that it is made of.
    """

    mask: np.ndarray
    description: str


def reference_region(labels: nb.Nifti1Image, scheme: Scheme, region: ReferenceRegion) -> Reference:
    """
    Find a reference region among labels.

    The brainstem is FreeSurfer's label 16, which is midbrain, pons and medulla together; where the
    labels tell the substructures apart, it is the pons alone (174).

    Parameters
    ----------
    labels : Nifti1Image, 3-D
        Labels on the grid of the T1w.
    scheme : {"freesurfer", "tissues"}
        What they mean.
    region : str
        Name of the region.

    Returns
    -------
    Reference

    Raises
    ------
    NoReferenceError
        If the labels do not have it.
    """
    data = np.asanyarray(labels.dataobj)
    if scheme == "tissues":
        if region != "eroded-white-matter":
            raise NoReferenceError(
                f"the labels are tissues, in which the {region} cannot be told from the rest; "
                "give FreeSurfer's labels, or a mask with --suvr-mask"
            )
        return Reference(_eroded(data == 2, labels), f"white matter (label 2), {_EROSION_TEXT}")
    if region == "brainstem" and (data == _PONS).any():
        return Reference(data == _PONS, f"pons (label {_PONS})")
    wanted = _LABELS[region]
    mask = np.isin(data, wanted)
    listed = "labels " + ", ".join(map(str, wanted)) if len(wanted) > 1 else f"label {wanted[0]}"
    if region == "eroded-white-matter":
        mask |= (data >= _WM_PARCELS[0]) & (data <= _WM_PARCELS[1])
        mask, listed = _eroded(mask, labels), f"{listed}, or those of wmparc; {_EROSION_TEXT}"
    if region == "brainstem":
        listed += ", midbrain, pons and medulla together"
    if not mask.any():
        raise NoReferenceError(f"the labels have no {region} ({listed})")
    return Reference(mask, f"{region.replace('-', ' ')} ({listed})")


def reference_mean(image_data: np.ndarray, reference: Reference, is_seen: np.ndarray,
                   voxel_mm3: float) -> np.ndarray:  # fmt: skip
    """
    Average an image over the part of a reference region that was scanned.

    Parameters
    ----------
    image_data : ndarray, shape (I, J, K) or (I, J, K, T)
        Image on the grid of the region.
    reference : Reference
    is_seen : ndarray of bool, shape (I, J, K)
        Voxels in the field of view of the scan.
    voxel_mm3 : float
        Volume of a voxel.

    Returns
    -------
    ndarray, shape (T,)
        Mean of each frame, of which at least one is positive.

    Raises
    ------
    NoReferenceError
        If too little of the region is there or was scanned, or its mean is positive in no frame.
    """
    volume = np.count_nonzero(reference.mask) * voxel_mm3
    if volume < MIN_VOLUME_MM3:
        raise NoReferenceError(
            f"{reference.description}: {volume:.0f} mm3, expected at least {MIN_VOLUME_MM3:.0f}"
        )
    inside = reference.mask & is_seen
    coverage = np.count_nonzero(inside) / np.count_nonzero(reference.mask)
    if coverage < MIN_COVERAGE:
        raise NoReferenceError(
            f"{reference.description}: {100 * coverage:.0f} % is in the field of view of the "
            f"scan, expected at least {100 * MIN_COVERAGE:.0f} %"
        )
    means = image_data[inside].reshape(np.count_nonzero(inside), -1).mean(axis=0, dtype=float)
    if not (np.isfinite(means).all() and (means > 0).any()):
        raise NoReferenceError(f"{reference.description}: its mean is not positive")
    return means


_EROSION_TEXT = f"without what is within {EROSION_MM:g} mm of other tissue"


def _eroded(mask: np.ndarray, image: nb.Nifti1Image) -> np.ndarray:
    """Leave out what is near the border of a mask; voxels may have any size."""
    spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0)
    # Padded, since the border of the image is one too.
    depth_mm = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)
    return depth_mm[1:-1, 1:-1, 1:-1] > EROSION_MM
