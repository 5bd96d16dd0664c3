"""Index BIDS datasets with pybids, and read filters and sidecars."""

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2m_bids.bids.naming import ENTITIES, ParsedName, parse_name
from m2m_bids.json_files import read_json_object

if TYPE_CHECKING:
    from bids import BIDSLayout

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".nii", ".nii.gz")
FILTER_KEYS = ("t1w", "pet", "fa")
# Keys of fMRIPrep's filter files that have no meaning here, so that one file can serve both.
_FOREIGN_FILTER_KEYS = {"t2w", "flair", "bold", "sbref", "fmap", "roi", "dwi"}
IGNORED_FOLDERS = (
    r"^/(code|derivatives|logs?|models|sourcedata|stimuli|work)(/|$)",
    r"/(beh|eeg|figures|fmap|func|ieeg|log|meg|micr|motion|mrs|nirs|perf)(/|$)",
)


class QueryError(ValueError):
    """A dataset that cannot be queried, or a selection that matches nothing."""


def layout_config() -> dict[str, Any]:
    r"""
    Describe entities to pybids, matched in the file name only.

    pybids' own configuration searches the absolute path, so that a dataset under ``/data/pet/``
    has only files of datatype pet, and one under ``/sub-9/`` only files of subject 9.
    """
    in_name = r"[^/\\]*$"
    entities = [
        {"name": name, "pattern": rf"[_/\\]{key}-([a-zA-Z0-9+]+)(?=[_.]){in_name}"}
        for key, name in ENTITIES.items()
    ]
    for entity in entities:
        if entity["name"] == "run":
            entity["dtype"] = "int"
            entity["pattern"] = rf"[_/\\]run-(\d+)(?=[_.]){in_name}"
    # Clinica's CAPS have maps two folders deeper, and what they are made from one.
    caps = r"(?:(?:dti_based_processing[/\\][a-z]+_space|preprocessing)[/\\])?"
    folders = r"[/\\](anat|dwi|pet)[/\\]" + caps
    return {
        "name": "m2m",
        "entities": [
            *entities,
            {"name": "datatype", "pattern": folders + in_name},
            {"name": "suffix", "pattern": r"[_/\\]([a-zA-Z0-9+]+)\.[^/\\]+$"},
            {"name": "extension", "pattern": r"[^./\\](\.[^/\\]+)$"},
        ],
    }


def index_dataset(
    root: Path, participants: Sequence[str] = (), database_dir: Path | None = None
) -> "BIDSLayout":
    """
    Index the files of one dataset, raw or derivative, without reading sidecars.

    A ``dataset_description.json`` is not needed. Datasets nested in ``derivatives/`` are left
    out, as are the folders of modalities that are not registered; ``dwi/`` is indexed.

    Parameters
    ----------
    root : Path
        Folder of the dataset.
    participants : sequence of str
        Labels of the participants to index; all of them by default.
    database_dir : Path, optional
        Folder of a database of pybids: read where it is there, which does not look at the
        dataset, and made otherwise. By default the index is in memory.

    Raises
    ------
    QueryError
        If pybids cannot index the folder.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    ignore = [re.compile(pattern) for pattern in IGNORED_FOLDERS]
    if participants:
        labels = "|".join(re.escape(label) for label in participants)
        ignore.append(re.compile(rf"^(?:/subjects)?/sub-(?!(?:{labels})(?:/|$))"))
    indexer = BIDSLayoutIndexer(validate=False, ignore=ignore, index_metadata=False)
    try:
        return BIDSLayout(
            str(root),
            validate=False,
            config=[layout_config()],
            indexer=indexer,
            database_path=None if database_dir is None else str(database_dir),
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise QueryError(
            f"{root}: cannot be indexed as a BIDS dataset ({error}). Check that the folder is "
            "readable and that its dataset_description.json is a valid JSON object."
        ) from error


def find_files(layout: "BIDSLayout", query: Mapping[str, Any]) -> list[Path]:
    """
    List the files of a layout that match a query, in natural order.

    Raises
    ------
    QueryError
        If the query names an entity that does not exist.
    """
    try:
        return [Path(path) for path in layout.get(return_type="filename", **query)]
    except ValueError as error:
        raise QueryError(f"BIDS filter {dict(query)}: {error}") from error


def list_participants(bids_dir: Path) -> list[str]:
    """
    List the labels of the ``sub-*`` folders of a dataset.

    Raises
    ------
    QueryError
        If there is none.
    """
    folders = sorted(path for path in Path(bids_dir).glob("sub-*") if path.is_dir())
    if not folders:
        raise QueryError(
            f"{bids_dir}: holds no sub-* folder. Give the folder of the BIDS dataset, the one "
            "with dataset_description.json."
        )
    return [folder.name.removeprefix("sub-") for folder in folders]


def read_bids_filters(file: Path) -> dict[str, dict[str, Any]]:
    """
    Read a BIDS filter file.

    The file is a JSON object of queries under ``t1w``, ``pet`` and ``fa``. Entities have the
    names of pybids (``session``) or of file names (``ses``); null means that an entity must be
    absent, ``"*"`` that it must be present.

    Returns
    -------
    dict
        Queries for `find_files`, under the keys of `FILTER_KEYS`.

    Raises
    ------
    QueryError
        If the file is missing, is not JSON, or holds something else or entities that do not exist.
    """
    try:
        content = read_json_object(Path(file))
    except ValueError as error:
        raise QueryError(f"BIDS filter file {error}") from error
    filters = {}
    for key, query in content.items():
        if key.lower() in _FOREIGN_FILTER_KEYS:
            continue
        if key.lower() not in FILTER_KEYS:
            raise QueryError(f"{file}: unknown key {key!r}, expected some of {FILTER_KEYS}")
        if not isinstance(query, dict):
            raise QueryError(f"{file}: {key!r} must be an object of entities, found {query!r}")
        filters[key.lower()] = {
            _query_entity(name, where := f"{file}: {key}.{name}"): _query_value(value, where)
            for name, value in query.items()
        }
    return filters


def _query_entity(name: str, where: str) -> str:
    """Name an entity as pybids does, which would take others for arguments of its own."""
    known = [entity["name"] for entity in layout_config()["entities"]]
    entity = ENTITIES.get(name, name)
    if entity not in known:
        raise QueryError(f"{where}: no such entity, expected one of {', '.join(known)}")
    return entity


def _query_value(value: Any, where: str) -> Any:
    """Translate a JSON value to what pybids expects."""
    from bids.layout import Query

    special: dict[Any, Any] = {
        None: Query.NONE,
        "*": Query.ANY,
        "Query.NONE": Query.NONE,
        "Query.ANY": Query.ANY,
        "Query.OPTIONAL": Query.OPTIONAL,
    }
    if isinstance(value, list):
        return [_query_value(item, where) for item in value]
    if value is not None and not isinstance(value, str | int):
        raise QueryError(f"{where}: {value!r} must be a label, a number, null, '*' or a list")
    return special.get(value, value)


def group_by_folder(files: Sequence[Path]) -> dict[Path, list[tuple[ParsedName, Path]]]:
    """Parse the names of JSON files, and group the files by folder; others are left out."""
    folders: dict[Path, list[tuple[ParsedName, Path]]] = {}
    for file in files:
        with contextlib.suppress(ValueError):
            folders.setdefault(file.parent, []).append((parse_name(file), file))
    return folders


def read_sidecar(
    file: Path,
    sidecars: Mapping[Path, Sequence[tuple[ParsedName, Path]]],
) -> dict[str, Any]:
    """
    Read the metadata of an image from its JSON sidecars, by the BIDS inheritance principle.

    Sidecars in the image's folder or above it, of its suffix, and whose entities are all the
    image's, apply; nearer and more specific ones win.

    Parameters
    ----------
    file : Path
        The image.
    sidecars : mapping
        JSON files of the dataset, from `group_by_folder`.

    Returns
    -------
    dict
        All fields that have a value or a list of values.

    Raises
    ------
    ValueError
        If an applicable sidecar is not a JSON object.
    """
    image = parse_name(file)
    metadata: dict[str, Any] = {}
    for folder in reversed(file.parents):
        applicable = [
            (len(name.entities), sidecar)
            for name, sidecar in sidecars.get(folder, [])
            if name.suffix == image.suffix and name.entities.items() <= image.entities.items()
        ]
        for _, sidecar in sorted(applicable):
            metadata.update(read_json_object(sidecar))
    known = {key: value for key, value in metadata.items() if value is not None}
    for key in [key for key, value in known.items() if not _is_plain(value)]:
        logger.warning("%s: its %s is neither a value nor a list of values: not used", file, key)
        del known[key]
    return known


def _is_plain(value: Any) -> bool:
    """Tell single values and flat lists of them from what is nested."""
    values = value if isinstance(value, list) else [value]
    return not any(isinstance(one, dict | list) for one in values)
