"""Records of single registrations on disk, so that an evaluation goes on where it stopped."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_bids.evaluation.records import Value
from m2m_bids.whole_files import replacing_folder

RECORD_NAME = "record.json"


def save_record(
    folder: Path,
    record: Mapping[str, Value],
    made_with: Mapping[str, Any],
    files: Mapping[str, Path] | None = None,
) -> Path:
    """
    Write the record of a registration as a folder that appears when it is whole.

    Parameters
    ----------
    folder : Path
        Of the record; what it held before is removed.
    record : mapping
        Fields as `m2m_bids.evaluation.records.write_records` takes them.
    made_with : mapping
        What the record depends on, in types that JSON has.
    files : mapping of str to Path, optional
        Files to copy beside the record, under these names.

    Returns
    -------
    Path
        The record's file.
    """
    content = {"made_with": dict(made_with), "record": dict(record)}
    with replacing_folder(folder) as beside:
        for name, file in (files or {}).items():
            shutil.copyfile(file, beside / name)
        (beside / RECORD_NAME).write_text(json.dumps(content, indent=2) + "\n")
    return folder / RECORD_NAME


def read_record(folder: Path, made_with: Mapping[str, Any]) -> dict[str, Value] | None:
    """
    Read the record of a registration.

    Parameters
    ----------
    folder : Path
        As `save_record` writes it.
    made_with : mapping
        What the record should depend on.

    Returns
    -------
    dict or None
        None if there is no record, it cannot be read, or it was made with something else.
    """
    file = folder / RECORD_NAME
    try:
        content = json.loads(file.read_text())
        return content["record"] if content["made_with"] == made_with else None
    except (OSError, ValueError, KeyError):
        return None
