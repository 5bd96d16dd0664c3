"""Describe the output dataset: its description, its sidecars, and what it lacks."""

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2m_bids import __version__
from m2m_bids.bids.naming import (
    Linear,
    Transform,
    expected_anat_outputs,
    expected_diffusivity_outputs,
    expected_outputs,
    expected_space_outputs,
    expected_template_outputs,
    frame_outputs,
    quantification_outputs,
    static_outputs,
)
from m2m_bids.bids.request import (
    FRAMES,
    SEGMENTATION,
    Request,
    differences,
    made_from,
)
from m2m_bids.bids.spaces import OutputSpace
from m2m_bids.json_files import read_json, read_json_object

if TYPE_CHECKING:
    from m2m_bids.bids.query import Scan

# Why there is no table, in the sidecar that stands in its place.
NO_STATISTICS_FIELD = "StatisticsNotComputed"
NO_PVC_FIELD = "PartialVolumeCorrectionNotComputed"
BIDS_VERSION = "1.10.0"
# What the BIDS schema does not define yet. The validator wants a folder to be ignored in all
# three ways: as an entry, as a folder, and with its content.
BIDSIGNORE = (
    "*.html",
    "logs/",
    "evaluation/",
    "training/",
    "sub-*/figures",
    "sub-*/figures/",
    "sub-*/figures/**",
    "sub-*/log",
    "sub-*/log/",
    "sub-*/log/**",
    "*_xfm.*",
    "*_dwimap.*",
    "*_petref.*",
    "*_tacs.*",
    "*_timeseries.*",
    "*_stat.*",
    "*_qc.json",
    "group*",
    "*_pvc-*",
)
# Fields of a source that are untrue of what is made of it: how it came about, and its grid.
_OF_THE_SOURCE_ALONE = (
    "Density",
    "Description",
    "ImageOrientationPatientDICOM",
    "RawSources",
    "Resolution",
    "SkullStripped",
    "SliceThickness",
    "Sources",
    "SpacingBetweenSlices",
    "SpatialReference",
)
# Fields that have a value for each frame: those of BIDS, and those of dcm2niix.
_OF_FRAMES = (
    "DecayCorrectionFactor",
    "DecayFactor",
    "FrameDuration",
    "FrameReferenceTime",
    "FrameTimesStart",
    "PromptRate",
    "RandomRate",
    "ScatterFraction",
    "SinglesRate",
)
_PACKAGES = (
    "antspyx",
    "nibabel",
    "nilearn",
    "nipype",
    "nitransforms",
    "numpy",
    "scipy",
    "torch",
)


def write_text(file: Path, text: str) -> None:
    """
    Write a text file in one step: readers see the old content or the new one, never a part.

    The content is on the disk before it has its name, so that this holds after a power cut too.
    A file that already holds this text is left alone, so that a finished output folder can be
    read-only.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if file.read_text(encoding="utf-8") == text:
            return
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; outputs follow the user's umask as others do.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in one step, indented, with keys in the order given."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_dataset_files(out_dir: Path, datasets: Mapping[str, Path]) -> None:
    """
    Write ``dataset_description.json`` and ``.bidsignore`` of the output dataset.

    Parameters
    ----------
    out_dir : Path
        Root of the output dataset; made if absent.
    datasets : mapping of str to Path
        Input datasets by the name that BIDS URIs use: "raw" and the derivatives' names.

    Raises
    ------
    ValueError
        If the folder holds the dataset of another application.
    """
    check_maker(out_dir)
    description = {
        "Name": "m2m-bids: PET and FA registered to T1w",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "m2m-bids", "Version": __version__, **_code_url()}],
        "HowToAcknowledge": "Please cite the works listed in logs/CITATION.md.",
        "DatasetLinks": {name: path.absolute().as_uri() for name, path in datasets.items()},
    }
    write_json(out_dir / "dataset_description.json", description)
    write_text(out_dir / ".bidsignore", "\n".join(BIDSIGNORE) + "\n")


def check_maker(out_dir: Path) -> None:
    """
    Refuse an output folder of another application, before anything is written to it.

    Raises
    ------
    ValueError
        If the folder holds the dataset of another application.
    """
    file = out_dir / "dataset_description.json"
    maker = _described_maker(file)
    if maker not in (None, "m2m-bids"):
        raise ValueError(
            f"{file}: the output folder holds a dataset made by {maker}. Give an output folder "
            "that is empty or was written by m2m-bids."
        )


def _code_url() -> dict[str, str]:
    """Give the source code's address that the installed package declares, if any."""
    for entry in importlib.metadata.metadata("m2m-bids").get_all("Project-URL") or []:
        label, _, url = entry.partition(", ")
        if label.lower() in ("repository", "source", "homepage"):
            return {"CodeURL": url}
    return {}


def _described_maker(file: Path) -> str | None:
    """Name the application that a dataset description gives; None where there is no file."""
    if not file.exists():
        return None
    try:
        return str(read_json_object(file)["GeneratedBy"][0]["Name"])
    except (ValueError, LookupError, TypeError):
        return "an unknown application"


def bids_uri(file: Path, out_dir: Path, datasets: Mapping[str, Path]) -> str:
    """
    Name a file by a BIDS URI: ``bids:raw:sub-01/...``, or ``bids::sub-01/...`` for an output.

    Parameters
    ----------
    file : Path
        A file of the output dataset or of one of `datasets`.
    out_dir : Path
        Root of the output dataset.
    datasets : mapping of str to Path
        Input datasets by name. Where they are nested, the innermost one names the file.

    Raises
    ------
    ValueError
        If the file is in none of the datasets.
    """
    file = file.absolute()
    roots = {"": out_dir.absolute(), **{name: path.absolute() for name, path in datasets.items()}}
    holding = {name: root for name, root in roots.items() if root in file.parents}
    if not holding:
        raise ValueError(f"{file} is in none of the datasets {sorted(map(str, roots.values()))}")
    name = max(holding, key=lambda key: len(holding[key].parts))
    return f"bids:{name}:{file.relative_to(holding[name]).as_posix()}"


def file_uri(file: Path, out_dir: Path, datasets: Mapping[str, Path]) -> str:
    """Name a file by its BIDS URI, or by its path if it is in none of the datasets."""
    try:
        return bids_uri(file, out_dir, datasets)
    except ValueError:
        return str(file.absolute())


@dataclass(frozen=True)
class Provenance:
    """
    How a registered image came about; fields that are None are left out of sidecars.

    Attributes
    ----------
    transform : {"m2m", "rigid", "affine"}
        The transform that was applied; "affine" to a template.
    transform_requested : {"m2m", "rigid"}
        The transform that was asked for: it differs where the deformable step was rejected.
    fallback_reason : str, optional
        Why the deformable step was rejected.
    weights_sha256 : str, optional
        Hash of the network's weights.
    refine_steps : int, optional
        Steps of refinement after the network.
    device : str, optional
        Device that the network ran on.
    random_seed : int, optional
        Seed of the run.
    """

    transform: Transform | Linear
    transform_requested: Transform
    fallback_reason: str | None = None
    weights_sha256: str | None = None
    refine_steps: int | None = None
    device: str | None = None
    random_seed: int | None = None

    def to_sidecar(self) -> dict[str, Any]:
        """Spell the fields as BIDS metadata."""
        names = {
            "transform": "Transform",
            "transform_requested": "TransformRequested",
            "fallback_reason": "TransformFallbackReason",
            "weights_sha256": "WeightsSHA256",
            "refine_steps": "RefinementSteps",
            "device": "Device",
            "random_seed": "RandomSeed",
        }
        values = {names[key]: value for key, value in asdict(self).items() if value is not None}
        return {**values, "SoftwareVersions": software_versions()}


def software_versions() -> dict[str, str]:
    """List the versions of m2m-bids, Python and the packages that numbers depend on."""
    versions = {"m2m-bids": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def without_frames(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what metadata say of frames, for a static image of a dynamic scan."""
    return {name: value for name, value in metadata.items() if name not in _OF_FRAMES}


def of_one_volume(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what metadata say of several frames, for an image that was given as one volume."""
    return {
        name: value
        for name, value in metadata.items()
        if not (name in _OF_FRAMES and isinstance(value, list) and len(value) > 1)
    }


def image_sidecar(
    sources: Sequence[str],
    *,
    is_skull_stripped: bool | None = None,
    spatial_reference: str | None = None,
    provenance: Provenance | None = None,
    description: str | None = None,
    resolution: str | None = None,
    source_metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Compose the sidecar of an output image or transform.

    Parameters
    ----------
    sources : sequence of str
        BIDS URIs of the files that the output was computed from.
    is_skull_stripped : bool, optional
        Needed for T1w, PET and FA images; not for masks, label maps and transforms.
    spatial_reference : str, optional
        BIDS URI of the image on whose grid the output is; needed in names with ``space-``.
    provenance : Provenance, optional
        For registered images and transforms.
    description : str, optional
        What the output is, in words.
    resolution : str, optional
        What its ``res`` means, in words; needed in names with ``res-``.
    source_metadata : mapping, optional
        Fields of the source's sidecar, of which those are kept that stay true.

    Returns
    -------
    dict
        JSON object, for `write_json`.
    """
    sidecar: dict[str, Any] = {}
    if description is not None:
        sidecar["Description"] = description
    sidecar["Sources"] = list(sources)
    if resolution is not None:
        sidecar["Resolution"] = resolution
    if spatial_reference is not None:
        sidecar["SpatialReference"] = spatial_reference
    if is_skull_stripped is not None:
        sidecar["SkullStripped"] = is_skull_stripped
    for name, value in (source_metadata or {}).items():
        if name not in _OF_THE_SOURCE_ALONE:
            sidecar[name] = value
    if provenance is not None:
        sidecar.update(provenance.to_sidecar())
    return sidecar


def missing_outputs(scan: "Scan", out_dir: Path, request: Request) -> list[Path]:
    """
    List the outputs that a scan still lacks; an empty list means that it is finished.

    A file that was not written to its end, as after a power cut, counts as one that is not there.
    A scan whose deformable step was rejected is finished without deformable transforms. One that
    was made from other files, or with other options, than is asked for now is not finished.

    Parameters
    ----------
    scan : Scan
        A scan with its target.
    out_dir : Path
        Root of the output dataset.
    request : Request
        What is asked for.
    """
    outputs = expected_outputs(scan, out_dir, request.transform)
    used = made_from(outputs["preproc_json"])
    if differences(used, request.registration):
        return list(outputs.values())
    transform = request.transform
    if read_json(outputs["preproc_json"]).get("Transform") != "m2m":
        transform = "rigid"
        outputs = expected_outputs(scan, out_dir, "rigid")
    needed = [*outputs.values()]
    if scan.t1w is not None:
        anatomical = expected_anat_outputs(scan.t1w_entities, out_dir)
        needed += [anatomical[key] for key in ("preproc", "mask")]
    if FRAMES in used:
        made = frame_outputs(scan, out_dir)
        is_corrected = used[FRAMES].get("MotionCorrection")
        needed += [file for name, file in made.items() if is_corrected or "static" in name]
    missing = _not_whole(needed)
    maps = [expected_diffusivity_outputs(scan, out_dir, name) for name in scan.diffusivities]
    missing += _missing_images(maps, request.registration)
    for space, record in request.spaces.items():
        missing += _missing_in_space(
            scan, out_dir, space, transform, record, has_frames=FRAMES in used
        )
    return missing + _missing_quantification(scan, out_dir, request.quantification)


def _missing_in_space(
    scan: "Scan",
    out_dir: Path,
    space: OutputSpace,
    transform: Transform,
    record: Mapping[str, Any],
    *,
    has_frames: bool,
) -> list[Path]:
    """List what a scan lacks in a space."""
    images = [
        expected_space_outputs(scan, out_dir, space, transform),
        *(expected_diffusivity_outputs(scan, out_dir, name, space) for name in scan.diffusivities),
    ]
    beside: list[Path] = []
    if has_frames:
        beside += static_outputs(scan, out_dir, space).values()
    if space.is_template and scan.t1w is not None:
        beside += expected_template_outputs(scan.t1w_entities, out_dir, space).values()
    return _missing_images(images, record) + _not_whole(beside)


def _missing_images(images: Iterable[Mapping[str, Path]], record: Mapping[str, Any]) -> list[Path]:
    """List files of images that lack one, or that were made otherwise than is asked for."""
    missing = []
    for files in images:
        is_other = differences(made_from(files["image_json"]), record)
        missing += files.values() if is_other else _not_whole(files.values())
    return missing


def _missing_quantification(scan: "Scan", out_dir: Path, request: Mapping[str, Any]) -> list[Path]:
    """List the tables that a scan lacks, unless it is known why they cannot be there."""
    if not request:
        return []
    made = quantification_outputs(scan, out_dir, request[SEGMENTATION])
    if differences(made_from(made["stat_json"]), request):
        return [made["stat_json"]]
    if NO_STATISTICS_FIELD in read_json(made["stat_json"]):
        return []
    return _not_whole(made[key] for key in ("stat", "tacs") if key in made)


def _not_whole(files: Iterable[Path]) -> list[Path]:
    # Not for the parser, which needs no images.
    from m2m_bids.spatial.whole import is_whole

    return [file for file in files if not is_whole(file)]
