"""The slow reference of the objective, for tests of this folder."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def reference():
    """The module `reference.py` beside this file, which import mode ``importlib`` cannot name."""
    file = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("registration_reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def same_on_any_threads():
    """A function that asserts that another one gives the same bytes on one to four threads."""
    before = torch.get_num_threads()

    def compare(function):
        found = []
        for n_threads in (1, 2, 3, 4):
            torch.set_num_threads(n_threads)
            found.append(function())
        for others in found[1:]:
            assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))

    yield compare
    torch.set_num_threads(before)
