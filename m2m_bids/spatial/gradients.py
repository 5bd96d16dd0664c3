"""Diffusion gradients: FSL's files, their directions in the world, and which volumes are used."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2m_bids.spatial.images import ImageError

B0_MAX = 50.0
# Beyond it the signal of tissue is no longer that of a Gaussian, which a tensor supposes.
B_MAX = 1200.0
MIN_DIRECTIONS = 6
# Axes nearer than this count as one.
DISTINCT_DEG = 5.0


class Gradients(NamedTuple):
    """
    Diffusion weighting of the volumes of an image.

    Attributes
    ----------
    b_values : ndarray, shape (N,)
        s/mm^2.
    directions : ndarray, shape (N, 3)
        Unit vectors in the world, RAS+; zero where a volume has no direction.
    """

    b_values: np.ndarray
    directions: np.ndarray

    @property
    def is_b0(self) -> np.ndarray:
        """Volumes without diffusion weighting, shape (N,)."""
        return self.b_values <= B0_MAX

    @property
    def is_used(self) -> np.ndarray:
        """Volumes that a tensor is fitted to, shape (N,): no high b, and a direction if any b."""
        has_direction = self.directions.any(axis=1)
        return self.is_b0 | ((self.b_values <= B_MAX) & has_direction)


def read_gradients(
    bval_file: Path | str,
    bvec_file: Path | str,
    *,
    vox2ras: np.ndarray,
    n_volumes: int | None = None,
) -> Gradients:
    """
    Read the gradients of an image from FSL's files, into the world.

    BIDS and FSL give directions along the axes of the image, the first one reversed where the
    affine's determinant is positive. They are taken as three rows or three columns, and made unit
    vectors; those that are zero or not finite (as of averages over directions) are zero.

    Parameters
    ----------
    bval_file, bvec_file : Path or str
        Files of numbers.
    vox2ras : ndarray, shape (4, 4)
        Affine of the image.
    n_volumes : int, optional
        Volumes of the image; by default as many as there are b-values.

    Returns
    -------
    Gradients

    Raises
    ------
    ImageError
        If a file cannot be read, or its numbers are not those of `n_volumes` volumes.
    """
    b_values = _read_numbers(bval_file).ravel()
    n_volumes = len(b_values) if n_volumes is None else n_volumes
    if len(b_values) != n_volumes:
        raise ImageError(
            f"{bval_file}: {len(b_values)} b-values, expected {n_volumes}, one for each volume of "
            "the image. Copy or convert image and files again."
        )
    if not np.isfinite(b_values).all() or b_values.min() < 0:
        raise ImageError(
            f"{bval_file}: a b-value is negative or not finite, expected s/mm^2. Correct the file."
        )
    components = _read_numbers(bvec_file)
    if components.shape != (3, n_volumes):
        components = components.T
    if components.shape != (3, n_volumes):
        found = " x ".join(str(size) for size in components.T.shape)
        raise ImageError(
            f"{bvec_file}: {found} numbers, expected 3 x {n_volumes}, a direction for each volume "
            "of the image. Copy or convert image and files again."
        )
    return Gradients(b_values, _in_world(components.T, vox2ras))


def check_sufficient(gradients: Gradients, file: Path | str) -> None:
    """
    Raise ImageError unless the used volumes determine a tensor.

    Parameters
    ----------
    gradients : Gradients
    file : Path or str
        Name of the image in the message.
    """
    if lack := what_lacks(gradients):
        raise ImageError(f"{file}: {lack}. Leave this scan out.")


def what_lacks(gradients: Gradients) -> str:
    """
    Say what the used volumes lack to determine a tensor; nothing if they do.

    Parameters
    ----------
    gradients : Gradients
    """
    directions = gradients.directions[gradients.is_used & ~gradients.is_b0]
    n_distinct = count_axes(directions)
    if not gradients.is_b0.any():
        return (
            f"no volume without diffusion weighting (b <= {B0_MAX:g}), expected one or more for a "
            "tensor fit"
        )
    products = directions[:, [0, 1, 2, 0, 0, 1]] * directions[:, [0, 1, 2, 1, 2, 2]]
    if n_distinct < MIN_DIRECTIONS or np.linalg.matrix_rank(products, tol=1e-2) < 6:
        return (
            f"{n_distinct} directions with {B0_MAX:g} < b <= {B_MAX:g} that are not collinear, "
            f"expected {MIN_DIRECTIONS} or more that determine a tensor"
        )
    return ""


def count_axes(directions: np.ndarray) -> int:
    """
    Count unit vectors that are not (anti-)parallel.

    Examples
    --------
    >>> count_axes(np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0]]))
    2
    """
    axes = np.empty((0, 3))
    for direction in directions:
        if not (np.abs(axes @ direction) > np.cos(np.deg2rad(DISTINCT_DEG))).any():
            axes = np.vstack([axes, direction])
    return len(axes)


def _read_numbers(file: Path | str) -> np.ndarray:
    """Read a table of numbers, separated by blanks or commas: 2-D."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig").replace(",", " ")
        numbers = np.array([[float(word) for word in line.split()]
                            for line in text.splitlines() if line.strip()])  # fmt: skip
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{file}: cannot be read as a table of numbers ({error}). Copy or convert it again."
        ) from error
    if not numbers.size:
        raise ImageError(f"{file}: empty, expected a table of numbers. Copy or convert it again.")
    return numbers


def _in_world(directions: np.ndarray, vox2ras: np.ndarray) -> np.ndarray:
    """Turn directions of FSL's convention into unit vectors of the world, shape (N, 3)."""
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    is_given = np.isfinite(lengths) & (lengths > 1e-3)
    units = np.where(is_given, directions / np.where(is_given, lengths, 1), 0.0)
    if np.linalg.det(vox2ras[:3, :3]) > 0:
        units[:, 0] *= -1
    left, _, right = np.linalg.svd(vox2ras[:3, :3] / np.linalg.norm(vox2ras[:3, :3], axis=0))
    return units @ (left @ right).T
