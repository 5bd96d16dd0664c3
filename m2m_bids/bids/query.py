"""Find the PET and FA scans of a BIDS dataset, each with the T1w image it is registered to."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2m_bids.bids.database import open_index
from m2m_bids.bids.diffusion import (
    DIFFUSIVITIES,
    DWI_QUERY,
    RAW_FIT,
    GradientFiles,
    GradientIndex,
    is_dwi,
    maps_beside,
    mask_beside,
    why_not_fitted,
)
from m2m_bids.bids.layout import (
    IMAGE_EXTENSIONS,
    QueryError,
    find_files,
    group_by_folder,
    index_dataset,
    read_bids_filters,
    read_sidecar,
)
from m2m_bids.bids.naming import Linear, Modality, ParsedName, parse_name, scan_name
from m2m_bids.bids.selection import Selection, listed
from m2m_bids.bids.sessions import Reference, T1wImage, choose_t1w
from m2m_bids.bids.spaces import T1W
from m2m_bids.bids.tables import session_times
from m2m_bids.bids.tracers import tracer_names

if TYPE_CHECKING:
    from bids import BIDSLayout

__all__ = ["QueryError", "Scan", "query", "read_bids_filters"]

logger = logging.getLogger(__name__)

_T1W_QUERY = {"suffix": "T1w", "datatype": "anat", "extension": list(IMAGE_EXTENSIONS)}
_SCAN_QUERIES = {
    "pet": {"suffix": "pet", "datatype": "pet", "extension": list(IMAGE_EXTENSIONS)},
    "fa": {
        "suffix": ["dwimap", "FA", "fa", "dwi"],
        "datatype": "dwi",
        "extension": list(IMAGE_EXTENSIONS),
    },
}
_TENSOR_MODELS = ("tensor", "dti")
# Beginnings of the names of standard spaces, of BIDS and of TemplateFlow. An FA map there has
# left its subject's anatomy; any other space is a subject's own.
_STANDARD_SPACE = re.compile(
    r"MNI|ICBM|IXI|OASIS|NKI|NMT|UNC|PNC|WHS|RESILIENT|Talairach|JHU|FMRIB|Fischer344|MBM|"
    r"Pediatric|fsaverage|fsLR|onavg|dhcp",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Scan:
    """
    A PET or FA scan with the T1w image chosen for it.

    Attributes
    ----------
    modality : {"pet", "fa"}
        Kind of image.
    file : Path
        The image.
    entities : dict
        Entities of the file name under their short names (``sub``, ``ses``, ``trc``, ...).
    t1w : Path or None
        The T1w image, always of the same subject; None for lack of one: the scan is left out, or
        goes to a template.
    t1w_entities : dict
        Entities of the T1w's file name.
    source : str
        "raw", or the name of the derivatives dataset that holds the scan.
    reason : str
        Why the scan is left out; empty for a scan to register.
    sidecar : dict
        PET metadata from JSON sidecars; of FA that is fitted to a raw image, what was corrected.
    t1w_choice : str
        The rule by which the T1w image was chosen, or why there is none.
    is_alternative : bool
        Whether this is a further version of a scan (another space, dataset or compression),
        whose outputs would be mistaken for that scan's. Alternatives are always left out.
    gradients : GradientFiles or None
        Of a diffusion-weighted image, to which FA is to be fitted; None for other images.
    mask : Path or None
        Brain mask that came with a preprocessed diffusion-weighted image.
    template : str
        Template that the scan is registered to for lack of a T1w; empty for others.
    """

    modality: Modality
    file: Path
    entities: dict[str, str]
    t1w: Path | None = None
    t1w_entities: dict[str, str] = field(default_factory=dict)
    source: str = "raw"
    reason: str = ""
    sidecar: dict[str, Any] = field(default_factory=dict)
    t1w_choice: str = ""
    is_alternative: bool = False
    gradients: GradientFiles | None = None
    mask: Path | None = None
    template: str = ""

    @property
    def space(self) -> str:
        """Label of the space that the scan is registered to: ``T1w``, or its template."""
        return self.template or T1W

    @property
    def linear(self) -> Linear:
        """Linear step of its registration: a person's head has not the size of a template's."""
        return "affine" if self.template else "rigid"

    @property
    def diffusivities(self) -> dict[str, Path | None]:
        """Maps of the tensor of FA: files by their parameter, None for those to be fitted."""
        if self.modality == "pet":
            return {}
        return dict.fromkeys(DIFFUSIVITIES) if self.gradients else dict(maps_beside(self.file))

    @property
    def sources(self) -> list[Path]:
        """The files that outputs are computed from, the scan's first and the T1w last."""
        files = (self.file, *(self.gradients or ()), self.mask, self.t1w)
        return [file for file in files if file is not None]

    @property
    def name(self) -> str:
        """Unique BIDS stem, such as ``sub-01_ses-M000_trc-FDG_pet``; a file of alternatives."""
        if self.is_alternative:
            return f"{self.source}:{self.file.name}"
        return scan_name(self.modality, self.entities)

    @property
    def subject(self) -> str:
        """Participant label, without ``sub-``."""
        return self.entities["sub"]

    @property
    def session(self) -> str | None:
        """Session label, without ``ses-``."""
        return self.entities.get("ses")

    @property
    def tracers(self) -> tuple[str, ...]:
        """What the tracer of a PET scan is called by its file name and its sidecar."""
        return tracer_names(self.entities, self.sidecar) if self.modality == "pet" else ()

    @property
    def tracer(self) -> str | None:
        """Tracer of a PET scan: the first of its names."""
        return next(iter(self.tracers), None)


def query(
    bids_dir: Path,
    *,
    participant_labels: Sequence[str] = (),
    session_labels: Sequence[str] = (),
    tracer_labels: Sequence[str] = (),
    reconstruction_labels: Sequence[str] = (),
    run_labels: Sequence[str] = (),
    subjects_sessions_tsv: Path | None = None,
    anatomical_reference: Reference = "nearest",
    template: str = "",
    modalities: Sequence[Modality] = ("pet", "fa"),
    derivatives: Mapping[str, Path] | None = None,
    filters: Mapping[str, Mapping[str, Any]] | None = None,
    database_dir: Path | None = None,
) -> list[Scan]:
    """
    Find the scans of a dataset, and the T1w image of each.

    Sessions are read from file names. PET scans and T1w images come from the raw dataset; FA
    maps from the derivatives datasets or, for sessions without, as ``_FA`` images in ``dwi/``
    from the raw one. Of versions of a map that of a tensor goes before those of other models,
    then that of the first dataset. For a session without a map, one is to be fitted to a
    preprocessed diffusion-weighted image of a derivative, or else to raw ones.

    Parameters
    ----------
    bids_dir : Path
        The raw dataset.
    participant_labels, session_labels, tracer_labels : sequence of str
        Labels to keep, with or without their prefix; all by default. Sessions select scans, not
        T1w images: the nearest T1w may be of a session that is not listed. Tracers are
        compared with all names of a scan's (`tracer_names`), without regard to case, and to the
        isotope where one of both names has none.
    reconstruction_labels, run_labels : sequence of str
        ``rec`` of the PET scans, and ``run`` of all scans, to keep; all by default. Runs are
        compared as numbers: 1 is 01.
    subjects_sessions_tsv : Path, optional
        Table of the participants and sessions to keep, for `read_subjects_sessions`.
    anatomical_reference : {"nearest", "sessionwise", "first-lex"}
        How the T1w image of a scan is chosen, see `choose_t1w`.
    template : str
        Template that scans without a T1w are registered to; if empty they are left out.
    modalities : sequence of {"pet", "fa"}
        Kinds of images to find.
    derivatives : mapping of str to Path, optional
        Derivatives datasets by name.
    filters : mapping, optional
        Further queries, as `read_bids_filters` returns them.
    database_dir : Path, optional
        Folder to keep indices of the datasets in, see `open_index`.

    Returns
    -------
    list of Scan
        Sorted by participant, session and name. Scans that cannot be registered have a reason.

    Raises
    ------
    QueryError
        If a participant does not exist, a dataset cannot be indexed, a requested session or
        tracer matches nothing, or there is no scan at all.
    """
    bids_dir, filters = Path(bids_dir), filters or {}
    selection = Selection(
        participants=tuple(participant_labels),
        sessions=tuple(session_labels),
        tracers=tuple(tracer_labels),
        reconstructions=tuple(reconstruction_labels),
        runs=tuple(run_labels),
        pairs_file=subjects_sessions_tsv,
    )
    participants = selection.find_participants(bids_dir)
    layouts = _index_all(bids_dir, derivatives or {}, list(participants), database_dir)
    found = _find_all(modalities, layouts, filters)
    scans = [scan for scan in found if not participants or scan.subject in participants]
    if not scans:
        raise QueryError(
            _nothing_found(bids_dir, modalities, layouts, list(participants), filters)
        )
    scans = selection.of(scans, participants)
    images = _find_t1w_images(layouts["raw"], filters.get("t1w", {}))
    t1w_filter = f" that matches {dict(filters['t1w'])}" if filters.get("t1w") else ""
    none = f"no T1w image (anat/*_T1w.nii[.gz]){t1w_filter} of its subject in {bids_dir}"
    scans = [
        _add_t1w(
            *(scan, images.get(scan.subject, []), none, bids_dir, anatomical_reference),
            template,
        )
        for scan in scans
    ]
    return sorted(
        _leave_out_duplicates(scans, list(layouts)),
        key=lambda scan: (scan.subject, scan.session or "", scan.name, str(scan.file)),
    )


def _index_all(
    bids_dir: Path,
    derivatives: Mapping[str, Path],
    participants: Sequence[str],
    database_dir: Path | None,
) -> dict[str, "BIDSLayout"]:
    """Index every dataset once; the raw one is under "raw", which no derivative may be."""

    def index(root: Path) -> "BIDSLayout":
        if database_dir is None:
            return index_dataset(root, participants)
        return open_index(root, Path(database_dir))

    layouts = {"raw": index(bids_dir)}
    for name, path in derivatives.items():
        if name == "raw":
            raise QueryError("the name 'raw' is taken by the BIDS dataset: rename the derivative")
        if not Path(path).is_dir():
            raise QueryError(f"derivatives dataset {name}: {path} is not a folder")
        layouts[name] = index(Path(path))
    return layouts


def _parse(file: Path) -> ParsedName | None:
    """Read the name of a subject's file; None, with a warning, where it is not BIDS."""
    try:
        parsed = parse_name(file)
    except ValueError as error:
        logger.warning("Ignored: %s.", error)
        return None
    subject = parsed.entities.get("sub")
    folders = [part for part in file.parent.parts if part.startswith("sub-")]
    if subject is None or not folders or folders[-1] != f"sub-{subject}":
        logger.warning("Ignored: %s is not in the folder of the subject that it names.", file)
        return None
    return parsed


def _find_t1w_images(
    layout: "BIDSLayout", filters: Mapping[str, Any]
) -> dict[str, list[T1wImage]]:
    """Group the T1w images of a dataset by subject."""
    images: dict[str, list[T1wImage]] = {}
    for file in find_files(layout, {**_T1W_QUERY, **filters}):
        if parsed := _parse(file):
            image = T1wImage(file, parsed.entities)
            images.setdefault(parsed.entities["sub"], []).append(image)
    return images


def _find_all(
    modalities: Sequence[Modality],
    layouts: Mapping[str, "BIDSLayout"],
    filters: Mapping[str, Mapping[str, Any]],
) -> list[Scan]:
    """Find the scans of all modalities, with what their sidecars say."""
    scans: list[Scan] = []
    for modality in modalities:
        found = _find_scans(modality, layouts, filters.get(modality, {}))
        if modality == "fa":
            found = _leave_out_maps_of_scanners(found)
            found += _find_dwi(layouts, filters.get("fa", {}), found)
            _warn_without_fa(found, layouts)
        if modality == "pet":
            found = _add_metadata(found, layouts["raw"])
        scans += found
    return scans


def _find_scans(
    modality: Modality, layouts: Mapping[str, "BIDSLayout"], filters: Mapping[str, Any]
) -> list[Scan]:
    """Find the scans of one modality, those to be preferred first."""
    # Derivatives come first: a FA map computed with care is better than the scanner's.
    names = ["raw"] if modality == "pet" else [*(name for name in layouts if name != "raw"), "raw"]
    scans = []
    for source in names:
        for file in find_files(layouts[source], {**_SCAN_QUERIES[modality], **filters}):
            parsed = _parse(file)
            if parsed and (modality == "pet" or _is_fa(parsed)):
                scan = Scan(modality, file, parsed.entities, source=source)
                scans.append(_check_usable(scan))
    return scans


def _find_dwi(
    layouts: Mapping[str, "BIDSLayout"], filters: Mapping[str, Any], maps: Sequence[Scan]
) -> list[Scan]:
    """Find the images that FA is to be fitted to, in sessions without a usable map."""
    with_map = {(scan.subject, scan.session) for scan in maps if not scan.reason}
    preprocessed: dict[tuple[str, str | None], Scan] = {}
    scans = []
    for source in [*(name for name in layouts if name != "raw"), "raw"]:
        index = GradientIndex(layouts[source])
        for file in find_files(layouts[source], {**filters, **DWI_QUERY}):
            parsed = _parse(file)
            if not parsed or not is_dwi(parsed, source):
                continue
            scan = Scan("fa", file, parsed.entities, source=source, gradients=index.of(file))
            session = scan.subject, scan.session
            if session in with_map:
                continue
            scan = _check_usable(scan)
            scan = replace(scan, reason=scan.reason or why_not_fitted(parsed, scan.gradients))
            if source != "raw" and not scan.reason:
                scan = replace(scan, mask=mask_beside(file))
                preprocessed.setdefault(session, scan)
            elif source == "raw" and (better := preprocessed.get(session)):
                why = f"FA is fitted to the preprocessed {better.file} ({better.source})"
                scan = replace(scan, reason=scan.reason or why, is_alternative=True)
            scans.append(replace(scan, sidecar=dict(RAW_FIT)) if source == "raw" else scan)
    return scans


def _warn_without_fa(scans: Sequence[Scan], layouts: Mapping[str, "BIDSLayout"]) -> None:
    """Tell of derivatives datasets that have diffusion, or datasets inside, but no FA map."""
    sources = {scan.source for scan in scans}
    for name, layout in layouts.items():
        if name == "raw" or name in sources:
            continue
        root = Path(layout.root)
        nested = [f"-d {path.name}={path}" for path in sorted(root.glob("derivatives/*/"))]
        if nested:
            hint = f"The datasets in it are read only if given: {' '.join(nested)}."
        elif find_files(layout, {"datatype": "dwi", "extension": list(IMAGE_EXTENSIONS)}):
            hint = "Looked for dwi/*_param-FA_dwimap.nii[.gz] and dwi/*_FA.nii[.gz]."
        else:
            continue
        logger.warning("derivatives dataset %s: %s has no FA map. %s", name, root, hint)


def _is_fa(parsed: ParsedName) -> bool:
    """Tell FA maps from the other maps of a diffusion model, in any case of letters."""
    if parsed.suffix.lower() == "fa":
        return True
    name = "desc" if "param" not in parsed.entities else "param"
    return parsed.entities.get(name, "").lower() == "fa"


def _check_usable(scan: Scan) -> Scan:
    """Leave a scan out if its name or file tells that it cannot be used."""
    if reason := _why_no_image(scan.file):
        return replace(scan, reason=reason)
    space = scan.entities.get("space", "")
    if scan.modality == "fa" and _STANDARD_SPACE.match(space):
        reason = f"in standard space {space}: an FA map in the subject's own space is needed"
        return replace(scan, reason=reason, is_alternative=True)
    return scan


def _why_no_image(file: Path) -> str:
    """Say why there is nothing in a file; empty if there is."""
    if not file.exists():
        return f"{file} is a link without its content: fetch it, as with `datalad get`"
    if file.stat().st_size == 0:
        return f"{file} is empty (0 bytes): copy or fetch it again"
    return ""


def _add_metadata(scans: Sequence[Scan], layout: "BIDSLayout") -> list[Scan]:
    """Read the sidecars of PET scans; a scan whose sidecar is broken is left out."""
    sidecars = group_by_folder(find_files(layout, {"suffix": "pet", "extension": ".json"}))
    if not sidecars:
        return list(scans)
    complete = []
    for scan in scans:
        try:
            metadata = read_sidecar(scan.file, sidecars)
            complete.append(replace(scan, sidecar=metadata))
        except ValueError as error:
            complete.append(replace(scan, reason=scan.reason or str(error)))
    return complete


def _add_t1w(
    scan: Scan,
    images: Sequence[T1wImage],
    why_none: str,
    bids_dir: Path,
    reference: Reference,
    template: str,
) -> Scan:
    """Choose the T1w image of a scan among those of its subject, else the template."""
    choice = choose_t1w(
        scan.session,
        images,
        reference=reference,
        find_times=partial(session_times, bids_dir / f"sub-{scan.subject}"),
    )
    if choice is None and images:
        own = f"its session ses-{scan.session}" if scan.session else "the folder without sessions"
        why_none = (
            f"no T1w image in {own}, and --subject-anatomical-reference is sessionwise; its "
            f"subject has {listed(image.file.name for image in images)}"
        )
    if choice is None and template and not scan.reason:
        return replace(scan, template=template, t1w_choice=why_none)
    if choice is None:
        return replace(scan, reason=scan.reason or why_none)
    reason = scan.reason
    if why := _why_no_image(choice.image.file):
        reason = reason or f"its T1w {why}"
    return replace(
        scan,
        t1w=choice.image.file,
        t1w_entities=choice.image.entities,
        t1w_choice=choice.rule,
        reason=reason,
    )


def _leave_out_maps_of_scanners(maps: Sequence[Scan]) -> list[Scan]:
    """Leave out raw FA maps of sessions that a derivative has a usable one of."""
    better = {
        (scan.subject, scan.session): scan
        for scan in reversed(maps)
        if scan.source != "raw" and not scan.reason
    }
    kept = []
    for scan in maps:
        best = better.get((scan.subject, scan.session))
        if best and scan.source == "raw":
            why = f"its session has an FA map of a derivative: {best.file} ({best.source})"
            scan = replace(scan, reason=scan.reason or why, is_alternative=True)
        kept.append(scan)
    return kept


def _leave_out_duplicates(scans: Sequence[Scan], sources: Sequence[str]) -> list[Scan]:
    """Leave out versions of a better scan: outputs of the same names, FA of other models."""
    order = {id(scan): rank for rank, scan in enumerate(scans)}

    def preference(scan: Scan) -> tuple[bool | int, ...]:
        is_raw, is_uncompressed = scan.source == "raw", not scan.file.name.endswith(".gz")
        is_other_model = scan.entities.get("model", "tensor").lower() not in _TENSOR_MODELS
        rank, has_space = sources.index(scan.source), "space" in scan.entities
        kind = bool(scan.reason), is_raw, is_other_model
        return *kind, rank, has_space, is_uncompressed, order[id(scan)]

    chosen: dict[str, Scan] = {}
    kept = []
    for scan in sorted(scans, key=preference):
        without_model = {key: scan.entities[key] for key in scan.entities if key != "model"}
        best = chosen.setdefault(scan_name(scan.modality, without_model), scan)
        if best is not scan:
            why = f"the outputs of {best.file} ({best.source}) have the same names: it is used"
            if best.name != scan.name:
                why = (
                    f"{best.file} ({best.source}) is used: FA of a tensor goes first, then the "
                    "first dataset; --bids-filter-file can name another"
                )
            scan = replace(scan, reason=scan.reason or why, is_alternative=True)
        kept.append(scan)
    return kept


def _nothing_found(
    bids_dir: Path,
    modalities: Sequence[Modality],
    layouts: Mapping[str, "BIDSLayout"],
    labels: Sequence[str],
    filters: Mapping[str, Mapping[str, Any]],
) -> str:
    """Say what was looked for, and where FA maps may be waiting."""
    names = " or ".join({"pet": "PET", "fa": "FA"}[modality] for modality in modalities)
    looked = {
        "pet": f"pet/*_pet.nii[.gz] in {bids_dir}",
        "fa": "dwi/*_param-FA_dwimap.nii[.gz], dwi/*_FA.nii[.gz] and dwi/*_dwi.nii[.gz] in "
        + ", ".join(layout.root for layout in layouts.values()),
    }
    message = f"No {names} scan was found"
    if labels:
        message += f" of participant {listed(labels)}"
    message += ". Looked for " + "; ".join(looked[modality] for modality in modalities) + "."
    if used := {key: dict(value) for key, value in filters.items() if key in modalities}:
        message += f" With the BIDS filter {used}."
    nested = sorted(path.name for path in bids_dir.glob("derivatives/*") if path.is_dir())
    given = {layout.root for layout in layouts.values()}
    unused = [
        name for name in nested if str(bids_dir.absolute() / "derivatives" / name) not in given
    ]
    if "fa" in modalities and unused:
        example = bids_dir / "derivatives" / unused[0]
        message += f" Derivatives are read only if given: -d {unused[0]}={example}."
    return message
