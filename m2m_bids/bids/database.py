"""Keep the index of a dataset in a database that later runs read."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from m2m_bids.bids.layout import IGNORED_FOLDERS, QueryError, index_dataset, layout_config

if TYPE_CHECKING:
    from bids import BIDSLayout

logger = logging.getLogger(__name__)

# Of what is kept and how; to be raised where `index_dataset` changes otherwise.
_VERSION = 1
_HIDDEN = ".index"
_KEPT_S = 7 * 24 * 3600


def open_index(root: Path, database_dir: Path) -> "BIDSLayout":
    """
    Read the index of a whole dataset from a database, made where there is none that fits.

    A file that is added, removed or renamed changes the time of its folder. The database is in a
    folder named by a hash of the times of all folders of the dataset, so that one which no
    longer fits is not found. No file is looked at for this. Contents of files are in no index.

    Other runs, on other machines too, may read an index that no longer fits, or be making one.
    What nobody has used for a week, longer than any run needs its index, is removed.

    Parameters
    ----------
    root : Path
        Folder of the dataset, raw or derivative.
    database_dir : Path
        Folder of the databases, of one dataset or several; made where it does not exist.

    Raises
    ------
    QueryError
        If the dataset cannot be indexed or the folder not be written to.
    """
    root = root.absolute()
    dataset = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    try:
        folder = database_dir / f"{dataset}-{_fingerprint(root)}"
    except OSError as error:
        raise QueryError(
            f"{root}: cannot be indexed as a BIDS dataset ({error}). Check that all of its "
            "folders are readable."
        ) from error
    if not folder.is_dir():
        try:
            _make_database(root, folder)
        except OSError as error:
            raise QueryError(f"--bids-database-dir {database_dir}: {error}") from error
    with contextlib.suppress(OSError):  # of another user, or read-only
        os.utime(folder)
        _remove_unused(dataset, folder)
    logger.info("index of %s: %s", root, folder)
    return index_dataset(root, database_dir=folder)


def _make_database(root: Path, folder: Path) -> None:
    """Index a dataset beside the final folder and rename it, so that half an index is none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_HIDDEN) as partial:
        made = Path(partial) / "index"
        index_dataset(root, database_dir=made).session.close()
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster: its index is as good
                raise


def _remove_unused(dataset: str, used: Path) -> None:
    """Remove indices of a dataset, and what killed runs left, long before one was used."""
    for older in (*used.parent.glob(f"{dataset}-*"), *used.parent.glob(f"{_HIDDEN}*")):
        # By the clock of the file system alone.
        if used.stat().st_mtime - older.stat().st_mtime > _KEPT_S:
            # Out of sight first: half an index is none.
            hidden = used.with_name(f"{_HIDDEN}{uuid.uuid4().hex}")
            os.rename(older, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _fingerprint(root: Path) -> str:
    """Hash the times of the folders of a dataset, and how it is indexed."""
    digest = hashlib.sha256(json.dumps([_VERSION, layout_config(), IGNORED_FOLDERS]).encode())
    ignored = [re.compile(pattern) for pattern in IGNORED_FOLDERS]
    for path, modified_ns in _folders(str(root), "", ignored):
        digest.update(f"{path}\0{modified_ns}\n".encode())
    return digest.hexdigest()[:16]


def _folders(root: str, path: str, ignored: list[re.Pattern[str]]) -> Iterator[tuple[str, int]]:
    """Yield the indexed folders at and below one, with the times of their last change, in ns."""
    yield path, os.stat(root + path).st_mtime_ns
    with os.scandir(root + path) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    for name in names:
        inner = f"{path}/{name}"
        if not any(pattern.search(inner) for pattern in ignored):
            yield from _folders(root, inner, ignored)
