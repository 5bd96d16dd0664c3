"""Instance optimisation: the M2M-Reg objective on one pair, from wherever the network left it.

The bridge is a pre-aligned pair (Sec. 2.4 of the paper), so three maps are optimised: moving ->
fixed, fixed -> bridge, bridge -> moving. Each is the network's map after the flow of a stationary
velocity, ``phi = phi_network(exp(v)(x))``, which keeps it a diffeomorphism where the network's is
one.

A second bridge is the fixed image itself with what the moving image's modality would show of the
same anatomy, simulated from its tissues. From the fixed image to that bridge the map is the
identity, and what is left of the cycle is one term: the moving image, brought to the fixed one, is
compared with the simulated image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m2m_bids.registration.grids import identity_map, resize
from m2m_bids.registration.m2m import (
    CycleMaps,
    CyclePairs,
    cycle_map,
    cycle_paths,
    cycle_similarity_loss,
    predict_cycle,
)
from m2m_bids.registration.maps import (
    compose,
    integrate_velocity,
    jacobian_determinant,
    map_from_displacement,
    warp,
)
from m2m_bids.registration.regularity import bending_loss, jacobian_identity_loss
from m2m_bids.registration.similarity import lncc_loss, local_correlation, smooth

_SMALLEST_JACOBIAN = 0.05
_MOST_SMOOTHINGS = 8
# Velocities of few voxels, on their grid: the first of sixteen steps is a fraction of one.
_N_SQUARINGS = 4


@dataclass(frozen=True)
class RefinementConfig:
    """
    How to refine one pair.

    Parameters
    ----------
    n_steps : int
        Adam's steps in all; two thirds of them at half the resolution. Zero keeps the network's
        maps.
    step_voxels : float
        Adam's learning rate: about how far a step moves a point, in voxels of the velocities'
        grid.
    network_sigma_voxels : float
        The network's displacements are Gaussian-smoothed before the first step, and again where
        they still fold.
    velocity_size : int
        Voxels along every axis of the velocities' grid.
    velocity_sigma_voxels : float
        The velocities are Gaussian-smoothed parameters.
    gradcycon_weight, bending_weight : float
        Of Eq. 3, and of the velocities' second differences in voxels.
    forward_bending_weight : float
        The same of moving -> fixed alone, the map that is applied. Anatomies of different people,
        as the bridge's and the pair's, differ in detail, and that noise has no place in it. Tried
        on single simulated pairs: 1.0 lowers the error of PET within a subject from 1.4 to 1.1 mm,
        and raises it between two subjects from 2.3 to 2.4 mm (PET) and 1.6 to 1.9 mm (FA).
    near_voxels, near_bending_weight : float
        Where the coarse steps move the brain by less on average, as within a person, they begin
        anew from the identity instead of the network's map, whose error would be larger than what
        there is to find, and with this weight instead of ``forward_bending_weight``. Zero voxels
        for never.
    likeness_weight : float
        Of the similarity to what is simulated from the fixed image's own tissues.
    lncc_sigma_voxels : float
        Window of the similarity on the full grid; half of it at half the resolution.
    """

    n_steps: int = 60
    step_voxels: float = 0.1
    network_sigma_voxels: float = 1.0
    velocity_size: int = 32
    velocity_sigma_voxels: float = 1.0
    gradcycon_weight: float = 1.0
    bending_weight: float = 0.5
    forward_bending_weight: float = 1.0
    near_voxels: float = 0.0
    near_bending_weight: float = 10.0
    likeness_weight: float = 4.0
    lncc_sigma_voxels: float = 2.5


class Registration(NamedTuple):
    """
    The maps of one registered pair.

    Parameters
    ----------
    forward : Tensor, shape (1, 3, n, n, n)
        Map from the fixed grid to unit coordinates of the moving image, phi_ST.
    backward : Tensor, shape (1, 3, n, n, n)
        Map from the moving grid to the fixed image, by way of the bridge: phi_TS'(phi_T'S(x)). It
        is found without phi_ST, so that their agreement says how sure both are.
    similarity_gain : float
        What phi_ST adds, beyond the identity, to the two mono-modal similarities (LNCC) of Eq. 2
        that it enters: of S at S', and of T' at T. It tells whether the map is worth applying.
    similarity : float
        Mean LNCC of S, brought to S', and S' deep inside the brain, from -1 to 1. It tells whether
        S shows what the bridge shows at all. Near the brain's outline any image that fills the
        outline is similar, and a gain can be had from it.
    losses : list of dict
        The named terms at every step.
    likeness : float or None
        Mean LNCC, in T's brain, of S brought to T and what is simulated from T, from -1 to 1; None
        without that.
    likeness_gain : float or None
        What phi_ST adds to it, beyond the identity.
    """

    forward: Tensor
    backward: Tensor
    similarity_gain: float
    similarity: float
    losses: list[dict[str, float]]
    likeness: float | None = None
    likeness_gain: float | None = None


def register_pair(
    network: Callable[[Tensor, Tensor], Tensor] | None,
    pairs: CyclePairs,
    config: RefinementConfig,
    likeness: Tensor | None = None,
) -> Registration:
    """
    Register a moving image S to a fixed image T.

    Parameters
    ----------
    network : callable, optional
        Takes moving and fixed images to displacements; without it the maps start from the
        identity.
    pairs : CyclePairs
        One pair and an aligned bridge, each image (1, 1, n, n, n).
    config : RefinementConfig
    likeness : Tensor, shape (1, 1, n, n, n), optional
        What the modality of S shows of T's anatomy, simulated, on T's grid: the second bridge.

    Returns
    -------
    Registration

    Raises
    ------
    ValueError
        If the bridge is not aligned.
    """
    if not pairs.is_aligned:
        raise ValueError("the bridge of a refinement must be an aligned pair")
    with torch.no_grad():
        if network is None:
            identity = identity_map(pairs.s.shape[-1], like=pairs.s)
            start = CycleMaps(identity, identity, None, identity)
        else:
            start = predict_cycle(network, pairs)
    maps, losses = start, []
    if config.n_steps:
        maps, losses = _refine(start, pairs, config, likeness)
    with torch.no_grad():
        identity = identity_map(pairs.s.shape[-1], like=pairs.s)
        gain = _forward_similarity(pairs, maps, config) - _forward_similarity(
            pairs, maps._replace(st=identity), config
        )
        similarity = _similarity_inside(pairs, maps, config)
        backward = compose(maps.t_bridge_s, maps.bridge_t_s)
        result = Registration(maps.st, backward, gain, similarity, losses)
        if likeness is None:
            return result
        before, after = (
            _mean_likeness(warp(pairs.s, phi), likeness, pairs.t, config)
            for phi in (identity, maps.st)
        )
    return result._replace(likeness=after, likeness_gain=after - before)


def _mean_likeness(
    moved: Tensor, likeness: Tensor, fixed: Tensor, config: RefinementConfig
) -> float:
    correlation = local_correlation(moved, likeness, sigma_voxels=config.lncc_sigma_voxels)
    return _average(correlation[fixed > 0])


def _similarity_inside(pairs: CyclePairs, maps: CycleMaps, config: RefinementConfig) -> float:
    """Average the LNCC at S' where its window holds few voxels outside the brain."""
    correlation = local_correlation(
        warp(pairs.s, compose(maps.st, maps.t_bridge_s)),
        pairs.bridge_s,
        sigma_voxels=config.lncc_sigma_voxels,
    )
    brain = smooth((pairs.bridge_t > 0.05).to(correlation.dtype), config.lncc_sigma_voxels)
    return _average(correlation[brain >= min(0.95, brain.max().item())])


def _forward_similarity(pairs: CyclePairs, maps: CycleMaps, config: RefinementConfig) -> float:
    """Sum the two similarities of Eq. 2 that phi_ST enters."""
    moved = (
        (warp(pairs.s, compose(maps.st, maps.t_bridge_s)), pairs.bridge_s),
        (warp(pairs.bridge_t, compose(maps.bridge_t_s, maps.st)), pairs.t),
    )
    sigma = config.lncc_sigma_voxels
    return sum(_average(local_correlation(*both, sigma_voxels=sigma)) for both in moved)


def _average(values: Tensor) -> float:
    """Average by NumPy: PyTorch adds up in another order on more threads."""
    return float(np.mean(values.cpu().numpy(), dtype=np.float64))


def _refine(
    start: CycleMaps, pairs: CyclePairs, config: RefinementConfig, likeness: Tensor | None
) -> tuple[CycleMaps, list[dict[str, float]]]:
    n_coarse = 2 * config.n_steps // 3
    initial = torch.cat(
        [_smooth_map(phi, config.network_sigma_voxels) for phi in start if phi is not None]
    )
    descent = _Descent(initial, pairs, likeness, config, config.forward_bending_weight)
    losses = descent.run(n_coarse, is_coarse=True)
    with torch.no_grad():
        moved_voxels = _mean_displacement(descent.maps().st, pairs.t > 0)
    if moved_voxels < config.near_voxels:
        identity = identity_map(initial.shape[-1], like=initial)
        initial = torch.cat((identity, initial[1:]))
        descent = _Descent(initial, pairs, likeness, config, config.near_bending_weight)
        losses = descent.run(n_coarse, is_coarse=True)
    losses += descent.run(config.n_steps - n_coarse, is_coarse=False)
    with torch.no_grad():
        return descent.maps(), losses


class _Descent:
    """Adam on the velocities of a pair's three maps."""

    def __init__(
        self,
        initial: Tensor,
        pairs: CyclePairs,
        likeness: Tensor | None,
        config: RefinementConfig,
        forward_bending_weight: float,
    ):
        self.initial, self.pairs, self.likeness, self.config = initial, pairs, likeness, config
        self.forward_bending_weight = forward_bending_weight
        size = (3, 3, *[config.velocity_size] * 3)
        self.parameters = torch.zeros(size, device=initial.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.parameters], lr=config.step_voxels)

    def maps(self) -> CycleMaps:
        """Give the maps as they are, on the full grid."""
        return _maps(self.initial, smooth(self.parameters, self.config.velocity_sigma_voxels))

    def run(self, n_steps: int, *, is_coarse: bool) -> list[dict[str, float]]:
        """Take steps, on the full grid or at half its resolution; the terms at each."""
        config, pairs, initial, likeness = self.config, self.pairs, self.initial, self.likeness
        sigma = config.lncc_sigma_voxels
        if is_coarse:
            sigma = sigma / 2
            pairs = CyclePairs(*(_halve(image) for image in pairs[:4]), is_aligned=True)
            likeness = None if likeness is None else _halve(likeness)
            disp = initial - identity_map(initial.shape[-1], like=initial)
            initial = map_from_displacement(resize(disp, pairs.s.shape[-1]))
        losses = []
        for _ in range(n_steps):
            velocity = smooth(self.parameters, config.velocity_sigma_voxels)
            maps = _maps(initial, velocity)
            paths = cycle_paths(maps)
            terms = {
                "m2m": cycle_similarity_loss(pairs, paths, lncc_sigma_voxels=sigma),
                "gradcycon": config.gradcycon_weight * jacobian_identity_loss(cycle_map(paths)),
                "bending": config.bending_weight * bending_loss(velocity)
                + self.forward_bending_weight * bending_loss(velocity[:1]),
            }
            if likeness is not None:
                terms["likeness"] = config.likeness_weight * lncc_loss(
                    warp(pairs.s, maps.st), likeness, sigma_voxels=sigma
                )
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            self.optimizer.step()
            losses.append({name: term.item() for name, term in terms.items()})
        return losses


def _mean_displacement(phi: Tensor, brain: Tensor) -> float:
    """Average how far a map moves the points of a brain, in voxels."""
    n = phi.shape[-1]
    lengths = (phi - identity_map(n, like=phi)).norm(dim=1, keepdim=True) * (n - 1)
    return _average(lengths[brain])


def _smooth_map(phi: Tensor, sigma_voxels: float) -> Tensor:
    """Smooth the displacement of a map until it is free of folds, as flows after it are."""
    n_border = round(2 * sigma_voxels)
    if n_border == 0:
        return phi
    identity = identity_map(phi.shape[-1], like=phi)
    disp = phi - identity
    for _ in range(_MOST_SMOOTHINGS):
        padded = functional.pad(disp, (n_border,) * 6, mode="replicate")
        disp = smooth(padded, sigma_voxels)[..., *[slice(n_border, -n_border)] * 3]
        if jacobian_determinant(identity + disp).min() > _SMALLEST_JACOBIAN:
            break
    return identity + disp


def _halve(image: Tensor) -> Tensor:
    """Halve the resolution, keeping voxel centres of the first and last planes."""
    return resize(smooth(image, 0.8), image.shape[-1] // 2)


def _maps(initial: Tensor, velocity: Tensor) -> CycleMaps:
    """Compose the network's maps with the flows of the velocities (in voxels of their grid)."""
    flow = resize(
        integrate_velocity(velocity / (velocity.shape[-1] - 1), n_squarings=_N_SQUARINGS),
        initial.shape[-1],
    )
    st, t_bridge_s, bridge_t_s = compose(initial, map_from_displacement(flow)).split(1)
    return CycleMaps(st, t_bridge_s, None, bridge_t_s)
