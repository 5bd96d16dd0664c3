"""Methods in processes of their own: transforms, costs, and ends of every kind."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from nibabel.affines import from_matvec

from m2m_bids.baselines import run
from m2m_bids.baselines.base import Options
from m2m_bids.baselines.run import PairFiles, Report, peak_memory_gb, run_method
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.itk import read_chain, write_affine

OPTIONS = Options(device="cpu", n_threads=1, spacing_mm=12.0)


def report_of(folder):
    return Report(**json.loads((folder / "report.json").read_text()))


@pytest.mark.parametrize("key", ["initial", "rigid"])
def test_given_transforms_cost_nothing(key, pair_files, images, tmp_path):
    report, xfm_file = run_method(key, PairFiles(**pair_files), OPTIONS, tmp_path / "new")
    assert report == Report("done") == report_of(tmp_path / "new")
    assert xfm_file == tmp_path / "new" / "xfm.txt"
    expected = np.eye(4) if key == "initial" else images.fixed2moving
    np.testing.assert_allclose(read_chain(xfm_file)[0], expected, atol=1e-9)


def test_registration_is_written_with_its_costs(pair_files, error_mm, images, tmp_path):
    report, xfm_file = run_method("syn-mi", PairFiles(**pair_files), OPTIONS, tmp_path)
    assert report == report_of(tmp_path)
    assert (report.status, report.reason) == ("done", None)
    assert 0.1 < report.seconds < 300
    # A Python with ANTs has about a fifth of a GB; a wrong unit is off by a thousand.
    assert 0.1 < report.peak_memory_gb < 5
    assert xfm_file == tmp_path / "xfm.h5"
    assert error_mm(read_chain(xfm_file)) < 0.95 * error_mm((images.fixed2moving,))


@pytest.mark.usefixtures("niftyreg")
def test_programs_are_found_in_the_process(pair_files, tmp_path):
    report, xfm_file = run_method("niftyreg-lncc", PairFiles(**pair_files), OPTIONS, tmp_path)
    assert report.status == "done"
    assert xfm_file.is_file()


def test_missing_program(pair_files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    report, xfm_file = run_method("niftyreg-lncc", PairFiles(**pair_files), OPTIONS, tmp_path)
    assert (report.status, report.seconds, report.peak_memory_gb) == ("missing", None, None)
    assert "conda install" in report.reason
    assert report == report_of(tmp_path)
    assert xfm_file is None


def test_failure_is_told_in_a_line(pair_files, tmp_path):
    away = write_affine(from_matvec(np.eye(3), [1000, 0, 0]), tmp_path / "away.txt")
    # What an earlier run left is no result of this one.
    run.write_chain((), tmp_path)
    files = PairFiles(**{**pair_files, "rigid_xfm": str(away)})
    report, xfm_file = run_method("syn-mi", files, OPTIONS, tmp_path)
    assert report.status == "failed"
    assert report.reason.startswith("ImageError: after rigid alignment")
    assert "do not overlap" in report.reason
    assert "\n" not in report.reason
    assert report == report_of(tmp_path)
    assert xfm_file is None
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_file_that_cannot_be_read_is_a_failure(pair_files, tmp_path):
    files = PairFiles(**{**pair_files, "moving_file": str(tmp_path / "none.nii")})
    report, _ = run_method("rigid", files, OPTIONS, tmp_path)
    assert report.status == "failed"
    assert "none.nii" in report.reason


def test_crash_of_a_process_is_told(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("reading\nterminate called\n\n")
    assert run._why_ended(-signal.SIGABRT, log) == "ended by signal 6: terminate called"
    assert "memory runs out" in run._why_ended(-signal.SIGKILL, log)
    log.write_text("")
    assert run._why_ended(1, log) == "nothing was printed"


def test_unknown_method_is_an_error(pair_files, tmp_path):
    with pytest.raises(ValueError, match="unknown"):
        run_method("none", PairFiles(**pair_files), OPTIONS, tmp_path)


def test_chains_are_written_and_read(tmp_path, rng):
    field = DisplacementField(rng.normal(size=(4, 5, 6, 3)), np.diag([2.0, 3, 4, 1]))
    affine = from_matvec(np.diag([1.0, 2, 3]), [4, 5, 6])
    file = run.write_chain((affine, field), tmp_path)
    assert file.name == "xfm.h5"
    outer, inner = read_chain(file)
    np.testing.assert_allclose(outer, affine)
    np.testing.assert_allclose(inner.data, field.data, atol=1e-6)
    assert run.write_chain((field,), tmp_path).name == "xfm.h5"


def measured_by(code, n_held=0):
    """Peak memory that a new Python measures after it ran code, while this one holds bytes."""
    held = np.ones(n_held, dtype=np.uint8)
    lines = "from m2m_bids.baselines.run import peak_memory_gb", code, "print(peak_memory_gb())"
    command = [sys.executable, "-c", "\n".join(lines)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    del held
    return float(printed)


def test_peak_memory():
    base = measured_by("")
    assert 0.05 < base < 1
    # Half a GB that is given back again still counts.
    freed = measured_by("import numpy; held = numpy.ones(500_000_000, dtype='uint8'); del held")
    assert 0.4 < freed - base < 0.6
    program = "import numpy; held = numpy.ones(1_000_000_000, dtype='uint8')"
    started = measured_by(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    )
    assert 0.95 < started < 1.3
    assert peak_memory_gb() > 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory apart")
def test_memory_of_the_caller_does_not_count():
    assert measured_by("", n_held=1_500_000_000) < 1


def test_threads_reach_the_programs():
    environment = run._environment(Options(n_threads=3))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "3"


def test_options_and_files_survive_json(pair_files):
    options = Options(device="cuda:1", n_threads=2, random_seed=3, spacing_mm=2.0, n_refine=4)
    assert Options(**json.loads(json.dumps(asdict(options)))) == options
    files = PairFiles(**pair_files, dseg_file="dseg.nii")
    assert PairFiles(**json.loads(json.dumps(asdict(files)))) == files
