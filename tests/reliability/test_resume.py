"""Runs that are killed, and run again."""

import pytest

pytestmark = pytest.mark.slow

def test_first(undisturbed):
    print(undisturbed.seconds, list(undisturbed.results))
