"""Compare names of PET tracers."""

import re

_ISOTOPE = re.compile(r"(\d{1,3}m?)(F|C|N|O|I|Br|Cu|Ga|Rb|Tc|Zr)(?=.)", re.IGNORECASE)


def is_same_tracer(one: str, other: str) -> bool:
    """
    Compare tracer names: ``FDG``, ``fdg``, ``18FDG`` and ``18FFDG`` are the same.

    Examples
    --------
    >>> [is_same_tracer("18FFDG", name) for name in ("FDG", "18FDG", "18FFDG", "11CFDG", "FBB")]
    [True, True, True, False, False]
    """
    mass_one, mass_other = (re.match(r"\d+m?", name) for name in (one, other))
    if mass_one and mass_other and mass_one.group() != mass_other.group():
        return False
    return bool(_tracer_spellings(one) & _tracer_spellings(other))


def _tracer_spellings(name: str) -> set[str]:
    """List what a tracer may be called: as given, without mass number, without isotope."""
    without_mass = re.sub(r"^\d+m?(?=.)", "", name)
    return {name.lower(), without_mass.lower(), _ISOTOPE.sub("", name, count=1).lower()}
