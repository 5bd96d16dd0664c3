"""Fail early, and say why, when the package is not installed; fixtures shared by all tests."""

import importlib.util
import os
from pathlib import Path

import h5py
import nibabel as nb
import numpy as np
import pytest

# ITK repeats itself on one thread alone, and reads this when it starts.
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config):
    if importlib.util.find_spec("m2m_bids.workflows") is None:
        raise pytest.UsageError("m2m_bids.workflows is not importable: run `pip install -e .`")


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real images; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def fill():
    """Write small files that are whole, each of the kind that its name tells, and holding it."""

    def write(*files):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".gz":
                image = nb.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4))
                image.header["descrip"] = file.name[:80]
                image.to_filename(file)
            elif file.suffix == ".h5":
                with h5py.File(file, "w") as h5:
                    h5.attrs["name"] = file.name
            else:
                file.write_text("{}\n" if file.suffix == ".json" else f"{file.name}\n")

    return write


@pytest.fixture
def renamed(monkeypatch):
    """Sizes of what was flushed to the disk of each file, by the name that it was given then."""
    flushed, names = {}, {}
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle):
        fsync(handle)
        status = os.fstat(handle)
        flushed[status.st_ino] = status.st_size

    def watch_replace(file, name):
        names[Path(name)] = flushed.get(os.stat(file).st_ino, 0)
        replace(file, name)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    return names
