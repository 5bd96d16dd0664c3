"""What nodes use of memory, as it was measured; nodes that are not here keep what they declare."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
from nipype.interfaces.base import Undefined, isdefined
from nipype.pipeline.engine import Workflow

from m2m_bids.spatial.images import READ_ERRORS


class Need(NamedTuple):
    """
    Peak memory of a step in a process of its own, GB.

    Attributes
    ----------
    fixed : float
        Whatever the size of images is, to which the largest one of the others is added.
    of_t1w : float
        For each million voxels of the T1w.
    of_scan : float
        For each million values of the scan, of all its volumes.
    of_frames : float
        For each million voxels of the T1w, in each frame of the scan.
    """

    fixed: float
    of_t1w: float = 0.0
    of_scan: float = 0.0
    of_frames: float = 0.0


# Of a volume that a step of frames has nothing to do with but to read it.
UNUSED = Need(0.1, of_scan=0.005)
# By names of steps or of interfaces. From two sizes of images each, by tests/benchmarks/memory.py
# and SLURM's accounting; docs/cluster.md has the tables.
MEASURED = {
    "conform_t1w": Need(0.13, of_t1w=0.0135),
    "extract_brain": Need(0.66, of_t1w=0.011),
    "align_template": Need(0.71, of_t1w=0.013),
    "correct_bias": Need(0.31, of_t1w=0.019),
    "segment_tissues": Need(0.36, of_t1w=0.037),
    "draw_anatomy": Need(0.15, of_t1w=0.021),
    # Its network has a grid of its own.
    "register_m2m": Need(1.06),
    "resample_rigid": Need(0.25, of_t1w=0.005),
    "resample_m2m": Need(0.26, of_t1w=0.006),
    "draw_registration": Need(0.17, of_t1w=0.029),
    "measure_scan": Need(0.24, of_t1w=0.014),
    "place_labels": Need(0.11, of_t1w=0.016),
    "quantify_scan": Need(0.12, of_t1w=0.018),
    "quantify_scan, PET": Need(0.12, of_t1w=0.018, of_frames=0.0126),
    "quantify_scan, PET, smoothed": Need(0.12, of_t1w=0.018, of_frames=0.019),
    "static_reference": Need(0.12, of_scan=0.004),
    "estimate_motion": Need(0.32, of_scan=0.0024),
    "estimate_motion, 3-D": UNUSED,
    "align_frames": Need(0.175, of_scan=0.007),
    "align_frames, 3-D": UNUSED,
    # Onto grids of other spaces, of eight million voxels at most.
    "resample_scan": Need(0.27, of_t1w=0.004),
    "resample_t1w": Need(0.32, of_t1w=0.006),
    # On the grid of the embedded template, which is about that of the others of 1 mm.
    "normalize_t1w": Need(0.88, of_t1w=0.004),
    "make_grid": Need(0.3),
    "compose_xfms": Need(0.17),
    "compose_inverse_xfms": Need(0.17),
    **{f"resample_{key}": Need(0.27, of_t1w=0.004) for key in ("md", "ad", "rd")},
    "resample_frames": Need(0.25, of_frames=0.005),
    "resample_frames, 3-D": UNUSED,
    "resample_corrected": Need(0.25, of_t1w=0.005, of_frames=0.005),
    "draw_suvr": Need(0.16, of_t1w=0.021, of_frames=0.007),
    "correct_pv": Need(0.18, of_t1w=0.0255, of_scan=0.0155),
    # Of a fitted map, whose scan is the diffusion image; of one that was given.
    "clean_fa": Need(0.12),
    "clean_fa, 3-D": Need(0.11, of_scan=0.013),
    "fit_tensor": Need(0.28, of_scan=0.0112),
    "fit_tensor, raw": Need(0.43, of_scan=0.0112),
    # By interface: a step of two names, and those of `evaluate` and `train`, whose names have a
    # method in them or two meanings.
    "RegisterRigid": Need(0.37, of_t1w=0.002),
    "MeasureRegistration": Need(0.325, of_t1w=0.0125),
    "MoveImages": Need(0.2, of_t1w=0.009),
    "PrepareLabels": Need(0.205, of_t1w=0.0075),
    "SaveScanFiles": Need(0.1, of_t1w=0.0042),
    "SaveTrainingScan": Need(0.11, of_t1w=0.0155),
}
# Methods that `evaluate` compares, by the cube that they see instead of the T1w; M2M-Reg by other
# weights, whose network and grid are not known before, declares the same for all.
METHODS = {
    "initial": Need(0.11),
    "rigid": Need(0.11),
    "syn-mi": Need(0.47, of_t1w=0.379),
    "niftyreg-lncc": Need(0.23, of_t1w=0.125),
    "fireants-mi": Need(0.95, of_t1w=0.55),
    "fireants-lncc": Need(0.63, of_t1w=0.507),
    "m2m:default": Need(1.33),
}
# SynthStrip's, by the grid of its network instead of the T1w's.
SYNTHSTRIP = Need(0.39, of_t1w=0.467)
MARGIN = 1.1
MILLION = 1e6
# Of the participant of `make demo`, for images that cannot be read.
N_VOXELS = 192 * 240 * 240


def declare_memory(
    workflow: Workflow, t1w_files: Iterable[Path], scan_files: Mapping[str, Path]
) -> None:
    """
    Let nodes declare what was measured, by the largest T1w image and their scan.

    Parameters
    ----------
    workflow : Workflow
        Of a subject, or of a pair of `evaluate`.
    t1w_files : iterable of Path
        Headers are read; an image that cannot be read fails in its own step.
    scan_files : mapping of str to Path
        Scans by the names of their workflows in it.
    """
    t1w_files = list(t1w_files)
    default = N_VOXELS / MILLION
    t1w = max(map(_millions, t1w_files), default=default)
    scans = {
        id(node): file
        for name, file in scan_files.items()
        for node in workflow.get_node(name)._get_all_nodes()
    }
    for node in workflow._get_all_nodes():
        if _uses_synthstrip(node):
            count = node.interface.network_voxels
            largest = max((_millions(file, count) for file in t1w_files), default=default)
            node._mem_gb = MARGIN * (SYNTHSTRIP.fixed + SYNTHSTRIP.of_t1w * largest)
        elif need := METHODS.get(getattr(node.inputs, "method", "")):
            node._mem_gb = MARGIN * (need.fixed + need.of_t1w * node.interface.n_voxels / MILLION)
        elif need := _need(node, file := scans.get(id(node))):
            parts = [need.of_t1w * t1w]
            if file:
                parts += [need.of_scan * _millions(file), need.of_frames * t1w * _n_frames(file)]
            node._mem_gb = MARGIN * (need.fixed + max(parts))


def _need(node: Any, file: Path | None) -> Need | None:
    """Find what was measured of a step, by its name or else its interface."""
    return MEASURED.get(_kind(node, file)) or MEASURED.get(type(node.interface).__name__)


def _kind(node: Any, file: Path | None) -> str:
    """Name a step; raw diffusion, PET and its smoothing take more, volumes without frames less."""
    name = node.name.replace("quantify_corrected", "quantify_scan")
    is_raw, scan = (getattr(node.inputs, field, Undefined) for field in ("is_raw", "scan"))
    if isdefined(is_raw) and is_raw:
        name += ", raw"
    if isdefined(scan) and scan["is_pet"]:
        name += ", PET, smoothed" if scan["smooth_fwhm_mm"] else ", PET"
    if file and f"{name}, 3-D" in MEASURED and _n_frames(file) == 1:
        name += ", 3-D"
    return name


def _uses_synthstrip(node: Any) -> bool:
    return isdefined(getattr(node.inputs, "synthstrip_model", Undefined))


def _n_values(file: Path) -> int:
    return math.prod(max(0, int(size)) for size in nb.load(file).shape)


def _n_frames(file: Path) -> int:
    """Count frames by a header; one where it cannot be read."""
    try:
        return math.prod(max(0, int(size)) for size in nb.load(file).shape[3:])
    except READ_ERRORS:
        return 1


def _millions(file: Path, count: Callable[[Path], int] = _n_values) -> float:
    """Count by a header, in millions; where it cannot be read, the scan's step will say why."""
    try:
        return count(file) / MILLION
    except READ_ERRORS:
        return N_VOXELS / MILLION
