"""Diffusion-weighted images that FA maps can be fitted from, and their gradients."""

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from m2m_bids.bids.layout import IMAGE_EXTENSIONS, find_files, group_by_folder
from m2m_bids.bids.naming import ParsedName, parse_name

if TYPE_CHECKING:
    from bids import BIDSLayout

logger = logging.getLogger(__name__)

# "preproc" is the suffix in Clinica's CAPS of before 2023, and no part of names afterwards.
_SUFFIXES = ["dwi", "preproc"]
DWI_QUERY = {"suffix": _SUFFIXES, "datatype": "dwi", "extension": list(IMAGE_EXTENSIONS)}
# What sidecars say of maps fitted to raw images.
RAW_FIT = {
    "MotionCorrected": True,
    "EddyCurrentCorrected": False,
    "SusceptibilityDistortionCorrected": False,
}
# Maps of the same tensor as FA: what they are.
DIFFUSIVITIES = {"MD": "Mean", "AD": "Axial", "RD": "Radial"}
# Where the name of a map says that it is FA, what has precedence first.
_FA_LABELS = (r"(?<=_param-)fa(?=_)", r"(?<=_desc-)fa(?=_)", r"(?<=_)fa(?=\.)")
_B0_MAX = 50.0


class GradientFiles(NamedTuple):
    """FSL's files of b-values and of directions; None where there is none."""

    bval: Path | None
    bvec: Path | None


def is_dwi(name: ParsedName, source: str) -> bool:
    """Tell images that a tensor can be fitted to: raw, or preprocessed of derivatives."""
    described = name.entities.get("desc") if name.suffix == "dwi" else name.suffix
    return described == (None if source == "raw" else "preproc")


class GradientIndex:
    """
    Gradients of a dataset.

    Parameters
    ----------
    layout : BIDSLayout
        The dataset.
    """

    def __init__(self, layout: "BIDSLayout") -> None:
        self._files = {
            kind: group_by_folder(
                find_files(layout, {"suffix": _SUFFIXES, "extension": f".{kind}"})
            )
            for kind in GradientFiles._fields
        }

    def of(self, image: Path) -> GradientFiles:
        """Find the files of an image by the BIDS inheritance principle."""
        return GradientFiles(*(_applicable(image, files) for files in self._files.values()))


def why_not_fitted(name: ParsedName, gradients: GradientFiles) -> str:
    """Say why no tensor can be fitted to an image; empty if nothing is known against it."""
    part = name.entities.get("part", "mag")
    if part != "mag":
        return f"part-{part}: a tensor is fitted to magnitudes"
    missing = [f".{kind}" for kind, file in gradients._asdict().items() if file is None]
    if missing:
        return (
            f"no FA map of its session, and no {' and '.join(missing)} file of this "
            "diffusion-weighted image (in its folder or above) to fit one"
        )
    if absent := [str(file) for file in gradients if file is not None and not file.exists()]:
        return f"{absent[0]} is a link without its content: fetch it, as with `datalad get`"
    return _without_weighting(gradients.bval) or _without_tensor(gradients)


def mask_beside(dwi_file: Path) -> Path | None:
    """
    Find the brain mask that QSIPrep or Clinica writes beside a preprocessed image.

    Parameters
    ----------
    dwi_file : Path
        A file ``*_desc-preproc_dwi.nii[.gz]`` or ``*_preproc.nii[.gz]``.

    Returns
    -------
    Path or None
        ``*_desc-brain_mask.nii[.gz]``, or else ``*_brainmask.nii[.gz]``, of the same entities; a
        link without its content is not taken, with a warning.
    """
    stem = re.sub(r"(_desc-preproc_dwi|_preproc)\..*", "", dwi_file.name)
    for end, extension in product(("desc-brain_mask", "brainmask"), IMAGE_EXTENSIONS):
        file = dwi_file.with_name(f"{stem}_{end}{extension}")
        if file.exists():
            return file
        if file.is_symlink():
            logger.warning("%s is a link without its content: it is not used.", file)
    return None


def maps_beside(fa_file: Path) -> dict[str, Path]:
    """
    Find the diffusivities that belong to an FA map: files of its name but for the parameter.

    Parameters
    ----------
    fa_file : Path
        A map with ``param-FA`` or, without that, ``desc-FA`` or the suffix ``FA``, in any case.

    Returns
    -------
    dict
        Files that exist by the keys of `DIFFUSIVITIES`.
    """
    name = fa_file.name
    matches = (re.search(pattern, name, re.IGNORECASE) for pattern in _FA_LABELS)
    match = next((match for match in matches if match), None)
    if match is None:
        return {}
    found = {}
    for parameter in DIFFUSIVITIES:
        label = parameter.lower() if match[0] == "fa" else parameter
        file = fa_file.with_name(name[: match.start()] + label + name[match.end() :])
        if file.exists():
            found[parameter] = file
    return found


def _without_weighting(bval: Path | None) -> str:
    """Say so where no volume has diffusion weighting, as in images for distortion correction."""
    try:
        values = [float(word) for word in Path(str(bval)).read_text().replace(",", " ").split()]
    except (OSError, ValueError) as error:
        return f"{bval}: cannot be read as b-values ({error})"
    if any(value > _B0_MAX for value in values):
        return ""
    return (
        f"no volume with diffusion weighting (b > {_B0_MAX:g}) in {bval}: an image for distortion "
        "correction, not for FA"
    )


def _without_tensor(gradients: GradientFiles) -> str:
    """Say so where gradients cannot be read or do not determine a tensor."""
    import numpy as np

    from m2m_bids.spatial.gradients import read_gradients, what_lacks
    from m2m_bids.spatial.images import ImageError

    try:
        # How the image lies does not matter to how many directions there are.
        lack = what_lacks(read_gradients(*map(str, gradients), vox2ras=np.eye(4)))
    except ImageError as error:
        return str(error)
    return f"{gradients.bval}: {lack}" if lack else ""


def _applicable(
    image: Path, files: Mapping[Path, Sequence[tuple[ParsedName, Path]]]
) -> Path | None:
    """Choose the file that applies to an image: of the nearest folder, the most specific one."""
    entities = parse_name(image).entities
    for folder in image.parents:
        found = [
            (len(name.entities), str(file))
            for name, file in files.get(folder, [])
            if name.entities.items() <= entities.items()
        ]
        if found:
            return Path(max(found)[1])
    return None
