"""Where nodes run. GPUs are pretended: what runs looks at the name that it was given."""

import importlib.util
import itertools
import os

import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import Function

from m2m_bids.cli.executors import DaskPlugin, GpuMultiProcPlugin
from m2m_bids.cli.progress import crash_reasons


# A function goes to other processes as its source: they need not find this file.
def look(use_gpu=False, killed_once=""):
    """Say which GPU a process sees, and when it ran."""
    import os
    import signal
    import time
    from pathlib import Path

    if killed_once and not Path(killed_once).exists():
        Path(killed_once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.time()
    time.sleep(0.3)
    return os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getpid(), begin, time.time()


def run(plugin, tmp_path, nodes):
    workflow = Workflow("w", base_dir=str(tmp_path / "work"))
    workflow.config["execution"].update(
        crashdump_dir=str(tmp_path / "log"),
        crashfile_format="txt",
        poll_sleep_duration="0.05",
        remove_unnecessary_outputs="false",
    )
    names = {"input_names": ["use_gpu", "killed_once"]}
    names["output_names"] = ["device", "process", "begin", "end"]
    for index, options in enumerate(nodes):
        interface = Function(function=look, **names)
        interface.inputs.trait_set(**options)
        workflow.add_nodes([Node(interface, name=f"node{index}")])
    done = workflow.run(plugin)
    return [node.result.outputs for node in sorted(done.nodes(), key=lambda node: node.name)]


def arguments(**changes):
    return {"n_procs": 3, "memory_gb": 4, "n_gpu_procs": 0, "mp_context": "forkserver", **changes}


def test_each_gpu_has_one_process(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plugin = GpuMultiProcPlugin(arguments(n_gpu_procs=2, gpus=("3", "GPU-b")))
    results = run(plugin, tmp_path, [{"use_gpu": True}] * 5 + [{}])
    on_gpu, on_cpu = results[:5], results[5]
    assert {result.device for result in on_gpu} == {"3", "GPU-b"}
    assert on_cpu.device == ""
    processes = {(result.device, result.process) for result in on_gpu}
    assert len(processes) == 2  # kept from node to node
    for device in ("3", "GPU-b"):
        times = sorted((r.begin, r.end) for r in on_gpu if r.device == device)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(times))


@pytest.mark.slow
def test_a_killed_gpu_process_is_replaced(tmp_path):
    plugin = GpuMultiProcPlugin(arguments(n_gpu_procs=1, gpus=("7",)))
    nodes = [{"use_gpu": True, "killed_once": str(tmp_path / "killed")}, {"use_gpu": True}]
    assert [result.device for result in run(plugin, tmp_path, nodes)] == ["7", "7"]
    assert crash_reasons(tmp_path / "log") == {}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="no Dask")
def test_dask(tmp_path):
    results = run(DaskPlugin(arguments(n_procs=2)), tmp_path, [{}] * 4)
    processes = {result.process for result in results}
    assert len(processes) == 2
    assert os.getpid() not in processes
