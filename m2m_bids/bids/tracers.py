"""Find the names of PET tracers, and compare them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_ISOTOPE = re.compile(
    r"(18F|11C|13N|15O|12[345]I|7[567]Br|6[0124]Cu|68Ga|82Rb|99mTc|89Zr)(?=.)", re.IGNORECASE
)
_REFERENCE_REGIONS = {
    "whole-cerebellum": (
        *("PIB", "AV45", "Florbetapir", "FBP", "FBB", "Florbetaben", "FMM", "Flutemetamol"),
        *("NAV4694", "NAV", "Flutafuranol", "AZD4694"),
    ),
    "brainstem": ("FDG", "Fludeoxyglucose", "Fluorodeoxyglucose"),
    "cerebellar-grey": (
        *("AV1451", "FTP", "T807", "Flortaucipir", "MK6240", "Florquinitau", "PI2620"),
        *("RO948", "GTP1", "PBB3", "PMPBB3", "APN1607", "Florzolotau", "THK5351", "THK5317"),
    ),
}


def tracer_names(entities: Mapping[str, str], metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """
    List what the tracer of a PET scan is called, the name that counts first.

    These are ``trc``, ``TracerName`` and, in names of before BIDS 1.6, ``acq``: the last only if
    it has an isotope or is listed here, as it may be anything.

    Parameters
    ----------
    entities : mapping of str to str
        Entities of the file name under their short names.
    metadata : mapping
        Fields of the sidecar.

    Examples
    --------
    >>> tracer_names({"acq": "fdg"}, {}), tracer_names({"acq": "10frames"}, {"TracerName": "PIB"})
    (('fdg',), ('PIB',))
    """
    acquisition = entities.get("acq", "")
    is_tracer = bool(_ISOTOPE.match(acquisition) or reference_region_of(acquisition))
    names = (entities.get("trc"), metadata.get("TracerName"), acquisition if is_tracer else None)
    return tuple(dict.fromkeys(str(name) for name in names if name))


def tracer_label(name: object) -> str:
    """
    Write a tracer's name as a label of file names.

    Returns
    -------
    str
        Empty of what is no text, has no letter or digit, or names a radionuclide alone.

    Examples
    --------
    >>> [tracer_label(name) for name in ("[18F]FDG", "PiB", "F18", "18F", None)]
    ['18FFDG', 'PiB', '', '', '']
    """
    label = re.sub(r"[^A-Za-z0-9]", "", name) if isinstance(name, str) else ""
    turned = re.sub(r"^([A-Za-z]+)(\d+m?)$", r"\2\1", label)
    is_radionuclide = any(_ISOTOPE.sub("", f"{one}_", count=1) == "_" for one in (label, turned))
    return "" if is_radionuclide else label


def is_same_tracer(one: str, other: str) -> bool:
    """
    Compare tracer names: ``FDG``, ``fdg``, ``18FDG``, ``18FFDG`` and ``[18F]FDG`` are the same.

    Examples
    --------
    >>> [is_same_tracer("18FFDG", name) for name in ("FDG", "18FDG", "18FFDG", "11CFDG", "FBB")]
    [True, True, True, False, False]
    """
    one, other = (re.sub(r"[^A-Za-z0-9]", "", name) for name in (one, other))
    mass_one, mass_other = (re.match(r"\d+m?", name) for name in (one, other))
    if mass_one and mass_other and mass_one.group() != mass_other.group():
        return False
    return bool(_tracer_spellings(one) & _tracer_spellings(other))


def common_spellings(names: Iterable[str]) -> dict[str, str]:
    """
    Find the most frequent spelling of each tracer.

    A name that could be of either of two tracers, ``FDG`` beside ``18FFDG`` and ``11CFDG``, stays
    as it is.

    Parameters
    ----------
    names : iterable of str
        Names of the scans' tracers.

    Returns
    -------
    dict of str to str
        Spelling that stands for each name.

    Examples
    --------
    >>> common_spellings(["18FFDG", "fdg", "FDG", "FDG", "PiB"])
    {'FDG': 'FDG', '18FFDG': 'FDG', 'fdg': 'FDG', 'PiB': 'PiB'}
    """
    counts = Counter(names)
    tracers: list[list[str]] = []
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        same = [one for one in tracers if all(is_same_tracer(name, other) for other in one)]
        if len(same) == 1:
            same[0].append(name)
        else:
            tracers.append([name])
    return {name: spellings[0] for spellings in tracers for name in spellings}


def _tracer_spellings(name: str) -> set[str]:
    """List what a tracer may be called: as given, without mass number, without isotope."""
    without_mass = re.sub(r"^\d+m?(?=.)", "", name)
    return {name.lower(), without_mass.lower(), _ISOTOPE.sub("", name, count=1).lower()}


def reference_region_of(tracer: str) -> str | None:
    """
    Return the reference region that is customary for a tracer in the brain.

    Amyloid tracers are compared with the whole cerebellum, FDG with the pons or brainstem, and
    tracers of tau with the grey matter of the cerebellum.

    Parameters
    ----------
    tracer : str
        Name of a tracer, with or without its isotope.

    Returns
    -------
    str or None
        None for a tracer that is not listed here.

    Examples
    --------
    >>> [reference_region_of(name) for name in ("18FAV45", "18FFDG", "AV1451", "11CDASB")]
    ['whole-cerebellum', 'brainstem', 'cerebellar-grey', None]
    """
    for region, tracers in _REFERENCE_REGIONS.items():
        if any(is_same_tracer(tracer, other) for other in tracers):
            return region
    return None
