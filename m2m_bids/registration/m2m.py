"""The M2M-Reg objective: a pair, a bridge pair, named loss terms.

Source: Choo et al., Mono-Modalizing Extremely Heterogeneous Multi-Modal Medical Image
Registration, MICCAI 2025. The order of composition is the paper's: ``phi_st(phi_ts2(x))`` takes a
point of S' to S.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from m2m_bids.registration.maps import compose, map_from_displacement, warp
from m2m_bids.registration.regularity import gradicon_loss, jacobian_identity_loss
from m2m_bids.registration.similarity import lncc_loss

Network = Callable[[Tensor, Tensor], Tensor]


class CyclePairs(NamedTuple):
    """
    The four images of one cycle S -> T -> S' -> T' -> S, each of shape (N, 1, n, n, n) in [0, 1].

    S and S' are of one modality, T and T' of the other. ``is_aligned`` states that S' and T' are
    of one subject and already registered, so that phi_S'T' is the identity (Sec. 2.4).
    """

    s: Tensor
    t: Tensor
    bridge_s: Tensor
    bridge_t: Tensor
    is_aligned: bool


class CycleMaps(NamedTuple):
    """The maps of one cycle, (N, 3, n, n, n) unit coordinates; no ``bridge`` is the identity."""

    st: Tensor
    t_bridge_s: Tensor
    bridge: Tensor | None
    bridge_t_s: Tensor


@dataclass(frozen=True)
class ObjectiveConfig:
    """
    Weights of the objective.

    Parameters
    ----------
    gradcycon_weight : float
        Of Eq. 3.
    gradicon_weight : float
        Of Eq. 4 on the pair (S, T), with an inverse edge of its own; 0 saves that edge.
    lncc_sigma_voxels : float
        Window of the similarity.
    """

    gradcycon_weight: float = 0.1
    gradicon_weight: float = 0.5
    lncc_sigma_voxels: float = 5.0


def predict_cycle(network: Network, pairs: CyclePairs) -> CycleMaps:
    """
    Predict the three or four edges of a cycle in one call of the network.

    Parameters
    ----------
    network : callable
        Takes moving and fixed images to displacements.
    pairs : CyclePairs

    Returns
    -------
    CycleMaps
    """
    moving = [pairs.s, pairs.t, pairs.bridge_t]
    fixed = [pairs.t, pairs.bridge_s, pairs.s]
    if not pairs.is_aligned:
        moving.append(pairs.bridge_s)
        fixed.append(pairs.bridge_t)
    maps = map_from_displacement(network(torch.cat(moving), torch.cat(fixed)))
    st, t_bridge_s, bridge_t_s, *bridge = maps.split(len(pairs.s))
    return CycleMaps(st, t_bridge_s, bridge[0] if bridge else None, bridge_t_s)


def cycle_similarity_loss(
    pairs: CyclePairs, maps: CycleMaps, *, lncc_sigma_voxels: float
) -> Tensor:
    r"""
    Compare images of one modality around the cycle.

    .. math::

        L_{m2m} = sim(S \circ \varphi_{ST} \circ \varphi_{TS'}, S')
        + sim(S' \circ \varphi_{S'T'} \circ \varphi_{T'S}, S)
        + sim(T \circ \varphi_{TS'} \circ \varphi_{S'T'}, T')
        + sim(T' \circ \varphi_{T'S} \circ \varphi_{ST}, T)

    (Eq. 2), where :math:`\varphi_{S'T'}` is left out for an aligned bridge.

    Parameters
    ----------
    pairs : CyclePairs
    maps : CycleMaps
    lncc_sigma_voxels : float
        Window of `lncc_loss`.

    Returns
    -------
    Tensor, shape ()
    """
    to_bridge_t = maps.t_bridge_s if maps.bridge is None else compose(maps.t_bridge_s, maps.bridge)
    from_bridge_s = (
        maps.bridge_t_s if maps.bridge is None else compose(maps.bridge, maps.bridge_t_s)
    )
    warped = torch.cat(
        (
            warp(pairs.s, compose(maps.st, maps.t_bridge_s)),
            warp(pairs.bridge_s, from_bridge_s),
            warp(pairs.t, to_bridge_t),
            warp(pairs.bridge_t, compose(maps.bridge_t_s, maps.st)),
        )
    )
    fixed = torch.cat((pairs.bridge_s, pairs.s, pairs.bridge_t, pairs.t))
    return 4 * lncc_loss(warped, fixed, sigma_voxels=lncc_sigma_voxels)


def cycle_map(maps: CycleMaps) -> Tensor:
    r"""
    Compose the whole cycle.

    .. math:: \varphi_{ST} \circ \varphi_{TS'} \circ \varphi_{S'T'} \circ \varphi_{T'S}

    Parameters
    ----------
    maps : CycleMaps

    Returns
    -------
    Tensor, shape (N, 3, n, n, n)
        The identity on S's grid where the maps are right.
    """
    inner = maps.bridge_t_s if maps.bridge is None else compose(maps.bridge, maps.bridge_t_s)
    return compose(maps.st, compose(maps.t_bridge_s, inner))


def m2m_loss(
    network: Network, pairs: CyclePairs, config: ObjectiveConfig
) -> tuple[dict[str, Tensor], CycleMaps]:
    """
    Evaluate the objective of Eq. 6.

    Parameters
    ----------
    network : callable
        Takes moving and fixed images to displacements.
    pairs : CyclePairs
    config : ObjectiveConfig

    Returns
    -------
    losses : dict of str to Tensor, shape ()
        Weighted terms ``m2m``, ``gradcycon`` and ``gradicon``; the objective is their sum.
    maps : CycleMaps
        The predicted maps, for further terms.
    """
    maps = predict_cycle(network, pairs)
    losses = {
        "m2m": cycle_similarity_loss(pairs, maps, lncc_sigma_voxels=config.lncc_sigma_voxels),
        "gradcycon": config.gradcycon_weight * jacobian_identity_loss(cycle_map(maps)),
    }
    if config.gradicon_weight:
        ts = map_from_displacement(network(pairs.t, pairs.s))
        losses["gradicon"] = config.gradicon_weight * gradicon_loss(maps.st, ts)
    return losses, maps
