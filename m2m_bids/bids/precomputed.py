"""
Find what fMRIPrep, sMRIPrep, PETPrep or FreeSurfer made of a T1w image, to use it, not compute it.

Of each piece the first one counts: derivatives datasets in their order, whose images are on the
grid of the T1w, and then FreeSurfer, whose mask and labels have to be resampled. Labels of regions
are FreeSurfer's first. Whatever uses another program's anatomy asks here whether it is of the T1w.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from m2m_bids.bids.labels import LabelFile, find_subject_labels

if TYPE_CHECKING:
    import nibabel as nb
    import numpy as np

    from m2m_bids.bids.query import Scan

# Ends of file names, by piece and by kind; of the kinds of a piece, the first that is there.
_PIECES = {
    "t1w": {"t1w": ("desc-preproc_T1w",)},
    "mask": {"mask": ("desc-brain_mask",)},
    "dseg": {
        "dseg": ("dseg",),
        "probseg": ("label-GM_probseg", "label-WM_probseg", "label-CSF_probseg"),
    },
    "labels": {"aparcaseg": ("desc-aparcaseg_dseg",), "aseg": ("desc-aseg_dseg",)},
}
_XFM = "from-{}_to-{}_mode-image_xfm"
# Spaces whose points are, to a few millimetres, those of the template of this app.
_TEMPLATES = ("MNI152NLin2009cAsym", "MNI152NLin6Asym", "MNI152NLin2009aSym")
_IMAGE_EXTENSIONS = (".nii.gz", ".nii")
_AFFINE_TOLERANCE_MM = 1e-3


# What the image is called that FreeSurfer was given, on its own grid.
_FREESURFER_INPUTS = ("rawavg.mgz", "orig/001.mgz")


class FreeSurferFiles(NamedTuple):
    """
    What FreeSurfer made of a T1w image, on its conformed grid in the T1w's world.

    Attributes
    ----------
    labels : Path
        ``aparc+aseg.mgz`` or ``aseg.mgz``.
    original : Path
        The T1w itself on that grid, ``orig.mgz``.
    brainmask : Path or None
        ``brainmask.mgz``, the T1w without skull; 1 is what an editor has taken out of the brain.
    """

    labels: Path
    original: Path
    brainmask: Path | None

    @property
    def mask_files(self) -> tuple[Path, ...]:
        """What a brain mask is made of."""
        return (self.labels, self.brainmask) if self.brainmask else (self.labels,)


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
    freesurfer : FreeSurferFiles or None
        Stands for ``mask`` and ``dseg`` where these are not there.
    labels : LabelFile or None
        FreeSurfer's labels of regions.
    template_xfms : mapping of str to tuple of Path
        By template, the ITK composites that carry images from the T1w to it, and back.
    findings : tuple of str
        What was found, missed or refused, a line for each piece and dataset.
    """

    t1w: Path | None = None
    mask: Path | None = None
    dseg: tuple[Path, ...] = ()
    xfm: Path | None = None
    freesurfer: FreeSurferFiles | None = None
    labels: LabelFile | None = None
    template_xfms: Mapping[str, tuple[Path, Path]] = MappingProxyType({})
    findings: tuple[str, ...] = ()

    @property
    def mask_files(self) -> tuple[Path, ...]:
        """Files that the brain mask is taken from."""
        if self.mask:
            return (self.mask,)
        return self.freesurfer.mask_files if self.freesurfer else ()

    @property
    def tissue_files(self) -> tuple[Path, ...]:
        """Files that the tissues are taken from."""
        if self.dseg:
            return self.dseg
        return self.freesurfer.mask_files if self.freesurfer else ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are used."""
        files = (self.t1w, *self.mask_files, *self.tissue_files, self.xfm)
        return tuple(dict.fromkeys(file for file in files if file))


def find_anatomy(
    scan: "Scan",
    bids_dir: Path,
    derivatives: Mapping[str, Path],
    fs_subjects_dir: Path | None,
    templates: Sequence[str] = (),
) -> Precomputed:
    """
    Find what other programs have made of a scan's T1w.

    Parameters
    ----------
    scan : Scan
        A scan with a T1w.
    bids_dir : Path
        The raw dataset.
    derivatives : mapping of str to Path
        Derivatives datasets by name.
    fs_subjects_dir : Path or None
        FreeSurfer's folder of subjects.
    templates : sequence of str
        Labels, in file names, of templates that transforms are looked for to.

    Returns
    -------
    Precomputed
    """
    labels = find_subject_labels(fs_subjects_dir, bids_dir, scan.t1w_entities)
    return find_precomputed(scan.t1w, scan.t1w_entities, derivatives, labels, templates)


def find_precomputed(
    t1w: Path,
    t1w_entities: Mapping[str, str],
    derivatives: Mapping[str, Path],
    freesurfer: LabelFile | None = None,
    templates: Sequence[str] = (),
) -> Precomputed:
    """
    Look for the derivatives of one T1w image.

    A file counts if its name has all entities of the T1w's (one that lacks some may be of several
    images together) and, for an image, if its grid is that of the T1w reordered to RAS+.
    Transforms have no grid: those of a dataset count unless its T1w or mask is refused. Of several
    datasets, the first that has a piece gives it. Datasets without any ``anat/`` folder are not
    searched. FreeSurfer gives the pieces that no dataset has, and labels of regions before any, if
    the image that it was given lies on the grid of the T1w. Only headers are read.

    Parameters
    ----------
    t1w : Path
        The T1w image.
    t1w_entities : mapping of str to str
        Entities of its name, short names.
    derivatives : mapping of str to Path
        Derivatives datasets by name.
    freesurfer : LabelFile, optional
        FreeSurfer's labels of the T1w, as `m2m_bids.bids.labels.find_subject_labels` finds them.
    templates : sequence of str
        Labels, in file names, of templates that transforms are looked for to.
    """
    found: dict[str, tuple[Path, ...]] = {}
    findings: list[str] = []
    for name, root in derivatives.items():
        if not _has_anatomy(root):
            continue
        looks = [*_look(_folder(root, t1w_entities), t1w, t1w_entities, templates)]
        findings += (
            f"{name}: {look.kind}: {look.problem or _names(look.files)}"
            for look in looks
            if look.piece not in found
        )
        found = {look.piece: look.files for look in looks if not look.problem} | found
    first = {piece: files[0] for piece, files in found.items()}
    pairs = {template: found.get(_to(template)) for template in templates}
    precomputed = Precomputed(
        t1w=first.get("t1w"),
        mask=first.get("mask"),
        dseg=found.get("dseg", ()),
        xfm=first.get("xfm"),
        labels=LabelFile(first["labels"], "freesurfer") if "labels" in first else None,
        template_xfms={name: (pair[0], pair[1]) for name, pair in pairs.items() if pair},
        findings=tuple(findings),
    )
    return _with_freesurfer(precomputed, t1w, freesurfer) if freesurfer else precomputed


class _Look(NamedTuple):
    """What was looked for: files of a piece, of one kind, or else why there are none."""

    piece: str
    kind: str
    files: tuple[Path, ...]
    problem: str


def _look(
    folder: Path, t1w: Path, entities: Mapping[str, str], templates: Sequence[str]
) -> Iterator[_Look]:
    """Look for all pieces in one dataset; of the kinds of each, until one is there."""
    of_another = ""
    for piece, kinds in _PIECES.items():
        for kind, ends in kinds.items():
            files, problem = _find_images(folder, t1w, entities, ends)
            yield _Look(piece, kind, files, problem)
            if piece in ("t1w", "mask") and problem.startswith("refused"):
                of_another = f"refused: the {piece} beside it is refused"
            if not problem:
                break
    transforms = {"xfm": _find_xfm(folder, entities)}
    transforms |= {_to(template): _find_pair(folder, entities, template) for template in templates}
    for kind, (files, problem) in transforms.items():
        yield _Look(kind, kind, files, problem or of_another)


def _to(template: str) -> str:
    """Name the piece that leads to a template."""
    return f"xfm to {template}"


def _with_freesurfer(precomputed: Precomputed, t1w: Path, labels: LabelFile) -> Precomputed:
    """Add what FreeSurfer has, or say why it is refused."""
    folder = labels.file.parent
    given = next((file for name in _FREESURFER_INPUTS if (file := folder / name).is_file()), None)
    original, brainmask = folder / "orig.mgz", folder / "brainmask.mgz"
    problem = given and _grid_problem(given, t1w)
    if not original.is_file():
        reason = f"no {original} to tell by that it is of this T1w"
    elif problem:
        reason = f"{given}, which FreeSurfer was given, is not this T1w: {problem}"
    else:
        reason = ""
    if reason:
        finding = f"freesurfer: refused: {reason}"
        return precomputed._replace(findings=(*precomputed.findings, finding))
    files = FreeSurferFiles(labels.file, original, brainmask if brainmask.is_file() else None)
    pieces = {"mask": precomputed.mask, "dseg": precomputed.dseg}
    findings = tuple(
        f"freesurfer: {piece}: {_names(files.mask_files)}"
        + ("; not used, a dataset has one" if other else "")
        for piece, other in pieces.items()
    )
    return precomputed._replace(
        freesurfer=files,
        labels=labels._replace(original=original),
        findings=(*precomputed.findings, *findings, f"freesurfer: labels: {labels.file}"),
    )


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


def _find_xfm(folder: Path, entities: Mapping[str, str]) -> tuple[tuple[Path, ...], str]:
    """Find the transform that maps points of MNI space to those of the T1w."""
    stems = [folder / f"{_stem(entities)}_{_XFM.format('T1w', name)}" for name in _TEMPLATES]
    expected = [Path(f"{stem}{extension}") for stem in stems for extension in (".h5", ".txt")]
    for file in expected:
        if file.is_file():
            return (file,), ""
    return (), f"missed: no {expected[0]}"


def _find_pair(
    folder: Path, entities: Mapping[str, str], template: str
) -> tuple[tuple[Path, ...], str]:
    """Find the ITK composites that carry images from the T1w to a template, and back."""
    pair = tuple(
        folder / f"{_stem(entities)}_{_XFM.format(start, end)}.h5"
        for start, end in (("T1w", template), (template, "T1w"))
    )
    missing = [file for file in pair if not file.is_file()]
    return ((), f"missed: no {missing[0]}") if missing else (pair, "")


def _grid_problem(file: Path, t1w: Path) -> str:
    """Say how the grid of an image differs from that of the T1w; nothing if it does not."""
    import nibabel as nb
    import numpy as np

    from m2m_bids.spatial.images import READ_ERRORS

    grids = []
    for image in (file, t1w):
        try:
            grids.append(_ras_grid(nb.load(image)))
        except READ_ERRORS as error:
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


def _ras_grid(image: "nb.spatialimages.SpatialImage") -> tuple[tuple[int, ...], "np.ndarray"]:
    """Shape and affine of an image as if its axes were reordered to RAS+."""
    import numpy as np
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
