"""Classes whose overlap is measured: the 11 of the M2M-Reg paper, or tissues."""

from typing import Literal

import numpy as np

from m2m_bids.spatial.labels import whole_numbers

Scheme = Literal["freesurfer", "tissues", "simulated"]
_Members = tuple[int | tuple[int, int], ...]

CLASSES: dict[int, str] = {
    1: "cerebral_white_matter",
    2: "cerebral_cortex",
    3: "ventricles",
    4: "cerebellar_white_matter",
    5: "cerebellar_cortex",
    6: "thalamus",
    7: "caudate_accumbens",
    8: "putamen",
    9: "brain_stem",
    10: "hippocampus",
    11: "amygdala",
}
"""Classes of FreeSurfer's labels; left and right are one class."""

TISSUES: dict[int, str] = {
    21: "grey_matter",
    22: "white_matter",
    23: "csf",
    24: "csf_outside_lateral_ventricles",
    25: "lateral_ventricles",
}
"""Classes of other label maps; their numbers and names are never those of `CLASSES`."""

NAMES: dict[int, str] = CLASSES | TISSUES

# FreeSurfer's numbers, last included, of each class: those of aseg with the pallidum, ventral
# diencephalon and hypointensities in class 1, as in the authors' public code; and the cortex of
# aparc+aseg and aparc.a2009s+aseg. White matter by region is of wmparc, which they did not use.
_FREESURFER: dict[int, _Members] = {
    1: (2, 41, 13, 52, 28, 60, 77, (3000, 4999), 5001, 5002, (13000, 14999)),
    2: (3, 42, (1000, 2999), (11000, 12999)),
    3: (4, 5, 14, 15, 31, 43, 44, 63, 72),
    4: (7, 46),
    5: (8, 47),
    6: (10, 49),
    7: (11, 26, 50, 58),
    8: (12, 51),
    9: (16, (173, 175)),
    10: (17, 53),
    11: (18, 54),
}
# BIDS numbers tissues so. Simulated scans have a fourth, which their CSF is without.
_TISSUES: dict[int, _Members] = {21: (1,), 22: (2,), 23: (3,)}
_SIMULATED: dict[int, _Members] = {21: (1,), 22: (2,), 24: (3,), 25: (4,)}
_SCHEMES: dict[Scheme, dict[int, _Members]] = {
    "freesurfer": _FREESURFER,
    "tissues": _TISSUES,
    "simulated": _SIMULATED,
}


def evaluation_labels(labels: np.ndarray, scheme: Scheme) -> np.ndarray:
    """
    Bring a label map to the classes that are evaluated.

    Parameters
    ----------
    labels : ndarray
        Label map of whole numbers, of any type.
    scheme : {"freesurfer", "tissues", "simulated"}
        What its numbers mean: FreeSurfer's aseg, aparc+aseg or wmparc; grey matter 1, white matter
        2 and CSF 3, as BIDS has them; or these with the lateral ventricles 4, not part of the CSF,
        as simulated scans have them.

    Returns
    -------
    ndarray, uint8, of the same shape
        Numbers of `CLASSES` or `TISSUES`; 0 for what belongs to none, such as the corpus callosum,
        vessels and the fluid outside the ventricles among FreeSurfer's labels.

    Raises
    ------
    ValueError
        If the scheme is unknown, a value is not a whole number, or no value belongs to a class.

    Examples
    --------
    >>> evaluation_labels(np.array([0, 2, 41, 1035, 24, 17]), "freesurfer")
    array([ 0,  1,  1,  2,  0, 10], dtype=uint8)
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}")
    classes = _class_of_number(scheme)
    labels = whole_numbers(labels)
    is_known = (labels > 0) & (labels < len(classes))
    found = classes[np.where(is_known, labels, 0)]
    if not found.any():
        some = ", ".join(str(value) for value in np.unique(labels)[:10])
        raise ValueError(
            f"labels: none of the values ({some}) is a class of the scheme {scheme!r}; give the "
            "label map that goes with the scheme"
        )
    return found


def labels_in_common(labels_a: np.ndarray, labels_b: np.ndarray) -> tuple[int, ...]:
    """
    Return the classes by which two label maps can be compared.

    Parameters
    ----------
    labels_a, labels_b : ndarray of integers
        Label maps as from `evaluation_labels`; one may be empty.

    Returns
    -------
    tuple of int
        All classes of the scheme of both, those that are in neither map as well.

    Raises
    ------
    ValueError
        If the maps are of different schemes, or have numbers of none.
    """
    numbers_a, numbers_b = (
        set(np.unique(labels).tolist()) - {0} for labels in (labels_a, labels_b)
    )
    for classes in _SCHEMES.values():
        if numbers_a | numbers_b <= set(classes):
            return tuple(classes)
    names = (
        ", ".join(NAMES.get(number, str(number)) for number in sorted(numbers))
        for numbers in (numbers_a, numbers_b)
    )
    raise ValueError(
        f"label maps of different kinds: {' and '.join(names)}; give labels of one kind for "
        "every participant"
    )


def _class_of_number(scheme: Scheme) -> np.ndarray:
    """Table of the class of each number of a scheme, uint8; 0 for none."""
    ranges = [
        (number, *(values if isinstance(values, tuple) else (values, values)))
        for number, members in _SCHEMES[scheme].items()
        for values in members
    ]
    table = np.zeros(1 + max(last for _, _, last in ranges), dtype=np.uint8)
    for number, first, last in ranges:
        table[first : last + 1] = number
    return table
