"""The slow reference of the objective, for tests of this folder."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference():
    """The module `reference.py` beside this file, which import mode ``importlib`` cannot name."""
    file = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("registration_reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
