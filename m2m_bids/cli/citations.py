"""Texts to cite: of what the images of a participant, or of all, were made by."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m2m_bids.bids.derivatives import software_versions, write_text
from m2m_bids.bids.earlier import registered_sidecar
from m2m_bids.bids.locks import locked
from m2m_bids.bids.methods import merge_methods, methods_in, methods_markdown
from m2m_bids.bids.request import MADE_FROM_FIELD
from m2m_bids.bids.status import REGISTERED, StatusRow, read_status
from m2m_bids.reports.citation import Citation, cite

VERSIONS_FIELD = "SoftwareVersions"


def write_citation(out_dir: Path) -> Path | None:
    """
    Write ``logs/CITATION.md``, ``.html`` and ``.bib`` of all scans that are registered.

    Runs that share an output folder take turns; whichever comes last finds the scans of all.

    Parameters
    ----------
    out_dir : Path
        Root of the output dataset.

    Returns
    -------
    Path or None
        The first; None where no scan is registered, and nothing is written.
    """
    folder = out_dir / "logs"
    with locked(folder / ".status.lock"):
        citation = citation_of(read_status(out_dir), out_dir)
        return _write(folder, citation) if citation else None


def citation_of(rows: Iterable[StatusRow], out_dir: Path) -> Citation | None:
    """
    Say how registered scans were made, by what their sidecars keep.

    Parameters
    ----------
    rows : iterable of StatusRow
    out_dir : Path
        Root of the output dataset.

    Returns
    -------
    Citation or None
        None where none of them is registered.
    """
    known = {}
    for row in rows:
        if row.status in REGISTERED and (sidecar := registered_sidecar(row.scan, out_dir)):
            known[row.scan] = sidecar
    if not known:
        return None
    targets = {str(sidecar[MADE_FROM_FIELD]["Target"]) for sidecar in known.values()}
    return cite(
        methods=methods_markdown(merge_methods(map(methods_in, known.values()))),
        software=versions_of(known.values()),
        templates=sorted(targets - {"T1w"}),
        has_t1w="T1w" in targets,
        untold=[name for name, sidecar in known.items() if not methods_in(sidecar)],
    )


def versions_of(sidecars: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """List the versions of the software that made images; several where they differ."""
    found: dict[str, dict[str, None]] = {}
    for sidecar in sidecars:
        versions = sidecar.get(VERSIONS_FIELD)
        for name, version in versions.items() if isinstance(versions, dict) else ():
            found.setdefault(name, {})[str(version)] = None
    return {name: " and ".join(versions) for name, versions in found.items()}


def write_level_citation(folder: Path, methods: str) -> Path:
    """Write the text of a cohort level, whose images have no sidecars, to its own folder."""
    return _write(folder, cite(methods=methods, software=software_versions()))


def _write(folder: Path, citation: Citation) -> Path:
    write_text(folder / "CITATION.html", citation.html)
    write_text(folder / "CITATION.bib", citation.bibtex)
    write_text(folder / "CITATION.md", citation.markdown)
    return folder / "CITATION.md"
