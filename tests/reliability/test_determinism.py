"""The same seed gives the same bytes, on any number of threads."""

import pytest

pytestmark = pytest.mark.slow

DEFORMABLE = ("--transform", "m2m", "--refine", "3", "--random-seed", "3")


def test_same_bytes(app, undisturbed):
    """A run in other folders, at another time."""
    run = app.run()
    assert run.code == 0, run.text
    assert app.results() == undisturbed.results


def test_deformable_again_and_with_other_threads(app, tmp_path):
    """Rigid and deformable steps, with one thread and with two."""
    first = app._replace(options=DEFORMABLE)
    run = first.run()
    assert run.code == 0, run.text
    assert [name for name in first.results() if "desc-m2m" in name or "desc-preproc" in name]
    again = first._replace(out=tmp_path / "again", work=tmp_path / "work2")
    assert again.run().code == 0
    assert again.results() == first.results()
    two = first._replace(out=tmp_path / "two", work=tmp_path / "work3")
    assert two.run("--omp-nthreads", "2", "--nprocs", "2").code == 0
    assert two.results() == first.results()
