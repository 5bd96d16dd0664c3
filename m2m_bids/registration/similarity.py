"""Image similarity losses: lower is more similar, and a batch counts as the mean of its items."""

from collections.abc import Callable
from functools import lru_cache, reduce
from itertools import combinations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from m2m_bids.registration.grids import can_be_compiled, multiply_axes

# Added to the variances of LNCC.
_EPSILON = 1e-5
# Of MIND-SSC; far below that of any image in [0, 1], far above the smallest float32.
_SMALLEST_VARIANCE = 1e-30


@lru_cache(maxsize=64)
def _gaussian_band(
    size: int, sigma: float, radius: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the banded matrix that convolves an axis with a truncated Gaussian, zero padding."""
    offsets = torch.arange(size, dtype=torch.float64)
    distance = (offsets[:, None] - offsets[None]).abs()
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
    band = torch.exp(-0.5 * (distance / sigma) ** 2) / taps.sum()
    band[distance > radius] = 0
    return band.to(device, dtype)


@lru_cache(maxsize=64)
def _box_band(size: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the banded matrix that averages an axis in a window, the border value repeated."""
    rows = torch.arange(size)
    band = torch.zeros(size, size, dtype=torch.float64)
    for shift in range(-radius, radius + 1):
        columns = (rows + shift).clamp(0, size - 1)
        band[rows, columns] += 1 / (2 * radius + 1)
    return band.to(device, dtype)


def _filter_last_axes(image: Tensor, bands: list[Tensor], radius: int) -> Tensor:
    """Multiply the last three axes of images with banded matrices."""
    if can_be_compiled(image):
        from m2m_bids.registration.bands import multiply_axes_by_bands

        return multiply_axes_by_bands(image, bands, radius)
    return multiply_axes(image, *bands)


class _Filter(torch.autograd.Function):
    """Products of the last three axes with banded matrices; keeps nothing for the backward."""

    @staticmethod
    def forward(ctx, image: Tensor, bands: list[Tensor], radius: int) -> Tensor:
        ctx.bands, ctx.radius = bands, radius
        return _filter_last_axes(image, bands, radius)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Filter.apply(gradient, [band.T for band in ctx.bands], ctx.radius), None, None


def smooth(image: Tensor, sigma_voxels: float, *, radius_voxels: int | None = None) -> Tensor:
    """
    Smooth images with a Gaussian, as three products with a banded matrix.

    Parameters
    ----------
    image : Tensor, shape (..., I, J, K)
    sigma_voxels : float
        Standard deviation; zero returns the image.
    radius_voxels : int, optional
        Taps on either side of the centre; ``round(2 * sigma)`` (at least 1) by default. The kernel
        sums to one, and the image is padded with zeros.

    Returns
    -------
    Tensor, shape (..., I, J, K)
    """
    if sigma_voxels <= 0:
        return image
    radius = max(1, round(2 * sigma_voxels)) if radius_voxels is None else radius_voxels
    bands = [
        _gaussian_band(n, float(sigma_voxels), radius, image.dtype, image.device)
        for n in image.shape[-3:]
    ]
    return _Filter.apply(image, bands, radius)


class _LocalCorrelation(torch.autograd.Function):
    r"""
    LNCC :math:`r = c s` of covariance `c` and scale :math:`s = (v_a v_b)^{-1/2}`.

    With the window :math:`G`, which is its own adjoint, and means :math:`m`, a gradient `g` of r
    becomes :math:`b\,G(g s) - a\,G(g r / v_a) + G(g (m_a r / v_a - m_b s))` of a: three windows
    instead of the five of the forward, of three images that the forward keeps.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, sigma_voxels: float) -> Tensor:
        means = [smooth(image, sigma_voxels) for image in (a, b)]
        # Not positive by rounding, or flat: there the variance is taken as constant.
        variances = [
            smooth(image * image, sigma_voxels).addcmul_(mean, mean, value=-1)
            for image, mean in zip((a, b), means, strict=True)
        ]
        guarded = [variance.clamp_min(0).add_(_EPSILON) for variance in variances]
        scale = (guarded[0] * guarded[1]).rsqrt_()
        correlation = smooth(a * b, sigma_voxels).addcmul_(*means, value=-1).mul_(scale)
        kept = [a, b, scale]
        for needed, own in zip(ctx.needs_input_grad[:2], (0, 1), strict=True):
            if needed:
                slope = (correlation / guarded[own]).masked_fill_(variances[own] <= 0, 0)
                offset = (means[own] * slope).addcmul_(means[1 - own], scale, value=-1)
                kept += [slope, offset]
        ctx.save_for_backward(*kept)
        ctx.sigma_voxels = sigma_voxels
        return correlation

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, scale, *kept = ctx.saved_tensors
        common = smooth(gradient * scale, ctx.sigma_voxels)
        gradients: list[Tensor | None] = []
        for needed, own, other in zip(ctx.needs_input_grad[:2], (a, b), (b, a), strict=True):
            if not needed:
                gradients.append(None)
                continue
            slope, offset, *kept = kept
            total = smooth(gradient * offset, ctx.sigma_voxels).addcmul_(common, other)
            total.addcmul_(own, smooth(gradient * slope, ctx.sigma_voxels), value=-1)
            gradients.append(total)
        return *gradients, None


def local_correlation(a: Tensor, b: Tensor, *, sigma_voxels: float = 5.0) -> Tensor:
    r"""
    Return the local normalised cross-correlation (LNCC) at every voxel.

    .. math::

        \frac{\mathrm{cov}(a, b)}
        {\sqrt{(\mathrm{var}(a) + \epsilon)(\mathrm{var}(b) + \epsilon)}}

    with moments in a Gaussian window of ``4 * sigma + 1`` taps, zero padding and :math:`\epsilon =
    10^{-5}` (the similarity of Eqs. 1 and 2 of the M2M-Reg paper, with the window of its public
    code). It can be differentiated once; an image that requires no gradient costs none.

    Parameters
    ----------
    a, b : Tensor, shape (N, 1, I, J, K)
        Images in [0, 1].
    sigma_voxels : float
        Standard deviation of the window.

    Returns
    -------
    Tensor, shape (N, 1, I, J, K)
        Between -1 and 1; near 0 where either image is flat, such as in the background.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    _check_shapes(a, b)
    if a.device.type != "cpu":
        return _LocalCorrelation.apply(a, b, float(sigma_voxels))
    # One after the other, so that there are the many intermediate images of one alone.
    images = zip(a.split(1), b.split(1), strict=True)
    return torch.cat([_LocalCorrelation.apply(*pair, float(sigma_voxels)) for pair in images])


def lncc_loss(a: Tensor, b: Tensor, *, sigma_voxels: float = 5.0) -> Tensor:
    """
    Return one minus the mean of `local_correlation`, which has the parameters and the errors.

    Returns
    -------
    Tensor, shape ()
        Between 0, for images equal up to a local affine intensity map, and 2; where either image
        is flat a voxel counts as 1.
    """
    return 1 - local_correlation(a, b, sigma_voxels=sigma_voxels).mean()


def lncc_squared_loss(a: Tensor, b: Tensor, *, sigma_voxels: float = 5.0) -> Tensor:
    """
    Return one minus the mean square of `local_correlation`, whatever the sign of the correlation.

    The parameters and the errors are those of `local_correlation`. It is the LNCC² of the M2M-Reg
    paper's Table 1.

    Returns
    -------
    Tensor, shape ()
        Between 0, for images equal up to a local affine intensity map, and 1.
    """
    return 1 - local_correlation(a, b, sigma_voxels=sigma_voxels).square().mean()


def _spline_taps(values: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the four bins that each value touches, their weights, and the slopes of these."""
    position = values.clamp(0, 1) * (n_bins - 3)
    first = position.floor().clamp_max_(n_bins - 4)
    t = position - first
    s = 1 - t
    weights = torch.stack(
        (
            s**3 / 6,
            2 / 3 - t * t * (2 - t) / 2,
            2 / 3 - s * s * (2 - s) / 2,
            t**3 / 6,
        ),
        1,
    )
    slopes = torch.stack((-s * s / 2, t * (1.5 * t - 2), s * (2 - 1.5 * s), t * t / 2), 1)
    slopes *= (n_bins - 3) * ((values >= 0) & (values <= 1))[:, None]
    return first.long()[:, None] + torch.arange(4, device=values.device), weights, slopes


class _JointHistogram(torch.autograd.Function):
    """
    Joint histogram of image pairs (N, V) with cubic B-spline windows, (N, n_bins, n_bins).

    In chunks of voxels, a row of weights each, so that the histogram is one matrix product; both
    passes make the weights anew and keep the images only.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, n_bins: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.n_bins = n_bins
        joint = a.new_zeros(len(a), n_bins, n_bins)
        for item, voxels in _chunks(a):
            rows = []
            for image in (a, b):
                bins, weights, _ = _spline_taps(image[item, voxels], n_bins)
                rows.append(weights.new_zeros(len(bins), n_bins).scatter_(1, bins, weights))
            joint[item].addmm_(rows[0].T, rows[1])
        return joint / a.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images = ctx.saved_tensors
        gradient = gradient / images[0].shape[1]
        results = [
            torch.empty_like(image) if needed else None
            for image, needed in zip(images, ctx.needs_input_grad, strict=False)
        ]
        for item, voxels in _chunks(images[0]):
            taps = [_spline_taps(image[item, voxels], ctx.n_bins) for image in images]
            for own, result in enumerate(results):
                if result is None:
                    continue
                bins, weights, _ = taps[1 - own]
                rows = weights.new_zeros(len(bins), ctx.n_bins).scatter_(1, bins, weights)
                along_own = rows @ (gradient[item] if own else gradient[item].T)
                bins, _, slopes = taps[own]
                result[item, voxels] = (along_own.gather(1, bins) * slopes).sum(1)
        return *results, None


def _chunks(images: Tensor) -> list[tuple[int, slice]]:
    """Cut images (N, V) into runs of voxels whose rows of weights stay in the cache."""
    size = 2**13 if images.device.type == "cpu" else 2**20
    n_items, n_voxels = images.shape
    starts = range(0, n_voxels, size)
    return [(item, slice(start, start + size)) for item in range(n_items) for start in starts]


def mutual_information_loss(a: Tensor, b: Tensor, *, n_bins: int = 32) -> Tensor:
    r"""
    Return minus the mutual information of images.

    .. math:: -\sum_{ij} p_{ij} \log \frac{p_{ij}}{p_{i \cdot}\, p_{\cdot j}}

    in nats, of the joint histogram of each pair, with cubic B-spline windows in both images
    (Thevenaz and Unser, 2000; they sum to one, so that the histogram's margins are the images'
    own histograms); the mean over the batch. All voxels count, those of the background too: to
    leave out those that are dark in both images would let a map lower the loss by moving tissue
    out. The size of the loss therefore depends on how much of the grid is brain.

    Parameters
    ----------
    a, b : Tensor, shape (N, 1, I, J, K)
        Images in [0, 1]; values beyond count as the nearer end, without a gradient.
    n_bins : int
        Windows in each image, at least 4; two neighbouring centres are ``1 / (n_bins - 3)`` apart.

    Returns
    -------
    Tensor, shape ()
        Between ``-log(n_bins)``, and 0 for independent images.

    Raises
    ------
    ValueError
        If the shapes differ, or there are too few bins.
    """
    _check_shapes(a, b)
    if n_bins < 4:
        raise ValueError(f"n_bins must be at least 4, got {n_bins}")
    joint = _JointHistogram.apply(a.flatten(1), b.flatten(1), n_bins)
    information = _entropy(joint.sum(1)) + _entropy(joint.sum(2)) - _entropy(joint.flatten(1))
    return -information.mean()


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of distributions (N, bins) in nats; empty bins have a finite gradient."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * (probabilities + tiny).log()).sum(1)


# Neighbours of the centre, and the pairs of them that are sqrt(2) apart.
_NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))
_PAIRS = tuple(
    (p, q)
    for p, q in combinations(_NEIGHBOURS, 2)
    if sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) == 2
)


def _neighbour(padded: Tensor, offset: tuple[int, int, int], step: int) -> Tensor:
    """Return an image padded by ``step`` without its margin, shifted by ``step * offset``."""
    i, j, k = (
        slice(step + step * o, n - step + step * o)
        for o, n in zip(offset, padded.shape[2:], strict=True)
    )
    return padded[:, :, i, j, k]


class _SelfSimilarity(torch.autograd.Function):
    r"""
    Descriptors :math:`E = \exp(-R)`, :math:`R = (D - \min D) / v`, of padded images.

    The forward keeps them, the padded image and v; one pair is at work at a time.
    """

    @staticmethod
    def forward(ctx, padded: Tensor, radius: int, step: int) -> Tensor:
        shape = [n - 2 * step for n in padded.shape[2:]]
        bands = [_box_band(n, radius, padded.dtype, padded.device) for n in shape]
        described = padded.new_empty(len(padded), len(_PAIRS), *shape)
        for channel, (p, q) in enumerate(_PAIRS):
            square = (_neighbour(padded, p, step) - _neighbour(padded, q, step)).square_()
            described[:, channel, None] = _filter_last_axes(square, bands, radius)
        described -= reduce(torch.minimum, described.unbind(1))[:, None]
        spread = described.mean(1)
        # A constant image has no variance at all.
        typical = spread.mean((1, 2, 3), keepdim=True).clamp_min(_SMALLEST_VARIANCE)
        variance = spread.clamp(0.001 * typical, 1000 * typical)
        described.div_(-variance[:, None]).exp_()
        ctx.save_for_backward(padded, described, variance, variance == spread)
        ctx.bands, ctx.radius, ctx.step = bands, radius, step
        return described

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        padded, described, variance, is_free = ctx.saved_tensors
        step, adjoint = ctx.step, [band.T for band in ctx.bands]
        # Of v: the sum over the pairs of g E R / v, with E R = -E log E, where v is not clamped.
        of_variance, of_least, n_least = (torch.zeros_like(variance) for _ in range(3))
        for g, e in zip(gradient.unbind(1), described.unbind(1), strict=True):
            of_variance -= g * torch.xlogy(e, e)
            of_least += g * e
            n_least += e == 1
        of_variance *= is_free / variance
        # Of min D: minus the sum of those of D - min D; the pairs that attain it share it.
        of_least = (of_least / variance - of_variance) / n_least
        of_variance /= len(_PAIRS)
        result = torch.zeros_like(padded)
        for channel, (p, q) in enumerate(_PAIRS):
            g, e = gradient[:, channel], described[:, channel]
            of_distance = (g * e).div_(variance).neg_().add_(of_variance)
            of_distance += of_least * (e == 1)
            of_square = _filter_last_axes(of_distance[:, None], adjoint, ctx.radius)
            of_square *= _neighbour(padded, p, step) - _neighbour(padded, q, step)
            _neighbour(result, p, step).add_(of_square, alpha=2)
            _neighbour(result, q, step).add_(of_square, alpha=-2)
        return result, None, None


def mind_ssc(image: Tensor, *, radius_voxels: int = 2, dilation_voxels: int = 2) -> Tensor:
    r"""
    Describe every voxel by its self-similarity context (MIND-SSC; Heinrich et al., MICCAI 2013).

    .. math:: \exp\left(-\frac{D_{pq} - \min D}{v}\right)

    for the 12 pairs of neighbours p, q among the six that are :math:`\sqrt 2` apart, D being the
    mean squared difference of the two patches there, and v the mean of the numerator over the
    pairs. As in the authors' public code, patches are boxes, the image and D continue beyond the
    border by their values there, and v is kept within 0.001 and 1000 times its mean over the
    image, which counts as constant. A departure from it: that mean is of each image of a batch,
    not of the batch. It can be differentiated once.

    Parameters
    ----------
    image : Tensor, shape (N, 1, I, J, K)
        Images, any unit.
    radius_voxels : int
        Of the patches, which have ``2 * radius + 1`` voxels along an axis.
    dilation_voxels : int
        Distance of the neighbours.

    Returns
    -------
    Tensor, shape (N, 12, I, J, K)
        Between 0 and 1; the same for an affine function of the intensities, and 1 for a constant
        image.
    """
    padded = functional.pad(image, (dilation_voxels,) * 6, mode="replicate")
    return _SelfSimilarity.apply(padded, radius_voxels, dilation_voxels)


def mind_ssc_loss(
    a: Tensor, b: Tensor, *, radius_voxels: int = 2, dilation_voxels: int = 2
) -> Tensor:
    """
    Return the mean squared difference of the descriptors of `mind_ssc`.

    Parameters
    ----------
    a, b : Tensor, shape (N, 1, I, J, K)
        Images, any unit and contrast.
    radius_voxels, dilation_voxels : int
        Half-width of the patches, and distance of those compared.

    Returns
    -------
    Tensor, shape ()
        Between 0, for images equal up to an affine intensity map, and 1.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    _check_shapes(a, b)
    descriptors = (
        mind_ssc(image, radius_voxels=radius_voxels, dilation_voxels=dilation_voxels)
        for image in (a, b)
    )
    return functional.mse_loss(*descriptors)


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")


SIMILARITIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "lncc": lambda a, b, sigma: lncc_loss(a, b, sigma_voxels=sigma),
    "lncc2": lambda a, b, sigma: lncc_squared_loss(a, b, sigma_voxels=sigma),
    "mi": lambda a, b, sigma: mutual_information_loss(a, b),
    "mind-ssc": lambda a, b, sigma: mind_ssc_loss(a, b),
}
"""Losses by name, each of two (N, 1, I, J, K) images and the window of LNCC in voxels."""


def similarity_loss(
    name: str, warped: Tensor, fixed: Tensor, *, lncc_sigma_voxels: float = 5.0
) -> Tensor:
    """
    Return a similarity loss by its name.

    Parameters
    ----------
    name : str
        One of `SIMILARITIES`: ``"lncc"``, ``"lncc2"``, ``"mi"`` or ``"mind-ssc"``.
    warped, fixed : Tensor, shape (N, 1, I, J, K)
        Images in [0, 1].
    lncc_sigma_voxels : float
        Window of ``"lncc"`` and ``"lncc2"``; the others do not use it.

    Returns
    -------
    Tensor, shape ()
        The mean over the batch, so that ``k`` times the loss of ``k`` pairs in one batch is the
        sum of their losses. Lower is more similar; ``"mi"`` is negative.

    Raises
    ------
    ValueError
        If the name is unknown, or the shapes differ.
    """
    if name not in SIMILARITIES:
        raise ValueError(f"unknown similarity {name!r}; expected one of {', '.join(SIMILARITIES)}")
    return SIMILARITIES[name](warped, fixed, lncc_sigma_voxels)
