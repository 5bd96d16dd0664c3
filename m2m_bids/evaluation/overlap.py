"""Overlap of label maps."""

from collections.abc import Iterable

import numpy as np


def dice_per_label(
    labels_a: np.ndarray, labels_b: np.ndarray, labels: Iterable[int] | None = None
) -> dict[int, float]:
    r"""
    Compute the Dice coefficient of each label.

    .. math:: D_l = \frac{2 |A_l \cap B_l|}{|A_l| + |B_l|}

    Parameters
    ----------
    labels_a, labels_b : ndarray of integers, of the same shape
        Label maps on one grid; 0 is the background.
    labels : iterable of int, optional
        Labels to compare; by default all in either map but the background.

    Returns
    -------
    dict of int to float
        From 0, apart, to 1, equal, in the order of `labels`. A label absent from both maps is
        left out, since nothing is known of its overlap; a label absent from one has 0.

    Raises
    ------
    ValueError
        If the shapes differ, or a map does not hold integers.

    Examples
    --------
    >>> dice_per_label(np.array([1, 1, 2, 0]), np.array([1, 0, 2, 0]), labels=(1, 2, 3))
    {1: 0.6666666666666666, 2: 1.0}
    """
    labels_a, labels_b = check_label_maps(labels_a, labels_b)
    scores = {}
    for label in labels_in_either(labels_a, labels_b) if labels is None else labels:
        in_a, in_b = labels_a == label, labels_b == label
        n_voxels = np.count_nonzero(in_a) + np.count_nonzero(in_b)
        if n_voxels:
            scores[label] = float(2 * np.count_nonzero(in_a & in_b) / n_voxels)
    return scores


def check_label_maps(labels_a: np.ndarray, labels_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Return two label maps as arrays, or fail if they cannot be compared.

    Parameters
    ----------
    labels_a, labels_b : array_like of integers, of the same shape
        Label maps on one grid.

    Returns
    -------
    tuple of two ndarray

    Raises
    ------
    ValueError
        If the shapes differ, or a map does not hold integers.
    """
    labels_a, labels_b = np.asarray(labels_a), np.asarray(labels_b)
    for labels in (labels_a, labels_b):
        if labels.dtype.kind not in "iub":
            raise ValueError(f"label maps must hold integers, got {labels.dtype}")
    if labels_a.shape != labels_b.shape:
        raise ValueError(f"label maps differ in shape: {labels_a.shape} and {labels_b.shape}")
    return labels_a, labels_b


def labels_in_either(labels_a: np.ndarray, labels_b: np.ndarray) -> list[int]:
    """Return the labels of two maps but the background, 0, sorted."""
    labels = np.union1d(labels_a, labels_b)
    return labels[labels != 0].tolist()
