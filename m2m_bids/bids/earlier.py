"""What earlier runs left of a scan: by which options it was made, and what its sidecar says."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2m_bids.bids.naming import (
    expected_outputs,
    expected_space_outputs,
    output_entities,
    parse_name,
    qc_file,
    quantification_outputs,
)
from m2m_bids.bids.request import SEGMENTATION, Request, differences, made_from
from m2m_bids.json_files import read_json

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan


class AsMade(NamedTuple):
    """
    How the outputs of a scan were made, whatever is asked for now.

    Attributes
    ----------
    request : Request
        What they were made from; what is asked for now, where there are none.
    changed : list of str
        What is asked for otherwise now.
    """

    request: Request
    changed: list[str]


def as_made(scan: "Scan", out_dir: Path, request: Request) -> AsMade:
    """
    Find by which options the outputs of a scan were made.

    Parameters
    ----------
    scan : Scan
        A scan with its target.
    out_dir : Path
        Root of the output dataset.
    request : Request
        What is asked for now.

    Returns
    -------
    AsMade
    """
    used = made_from(expected_outputs(scan, out_dir, "rigid")["preproc_json"])
    if not used:
        return AsMade(request, [])
    changed = differences(used, request.registration)
    spaces: dict[Any, Mapping[str, Any]] = {}
    for space, wanted in request.spaces.items():
        sidecar = expected_space_outputs(scan, out_dir, space, "rigid")["image_json"]
        if sidecar.is_file():
            spaces[space] = made_from(sidecar)
        of_space = {key: wanted[key] for key in wanted.keys() - request.registration.keys()}
        if not sidecar.is_file() or differences(spaces[space], {**used, **of_space}):
            changed.append(f"output space {space}")
    measured = _measured(scan, out_dir, request)
    changed += differences(measured, request.quantification)
    transform = used.get("Transform", request.transform)
    return AsMade(Request(transform, used, measured, spaces), list(dict.fromkeys(changed)))


def _measured(scan: "Scan", out_dir: Path, request: Request) -> Mapping[str, Any]:
    """Find what tables were made from: those asked for, or else those that are there."""
    wanted = quantification_outputs(scan, out_dir, request.quantification[SEGMENTATION])
    others = sorted(wanted["stat_json"].parent.glob("*_stat.json"))
    for file in (wanted["stat_json"], *others):
        is_own = output_entities(entities_of(file)) == output_entities(scan.entities)
        if is_own and (used := made_from(file)):
            return used
    return request.quantification


def registered_sidecar(name: str, out_dir: Path) -> dict[str, Any]:
    """
    Read the sidecar of a scan's image on the grid of its target, whatever that was.

    Parameters
    ----------
    name : str
        Name of the scan, as `bids.naming.scan_name` makes it.
    out_dir : Path
        Root of the output dataset.

    Returns
    -------
    dict
        Empty if there is none, or if that is not the name of a scan.
    """
    try:
        own, folder = parse_name(name), qc_file(name, out_dir).parent
    except ValueError:
        return {}
    for file in sorted(folder.glob(f"*_space-*_desc-preproc_{own.suffix}.json")):
        entities = entities_of(file)
        placed = {key: entities.get(key) for key in ("space", "desc")}
        # Images in further spaces have such names too, but another target, or `res`.
        is_target = made_from(file).get("Target") == placed["space"]
        if entities == {**own.entities, **placed} and is_target:
            return read_json(file)
    return {}


def entities_of(file: Path) -> dict[str, str]:
    """Read the entities of a file's name; none of a file that someone else put there."""
    with contextlib.suppress(ValueError):
        return parse_name(file).entities
    return {}
