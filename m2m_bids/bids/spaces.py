"""Spaces of the outputs beside the T1w's own: ``MNI152NLin2009cAsym:res-2`` and the like."""

import re
from collections.abc import Sequence
from typing import NamedTuple

T1W = "T1w"

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9]*")
_LABEL = re.compile(r"[a-zA-Z0-9]+")


class OutputSpace(NamedTuple):
    """
    A space and the grid in it.

    Attributes
    ----------
    name : str
        ``T1w``, or a template as TemplateFlow names it.
    cohort : str or None
        Cohort of a template that has several.
    resolution : str or None
        ``native`` for voxels of the scan's size; for the T1w a voxel size in millimetres, for a
        template the number of a resolution that it comes in. None for the T1w's own grid, or for
        a template's first.
    """

    name: str
    cohort: str | None = None
    resolution: str | None = None

    @property
    def is_template(self) -> bool:
        """Whether it is a template's space, not the T1w's."""
        return self.name != T1W

    @property
    def entities(self) -> dict[str, str | None]:
        """Entities in the names of images in this space."""
        return {"space": self.name, "cohort": self.cohort, "res": self.resolution}

    @property
    def template(self) -> str:
        """Label in the names of transforms, the cohort in it, as fMRIPrep spells it."""
        return f"{self.name}+{self.cohort}" if self.cohort else self.name

    def __str__(self) -> str:
        """Spell the space as on the command line."""
        parts = {"cohort": self.cohort, "res": self.resolution}
        return ":".join([self.name, *(f"{key}-{value}" for key, value in parts.items() if value)])


def spaces_from(target: str, spaces: Sequence[OutputSpace]) -> list[OutputSpace]:
    """
    Keep the spaces that a scan can be brought to from the space that it is registered to.

    Parameters
    ----------
    target : str
        ``T1w``, from which all can be reached, or a template, which has but further grids.
    spaces : sequence of OutputSpace
        Beside the T1w's own grid.

    Examples
    --------
    >>> spaces = [OutputSpace("T1w", None, "2"), OutputSpace("MNI"), OutputSpace("MNI", None, "2")]
    >>> [str(space) for space in spaces_from("MNI", spaces)]
    ['MNI:res-2']
    """
    if target == T1W:
        return list(spaces)
    return [space for space in spaces if space.name == target and space.resolution]


def unreachable_spaces(target: str, spaces: Sequence[OutputSpace]) -> list[OutputSpace]:
    """
    List the spaces that a scan cannot be brought to from that of a template.

    Examples
    --------
    >>> spaces = [OutputSpace("T1w", None, "2"), OutputSpace("MNI"), OutputSpace("MNI", None, "2")]
    >>> [str(space) for space in unreachable_spaces("MNI", spaces)]
    ['T1w:res-2']
    """
    return [space for space in spaces if target not in (T1W, space.name)]


def parse_space(text: str) -> OutputSpace:
    """
    Read a space as it is given on the command line.

    Raises
    ------
    ValueError
        If it is not ``NAME[:cohort-LABEL][:res-LABEL]``, or asks for a grid that cannot be.

    Examples
    --------
    >>> parse_space("MNI152NLin2009cAsym:res-2")
    OutputSpace(name='MNI152NLin2009cAsym', cohort=None, resolution='2')
    """
    name, *modifiers = text.split(":")
    given = {}
    for modifier in modifiers:
        key, _, label = modifier.partition("-")
        if key not in ("res", "cohort") or key in given or not _LABEL.fullmatch(label):
            raise ValueError(
                f"--output-spaces: {modifier!r} in {text!r} must be res-LABEL or cohort-LABEL, "
                "once each"
            )
        given[key] = label
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--output-spaces: {name!r} is no space: give T1w, or a template such as "
            "MNI152NLin2009cAsym"
        )
    space = OutputSpace(name, given.get("cohort"), given.get("res"))
    resolution = space.resolution
    if resolution not in (None, "native") and not re.fullmatch(r"0*[1-9]", str(resolution)):
        raise ValueError(f"--output-spaces: {text!r}: res- must be 'native' or 1 to 9")
    if name == T1W and space.cohort:
        raise ValueError(f"--output-spaces: {text!r}: only templates have cohorts")
    if resolution not in (None, "native"):
        space = space._replace(resolution=str(int(str(resolution))))
    return space
