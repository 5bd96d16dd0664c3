"""Read BIDS file names and build the paths of the outputs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from m2m_bids.bids.spaces import OutputSpace

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan

# Short name in file names -> name in pybids and in BIDS filter files, in the order of file names.
# The order is that of the BIDS schema; from, to, mode, model, param and pvc are in no schema yet.
ENTITIES = {
    "sub": "subject",
    "ses": "session",
    "cohort": "cohort",
    "sample": "sample",
    "task": "task",
    "acq": "acquisition",
    "ce": "ceagent",
    "trc": "tracer",
    "rec": "reconstruction",
    "dir": "direction",
    "run": "run",
    "mod": "modality",
    "echo": "echo",
    "flip": "flip",
    "inv": "inv",
    "mt": "mt",
    "part": "part",
    "hemi": "hemi",
    "space": "space",
    "split": "split",
    "recording": "recording",
    "chunk": "chunk",
    "seg": "segmentation",
    "res": "res",
    "den": "den",
    "label": "label",
    "from": "from",
    "to": "to",
    "mode": "mode",
    "model": "model",
    "param": "param",
    "pvc": "pvc",
    "desc": "desc",
}
# Entities that say what an image is rather than which one: the outputs have their own.
_DESCRIBING = {
    "space",
    "cohort",
    "res",
    "den",
    "label",
    "seg",
    "from",
    "to",
    "mode",
    "param",
    "pvc",
    "desc",
}
# Label of the ``seg`` entity of the 11 classes that methods are evaluated with.
SEGMENTATION = "m2m11"
TISSUES = ("GM", "WM", "CSF")
_DATATYPES = ("anat", "dwi", "pet", "figures")
_LABEL = re.compile(r"[a-zA-Z0-9+]+")
_EXTENSION = re.compile(r"(\.[a-zA-Z0-9]+)+")

Modality = Literal["pet", "fa"]
Transform = Literal["m2m", "rigid"]
Linear = Literal["rigid", "affine"]


class ParsedName(NamedTuple):
    """A BIDS file name in its parts; entities have short names and keep the file's order."""

    entities: dict[str, str]
    suffix: str
    extension: str


def parse_name(file: Path | str) -> ParsedName:
    """
    Split a BIDS file name into entities, suffix and extension.

    Only the file name is read, never its folders. A ``dwi`` among the entities, which Clinica's
    CAPS had there before 2023, is passed over.

    Raises
    ------
    ValueError
        If the name is not made of ``key-label`` pairs and a suffix.

    Examples
    --------
    >>> parse_name("sub-01_ses-M000_trc-FDG_pet.nii.gz")
    ParsedName(entities={'sub': '01', 'ses': 'M000', 'trc': 'FDG'}, suffix='pet',
               extension='.nii.gz')
    """
    stem, dot, extension = Path(file).name.partition(".")
    *pairs, suffix = stem.split("_")
    entities = {}
    for pair in pairs:
        if pair == "dwi":
            continue
        key, dash, label = pair.partition("-")
        if not (dash and key.isalnum() and _LABEL.fullmatch(label)) or key in entities:
            raise ValueError(f"{file}: '{pair}' is not a BIDS key-label pair")
        entities[key] = label
    if not suffix.isalnum():
        raise ValueError(f"{file}: '{suffix}' is not a BIDS suffix")
    return ParsedName(entities, suffix, dot + extension)


def output_entities(entities: Mapping[str, str]) -> dict[str, str]:
    """
    Keep the entities that tell one scan from another, and drop those that outputs set anew.

    Examples
    --------
    >>> output_entities({"sub": "01", "space": "ACPC", "model": "tensor", "param": "fa"})
    {'sub': '01', 'model': 'tensor'}
    """
    return {key: entities[key] for key in ENTITIES if key in entities and key not in _DESCRIBING}


def build_stem(entities: Mapping[str, str | None], suffix: str) -> str:
    """
    Join entities (short names; None leaves one out) in BIDS order, and the suffix.

    Raises
    ------
    ValueError
        If an entity is unknown, a label or suffix is not alphanumeric, or ``sub`` is missing.

    Examples
    --------
    >>> build_stem({"desc": "rigid", "sub": "01", "trc": "FDG"}, "pet")
    'sub-01_trc-FDG_desc-rigid_pet'
    """
    given = {key: label for key, label in entities.items() if label is not None}
    if unknown := sorted(set(given) - set(ENTITIES)):
        raise ValueError(f"unknown entities {unknown}: expected some of {list(ENTITIES)}")
    if "sub" not in given:
        raise ValueError("a BIDS file name needs the entity 'sub'")
    for key, label in {**given, "suffix": suffix}.items():
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise ValueError(f"{key}: {label!r} is not a BIDS label (letters and digits only)")
    return "_".join([*(f"{key}-{given[key]}" for key in ENTITIES if key in given), suffix])


def output_path(
    out_dir: Path,
    entities: Mapping[str, str | None],
    *,
    datatype: str,
    suffix: str,
    extension: str,
    **more: str | None,
) -> Path:
    """
    Build the path of one output.

    Parameters
    ----------
    out_dir : Path
        Root of the output dataset.
    entities : mapping
        Labels under short names (``sub``, ``ses``, ``trc``, ...), in any order.
    datatype : str
        Folder of the file: anat, dwi, pet, or figures (kept at the level of the subject).
    suffix, extension : str
        End of the file name; the extension starts with a dot.
    **more : str or None
        Entities to add or replace; None removes one. ``from_`` stands for ``from``.

    Returns
    -------
    Path
        Always a file below `out_dir`, since labels hold only letters, digits and ``+``.

    Raises
    ------
    ValueError
        If a label, entity, datatype or extension cannot be part of a BIDS path.

    Examples
    --------
    >>> path = output_path(Path("out"), {"sub": "01", "trc": "FDG"}, datatype="pet", suffix="pet",
    ...                    extension=".nii.gz", space="T1w", desc="preproc")
    >>> path.as_posix()
    'out/sub-01/pet/sub-01_trc-FDG_space-T1w_desc-preproc_pet.nii.gz'
    """
    if datatype not in _DATATYPES:
        raise ValueError(f"datatype: {datatype!r} is not one of {_DATATYPES}")
    if not _EXTENSION.fullmatch(extension):
        raise ValueError(f"extension: {extension!r} is not a file extension such as '.nii.gz'")
    merged = {**entities, **{key.rstrip("_"): label for key, label in more.items()}}
    stem = build_stem(merged, suffix)
    folder = Path(out_dir) / f"sub-{merged['sub']}"
    if merged.get("ses") and datatype != "figures":
        folder = folder / f"ses-{merged['ses']}"
    return folder / datatype / (stem + extension)


def scan_name(modality: Modality, entities: Mapping[str, str]) -> str:
    """
    Name a scan; scans of one name would have the same outputs.

    Examples
    --------
    >>> scan_name("fa", {"sub": "02", "ses": "M012", "space": "ACPC"})
    'sub-02_ses-M012_param-FA_dwimap'
    """
    kept = output_entities(entities)
    if modality == "fa":
        return build_stem({**kept, "param": "FA"}, "dwimap")
    return build_stem(kept, "pet")


def expected_outputs(scan: "Scan", out_dir: Path, transform: Transform) -> dict[str, Path]:
    """
    List what a finished scan consists of.

    The files are in the folder of the scan's own session, whichever session its T1w is of. Of a
    scan without a T1w, the space is that of its template, and "rigid" in names is "affine".

    Parameters
    ----------
    scan : Scan
        A PET or FA scan.
    out_dir : Path
        Root of the output dataset.
    transform : {"m2m", "rigid"}
        The transform that was used: a scan whose deformable step was rejected has "rigid".

    Returns
    -------
    dict
        ``preproc`` and ``rigid`` (images on the target's grid), both with ``_json``;
        ``rigid_xfm`` and ``rigid_inverse_xfm`` (ITK affines); ``qc_json``; with "m2m" also
        ``m2m_xfm`` and ``m2m_inverse_xfm`` (ITK composites). ``*_xfm`` carry images from the scan
        to the target.
    """
    descriptions = {"preproc": "preproc", "rigid": scan.linear, "m2m": "m2m"}
    outputs = {
        name: _scan_image(scan, out_dir, extension, space=scan.space, desc=descriptions[key])
        for key in ("preproc", "rigid")
        for name, extension in ((key, ".nii.gz"), (f"{key}_json", ".json"))
    }
    for key in ("rigid", "m2m") if transform == "m2m" else ("rigid",):
        extension = ".txt" if key == "rigid" else ".h5"
        forward, inverse = _scan_xfms(
            scan, out_dir, extension, to=scan.space, desc=descriptions[key]
        )
        outputs |= {f"{key}_xfm": forward, f"{key}_inverse_xfm": inverse}
    return outputs | {"qc_json": qc_file(scan.name, out_dir)}


def frame_outputs(scan: "Scan", out_dir: Path) -> dict[str, Path]:
    """
    List what a dynamic PET scan has beside `expected_outputs`.

    Returns
    -------
    dict
        ``static`` and ``static_json``, as `static_outputs` gives them, ``motion`` (table of motion
        parameters) and ``motion_json``, and ``motion_xfm`` (ITK affines from the frames to the
        static image).
    """
    outputs = static_outputs(scan, out_dir)
    for name, extension in (("motion", ".tsv"), ("motion_json", ".json")):
        outputs[name] = output_path(
            out_dir,
            output_entities(scan.entities),
            datatype="pet",
            suffix="timeseries",
            extension=extension,
            desc="confounds",
        )
    outputs["motion_xfm"] = output_path(
        out_dir,
        {**output_entities(scan.entities), "from": "orig", "to": "petref"},
        datatype="pet",
        suffix="xfm",
        extension=".txt",
        mode="image",
        desc="hmc",
    )
    return outputs


def static_outputs(
    scan: "Scan", out_dir: Path, space: OutputSpace | None = None
) -> dict[str, Path]:
    """
    List what there is of the static image of a dynamic PET scan.

    Parameters
    ----------
    scan : Scan
        A PET scan.
    out_dir : Path
        Root of the output dataset.
    space : OutputSpace, optional
        Where it is; by default on the target's grid.

    Returns
    -------
    dict
        ``static``, on the grid that the frames have there, and ``static_json``.
    """
    placed = space.entities if space else {"space": scan.space}
    return {
        name: output_path(
            out_dir,
            {**output_entities(scan.entities), **placed},
            datatype="pet",
            suffix="petref",
            extension=extension,
        )
        for name, extension in (("static", ".nii.gz"), ("static_json", ".json"))
    }


def expected_space_outputs(
    scan: "Scan", out_dir: Path, space: OutputSpace, transform: Transform
) -> dict[str, Path]:
    """
    List what there is of a finished scan in another space.

    Parameters
    ----------
    scan : Scan
        A PET or FA scan.
    out_dir : Path
        Root of the output dataset.
    space : OutputSpace
        Not the T1w's own grid.
    transform : {"m2m", "rigid"}
        The transform to the T1w that was used.

    Returns
    -------
    dict
        ``image``, of a dynamic scan all frames (`static_outputs` has the static image), and
        ``image_json``; in the space of a template that is not the scan's target also
        ``xfm`` and ``inverse_xfm``, ITK composites between the scan and the template. ``xfm``
        carries images to the template.
    """
    outputs = {
        name: _scan_image(scan, out_dir, extension, **space.entities, desc="preproc")
        for name, extension in (("image", ".nii.gz"), ("image_json", ".json"))
    }
    if space.name != scan.space and space.is_template:
        pair = _scan_xfms(scan, out_dir, ".h5", to=space.template, desc=transform)
        outputs |= dict(zip(("xfm", "inverse_xfm"), pair, strict=True))
    return outputs


def expected_diffusivity_outputs(
    scan: "Scan", out_dir: Path, parameter: str, space: OutputSpace | None = None
) -> dict[str, Path]:
    """
    List what there is of a map of the tensor beside FA.

    Parameters
    ----------
    scan : Scan
        An FA scan.
    out_dir : Path
        Root of the output dataset.
    parameter : str
        MD, AD or RD.
    space : OutputSpace, optional
        Where it is; by default on the target's grid.

    Returns
    -------
    dict
        ``image``, on the grid that FA has there, and ``image_json``.
    """
    placed = space.entities if space else {"space": scan.space}
    return {
        name: _scan_image(scan, out_dir, extension, **placed, param=parameter, desc="preproc")
        for name, extension in (("image", ".nii.gz"), ("image_json", ".json"))
    }


def _scan_image(scan: "Scan", out_dir: Path, extension: str, **entities: str | None) -> Path:
    """Path of an image of a scan, or of its sidecar."""
    is_pet = scan.modality == "pet"
    return output_path(
        out_dir,
        {**output_entities(scan.entities), "param": None if is_pet else "FA", **entities},
        datatype="pet" if is_pet else "dwi",
        suffix="pet" if is_pet else "dwimap",
        extension=extension,
    )


def qc_file(name: str, out_dir: Path) -> Path:
    """
    Return the path of a scan's numbers for quality control.

    Parameters
    ----------
    name : str
        Name of the scan, as `scan_name` makes it.
    out_dir : Path
        Root of the output dataset.

    Raises
    ------
    ValueError
        If that is not the name of a scan.

    Examples
    --------
    >>> qc_file("sub-02_ses-M012_param-FA_dwimap", Path("out")).as_posix()
    'out/sub-02/ses-M012/dwi/sub-02_ses-M012_param-FA_desc-preproc_qc.json'
    """
    entities, suffix, _ = parse_name(name)
    datatypes = {"pet": "pet", "dwimap": "dwi"}
    if suffix not in datatypes:
        raise ValueError(f"{name}: expected the name of a PET scan or an FA map")
    return output_path(
        out_dir,
        entities,
        datatype=datatypes[suffix],
        suffix="qc",
        extension=".json",
        desc="preproc",
    )


def _scan_xfms(
    scan: "Scan", out_dir: Path, extension: str, *, to: str, desc: str
) -> tuple[Path, Path]:
    """Paths of the transform from a scan to a space, and of its inverse."""
    is_pet = scan.modality == "pet"
    origin = "petref" if is_pet else "FA"
    forward, inverse = (
        output_path(
            out_dir,
            {**output_entities(scan.entities), "from": start, "to": end},
            datatype="pet" if is_pet else "dwi",
            suffix="xfm",
            extension=extension,
            mode="image",
            desc=desc,
        )
        for start, end in ((origin, to), (to, origin))
    )
    return forward, inverse


def smoothed_desc(desc: str, fwhm_mm: float) -> str:
    """
    Name a smoothed copy of an image by the image's ``desc`` and the width of the kernel, mm.

    Examples
    --------
    >>> smoothed_desc("preprocSUVR", 8.0), smoothed_desc("preproc", 5.5)
    ('preprocSUVRSmoothed8', 'preprocSmoothed5p5')
    """
    width = str(float(fwhm_mm)).removesuffix(".0").replace(".", "p")
    return f"{desc}Smoothed{width}"


def quantification_outputs(
    scan: "Scan",
    out_dir: Path,
    segmentation: str,
    *,
    pvc: str | None = None,
    smooth_fwhm_mm: Sequence[float] = (),
) -> dict[str, Path]:
    """
    List what quantification of a scan may write; each also with ``_json``.

    Parameters
    ----------
    scan : Scan
        A PET or FA scan.
    out_dir : Path
        Root of the output dataset.
    segmentation : str
        Label of the ``seg`` entity.
    pvc : str, optional
        Correction for partial volume effects, by which names differ.
    smooth_fwhm_mm : sequence of float
        Widths of the kernels of smoothed copies.

    Returns
    -------
    dict
        ``stat`` and, of PET, ``tacs`` (tables, which name the space where it is a template's), and
        images in the target's space by their ``desc``: ``preproc`` with a correction,
        ``preprocSUV``, ``preprocSUVR``, and the `smoothed_desc` of each, also of ``preproc``.
    """
    is_pet = scan.modality == "pet"
    entities = {
        **output_entities(scan.entities),
        "param": None if is_pet else "FA",
        "pvc": pvc,
    }
    datatype = "pet" if is_pet else "dwi"
    tables = ("tacs", "stat") if is_pet else ("stat",)
    kinds = ("preproc", "preprocSUV", "preprocSUVR") if is_pet else ("preproc",)
    images = list(kinds if pvc else kinds[1:])
    images += [smoothed_desc(kind, width) for kind in kinds for width in smooth_fwhm_mm]
    measured = {"space": scan.template or None, "seg": segmentation, "desc": "preproc"}
    described = {
        **{table: (measured, table, ".tsv") for table in tables},
        **{
            desc: ({"space": scan.space, "desc": desc}, "pet" if is_pet else "dwimap", ".nii.gz")
            for desc in images
        },
    }
    outputs = {}
    for key, (more, suffix, extension) in described.items():
        for name, end in ((key, extension), (f"{key}_json", ".json")):
            outputs[name] = output_path(
                out_dir, {**entities, **more}, datatype=datatype, suffix=suffix, extension=end
            )
    return outputs


def expected_anat_outputs(t1w_entities: Mapping[str, str], out_dir: Path) -> dict[str, Path]:
    """
    List the outputs of a T1w reference, in the folder of its own session.

    Returns
    -------
    dict
        ``preproc``, ``mask`` and ``dseg``, and the probabilities ``GM``, ``WM`` and ``CSF``, which
        are there unless another program has made the tissues; each also with ``_json``.
    """
    entities = output_entities(t1w_entities)
    parts = {
        "preproc": ({"desc": "preproc"}, "T1w"),
        "mask": ({"desc": "brain"}, "mask"),
        "dseg": ({}, "dseg"),
        **{tissue: ({"label": tissue}, "probseg") for tissue in TISSUES},
    }
    outputs = {}
    for key, (described, suffix) in parts.items():
        for name, extension in ((key, ".nii.gz"), (f"{key}_json", ".json")):
            outputs[name] = output_path(
                out_dir,
                {**entities, **described},
                datatype="anat",
                suffix=suffix,
                extension=extension,
            )
    return outputs


def figure_names(entities: Mapping[str, str], suffix: str, out_dir: Path) -> dict[str, str]:
    """
    Say where figures go: ``<figures_dir>/<stem>_desc-<name>_<suffix>`` and an extension.

    Parameters
    ----------
    entities : mapping
        Entities of the image, of which those that tell it from others are kept.
    suffix : str
        Suffix of the figures.
    out_dir : Path
        Root of the output dataset.

    Returns
    -------
    dict
        ``figures_dir``, ``stem`` and ``suffix``.
    """
    stem = build_stem(output_entities(entities), suffix).removesuffix(f"_{suffix}")
    folder = Path(out_dir) / f"sub-{entities['sub']}" / "figures"
    return {"figures_dir": str(folder), "stem": stem, "suffix": suffix}


def figures_of_scan(scan: "Scan", out_dir: Path) -> dict[str, str]:
    """Say where the figures of a PET or FA scan go, as `figure_names` does."""
    suffix = "pet" if scan.modality == "pet" else "dwimap"
    return figure_names(scan.entities, suffix, out_dir)


def expected_class_outputs(t1w_entities: Mapping[str, str], out_dir: Path) -> dict[str, Path]:
    """
    List the outputs of the 11 classes of a T1w reference.

    Returns
    -------
    dict
        ``image`` and ``image_json``, and ``table``, which names the numbers.
    """
    return {
        name: output_path(
            out_dir,
            {**output_entities(t1w_entities), "seg": SEGMENTATION},
            datatype="anat",
            suffix="dseg",
            extension=extension,
        )
        for name, extension in (("image", ".nii.gz"), ("image_json", ".json"), ("table", ".tsv"))
    }


def expected_template_outputs(
    t1w_entities: Mapping[str, str], out_dir: Path, space: OutputSpace
) -> dict[str, Path]:
    """
    List the outputs of a T1w reference in a template's space.

    Returns
    -------
    dict
        ``preproc`` and ``preproc_json``, on the first grid of the template, and ``xfm`` and
        ``inverse_xfm``, ITK composites between the T1w and the template.
    """
    entities = output_entities(t1w_entities)
    described = {**space.entities, "res": None, "desc": "preproc"}
    outputs = {
        name: output_path(
            out_dir,
            {**entities, **described},
            datatype="anat",
            suffix="T1w",
            extension=extension,
        )
        for name, extension in (("preproc", ".nii.gz"), ("preproc_json", ".json"))
    }
    for name, start, end in (
        ("xfm", "T1w", space.template),
        ("inverse_xfm", space.template, "T1w"),
    ):
        outputs[name] = output_path(
            out_dir,
            {**entities, "from": start, "to": end, "mode": "image"},
            datatype="anat",
            suffix="xfm",
            extension=".h5",
        )
    return outputs
