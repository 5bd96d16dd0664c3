"""
Templates of the head: one that is always there, others from a TemplateFlow archive on disk.

The archive is read as files: TemplateFlow's own client asks the network for what is missing, and
writes to its archive when it is imported.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
from scipy import ndimage

from m2m_bids.spatial.images import ImageError, load_image, require_3d
from m2m_bids.spatial.resampling import resample

EMBEDDED = "MNI152NLin2009aSym"
"""ICBM 2009a nonlinear symmetric, skull-stripped, as nilearn ships it."""


class Template(NamedTuple):
    """
    A template of the head.

    Attributes
    ----------
    t1w : Nifti1Image, 3-D
        T1w image, with or without skull.
    mask : Nifti1Image, 3-D
        Brain mask on its grid.
    """

    t1w: nb.Nifti1Image
    mask: nb.Nifti1Image


def load_template(
    name: str, home: Path, *, cohort: str | None = None, resolution: int = 1
) -> Template:
    """
    Load a template.

    Parameters
    ----------
    name : str
        `EMBEDDED`, or a template of the archive.
    home : Path
        Folder of the archive.
    cohort : str, optional
        Cohort of a template that has several.
    resolution : int
        Of the embedded template the voxel size, mm; of others the number of the resolution in
        the archive.

    Returns
    -------
    Template

    Raises
    ------
    ImageError
        If the template is not there, or cannot be read.
    """
    if name == EMBEDDED:
        return Template(embedded_template("t1", resolution), embedded_template("mask", resolution))
    t1w, mask = find_template(name, home, cohort=cohort, resolution=resolution)
    return Template(require_3d(load_image(t1w), t1w), require_3d(load_image(mask), mask))


def find_template(
    name: str, home: Path, *, cohort: str | None = None, resolution: int = 1
) -> tuple[Path, Path]:
    """
    Find the T1w image and the brain mask of a template in a TemplateFlow archive.

    Parameters
    ----------
    name, home, cohort, resolution
        As for `load_template`. The archive spells resolutions ``res-01`` or ``res-1``, and leaves
        out the only one of a template, which counts as 1.

    Raises
    ------
    ImageError
        If one is missing, or is an empty placeholder; the message says where it was looked for
        and how to get it.
    """
    stem = f"tpl-{name}"
    folder = home / stem
    if cohort:
        folder, stem = folder / f"cohort-{cohort}", f"{stem}_cohort-{cohort}"
    spellings = [
        f"_res-{resolution:02d}",
        f"_res-{resolution}",
        *([""] if resolution == 1 else []),
    ]
    pairs = [
        [folder / f"{stem}{spelling}_{end}.nii.gz" for end in ("T1w", "desc-brain_mask")]
        for spelling in spellings
    ]
    # The archive starts as a tree of empty files, which are filled when they are asked for.
    lacks = [
        [file for file in pair if not file.is_file() or not file.stat().st_size] for pair in pairs
    ]
    missing, wanted = min(zip(lacks, pairs, strict=True), key=lambda found: len(found[0]))
    if missing:
        asked = f"'{name}', resolution={resolution}" + (f", cohort='{cohort}'" if cohort else "")
        raise ImageError(
            f"--output-spaces {name}: {missing[0]} is not there, and nothing is downloaded. Set "
            "TEMPLATEFLOW_HOME to an archive that has it (fill one where there is a network: "
            f'python -c "from templateflow.api import get; get({asked})"), or give '
            f"{EMBEDDED}, which comes with m2m-bids."
        )
    return wanted[0], wanted[1]


def embedded_tissues() -> nb.Nifti1Image:
    """
    Label the tissues of the embedded template, at 1 mm.

    Returns
    -------
    Nifti1Image, uint8, 3-D
        The most probable of 1 grey matter, 2 white matter and 3 fluid; 0 outside its brain.
    """
    mask, grey, white = (embedded_template(part) for part in ("mask", "gm", "wm"))
    shares = [np.asarray(image.dataobj) for image in (grey, white)]
    labels = np.argmax([*shares, 1 - sum(shares)], axis=0) + 1
    inside = np.asarray(mask.dataobj) > 0
    return nb.Nifti1Image(np.where(inside, labels, 0).astype(np.uint8), mask.affine)


@cache
def embedded_template(part: str, resolution: int = 1) -> nb.Nifti1Image:
    """
    Load a part of the embedded template, without any network.

    Parameters
    ----------
    part : str
        T1w (``t1``), brain mask (``mask``), grey or white matter (``gm``, ``wm``).
    resolution : int
        Voxel size, mm.

    Returns
    -------
    Nifti1Image, 3-D
        The T1w is skull-stripped, in [0, 1].
    """
    from nilearn import datasets

    if part == "mask":
        t1 = embedded_template("t1")
        brain = ndimage.binary_fill_holes(np.asarray(t1.dataobj) > 0)
        mask = nb.Nifti1Image(brain.astype(np.float32), t1.affine)
        if resolution == 1:
            return mask
        # nilearn's interpolation leaves traces of signal outside the brain.
        coarse = resample(mask, (), embedded_template("t1", resolution), order=1)
        return nb.Nifti1Image(np.rint(np.asarray(coarse.dataobj)), coarse.affine)
    load = {
        "t1": datasets.load_mni152_template,
        "gm": datasets.load_mni152_gm_template,
        "wm": datasets.load_mni152_wm_template,
    }[part]
    return load(resolution=resolution)
