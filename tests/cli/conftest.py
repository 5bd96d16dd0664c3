"""What several tests of the command line begin with."""

import pytest

from m2m_bids.settings import Settings


@pytest.fixture
def settings(tmp_path):
    """Make settings of a run in this test's own folders."""
    (tmp_path / "bids").mkdir()

    def make(**options):
        return Settings(
            bids_dir=tmp_path / "bids",
            output_dir=tmp_path / "out",
            work_dir=tmp_path / "work",
            **options,
        )

    return make
