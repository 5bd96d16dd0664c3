"""Fail early, and say why, when the package is not installed; fixtures shared by all tests."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

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
