"""
The app on a real SLURM, which runs on this host alone: ``make test-slurm`` shows its accounting.

Jobs are those of the examples in containers/slurm, with m2m-bids of this environment in place of
an image. The GPUs that the cluster counts are null devices.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2m_bids.bids.status import read_status
from m2m_bids.simulation.cohort import CohortOptions, write_cohort

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "containers" / "slurm"
PATH = f"{os.environ['PATH']}:/usr/sbin"


def missing(*programs):
    return [name for name in programs if shutil.which(name, path=PATH) is None]


MISSING = missing("slurmctld", "slurmd", "sbatch", "munged")
HAS_ACCOUNTING = not missing("slurmdbd", "mariadbd", "mariadb-install-db")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here: {', '.join(MISSING)} missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM is started by root alone"),
]
COHORT = CohortOptions(spacing_mm=4.0, t1w_mm=4.0, scan_mm=6.0, warp_mm=5.0, n_landmarks=10)
QUICK = ["--modalities", "pet", "--transform", "rigid", "--skip-bids-validation"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of a cluster of its own, of two processors and two pretended GPUs."""
    # Paths of sockets are short.
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # noqa: S108
    environment = {**os.environ, "ONE_HOST_GPUS": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}:/usr/sbin"
    script = Path(__file__).with_name("one_host.sh")
    log = tmp_path_factory.mktemp("slurm") / "start.log"
    with log.open("w") as stream:
        command = [script, "start", folder]
        code = subprocess.run(command, env=environment, stdout=stream, stderr=stream).returncode
    try:
        assert code == 0, log.read_text()
        yield {**environment, "SLURM_CONF": str(folder / "slurm.conf"), "LOGNAME": "root"}
    finally:
        subprocess.run([script, "stop", folder], env=environment, check=True)


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    """Two simulated people with coarse images."""
    root = tmp_path_factory.mktemp("cohort") / "bids"
    write_cohort(root, n_subjects=2, options=COHORT)
    return root


@pytest.fixture(scope="module")
def labels(bids):
    return sorted(folder.name.removeprefix("sub-") for folder in bids.glob("sub-*"))


@pytest.fixture
def call(cluster, tmp_path):
    """Run a program in the cluster's environment; return its standard output."""

    def run(*command, check=True, **variables):
        environment = {**cluster, **{name: str(value) for name, value in variables.items()}}
        done = subprocess.run(
            [str(part) for part in command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
        assert not check or done.returncode == 0, done.stdout + done.stderr + logs
        return done.stdout

    return run


def app(bids, out, work, plugin, *options):
    file = work.parent / "plugin.yml"
    file.write_text(json.dumps({"plugin": plugin, "plugin_args": {"sbatch_args": "--time=30"}}))
    command = [sys.executable, "-m", "m2m_bids", bids, out, "participant", "-w", work]
    return [*command, "--use-plugin", file, "--omp-nthreads", "1", *QUICK, *options]


def accounting(call, *jobs):
    """Print SLURM's accounting and return it: a row of fields for each job; or its log of jobs."""
    if not HAS_ACCOUNTING:
        log = Path(call("scontrol", "show", "config").partition("JobCompLoc")[2].split()[1])
        sys.stdout.write(log.read_text())
        return []
    fields = "JobID,JobName%24,State,Elapsed,TotalCPU,ReqMem,MaxRSS,AllocTRES%34"
    sys.stdout.write(call("sacct", "--format", fields, *jobs))
    fields = "JobID,JobName,State,ReqMem,MaxRSS"
    rows = call("sacct", "--parsable2", "--noheader", f"--format={fields}", *jobs)
    return [row.split("|") for row in rows.splitlines()]


def megabytes(text):
    """Read an amount of memory as SLURM writes it; none of a job that ended before a sample."""
    factors = {"K": 1 / 1024, "M": 1, "G": 1024}
    return float(text[:-1]) * factors[text[-1]] if text else 0


def assert_done(out, label):
    rows = [row for row in read_status(out) if row.participant_id == f"sub-{label}"]
    assert [row.status for row in rows] == ["done"]
    assert len(list(out.glob(f"sub-{label}/ses-*/pet/*_space-T1w_desc-preproc_pet.nii.gz"))) == 1
    assert (out / f"sub-{label}.html").is_file()


@pytest.mark.parametrize("plugin", ["SLURM", "SLURMGraph"])
def test_a_job_for_each_node(call, bids, labels, tmp_path, plugin):
    out, work = tmp_path / "out", tmp_path / "work"
    call(
        *app(
            bids, out, work, plugin, "--participant-label", labels[0], "--purge-workdir-on-success"
        )
    )
    assert_done(out, labels[0])
    assert not list(work.glob("m2m_bids_wf/sub_*"))
    jobs = accounting(call)
    if not HAS_ACCOUNTING:
        return
    assert {row[2] for row in jobs} == {"COMPLETED"}
    asked, used = {}, {}
    for number, name, _, memory, peak in jobs:
        job, _, step = number.partition(".")
        if step == "batch":
            used[job] = megabytes(peak)
        elif not step:
            asked[job] = name, megabytes(memory)
    # What the node declares, not the default of the cluster; a limit that all keep.
    rigid = [memory for name, memory in asked.values() if "register_rigi" in name]
    default = 500
    assert rigid
    assert default not in rigid
    assert not {name: memory for job, (name, memory) in asked.items() if used[job] > memory}


def test_an_array_over_participants(call, bids, labels, tmp_path):
    (tmp_path / "participants.txt").write_text("".join(f"{label}\n" for label in labels))
    variables = {"BIDS": bids, "OUT": tmp_path / "out", "RUN": "m2m-bids", "SCRATCH": tmp_path}
    options = {"OPTIONS": " ".join(QUICK)}
    answer = call(
        *("sbatch", "--parsable", "--wait", "--array=1-2", "--cpus-per-task=1", "--mem=3G"),
        JOBS / "array.sbatch",
        **variables,
        **options,
    )
    for label in labels:
        assert_done(tmp_path / "out", label)
    assert not list(tmp_path.glob("m2m-bids-*.*/"))  # work folders are gone
    rows = accounting(call, "-j", answer.strip())
    assert {row[2] for row in rows} <= {"COMPLETED"}


def test_a_job_with_a_gpu(call, bids, labels, tmp_path):
    """The GPU is counted by SLURM; nothing runs on it, as it is pretended."""
    answer = call(
        *("sbatch", "--parsable", "--wait", "--cpus-per-task=2", "--mem=5G"),
        *(JOBS / "gpu.sbatch", labels[0]),
        **{"BIDS": bids, "OUT": tmp_path / "out", "RUN": "m2m-bids", "SCRATCH": tmp_path},
        DEVICE="cpu",
        OPTIONS=" ".join(QUICK),
    )
    assert_done(tmp_path / "out", labels[0])
    if HAS_ACCOUNTING:
        tres = call("sacct", "-X", "--noheader", "--format=AllocTRES%60", "-j", answer.strip())
        assert "gres/gpu=1" in tres


def program(folder, name, *lines):
    file = folder / name
    file.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    file.chmod(0o755)


def test_training_requeues_itself(call, cluster, tmp_path):
    """The job alone: others stand for the app and torchrun, which have tests of their own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, "torchrun", "until [ $1 = --no-python ]; do shift; done; shift", 'exec "$@"')
    program(
        *(programs, "m2m-bids", f'echo "$@" >> {tmp_path}/calls.txt'),
        'case "$*" in *--prepare-only*) exit 0 ;; esac',
        f"[ -e {tmp_path}/checkpoint ] && exit 0",
        f"touch {tmp_path}/checkpoint; sleep 600",
    )
    job = call(
        *("sbatch", "--parsable", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1"),
        *("--mem=500M", "--time=30", JOBS / "train.sbatch"),
        **{"BIDS": tmp_path, "OUT": tmp_path / "out", "WORK": tmp_path / "work", "RUN": 1},
        PATH=f"{programs}:{cluster['PATH']}",
        PROCESSES=1,
    ).strip()
    log = tmp_path / f"m2m-bids-train-{job}.log"
    wait((tmp_path / "checkpoint").exists, log)
    call("scancel", "--signal=USR1", "--batch", job)
    wait(lambda: "Restarts=1" in call("scontrol", "show", "job", job), log)
    # SLURM waits two minutes with jobs that were requeued.
    call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
    wait(lambda: "JobState=COMPLETED" in call("scontrol", "show", "job", job), log)
    assert "requeued after" in log.read_text()
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[-1] for line in calls] == ["--prepare-only", "--resume"] * 2
    accounting(call, "-j", job, "--duplicates")


def wait(is_so, log, limit_s=400):
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, log.read_text() if log.is_file() else "no log"
        time.sleep(2)
