"""Three tissue classes of a T1w image by a Gaussian mixture with a Markov random field."""

import numpy as np
from scipy import ndimage

N_ITERATIONS = 25
# Weights of the template's prior (an affine fit is only roughly right) and of the six neighbours.
PRIOR_WEIGHT = 0.4
NEIGHBOUR_WEIGHT = 0.25
# Order of brightness in a T1w image: CSF, grey, white matter.
BRIGHTNESS = (2, 0, 1)


def fit_classes(data: np.ndarray, mask: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
    r"""
    Fit grey matter, white matter and CSF to the voxels of a mask.

    Expectation maximisation of a Gaussian mixture whose class probabilities at voxel *i* are

    .. math:: p_{ik} \propto w_k\, \pi_{ik}^{a}
              \exp\Big(b \sum_{j \in N(i)} p_{jk}\Big)\, \mathcal N(y_i; \mu_k, \sigma_k^2)

    with the prior :math:`\pi` and a mean-field Potts term over the six neighbours, as in Atropos
    [Avants et al., Neuroinformatics 2011], which is not used itself because it goes through
    files. Means are kept in the order of brightness CSF < GM < WM.

    Parameters
    ----------
    data : ndarray, shape (I, J, K)
        Bias-corrected T1w intensities.
    mask : ndarray of bool, shape (I, J, K)
        Brain.
    prior : ndarray, shape (3, n_voxels), or None
        Prior probabilities of GM, WM and CSF at the voxels of the mask.

    Returns
    -------
    ndarray, shape (3, I, J, K)
        float32 posterior probabilities of GM, WM and CSF; 0 outside the mask.
    """
    values = data[mask].astype(np.float32)
    low, high = np.percentile(values, [1, 99])
    values = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    means, deviations = _start(values, prior)
    fixed = np.zeros((3, 1), dtype=np.float32)
    if prior is not None:
        fixed = PRIOR_WEIGHT * np.log(0.05 + prior).astype(np.float32)
    weights = np.full(3, 1 / 3)
    neighbours = np.zeros((3, values.size), dtype=np.float32)
    posterior = np.zeros((3, *mask.shape), dtype=np.float32)
    for _ in range(N_ITERATIONS):
        distance = (values - means[:, None]) / deviations[:, None]
        log_p = fixed + NEIGHBOUR_WEIGHT * neighbours - 0.5 * distance.astype(np.float32) ** 2
        log_p += np.log(weights / deviations)[:, None].astype(np.float32)
        p = np.exp(log_p - log_p.max(axis=0))
        p /= p.sum(axis=0)
        posterior[:, mask] = p
        neighbours = np.stack([_six_neighbours(part)[mask] for part in posterior])
        mass = p.sum(axis=1) + 1e-6
        weights = mass / mass.sum()
        means = _in_order(p @ values / mass)
        spread = [p[k] @ (values - means[k]) ** 2 / mass[k] for k in range(3)]
        deviations = np.sqrt(np.maximum(spread, 0.03**2))
    return posterior


def _start(values: np.ndarray, prior: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return means and deviations from the prior's surest voxels, else from k-means."""
    if prior is None or prior.max(axis=1).min() < 0.6:
        bright = np.quantile(values, [0.1, 0.45, 0.8])
        for _ in range(30):
            nearest = np.argmin(np.abs(values - bright[:, None]), axis=0)
            size = np.maximum(np.bincount(nearest, minlength=3), 1)
            bright = np.bincount(nearest, values, 3) / size
        means = np.empty(3)
        means[list(BRIGHTNESS)] = bright
    else:
        means = np.array([np.median(values[part > 0.6 * part.max()]) for part in prior])
        means = _in_order(means)
    return means, np.full(3, 0.12)


def _in_order(means: np.ndarray) -> np.ndarray:
    """Sort class means so that CSF < GM < WM."""
    sorted_means = np.empty(3)
    sorted_means[list(BRIGHTNESS)] = np.sort(means)
    return sorted_means


def _six_neighbours(data: np.ndarray) -> np.ndarray:
    """Sum the six face neighbours of every voxel."""
    return sum(
        ndimage.convolve1d(data, [1, 0, 1], axis=axis, mode="constant") for axis in range(3)
    )
