"""Keep temporary files of a step where they go with it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def temporary_files_in(folder: str) -> Iterator[None]:
    """
    Make temporary files of this process in a folder, as those of ANTs.

    Parameters
    ----------
    folder : str
        Of a node: Nipype empties it before the node runs again, so that nothing stays of one whose
        process was killed, and the system's temporary folder may be small.
    """
    before = tempfile.tempdir
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before
