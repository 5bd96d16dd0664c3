"""What nodes use of memory, as it was measured; nodes that are not here keep what they declare."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from nipype.interfaces.base import Undefined, isdefined

# Peak memory in GB of each step in a process of its own, for the participant of `make demo`, whose
# T1w image has N_VOXELS; docs/cluster.md has the table. A tenth is added.
MEASURED_GB = {
    "conform_t1w": 0.30,
    "extract_brain": 0.85,
    "correct_bias": 0.57,
    "segment_tissues": 0.79,
    "draw_anatomy": 0.41,
    "register_rigid": 0.43,
    "resample_rigid": 0.34,
    "resample_m2m": 0.37,
    "draw_registration": 0.49,
    "place_labels": 0.32,
    "quantify_scan": 0.35,
}
# Its network has a grid of its own, whatever the size of the images.
REGISTER_M2M_GB = 1.1
# Of Python and what it imports; the rest is in proportion to the image.
PROCESS_GB = 0.1
N_VOXELS = 192 * 240 * 240


def declare_memory(nodes: Iterable[Any], t1w_files: Iterable[Path]) -> None:
    """
    Let nodes declare what was measured, in proportion to the largest T1w image of a subject.

    Parameters
    ----------
    nodes : iterable of Node
    t1w_files : iterable of Path
        Their headers are read; an image that cannot be read fails in its own step.
    """
    scale = max((_n_voxels(file) for file in t1w_files), default=N_VOXELS) / N_VOXELS
    for node in nodes:
        if node.name == "register_m2m":
            node._mem_gb = REGISTER_M2M_GB
        elif node.name in MEASURED_GB and not _uses_synthstrip(node):
            node._mem_gb = PROCESS_GB + (MEASURED_GB[node.name] - PROCESS_GB) * scale


def _uses_synthstrip(node: Any) -> bool:
    """Tell whether a node finds brains by SynthStrip, which was not measured here."""
    return isdefined(getattr(node.inputs, "synthstrip_model", Undefined))


def _n_voxels(file: Path) -> int:
    try:
        return int(np.prod(nb.load(file).shape[:3]))
    except (OSError, nb.filebasedimages.ImageFileError):
        return N_VOXELS
