import os
import subprocess
import sys

import pytest

from m2m_bids.cli import environment
from m2m_bids.cli.environment import (
    available_memory_gb,
    count_gpus,
    name_a_home,
    prepare_environment,
)


@pytest.fixture
def variables(monkeypatch):
    """Environment variables of this process, put back after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


def test_caches_are_in_the_work_folder(settings, variables, tmp_path):
    prepare_environment(settings())
    for name in (
        "TEMPLATEFLOW_HOME",
        "MPLCONFIGDIR",
        "XDG_CACHE_HOME",
        "NIPYPE_CONFIG_DIR",
        "DENO_DIR",
        "DASK_TEMPORARY_DIRECTORY",
    ):
        assert variables[name].startswith(str(tmp_path / "work/caches/"))
        assert os.path.isdir(variables[name])
    prepare_environment(settings())  # a second run in the same folder


def test_threads_and_telemetry(settings, variables):
    prepare_environment(settings(nprocs=4, omp_nthreads=3, random_seed=7))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert variables[name] == "3"
    # ANTs does not repeat its results on several threads.
    assert variables["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "1"
    assert variables["NO_ET"] == "1"
    assert variables["ANTS_RANDOM_SEED"] == "7"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "m2m-bids"),
        ({"USER": "ada"}, "ada"),
        ({"USER": "ada", "LOGNAME": "lovelace"}, "lovelace"),
    ],
)
def test_login_name_for_batch_systems(settings, variables, given, expected):
    for name in ("USER", "LOGNAME"):
        variables.pop(name, None)
    variables.update(given)
    prepare_environment(settings())
    assert variables["LOGNAME"] == expected


@pytest.mark.parametrize(("verbose", "level"), [(0, "CRITICAL"), (1, "INFO")])
def test_workers_read_the_same_configuration(settings, tmp_path, verbose, level):
    """Nipype's workers are processes of their own, which know the environment alone."""
    settings(verbose=verbose, stop_on_first_crash=True).to_toml(tmp_path / "settings.toml")
    code = f"""
import subprocess, sys
from m2m_bids.cli.environment import configure_nipype, prepare_environment
from m2m_bids.settings import Settings
settings = Settings.from_toml({str(tmp_path / "settings.toml")!r})
prepare_environment(settings)
configure_nipype(settings)
show = '''
import logging
from nipype import config
print(config.get("logging", "workflow_level"), config.get("execution", "stop_on_first_crash"),
      config.get("execution", "crashfile_format"),
      logging.getLevelName(logging.getLogger("nipype.workflow").level))
'''
exec(show)
subprocess.run([sys.executable, "-c", show], check=True)
"""
    command = [sys.executable, "-uc", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{level} true txt {level}"] * 2


@pytest.mark.parametrize(
    ("device", "n_gpus", "expected"),
    [("auto", 0, 0), ("auto", 2, 2), ("cuda", 1, 1), ("cuda", 3, 3), ("cuda:1", 2, 1)],
)
def test_gpus_are_counted(monkeypatch, device, n_gpus, expected):
    monkeypatch.setattr(environment, "GPU_COUNT_CODE", f"print({n_gpus})")
    assert count_gpus(device) == expected


@pytest.mark.parametrize(("device", "n_gpus"), [("cuda", 0), ("cuda:1", 1), ("cuda:2", 2)])
def test_missing_gpu_names_the_way_out(monkeypatch, device, n_gpus):
    monkeypatch.setattr(environment, "GPU_COUNT_CODE", f"print({n_gpus})")
    with pytest.raises(
        ValueError, match=f"--device {device}: .*{n_gpus} GPUs.*--nv.*--device cpu"
    ):
        count_gpus(device)


def test_broken_torch_counts_as_no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "GPU_COUNT_CODE", "raise SystemExit(1)")
    assert count_gpus("auto") == 0


def test_cpu_asks_nobody(monkeypatch):
    monkeypatch.setattr(environment.subprocess, "run", None)
    assert count_gpus("cpu") == 0


def test_torch_is_asked_in_another_process():
    code = (
        "import sys; from m2m_bids.cli.environment import count_gpus; count_gpus('auto');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_of_a_container(monkeypatch):
    monkeypatch.setattr(environment, "memory_limit", lambda: None)
    total = available_memory_gb()
    assert 0 < total < 1e5
    monkeypatch.setattr(environment, "memory_limit", lambda: 500_000_000)
    assert available_memory_gb() == pytest.approx(0.45)
    monkeypatch.setattr(environment, "memory_limit", lambda: 10**15)
    assert available_memory_gb() == total


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "1000"}, 0.9 * 1000 * 2**20 / 1e9),
        ({"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "3"}, 0.9 * 1500 * 2**20 / 1e9),
        ({"SLURM_MEM_PER_NODE": "", "SLURM_MEM_PER_CPU": "500"}, 0.9 * 500 * 2**20 / 1e9),
    ],
)
def test_memory_of_a_job(monkeypatch, given, expected):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert available_memory_gb() == pytest.approx(expected)


def test_a_user_without_a_home_gets_a_name_for_one(variables, monkeypatch):
    name_a_home()
    known = variables.get("HOME")
    monkeypatch.setattr(environment.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert variables.get("HOME") == known
    name_a_home()
    assert variables["HOME"] == "/nonexistent"


def test_nothing_is_written_to_the_home_directory_before_it_is_prepared(tmp_path):
    """Importing what a run imports first must not import Nipype, niworkflows or matplotlib."""
    code = (
        "import sys, m2m_bids.cli.run, m2m_bids.bids.query\n"
        "from m2m_bids.api import DEFAULT_WEIGHTS, check_weights\n"
        "check_weights(DEFAULT_WEIGHTS, ['pet'])\n"
        "print({'nipype', 'niworkflows', 'matplotlib', 'templateflow'} & set(sys.modules))"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    for name in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"
    assert list(tmp_path.iterdir()) == []
