"""Find what fMRIPrep, sMRIPrep or PETPrep made of a T1w image, to use it instead of computing."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import nibabel as nb

# Ends of file names; what is on the grid of the T1w comes first.
_ENDS = {
    "t1w": ("desc-preproc_T1w",),
    "mask": ("desc-brain_mask",),
    "dseg": ("dseg",),
    "probseg": ("label-GM_probseg", "label-WM_probseg", "label-CSF_probseg"),
}
_XFM = "from-T1w_to-{}_mode-image_xfm"
# Spaces whose points are, to a few millimetres, those of the template of this app.
_TEMPLATES = ("MNI152NLin2009cAsym", "MNI152NLin6Asym", "MNI152NLin2009aSym")
_IMAGE_EXTENSIONS = (".nii.gz", ".nii")
_AFFINE_TOLERANCE_MM = 1e-3


class Precomputed(NamedTuple):
    """
    Files that stand for steps of the preparation of a T1w image.

    Attributes
    ----------
    t1w : Path or None
        Without bias field, with its skull.
    mask : Path or None
        Brain mask.
    dseg : tuple of Path
        Grey matter 1, white matter 2, fluid 3; or three maps of probability, in this order; empty
        where there are none.
    xfm : Path or None
        ITK transform that maps points of MNI space to points of the T1w.
    findings : tuple of str
        What was found, missed or refused, a line for each piece and dataset.
    """

    t1w: Path | None = None
    mask: Path | None = None
    dseg: tuple[Path, ...] = ()
    xfm: Path | None = None
    findings: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are used."""
        return tuple(file for file in (self.t1w, self.mask, *self.dseg, self.xfm) if file)


def find_precomputed(
    t1w: Path, t1w_entities: Mapping[str, str], derivatives: Mapping[str, Path]
) -> Precomputed:
    """
    Look for the derivatives of one T1w image.

    A file counts if its name has all entities of the T1w's (one that lacks some may be of several
    images together) and, for an image, if its grid is that of the T1w reordered to RAS+. Of
    several datasets, the first that has a piece gives it. Datasets without any ``anat/`` folder
    are not searched. Only headers are read.

    Parameters
    ----------
    t1w : Path
        The T1w image.
    t1w_entities : mapping of str to str
        Entities of its name, short names.
    derivatives : mapping of str to Path
        Derivatives datasets by name.
    """
    found: dict[str, tuple[Path, ...]] = {}
    findings = []
    for name, root in derivatives.items():
        if not _has_anatomy(root):
            continue
        folder = _folder(root, t1w_entities)
        for piece, ends in _ENDS.items():
            if piece in found or (piece == "probseg" and "dseg" in found):
                continue
            files, problem = _find_images(folder, t1w, t1w_entities, ends)
            if not problem:
                found[piece] = files
            findings.append(f"{name}: {piece}: {problem or _names(files)}")
        if "xfm" not in found:
            file = _find_xfm(folder, t1w_entities)
            found |= {"xfm": (file,)} if file else {}
            expected = folder / f"{_stem(t1w_entities)}_{_XFM.format(_TEMPLATES[0])}.h5"
            findings.append(f"{name}: xfm: {file or f'missed: no {expected}'}")
    first = {piece: files[0] for piece, files in found.items()}
    return Precomputed(
        t1w=first.get("t1w"),
        mask=first.get("mask"),
        dseg=found.get("dseg") or found.get("probseg", ()),
        xfm=first.get("xfm"),
        findings=tuple(findings),
    )


def find_template_xfms(
    t1w_entities: Mapping[str, str], derivatives: Mapping[str, Path], template: str
) -> tuple[Path, Path] | None:
    """
    Find the transforms between a T1w image and a template that another program has made.

    Parameters
    ----------
    t1w_entities : mapping of str to str
        Entities of the T1w's name, short names.
    derivatives : mapping of str to Path
        Derivatives datasets by name.
    template : str
        Label of the template in file names.

    Returns
    -------
    tuple of Path, or None
        ITK composites (``.h5``) of the first dataset that has both: the one that carries images
        to the template, and its inverse.
    """
    for root in derivatives.values():
        folder, stem = _folder(root, t1w_entities), _stem(t1w_entities)
        pair = [
            folder / f"{stem}_from-{start}_to-{end}_mode-image_xfm.h5"
            for start, end in (("T1w", template), (template, "T1w"))
        ]
        if all(file.is_file() for file in pair):
            return pair[0], pair[1]
    return None


@cache  # asked for every T1w of a cohort
def _has_anatomy(root: Path) -> bool:
    """Tell whether a dataset has images of anatomy at all."""
    return any(root.glob("sub-*/anat/")) or any(root.glob("sub-*/ses-*/anat/"))


def _folder(root: Path, entities: Mapping[str, str]) -> Path:
    session = entities.get("ses")
    subject_dir = root / f"sub-{entities['sub']}"
    return (subject_dir / f"ses-{session}" if session else subject_dir) / "anat"


def _stem(entities: Mapping[str, str]) -> str:
    return "_".join(f"{key}-{label}" for key, label in entities.items())


def _names(files: tuple[Path, ...]) -> str:
    return ", ".join(map(str, files))


def _find_images(
    folder: Path, t1w: Path, entities: Mapping[str, str], ends: tuple[str, ...]
) -> tuple[tuple[Path, ...], str]:
    """Find the files of one piece; return them, or else why there are none."""
    files = []
    for end in ends:
        expected = [folder / f"{_stem(entities)}_{end}{e}" for e in _IMAGE_EXTENSIONS]
        there = [file for file in expected if file.exists()]
        if not there:
            return (), f"missed: no {expected[0]}{_merged(folder, entities, end)}"
        if problem := _grid_problem(there[0], t1w):
            return (), f"refused: {there[0]}: {problem}"
        files.append(there[0])
    return tuple(files), ""


def _merged(folder: Path, entities: Mapping[str, str], end: str) -> str:
    """Say that there is a file of several T1w images together, where there is one."""
    subject = f"sub-{entities['sub']}"
    folders = (folder, *(parent / "anat" for parent in folder.parents if parent.name == subject))
    stems = (subject, "_".join(f"{k}-{entities[k]}" for k in ("sub", "ses") if k in entities))
    for file in (f / f"{stem}_{end}.nii.gz" for f in folders for stem in stems):
        if file.exists():
            lacking = [f"{k}-{v}" for k, v in entities.items() if f"{k}-{v}" not in file.name]
            return f" ({file} lacks {'_'.join(lacking)}: it may be of several T1w images together)"
    return ""


def _find_xfm(folder: Path, entities: Mapping[str, str]) -> Path | None:
    """Find the transform that maps points of MNI space to those of the T1w."""
    for template in _TEMPLATES:
        for extension in (".h5", ".txt"):
            file = folder / f"{_stem(entities)}_{_XFM.format(template)}{extension}"
            if file.is_file():
                return file
    return None


def _grid_problem(file: Path, t1w: Path) -> str:
    """Say how the grid of an image differs from that of the T1w; nothing if it does not."""
    import nibabel as nb
    from nibabel.filebasedimages import ImageFileError

    grids = []
    for image in (file, t1w):
        try:
            grids.append(_ras_grid(nb.load(image)))
        except (OSError, EOFError, ValueError, ImageFileError) as error:
            return f"{image.name} cannot be read ({' '.join(str(error).split())})"
    (shape, affine), (t1w_shape, t1w_affine) = grids
    if shape != t1w_shape:
        return f"its shape {_x(shape)} is not that of {t1w.name}, {_x(t1w_shape)}"
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)
    moved = nb.affines.apply_affine(affine, corners) - nb.affines.apply_affine(t1w_affine, corners)
    distance_mm = np.linalg.norm(moved, axis=1).max()
    if distance_mm > _AFFINE_TOLERANCE_MM * max(shape):
        return f"its corners are up to {distance_mm:.3g} mm from those of {t1w.name}"
    return ""


def _x(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _ras_grid(image: "nb.spatialimages.SpatialImage") -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of an image as if its axes were reordered to RAS+."""
    from nibabel.orientations import inv_ornt_aff, io_orientation

    shape = image.shape[:3]
    if len(shape) != 3 or any(size != 1 for size in image.shape[3:]):
        raise ValueError(f"{_x(image.shape)}: expected one volume")
    orientation = io_orientation(image.affine)
    order = np.argsort(orientation[:, 0])
    affine = image.affine @ inv_ornt_aff(orientation, shape)
    return tuple(int(shape[axis]) for axis in order), affine


def describe_findings(
    anatomies: Mapping[Path, Precomputed],
) -> Iterator[str]:
    """Yield lines that say, for each T1w, what was found, missed and refused."""
    for t1w, precomputed in anatomies.items():
        if precomputed.findings:
            yield f"Derivatives of {t1w.name}:"
            yield from (f"  {finding}" for finding in precomputed.findings)
