"""
The paper's hyperparameters, named after the rows of its Table 1.

Its learning rate is the default of `TrainingConfig`, its number of iterations that of `train`.
"""

from dataclasses import dataclass

from m2m_bids.registration.m2m import ObjectiveConfig

OBJECTIVES = ("lncc", "lncc2", "mi", "mind-ssc", "m2m", "m2m+gcc")
LNCC_SIGMA_MM = 7.5  # 5 voxels of 1.5 mm


@dataclass(frozen=True)
class Preset:
    """
    How a row of Table 1 was trained.

    Parameters
    ----------
    network : str
        Name in the registry.
    objective : ObjectiveConfig
    batch_size : int
    """

    network: str
    objective: ObjectiveConfig
    batch_size: int


def preset(network: str, objective: str, *, spacing_mm: float = 1.5) -> Preset:
    r"""
    Return the hyperparameters of a row of Table 1.

    GradICON is regularised by itself, the others by diffusion. Without M2M-Reg the paper gives
    :math:`\lambda_{reg} = 1000` for diffusion. In voxels per voxel that would leave no deformation
    at all, while that row of Table 1 folds in 40 % of the voxels; it is taken as of displacements
    in units of the whole grid of 128 voxels, :math:`1000 / 127^2` in voxels per voxel.

    Parameters
    ----------
    network : str
        Name in the registry; a network that the paper does not have is treated as TransMorph.
    objective : str
        One of `OBJECTIVES`: a similarity for the conventional objective (Eq. 1), ``"m2m"`` or
        ``"m2m+gcc"``, with GradCyCon, for M2M-Reg with LNCC (Eq. 6).
    spacing_mm : float
        Voxel size of the grid; the window of LNCC keeps its size in mm.

    Returns
    -------
    Preset

    Raises
    ------
    ValueError
        If the objective is unknown.

    Examples
    --------
    >>> preset("gradicon", "m2m+gcc").objective.regularity_weight
    0.5
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; known are {', '.join(OBJECTIVES)}")
    is_m2m = objective.startswith("m2m")
    is_gradicon = network == "gradicon"
    if is_gradicon:
        regularity_weight = 0.5 if is_m2m else 1.5
    else:
        regularity_weight = 0.01 if is_m2m else 1000 / 127**2
    gradcycon_weight = (0.1 if is_gradicon else 1.0) if objective == "m2m+gcc" else 0.0
    config = ObjectiveConfig(
        is_m2m=is_m2m,
        similarity="lncc" if is_m2m else objective,
        regularizer="gradicon" if is_gradicon else "diffusion",
        regularity_weight=regularity_weight,
        gradcycon_weight=gradcycon_weight,
        lncc_sigma_voxels=LNCC_SIGMA_MM / spacing_mm,
    )
    return Preset(network, config, batch_size=8 if is_gradicon else 2)


PRESETS = {
    f"{network}-{objective}": preset(network, objective)
    for network, objectives in {
        "transmorph": ("lncc", "m2m", "m2m+gcc"),
        "corrmlp": ("lncc", "m2m", "m2m+gcc"),
        "gradicon": ("lncc2", "lncc", "m2m", "m2m+gcc"),
    }.items()
    for objective in objectives
}
"""The learning rows of Table 1, at its 1.5 mm."""
