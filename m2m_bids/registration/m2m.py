"""The objectives: a pair, a bridge pair, named loss terms.

Source: Choo et al., Mono-Modalizing Extremely Heterogeneous Multi-Modal Medical Image
Registration, MICCAI 2025. The order of composition is the paper's: ``phi_st(phi_ts2(x))`` takes a
point of S' to S.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from m2m_bids.registration.edges import Network, predict_edges
from m2m_bids.registration.grids import identity_map
from m2m_bids.registration.maps import compose, warp
from m2m_bids.registration.regularity import (
    bending_loss,
    diffusion_loss,
    gradicon_loss,
    jacobian_identity_loss,
)
from m2m_bids.registration.similarity import SIMILARITIES, similarity_loss

Regularizer = Literal["gradicon", "diffusion", "bending"]


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


class CyclePaths(NamedTuple):
    """
    The mono-modal paths around a cycle, two edges each; a map takes a name's end to its start.

    (N, 3, n, n, n), unit coordinates: ``s_bridge_s`` takes points of S' to points of S.
    """

    s_bridge_s: Tensor
    bridge_s_s: Tensor
    t_bridge_t: Tensor
    bridge_t_t: Tensor


@dataclass(frozen=True)
class ObjectiveConfig:
    """
    What is minimised; the defaults are the paper's for GradICON's network.

    Parameters
    ----------
    is_m2m : bool
        M2M-Reg (Eq. 6): mono-modal similarities around the cycle. Otherwise the conventional
        objective (Eq. 1): the similarity of both modalities, without a bridge.
    similarity : str
        A name of `SIMILARITIES`.
    regularizer : {"gradicon", "diffusion", "bending"}
        Of the edge S -> T: Eq. 4 with an inverse edge of its own, the squared gradient of its
        displacement, or the squared second differences of its displacement in voxels.
    regularity_weight : float
        Of the regulariser; 0 saves the inverse edge.
    gradcycon_weight : float
        Of Eq. 3; 0 leaves it out, and the conventional objective has none.
    lncc_sigma_voxels : float
        Window of LNCC.

    Raises
    ------
    ValueError
        If a name is unknown.
    """

    is_m2m: bool = True
    similarity: str = "lncc"
    regularizer: Regularizer = "gradicon"
    regularity_weight: float = 0.5
    gradcycon_weight: float = 0.1
    lncc_sigma_voxels: float = 5.0

    def __post_init__(self):
        for value, names in (
            (self.similarity, tuple(SIMILARITIES)),
            (self.regularizer, get_args(Regularizer)),
        ):
            if value not in names:
                raise ValueError(f"{value!r} is unknown; known are {', '.join(names)}")


def predict_cycle(network: Network, pairs: CyclePairs) -> CycleMaps:
    """
    Predict the three or four edges of a cycle.

    Parameters
    ----------
    network : callable
        Takes moving and fixed images to displacements.
    pairs : CyclePairs

    Returns
    -------
    CycleMaps
    """
    return _cycle_maps(predict_edges(network, _cycle_edges(pairs)))


def _cycle_edges(pairs: CyclePairs) -> list[tuple[Tensor, Tensor]]:
    edges = [(pairs.s, pairs.t), (pairs.t, pairs.bridge_s), (pairs.bridge_t, pairs.s)]
    return edges if pairs.is_aligned else [*edges, (pairs.bridge_s, pairs.bridge_t)]


def _cycle_maps(predicted: list[Tensor]) -> CycleMaps:
    st, t_bridge_s, bridge_t_s, *bridge = predicted
    return CycleMaps(st, t_bridge_s, bridge[0] if bridge else None, bridge_t_s)


def cycle_paths(maps: CycleMaps) -> CyclePaths:
    """
    Compose the edges of a cycle two by two.

    Parameters
    ----------
    maps : CycleMaps

    Returns
    -------
    CyclePaths
    """
    st, t_bridge_s, bridge, bridge_t_s = maps
    return CyclePaths(
        s_bridge_s=compose(st, t_bridge_s),
        bridge_s_s=bridge_t_s if bridge is None else compose(bridge, bridge_t_s),
        t_bridge_t=t_bridge_s if bridge is None else compose(t_bridge_s, bridge),
        bridge_t_t=compose(bridge_t_s, st),
    )


def cycle_similarity_loss(
    pairs: CyclePairs, paths: CyclePaths, *, lncc_sigma_voxels: float, similarity: str = "lncc"
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
    paths : CyclePaths
    lncc_sigma_voxels : float
        Window of LNCC.
    similarity : str
        A name of `SIMILARITIES`.

    Returns
    -------
    Tensor, shape ()
    """
    warped = torch.cat(
        (
            warp(pairs.s, paths.s_bridge_s),
            warp(pairs.bridge_s, paths.bridge_s_s),
            warp(pairs.t, paths.t_bridge_t),
            warp(pairs.bridge_t, paths.bridge_t_t),
        )
    )
    fixed = torch.cat((pairs.bridge_s, pairs.s, pairs.bridge_t, pairs.t))
    return 4 * similarity_loss(similarity, warped, fixed, lncc_sigma_voxels=lncc_sigma_voxels)


def cycle_map(paths: CyclePaths) -> Tensor:
    r"""
    Compose the whole cycle.

    .. math:: \varphi_{ST} \circ \varphi_{TS'} \circ \varphi_{S'T'} \circ \varphi_{T'S}

    Parameters
    ----------
    paths : CyclePaths

    Returns
    -------
    Tensor, shape (N, 3, n, n, n)
        The identity on S's grid where the maps are right.
    """
    return compose(paths.s_bridge_s, paths.bridge_s_s)


def objective_losses(
    network: Network,
    pairs: CyclePairs,
    config: ObjectiveConfig,
) -> tuple[dict[str, Tensor], CycleMaps]:
    """
    Evaluate an objective.

    Parameters
    ----------
    network : callable
        Takes moving and fixed images to displacements.
    pairs : CyclePairs
        The conventional objective looks at S and T alone.
    config : ObjectiveConfig

    Returns
    -------
    losses : dict of str to Tensor, shape ()
        Weighted terms ``similarity``, ``gradcycon`` and ``regularity``; the objective is their
        sum (Eq. 1 or Eq. 6).
    maps : CycleMaps
        The predicted maps, for further terms; of the conventional objective ``st`` alone.
    """
    has_inverse = config.regularizer == "gradicon" and config.regularity_weight > 0
    edges = _cycle_edges(pairs) if config.is_m2m else [(pairs.s, pairs.t)]
    if has_inverse:
        edges.append((pairs.t, pairs.s))
    predicted = predict_edges(network, edges)
    inverse = predicted.pop() if has_inverse else None
    losses = {}
    if config.is_m2m:
        maps = _cycle_maps(predicted)
        paths = cycle_paths(maps)
        losses["similarity"] = cycle_similarity_loss(
            pairs,
            paths,
            lncc_sigma_voxels=config.lncc_sigma_voxels,
            similarity=config.similarity,
        )
        if config.gradcycon_weight:
            losses["gradcycon"] = config.gradcycon_weight * jacobian_identity_loss(
                cycle_map(paths)
            )
    else:
        maps = CycleMaps(predicted[0], None, None, None)
        losses["similarity"] = similarity_loss(
            config.similarity,
            warp(pairs.s, maps.st),
            pairs.t,
            lncc_sigma_voxels=config.lncc_sigma_voxels,
        )
    if config.regularity_weight:
        losses["regularity"] = config.regularity_weight * _regularity(maps.st, inverse, config)
    return losses, maps


def _regularity(st: Tensor, inverse: Tensor | None, config: ObjectiveConfig) -> Tensor:
    if inverse is not None:
        return gradicon_loss(st, inverse)
    disp = st - identity_map(st.shape[-1], like=st)
    if config.regularizer == "diffusion":
        return diffusion_loss(disp)
    return bending_loss(disp * (disp.shape[-1] - 1))
