"""Three tissue classes of a T1w image by a Gaussian mixture with a Markov random field."""

import numpy as np
from scipy import ndimage

N_ITERATIONS = 24
# The bias that N4 left is updated this often, with a Gaussian of this width.
BIAS_EVERY = 4
BIAS_SIGMA_MM = 20.0
# Weights of the template's prior (an affine fit is only roughly right) and of the six neighbours.
PRIOR_WEIGHT = 0.8
NEIGHBOUR_WEIGHT = 0.25
# Order of brightness in a T1w image: CSF, grey, white matter.
BRIGHTNESS = (2, 0, 1)


def fit_classes(
    data: np.ndarray, mask: np.ndarray, prior: np.ndarray | None, *, spacing_mm: float
) -> np.ndarray:
    r"""
    Fit grey matter, white matter and CSF to the voxels of a mask.

    Expectation maximisation of a Gaussian mixture whose class probabilities at voxel *i* are

    .. math:: p_{ik} \propto \pi_{ik}^{a} \exp\Big(b \sum_{j \in N(i)} p_{jk}\Big)
              \mathcal N(y_i / g_i; \mu_k, \sigma^2)

    with the prior :math:`\pi`, a mean-field Potts term over the six neighbours, and a smooth gain
    *g* that makes up for what bias correction left [Wells et al., IEEE TMI 1996]. The classes
    share one variance and have no mixing weights: otherwise grey matter takes the partly filled
    sulci. Means keep the order of brightness CSF < GM < WM.

    Atropos, which is similar, is not used because ANTsPy leaves its files in the temporary folder.

    Parameters
    ----------
    data : ndarray, shape (I, J, K)
        Bias-corrected T1w intensities.
    mask : ndarray of bool, shape (I, J, K)
        Brain.
    prior : ndarray, shape (3, n_voxels), or None
        Prior probabilities of GM, WM and CSF at the voxels of the mask.
    spacing_mm : float
        Voxel size.

    Returns
    -------
    ndarray, shape (3, I, J, K)
        float32 posterior probabilities of GM, WM and CSF; 0 outside the mask.
    """
    observed = data[mask].astype(np.float32)
    observed = np.clip(observed / max(np.percentile(observed, 99), 1e-6), 0, 1.2)
    values = observed
    means = _start(values, prior)
    deviation = 0.2 * np.ptp(means)
    fixed = np.zeros((3, 1), dtype=np.float32)
    if prior is not None:
        fixed = PRIOR_WEIGHT * np.log(0.05 + prior).astype(np.float32)
    neighbours = np.zeros((3, values.size), dtype=np.float32)
    posterior = np.zeros((3, *mask.shape), dtype=np.float32)
    for iteration in range(N_ITERATIONS):
        distance = ((values - means[:, None]) / deviation).astype(np.float32)
        log_p = fixed + NEIGHBOUR_WEIGHT * neighbours - 0.5 * distance**2
        p = np.exp(log_p - log_p.max(axis=0))
        p /= p.sum(axis=0)
        posterior[:, mask] = p
        neighbours = np.stack([_six_neighbours(part)[mask] for part in posterior])
        if iteration % BIAS_EVERY == BIAS_EVERY - 1:
            values = observed / _gain(observed, p, means, mask, BIAS_SIGMA_MM / spacing_mm)
        mass = p.sum(axis=1) + 1e-6
        means = _in_order(p @ values / mass)
        deviation = np.sqrt(np.mean(np.sum(p * (values - means[:, None]) ** 2, axis=0)))
        deviation = max(float(deviation), 0.02)
    return posterior


def _gain(
    observed: np.ndarray, p: np.ndarray, means: np.ndarray, mask: np.ndarray, sigma_voxels: float
) -> np.ndarray:
    """Smooth ratio of the intensities to those of the classes, over GM and WM, (n_voxels,)."""
    # The field is smooth: every fourth voxel is enough to find it, and 64 times quicker.
    weight = p[0] + p[1]
    smooth = []
    for values in (weight * observed, weight * (means @ p)):
        volume = np.zeros(mask.shape, dtype=np.float32)
        volume[mask] = values
        volume = ndimage.uniform_filter(volume, 4)[::4, ::4, ::4]
        smooth.append(ndimage.gaussian_filter(volume, sigma_voxels / 4) + 1e-6)
    gain = smooth[0] / smooth[1]
    return ndimage.map_coordinates(gain, np.argwhere(mask).T / 4, order=1, mode="nearest")


def _start(values: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
    """Return class means from the prior's surest voxels, else from k-means."""
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
    return means


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
