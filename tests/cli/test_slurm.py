"""SLURM's plugins with stand-ins for its programs; tests/slurm has a real one."""

import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import pytest
from nipype import Node
from nipype.interfaces.utility import IdentityInterface

from m2m_bids.cli import slurm
from m2m_bids.cli.slurm import (
    RunJobs,
    SLURMGraphPlugin,
    SLURMPlugin,
    ended_as,
    is_done,
    resource_args,
)


@pytest.fixture
def programs(monkeypatch):
    """Answer for SLURM's programs; return what was asked."""
    asked = []

    def say(**answers):
        def run(command, **_):
            asked.append(command)
            text = answers.get(command[0])
            return SimpleNamespace(returncode=int(text is None), stdout=text or "", stderr="down")

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return say


def node(*, gpu=False, n_procs=4, mem_gb=2.5):
    made = Node(IdentityInterface(fields=["use_gpu"]), name="n", n_procs=n_procs, mem_gb=mem_gb)
    made.inputs.use_gpu = gpu
    return made


@pytest.mark.parametrize(
    ("given", "gpu", "expected"),
    [
        ("--time=30", False, "--cpus-per-task=4 --mem=2500M"),
        ("--time=30", True, "--cpus-per-task=4 --mem=2500M --gpus=1"),
        ("-c 2 --mem=9G", False, ""),
        ("--mem-per-cpu=1G", True, "--cpus-per-task=4 --gpus=1"),
        ("--cpus-per-task=1 --gres=gpu:a100:1 --mem=1G", True, ""),
        ("--comment='-c is --mem'", False, "--cpus-per-task=4 --mem=2500M"),
        ("-c4 -G1 --mem 9G", True, ""),
        ("--cpus-per-gpu=4 --gpus-per-node=1", True, "--mem=2500M"),
        ("--gres gpu:1 --mem-bind=local", True, "--cpus-per-task=4 --mem=2500M"),
        ("--gres=tmp:1 -C gpu", True, "--cpus-per-task=4 --mem=2500M --gpus=1"),
        ("--tres-per-task=gres/gpu:1 --mem-per-gpu=9G", True, "--cpus-per-task=4"),
    ],
)
def test_nodes_ask_for_what_they_declare(given, gpu, expected):
    assert resource_args(node(gpu=gpu), given) == expected


def test_the_queue_is_read_once_for_all_jobs(programs):
    asked = programs(squeue="3\n4\n")
    plugin = SLURMPlugin({})
    plugin._submitted = dict.fromkeys((3, 4, 5), time.monotonic() - 1)
    assert [plugin._is_pending(job) for job in (3, 4, 5)] == [True, True, False]
    assert len(asked) == 1


def test_a_job_newer_than_the_answer_is_pending(programs):
    programs(squeue="")
    plugin = SLURMPlugin({})
    plugin._submitted = {3: time.monotonic() - 1}
    assert not plugin._is_pending(3)
    plugin._submitted[4] = time.monotonic()
    assert plugin._is_pending(4)


def test_a_controller_that_does_not_answer_ends_nothing(programs):
    programs(squeue=None)
    plugin = SLURMPlugin({})
    plugin._submitted = {3: time.monotonic() - 1}
    assert plugin._is_pending(3)


def test_killed_jobs_fail_their_node(programs, monkeypatch, tmp_path):
    programs(squeue="", scontrol="JobId=3 JobName=x JobState=TIMEOUT Reason=TimeLimit\n")
    plugin = SLURMPlugin({})
    plugin._config = {"execution": {"job_finished_timeout": "0"}}
    plugin._submitted, plugin._pending = {3: time.monotonic() - 1}, {3: str(tmp_path / "w/s/n")}
    (line,) = plugin._get_result(3)["traceback"]
    assert line.startswith("RuntimeError: the SLURM job of n ended as TIMEOUT without a result:")
    assert "--time" in line
    assert line.endswith("\n")


def test_forgotten_jobs_have_no_state(programs):
    programs(scontrol=None)
    assert ended_as(3) == ""


def test_a_graph_is_followed_to_its_end(programs, monkeypatch):
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    told = []
    plugin = SLURMGraphPlugin(
        {"status_callback": lambda node, status: told.append((node, status))}
    )
    answers = iter(
        [
            {"j0_a": "RUNNING", "j1_b": "PENDING"},
            {"j0_a": "COMPLETED", "j1_b": "RUNNING", "j2_c": "PENDING"},
            {"j0_a": "COMPLETED", "j1_b": "TIMEOUT", "j2_c": "CANCELLED"},
        ]
    )
    monkeypatch.setattr(plugin, "_states", lambda: next(answers))
    states = plugin._wait({"j0_a": "a", "j1_b": "b", "j2_c": "c"})
    assert states == {"j0_a": "COMPLETED", "j1_b": "TIMEOUT", "j2_c": "CANCELLED"}
    assert told == [
        ("a", "start"), ("a", "end"), ("b", "start"), ("b", "exception"), ("c", "exception"),
    ]  # fmt: skip


def test_other_jobs_are_not_followed(programs):
    plugin = SLURMGraphPlugin({})
    programs(
        squeue=f"j0_a|RUNNING|m2m-bids-ab{plugin._jobs.run}\n"
        "j0_a|FAILED|m2m-bids-ab-1\nother|RUNNING|(null)\nother|RUNNING|of a|b\n"
    )
    assert plugin._states() == {"j0_a": "RUNNING"}


def in_folder(made, folder, workflow="sub_01_wf"):
    """Place a node in a participant's folder of a work folder."""
    made.base_dir, made._hierarchy = str(folder), f"m2m_bids_wf.{workflow}.scan_wf"
    return made


@pytest.mark.parametrize("plugin", [SLURMPlugin, SLURMGraphPlugin])
def test_an_interrupted_run_is_taken_out_of_the_queue(programs, monkeypatch, tmp_path, plugin):
    """Also where a job is in the queue whose number is not known yet."""
    started = plugin({})
    mark = started._jobs.argument(in_folder(node(), tmp_path)).partition("=")[2]
    asked = programs(squeue=f"7|{mark}\n8|(null)\n9|{mark.rpartition('-')[0]}-1\n", scancel="")
    monkeypatch.setattr(started._jobs, "cancel_left", lambda nodes: None)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(plugin.__base__, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        started.run(nx.DiGraph(), {})
    assert asked[-1] == ("scancel", "7")


@pytest.mark.parametrize("plugin", [SLURMPlugin, SLURMGraphPlugin])
def test_jobs_that_a_killed_run_has_left_are_cancelled(monkeypatch, tmp_path, plugin):
    """They would write into the folders of the nodes that run again; those of others go on."""
    marks = [
        RunJobs().argument(in_folder(node(), folder, workflow)).partition("=")[2]
        for folder, workflow in (
            (tmp_path, "sub_01_wf"),
            (tmp_path, "sub_02_wf"),
            (tmp_path / "other", "sub_01_wf"),
        )
    ]
    queue = {str(number): mark for number, mark in enumerate(marks)} | {"3": "(null)"}
    answers = [queue, queue, {job: queue[job] for job in "123"}]
    asked = []

    def run(command, **_):
        asked.append(command)
        text = ""
        if command[0] == "squeue":
            text = "".join(f"{job}|{mark}\n" for job, mark in answers.pop(0).items())
        return SimpleNamespace(returncode=0, stdout=text, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    monkeypatch.setattr(plugin.__base__, "run", lambda *_, **__: asked.append("run"))
    graph = nx.DiGraph()
    graph.add_node(in_folder(node(), tmp_path))
    plugin({}).run(graph, {})
    done = [command for command in asked if command[0] != "squeue"]
    assert done == [("scancel", "0"), ("scancel", "0"), "run"]


def test_jobs_are_marked(monkeypatch, tmp_path):
    """After a comment of the plugin file: of two, sbatch takes the last."""
    marked = in_folder(node(), tmp_path)
    marked.plugin_args = {}
    plugin = SLURMPlugin({"sbatch_args": "--comment=mine"})
    monkeypatch.setattr(SLURMPlugin.__base__, "_submit_batchtask", lambda *_: 3)
    plugin._submit_batchtask("script.sh", marked)
    assert marked.plugin_args["sbatch_args"].endswith(f" {plugin._jobs.argument(marked)}")


def test_a_job_that_was_cancelled_before_it_began_is_not_done(monkeypatch, tmp_path):
    """An earlier result, of other inputs, lies in its node's folder."""
    earlier = in_folder(node(), tmp_path)
    folder = Path(earlier.output_dir())
    folder.mkdir(parents=True)
    (folder / "_0x12.json").touch()
    plugin = SLURMGraphPlugin({})
    monkeypatch.setattr(SLURMGraphPlugin.__base__, "_submit_graph", lambda *_: None)
    monkeypatch.setattr(slurm, "report_crash", lambda *_, **__: None)
    monkeypatch.setattr(slurm, "_crashed", lambda _: False)
    for states, fails in (
        ({}, False),
        ({"j0_n": "COMPLETED"}, False),
        ({"j0_n": "CANCELLED"}, True),
    ):
        monkeypatch.setattr(plugin, "_wait", lambda _, states=states: states)
        expected = pytest.raises(RuntimeError, match="1 of 1") if fails else nullcontext()
        with expected:
            plugin._submit_graph([str(tmp_path / "n.py")], {0: []}, [earlier])


def test_done_is_what_has_its_hash(tmp_path):
    folder = SimpleNamespace(output_dir=lambda: str(tmp_path))
    assert not is_done(folder)
    (tmp_path / "_0x12_unfinished.json").touch()
    assert not is_done(folder)
    (tmp_path / "_0x12.json").touch()
    assert is_done(folder)
