"""Label images of T1w images, and where FreeSurfer has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

Scheme = Literal["freesurfer", "tissues", "simulated"]

FREESURFER_FILES = ("aparc+aseg.mgz", "aseg.mgz")
PONS = 174
"""FreeSurfer's label of the pons, where the substructures of the brainstem are told apart."""


class LabelFile(NamedTuple):
    """
    A label image in the world of a T1w, and what its numbers mean.

    Attributes
    ----------
    file : Path
        Image.
    scheme : {"freesurfer", "tissues", "simulated"}
        What its numbers mean.
    original : Path or None
        The T1w as FreeSurfer has it, on the grid of the labels, to tell by that they are of it.
    """

    file: Path
    scheme: Scheme
    original: Path | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """Files by the names that interfaces take them by."""
        files = {"label_file": self.file, "original_file": self.original}
        return {name: str(file) for name, file in files.items() if file}


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
