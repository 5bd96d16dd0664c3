"""Methods in processes of their own: transforms, costs, and ends of every kind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

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


def test_threads_and_the_temporary_folder_reach_the_programs(tmp_path):
    environment = run._environment(Options(n_threads=3), tmp_path)
    assert environment["TMPDIR"] == str(tmp_path)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "3"


def test_options_and_files_survive_json(pair_files):
    options = Options(device="cuda:1", n_threads=2, random_seed=3, spacing_mm=2.0, n_refine=4)
    assert Options(**json.loads(json.dumps(asdict(options)))) == options
    files = PairFiles(**pair_files, dseg_file="dseg.nii")
    assert PairFiles(**json.loads(json.dumps(asdict(files)))) == files


CALLER = """
import json, sys
from pathlib import Path
from m2m_bids.baselines.base import Options
from m2m_bids.baselines.run import PairFiles, run_method
files = PairFiles(**json.loads(sys.argv[2]))
options = Options(device="cpu", n_threads=1, spacing_mm=12.0)
report, _ = run_method("niftyreg-lncc", files, options, Path(sys.argv[1]))
print(report.status, report.reason)
"""


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """Programs of NiftyReg, the first of which sleeps; the file with its process."""
    folder = tmp_path / "programs"
    folder.mkdir()
    file = folder / "pid"
    for name in ("reg_f3d", "reg_transform", "reg_aladin"):
        sleeps = f"echo $$ > {file}.new && mv {file}.new {file}\nexec sleep 600"
        (folder / name).write_text(
            f"#!/bin/sh\n{sleeps if name == 'reg_f3d' else 'echo 1.5.77'}\n"
        )
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return file


def status_of(pid):
    """Letter of a process's state, and the process that started it; Z where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0


def method_above(pid):
    """The process of the method that has started a program, perhaps through a shell."""
    while b"m2m_bids.baselines.run" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        pid = status_of(pid)[1]
    return pid


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux")
@pytest.mark.parametrize("killed", ["caller", "method", "both"])
def test_no_program_outlives_what_started_it(killed, pair_files, sleeper, tmp_path):
    """Both at once: the caller is stopped first, so that it cannot end what it has started."""
    command = [sys.executable, "-c", CALLER, str(tmp_path / "new"), json.dumps(pair_files)]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not sleeper.is_file():
            assert caller.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        program = int(sleeper.read_text())
        method = method_above(program)
        assert os.getpgid(program) == method
        if killed == "both":
            caller.send_signal(signal.SIGSTOP)
        if killed != "caller":
            os.kill(method, signal.SIGKILL)
        if killed != "method":
            caller.kill()
        end = time.monotonic() + 30
        while {status_of(pid)[0] for pid in (program, method)} != {"Z"}:
            assert time.monotonic() < end
            time.sleep(0.05)
        if killed == "method":
            assert caller.communicate(timeout=60)[0].startswith("failed the system ended it")
        # Its temporary files are where the next registration of this pair finds them.
        assert list((tmp_path / "new").glob("m2m-niftyreg-*"))
    finally:
        caller.kill()
