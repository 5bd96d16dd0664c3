"""What the outputs of a scan are made from: kept in their sidecars, compared by later runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2m_bids.bids.naming import Transform
from m2m_bids.bids.spaces import OutputSpace
from m2m_bids.json_files import read_json

MADE_FROM_FIELD = "MadeFrom"
"""Field of the sidecars of registered images, in all spaces, and of statistics."""
FRAMES = "Frames"
"""Entry that matters to dynamic scans alone; the sidecars of others do not have it."""
TEMPLATE_TRANSFORMS = "TemplateTransforms"
"""Entry of a space: the transforms of another program that lead there."""
SEGMENTATION = "Segmentation"
"""Entry of a quantification: the label of its ``seg`` entity."""
SMOOTHING = "SmoothingFullWidthHalfMaximum"
"""Entry of a quantification: widths of the kernels of smoothed copies, mm; none without."""


class Request(NamedTuple):
    """
    How the outputs of a scan are to be made.

    Attributes
    ----------
    transform : {"m2m", "rigid"}
        The last step of registration that is asked for.
    registration : dict
        JSON object of all that registered images depend on: fingerprints of files, and options.
    quantification : dict
        The same for tables, SUV, SUVR and what is corrected or smoothed; empty for none.
    spaces : mapping of OutputSpace to dict
        Spaces beside the grid of the scan's target, each with all that its images depend on: the
        registration, and what is of the space alone.
    """

    transform: Transform
    registration: Mapping[str, Any]
    quantification: Mapping[str, Any]
    spaces: Mapping[OutputSpace, Mapping[str, Any]]


def made_from(sidecar: Path) -> dict[str, Any]:
    """Read what outputs were made from; empty where that is not known."""
    content = read_json(sidecar).get(MADE_FROM_FIELD, {})
    return content if isinstance(content, dict) else {}


def differences(used: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """
    Name the entries in which two records differ.

    Examples
    --------
    >>> differences({"Target": "T1w", "Weights": "a"}, {"Target": "T1w", "Frames": {}})
    ['Weights']
    """
    ignored = {FRAMES} - used.keys() if used else set()
    return [
        key
        for key in {**wanted, **used}
        if key not in ignored and _spelled(used.get(key)) != _spelled(wanted.get(key))
    ]


def _spelled(value: Any) -> str:
    """Spell a value as JSON: a number that is not one equals itself, a tuple a list."""
    return json.dumps(value, sort_keys=True)
