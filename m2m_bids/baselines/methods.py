"""The methods that are compared, by key."""

from functools import partial
from pathlib import Path

from m2m_bids.api import DeformableOptions, Modality, check_weights, estimate_deformation
from m2m_bids.baselines.base import Images, Method, Options, Outcome
from m2m_bids.baselines.fireants import missing_fireants, register_fireants
from m2m_bids.baselines.niftyreg import missing_niftyreg, register_niftyreg
from m2m_bids.baselines.syn import register_syn

OWN_PREFIX = "m2m:"


def _keep_headers(images: Images, options: Options) -> Outcome:
    return Outcome(())


def _keep_rigid(images: Images, options: Options) -> Outcome:
    return Outcome((images.fixed2moving,))


METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method("initial", "Initial", _keep_headers, is_given=True),
        Method("rigid", "Rigid", _keep_rigid, is_given=True),
        Method("syn-mi", "SyN (MI)", register_syn),
        Method("niftyreg-lncc", "NiftyReg (LNCC, BE)", register_niftyreg, missing_niftyreg),
        Method(
            "fireants-mi",
            "FireANTs (MI)",
            partial(register_fireants, similarity="mi"),
            missing_fireants,
            uses_gpu=True,
        ),
        Method(
            "fireants-lncc",
            "FireANTs (LNCC)",
            partial(register_fireants, similarity="cc"),
            missing_fireants,
            uses_gpu=True,
        ),
    )
}
"""Methods other than M2M-Reg, in the order of tables."""


def find_method(key: str, weights: Path | None = None) -> Method:
    """
    Return the method of a key.

    Parameters
    ----------
    key : str
        One of `METHODS`, or ``m2m:NAME`` for M2M-Reg.
    weights : Path, optional
        Weights folder of M2M-Reg.

    Returns
    -------
    Method

    Raises
    ------
    ValueError
        If the key is another, or M2M-Reg has no weights.

    Examples
    --------
    >>> find_method("syn-mi").title
    'SyN (MI)'
    >>> find_method("m2m:mine", Path("weights")).title
    'M2M-Reg (mine)'
    """
    name = key.removeprefix(OWN_PREFIX)
    if key in METHODS:
        return METHODS[key]
    if name == key or not name:
        raise ValueError(
            f"method {key!r} is unknown: expected one of {', '.join(METHODS)} or {OWN_PREFIX}NAME"
        )
    if weights is None:
        raise ValueError(f"method {key!r} needs a folder of weights")
    return Method(
        key,
        f"M2M-Reg ({name})",
        partial(register_m2m, weights=weights),
        partial(_missing_weights, weights),
        uses_gpu=True,
    )


def register_m2m(images: Images, options: Options, *, weights: Path) -> Outcome:
    """
    Register by M2M-Reg as the app does: rigidly where the deformable step has to be rejected.

    Without refinement, by the network alone, whose map is taken as it is.

    Parameters
    ----------
    images : Images
    options : Options
        Device, threads and steps of instance optimisation; the voxels are the network's own.
    weights : Path
        Weights folder.

    Returns
    -------
    Outcome
        With the objections to the deformable step, if it was rejected.

    Raises
    ------
    WeightsError, DeviceError, ImageError
        As `m2m_bids.api.estimate_deformation` says.
    """
    deformation = estimate_deformation(
        images.moving,
        images.fixed,
        images.fixed_mask,
        fixed2moving=images.fixed2moving,
        template2fixed=images.template2fixed,
        options=DeformableOptions(
            images.modality,
            weights=weights,
            n_refine=options.n_refine,
            device=options.device,
            n_threads=options.n_threads,
        ),
        fixed_dseg=images.fixed_dseg,
    )
    objections = deformation.quality.objections()
    if objections and options.n_refine:
        return Outcome(
            (images.fixed2moving,), f"deformable step not applied: {'; '.join(objections)}"
        )
    return Outcome((images.fixed2moving, deformation.field))


def _missing_weights(weights: Path, modality: Modality | None = None) -> str | None:
    from m2m_bids.registration.weights import WeightsError

    try:
        check_weights(weights, [modality] if modality else [])
    except WeightsError as error:
        return str(error)
    return None
