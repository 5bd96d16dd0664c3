"""Find label images of T1w images: FreeSurfer's, and ``dseg`` files of derivatives datasets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from m2m_bids.bids.naming import parse_name

Scheme = Literal["freesurfer", "tissues", "simulated"]

FREESURFER_FILES = ("aparc+aseg.mgz", "aseg.mgz")
PONS = 174
"""FreeSurfer's label of the pons, where the substructures of the brainstem are told apart."""
# As fMRIPrep and its kind name FreeSurfer's labels, and tissues, in the T1w's space.
_DESCRIPTIONS: dict[str | None, Scheme] = {
    "aparcaseg": "freesurfer",
    "aseg": "freesurfer",
    None: "tissues",
}


class LabelFile(NamedTuple):
    """A label image in the world of a T1w, and what its numbers mean."""

    file: Path
    scheme: Scheme


def find_freesurfer_labels(
    subjects_dir: Path, t1w_entities: Mapping[str, str], *, is_only_t1w: bool = True
) -> LabelFile | None:
    """
    Find what FreeSurfer made of a T1w image.

    Parameters
    ----------
    subjects_dir : Path
        Folder with a folder for each subject, ``sub-X_ses-Y`` or ``sub-X``.
    t1w_entities : mapping of str to str
        Entities of the T1w's name.
    is_only_t1w : bool
        Whether the participant has no T1w of another session, whose labels ``sub-X`` might be.

    Returns
    -------
    LabelFile or None
        ``mri/aparc+aseg.mgz``, or else ``mri/aseg.mgz``; None if there is neither.
    """
    names = [f"sub-{t1w_entities['sub']}"]
    if session := t1w_entities.get("ses"):
        names = [f"{names[0]}_ses-{session}", *(names if is_only_t1w else [])]
    for name in names:
        for file in FREESURFER_FILES:
            path = subjects_dir / name / "mri" / file
            if path.is_file():
                return LabelFile(path, "freesurfer")
    return None


def find_subject_labels(
    subjects_dir: Path | None, bids_dir: Path, t1w_entities: Mapping[str, str]
) -> LabelFile | None:
    """
    Find what FreeSurfer made of a T1w image of a BIDS dataset.

    Parameters
    ----------
    subjects_dir : Path or None
        FreeSurfer's folder of subjects, if there is one.
    bids_dir : Path
        The dataset: where a participant has T1w images in one session only, ``sub-X`` is of it.
    t1w_entities : mapping of str to str
        Entities of the T1w's name.

    Returns
    -------
    LabelFile or None
        As `find_freesurfer_labels`.
    """
    if subjects_dir is None:
        return None
    images = bids_dir.glob(f"sub-{t1w_entities['sub']}/**/anat/*_T1w.nii*")
    is_only_t1w = len({file.parent for file in images}) <= 1
    return find_freesurfer_labels(subjects_dir, t1w_entities, is_only_t1w=is_only_t1w)


def find_class_labels(
    freesurfer: LabelFile | None,
    derivatives: Mapping[str, Path],
    t1w_entities: Mapping[str, str],
) -> LabelFile | None:
    """
    Find labels of a T1w image that have the 11 classes.

    Parameters
    ----------
    freesurfer : LabelFile or None
        What FreeSurfer made of this T1w; it comes first.
    derivatives : mapping of str to Path
        Derivatives datasets by name.
    t1w_entities : mapping of str to str
        Entities of the T1w's name.

    Returns
    -------
    LabelFile or None
        FreeSurfer's labels, or those of the first dataset that has them (``desc-aparcaseg_dseg``,
        ``desc-aseg_dseg``). Tissues do not have these classes.
    """
    found = (freesurfer, *(find_dseg(root, t1w_entities) for root in derivatives.values()))
    return next((label for label in found if label and label.scheme == "freesurfer"), None)


def find_pons(labels: LabelFile) -> Path | None:
    """
    Find the labels of the brainstem's substructures beside FreeSurfer's other labels.

    Parameters
    ----------
    labels : LabelFile
        As from `find_freesurfer_labels`.

    Returns
    -------
    Path or None
        Image in the world of the labels, in which the pons is `PONS`.
    """
    found = sorted(labels.file.parent.glob("brainstemSsLabels*.FSvoxelSpace.mgz"))
    return found[-1] if found else None


def find_dseg(dataset_dir: Path, t1w_entities: Mapping[str, str]) -> LabelFile | None:
    """
    Find the labels of a T1w image in a derivatives dataset.

    Parameters
    ----------
    dataset_dir : Path
        Derivatives dataset.
    t1w_entities : mapping of str to str
        Entities of the T1w's name.

    Returns
    -------
    LabelFile or None
        The ``*_dseg.nii.gz`` of this T1w in its own space: FreeSurfer's labels
        (``desc-aparcaseg``, ``desc-aseg``) or else tissues. A file that lacks the session is not
        taken: it may be of several sessions together, in none's space.
    """
    found: dict[str | None, Path] = {}
    for file in sorted(dataset_dir.glob(f"sub-{t1w_entities['sub']}/**/anat/*_dseg.nii.gz")):
        try:
            entities = parse_name(file).entities
        except ValueError:
            continue
        description, space = entities.pop("desc", None), entities.pop("space", "T1w")
        if space == "T1w" and entities == t1w_entities:
            found[description] = file
    for description, scheme in _DESCRIPTIONS.items():
        if description in found:
            return LabelFile(found[description], scheme)
    return None
