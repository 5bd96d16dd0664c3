r"""
Standardised uptake values of a PET scan, from its metadata and the weight of the body.

.. math:: SUV = C \, w / A

with the activity concentration C in Bq/mL, the weight w in g and the injected activity A in Bq,
both activities at the same time. The unit of SUV is g/mL.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from m2m_bids.preprocessing.pet_timing import frame_timing

# Half-lives in minutes, as evaluated by DDEP and NNDC.
HALF_LIVES_MIN = {
    "O15": 122.27 / 60,
    "N13": 9.965,
    "C11": 20.36,
    "F18": 109.77,
    "Ga68": 67.8,
    "Rb82": 1.258,
    "Cu62": 9.67,
    "Cu64": 12.701 * 60,
    "Br76": 16.2 * 60,
    "Zr89": 78.4 * 60,
    "I124": 4.176 * 24 * 60,
}
_BECQUEREL = {"bq": 1.0, "ci": 3.7e10}
_PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9}
_GRAMS = {"kg": 1e3, "kilogram": 1e3, "kilograms": 1e3, "g": 1.0, "gram": 1.0, "grams": 1.0}
_MAX_WEIGHT_KG = 700.0
# As DICOM has it, and converters that copy it.
_DICOM_BQ_ML = "BQML"
_ELEMENTS = {
    "oxygen": "O",
    "nitrogen": "N",
    "carbon": "C",
    "fluorine": "F",
    "gallium": "Ga",
    "rubidium": "Rb",
    "copper": "Cu",
    "bromine": "Br",
    "zirconium": "Zr",
    "iodine": "I",
}


class NoSUVError(ValueError):
    """SUV cannot be computed; the message is the reason, for a log and a sidecar."""


class SUVScale(NamedTuple):
    """
    What turns the values of a PET image into SUV.

    Attributes
    ----------
    factors : ndarray, shape (T,)
        SUV (g/mL) per unit of the image, of each frame.
    injected_bq : float
        Injected activity at the time that the image's activities are of.
    convention : str
        How decay was taken into account, in words.
    """

    factors: np.ndarray
    injected_bq: float
    convention: str


def suv_scale(metadata: Mapping[str, Any], weight_kg: float, n_frames: int = 1) -> SUVScale:
    """
    Compute the factors from image values to SUV.

    All times are seconds after ``TimeZero``, as in BIDS, whose clock time does not matter then.
    ``InjectedRadioactivity`` is the activity at ``InjectionStart``. Two conventions are handled:

    - ``ImageDecayCorrected`` is true: activities are of ``ImageDecayCorrectionTime``; the injected
      activity is brought to that time.
    - It is false: each frame shows the mean activity from its start to its end, while only the
      radionuclide decays; it is brought to the time of injection. The image must have the frames
      themselves, not their average.

    An injection that is not a bolus has no one time, and no SUV here.

    Parameters
    ----------
    metadata : mapping
        BIDS fields of the scan.
    weight_kg : float
        Weight of the body.
    n_frames : int
        Frames of the image.

    Returns
    -------
    SUVScale

    Raises
    ------
    NoSUVError
        If a field is missing, has a value that is not understood, or contradicts another.

    Examples
    --------
    >>> scale = suv_scale(
    ...     {"Units": "kBq/mL", "InjectedRadioactivity": 370, "InjectedRadioactivityUnits": "MBq",
    ...      "ImageDecayCorrected": True, "ImageDecayCorrectionTime": 0, "InjectionStart": 0}, 74)
    >>> print(scale.factors)
    [0.2]
    """
    _check_administration(metadata)
    if not (np.isfinite(weight_kg) and weight_kg > 0):
        raise NoSUVError(f"the body weight, {weight_kg} kg, is not a positive number")
    bq_per_ml = concentration_bq_ml(metadata.get("Units"))
    injected = _number(metadata, "InjectedRadioactivity")
    injected *= activity_bq(metadata.get("InjectedRadioactivityUnits"))
    if injected <= 0:
        raise NoSUVError("InjectedRadioactivity is not positive")
    start = _number(metadata, "InjectionStart")
    is_corrected = metadata.get("ImageDecayCorrected")
    if not isinstance(is_corrected, bool):
        raise NoSUVError(f"ImageDecayCorrected is {_shown(metadata, 'ImageDecayCorrected')}")
    per_bq_ml = np.full(n_frames, bq_per_ml * weight_kg * 1e3)
    if not is_corrected:
        factors = per_bq_ml * _decay_of_frames(metadata, start, n_frames) / injected
        return SUVScale(factors, injected, "each frame corrected for decay to InjectionStart")
    reference = _number(metadata, "ImageDecayCorrectionTime")
    if reference != start:
        injected *= 0.5 ** ((reference - start) / half_life_s(metadata.get("TracerRadionuclide")))
        convention = "injected activity brought from InjectionStart to ImageDecayCorrectionTime"
    else:
        convention = "image corrected for decay to InjectionStart"
    return SUVScale(per_bq_ml / injected, injected, convention)


def activity_bq(units: Any) -> float:
    """
    Read a unit of activity, as becquerels.

    Raises
    ------
    NoSUVError
        If it is none.

    Examples
    --------
    >>> [activity_bq(name) for name in ("MBq", "kBq", "mCi", "uCi")]
    [1000000.0, 1000.0, 37000000.0, 37000.0]
    """
    # The case of the prefix counts: M is a million, m a thousandth.
    text = str(units).strip().replace("µ", "u").replace("μ", "u")
    match = re.fullmatch(r"([numkMG]?)(bq|ci)", re.sub(r"(?i)(bq|ci)$", _lower, text))
    if not match or match.group(1) + match.group(2) in ("ubq", "nbq", "mbq"):
        raise NoSUVError(f"{units!r} is not a unit of activity such as MBq or mCi")
    return _PREFIXES[match.group(1)] * _BECQUEREL[match.group(2)]


def concentration_bq_ml(units: Any) -> float:
    """
    Read a unit of activity concentration, as Bq/mL.

    Raises
    ------
    NoSUVError
        If it is none: an image of counts, say, or one that is of SUV already.

    Examples
    --------
    >>> [concentration_bq_ml(name) for name in ("Bq/mL", "kBq/ml", "MBq/L", "nCi/cc", "BQML")]
    [1.0, 1000.0, 1000.0, 37.0, 1.0]
    """
    text = re.sub(r"\s", "", str(units)).replace("^", "")
    if text == _DICOM_BQ_ML:
        return 1.0
    if text.lower() in ("g/ml", "suv", "suvbw"):
        raise NoSUVError(f"the scan is of SUV already (Units {units})")
    activity, _, volume = text.partition("/")
    millilitres = {"ml": 1.0, "cc": 1.0, "cm3": 1.0, "l": 1e3}.get(volume.lower())
    if millilitres is None:
        raise NoSUVError(f"Units {units!r} is not an activity concentration such as Bq/mL")
    return activity_bq(activity) / millilitres


def weight_in_kg(value: Any, units: Any) -> float:
    """
    Read the weight of a body.

    Raises
    ------
    NoSUVError
        If the unit is not kg or g, or the value not one of a body: grams called kg, say.

    Examples
    --------
    >>> [weight_in_kg("70", "kg"), weight_in_kg(350, "g")]
    [70.0, 0.35]
    """
    if units is None:
        raise NoSUVError(
            "the body weight has no unit: give Units, kg or g, in the JSON file of its table"
        )
    grams = _GRAMS.get(str(units).strip().lower())
    if grams is None:
        raise NoSUVError(f"the body weight has the unit {units!r}, expected kg or g")
    try:
        weight = float(value) * grams / 1e3
    except (TypeError, ValueError):
        weight = np.nan
    if not 0 < weight <= _MAX_WEIGHT_KG:
        raise NoSUVError(
            f"the body weight is {value!r} {units}, expected more than 0 and at most "
            f"{_MAX_WEIGHT_KG:.0f} kg"
        )
    return weight


def half_life_s(radionuclide: Any) -> float:
    """
    Look up the half-life of a radionuclide, however it is spelt.

    Raises
    ------
    NoSUVError
        If it is not known.

    Examples
    --------
    >>> len({half_life_s(name) for name in ("F18", "18F", "[18F]", "F-18", "^18^Fluorine")})
    1
    """
    text = re.sub(r"[^A-Za-z0-9]", "", str(radionuclide))
    match = re.fullmatch(r"(\d+)([A-Za-z]+)|([A-Za-z]+)(\d+)", text)
    if match:
        mass, element = match.group(1) or match.group(4), match.group(2) or match.group(3)
        name = _ELEMENTS.get(element.lower(), element.capitalize()) + mass
        if name in HALF_LIVES_MIN:
            return HALF_LIVES_MIN[name] * 60
    raise NoSUVError(
        f"TracerRadionuclide is {radionuclide!r}; half-lives are known of "
        f"{', '.join(HALF_LIVES_MIN)}"
    )


def _check_administration(metadata: Mapping[str, Any]) -> None:
    """Raise unless the tracer was injected at once, as far as is said."""
    mode = metadata.get("ModeOfAdministration")
    if mode is not None and str(mode).strip().lower() != "bolus":
        raise NoSUVError(f"ModeOfAdministration is {mode!r}: there is no one time of injection")


def _decay_of_frames(metadata: Mapping[str, Any], injection_s: float, n_frames: int) -> np.ndarray:
    """Activity at injection over the mean activity during each frame."""
    constant = np.log(2) / half_life_s(metadata.get("TracerRadionuclide"))
    timing = frame_timing(metadata, n_frames)
    if timing.starts_s is None or timing.durations_s is None:
        remark = timing.starts_remark or timing.durations_remark
        raise NoSUVError(f"the image is not corrected for decay, and {remark}")
    decayed = constant * timing.durations_s
    during = decayed / -np.expm1(-decayed)
    return during * np.exp(constant * (timing.starts_s - injection_s))


def _number(metadata: Mapping[str, Any], name: str) -> float:
    value = metadata.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value):
        raise NoSUVError(f"{name} is {_shown(metadata, name)}")
    return float(value)


def _shown(metadata: Mapping[str, Any], name: str) -> str:
    return f"{metadata[name]!r}" if metadata.get(name) is not None else "not given"


def _lower(match: re.Match) -> str:
    return match.group().lower()
