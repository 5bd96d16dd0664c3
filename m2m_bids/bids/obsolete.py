"""Files of a scan that an earlier run wrote, and that one with other options does not replace."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.bids.naming import (
    ParsedName,
    expected_diffusivity_outputs,
    expected_outputs,
    expected_space_outputs,
    frame_outputs,
    output_entities,
    parse_name,
    quantification_outputs,
    static_outputs,
)
from m2m_bids.bids.request import SEGMENTATION, SMOOTHING, Request, differences, made_from

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan

_IMAGES = re.compile(r"rigid|affine|preproc(SUVR?)?(Smoothed[0-9p]*)?")
# Descriptions of what this app writes, by suffix; other files are not its own.
_OWN = {
    "xfm": re.compile(r"rigid|affine|m2m"),
    "petref": re.compile(""),
    "timeseries": re.compile("confounds"),
    **dict.fromkeys(("stat", "tacs"), re.compile("preproc")),
    **dict.fromkeys(("pet", "dwimap"), _IMAGES),
}
_QUANTIFIED = re.compile(r"preprocSUVR?|.*Smoothed.*")


def obsolete_outputs(scan: "Scan", out_dir: Path, request: Request) -> list[Path]:
    """
    List the files of a scan that would lie beside its new outputs without belonging to them.

    Those of quantification always count; registered images and transforms only where they were
    made otherwise than is asked for, since an image in a further space stays true otherwise.

    Parameters
    ----------
    scan : Scan
        A scan with its target.
    out_dir : Path
        Root of the output dataset.
    request : Request
        What is to be written.

    Returns
    -------
    list of Path
        Files of names that this app gives, of this scan alone.
    """
    folder = expected_outputs(scan, out_dir, "rigid")["preproc"].parent
    if not folder.is_dir():
        return []
    used = made_from(expected_outputs(scan, out_dir, "rigid")["preproc_json"])
    is_registered_anew = bool(differences(used, request.registration))
    written = set(_written(scan, out_dir, request))
    obsolete = []
    for file in sorted(set(folder.iterdir()) - written):
        name = _own_name(file, scan)
        if name is not None and (is_registered_anew or _is_quantified(name)):
            obsolete.append(file)
    return obsolete


def _written(scan: "Scan", out_dir: Path, request: Request) -> Iterator[Path]:
    """Yield all files that a run may write for a scan; it removes those that it does not."""
    yield from expected_outputs(scan, out_dir, "m2m").values()
    if scan.modality == "pet":
        yield from frame_outputs(scan, out_dir).values()
    for parameter in scan.diffusivities:
        for place in (None, *request.spaces):
            yield from expected_diffusivity_outputs(scan, out_dir, parameter, place).values()
    for space in request.spaces:
        yield from expected_space_outputs(scan, out_dir, space, "m2m").values()
        yield from expected_space_outputs(scan, out_dir, space, "rigid").values()
        if scan.modality == "pet":
            yield from static_outputs(scan, out_dir, space).values()
    measured = request.quantification
    for pvc in {None, measured.get("PartialVolumeCorrection")} - {"none"}:
        yield from quantification_outputs(
            scan,
            out_dir,
            measured[SEGMENTATION],
            pvc=pvc,
            smooth_fwhm_mm=measured.get(SMOOTHING, ()),
        ).values()


def _own_name(file: Path, scan: "Scan") -> ParsedName | None:
    """Parse the name of a file if this app gives such names to files of a scan."""
    try:
        name = parse_name(file)
    except ValueError:
        return None
    pattern = _OWN.get(name.suffix)
    is_own = pattern is not None and pattern.fullmatch(name.entities.get("desc", ""))
    is_placed = (
        bool({"space", "seg", "from"} & name.entities.keys()) or name.suffix == "timeseries"
    )
    is_of_scan = output_entities(name.entities) == output_entities(scan.entities)
    return name if is_own and is_placed and is_of_scan else None


def _is_quantified(name: ParsedName) -> bool:
    """Tell what quantification writes from registered images."""
    description = name.entities.get("desc", "")
    is_named = bool({"seg", "pvc"} & name.entities.keys())
    return is_named or _QUANTIFIED.fullmatch(description) is not None
