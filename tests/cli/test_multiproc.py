"""Nodes whose process is killed: in Nipype's own plugin they never end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import Function

from m2m_bids.cli.multiproc import SturdyMultiProcPlugin
from m2m_bids.cli.progress import crash_reasons


def die_once(marker):
    """End this process without a word, as the kernel does for want of memory; not again."""
    import os
    import signal
    from pathlib import Path

    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker


def die(marker):
    """End this process whenever it comes here, but where its marker is."""
    import os
    import signal
    from pathlib import Path

    if not Path(marker).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return marker


def read(first, second):
    """Take what two others gave."""
    return [first, second]


def workflow_of(tmp_path, function):
    workflow = Workflow("w", base_dir=str(tmp_path / "work"))
    workflow.config["execution"].update(
        {
            "crashdump_dir": str(tmp_path / "log"),
            "crashfile_format": "txt",
            "poll_sleep_duration": "0.1",
        }
    )
    last = Node(Function(["first", "second"], ["out"], read), name="last")
    for index, field in enumerate(("first", "second")):
        node = Node(Function(["marker"], ["out"], function), name=f"node{index}")
        node.inputs.marker = str(tmp_path / f"marker{index}")
        workflow.connect(node, "out", last, field)
    return workflow


def plugin():
    return SturdyMultiProcPlugin(
        {"n_procs": 2, "memory_gb": 4, "n_gpu_procs": 0, "mp_context": "forkserver"}
    )


def test_nodes_of_killed_processes_run_again(tmp_path):
    """One dies; the other, which does not, may be lost with it."""
    (tmp_path / "marker1").touch()
    graph = workflow_of(tmp_path, die_once).run(plugin=plugin())
    last = next(node for node in graph.nodes() if node.name == "last")
    assert last.result.outputs.out == [str(tmp_path / f"marker{index}") for index in range(2)]


def test_a_node_that_is_killed_again_has_failed(tmp_path):
    with pytest.raises(RuntimeError, match="2 raised"):
        workflow_of(tmp_path, die).run(plugin=plugin())
    reasons = crash_reasons(tmp_path / "log")
    assert set(reasons) == {"w.node0", "w.node1"}
    for reason in reasons.values():
        assert "memory was not enough" in reason
        assert "\n" not in reason


def test_others_go_on_beside_a_node_that_is_killed_again(tmp_path):
    (tmp_path / "marker1").touch()
    with pytest.raises(RuntimeError):
        workflow_of(tmp_path, die).run(plugin=plugin())
    assert set(crash_reasons(tmp_path / "log")) == {"w.node0"}
    assert (tmp_path / "work/w/node1/result_node1.pklz").is_file()
    assert not (tmp_path / "work/w/node0/result_node0.pklz").exists()


PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from m2m_bids.cli.multiproc import SturdyMultiProcPlugin
sys.path.insert(0, {folder!r})
if __name__ == "__main__":
    plugin = SturdyMultiProcPlugin({{"n_procs": 1, "memory_gb": 1, "n_gpu_procs": 0,
                                    "mp_context": "forkserver"}})
    plugin.pool.submit(time.sleep, 0).result()
    Path({file!r}).write_text(str(list(plugin.pool._processes)[0]))
    plugin.pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux")
def test_no_process_outlives_the_main_one(tmp_path):
    file, script = tmp_path / "pid", tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(tmp_path), file=str(file)))
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    wait_until(lambda: file.is_file() and file.read_text())
    worker = int(file.read_text())
    assert is_alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_alive(worker))


LATE = """
import os, signal, sys, time
from pathlib import Path
from m2m_bids.cli.multiproc import SturdyMultiProcPlugin

class LateFolder(str):
    \"\"\"An argument of a worker's initialiser that it waits for.\"\"\"
    def __reduce__(self):
        return wait, (str(self),)

def wait(folder):
    Path(folder, "waits").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.05)
    return folder

if __name__ == "__main__":
    folder = {folder!r}
    plugin = SturdyMultiProcPlugin({{"n_procs": 1, "memory_gb": 1, "n_gpu_procs": 0,
                                    "mp_context": "forkserver"}})
    plugin._cwd = LateFolder(folder)
    pool = plugin._new_pool(1)
    pool.submit(Path.touch, Path(folder, "ran"))
    while not (Path(folder, "waits").exists() and pool._call_queue._reader.poll()):
        time.sleep(0.05)
    print(*pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux")
def test_a_process_that_starts_when_the_main_one_is_gone_does_nothing(tmp_path):
    """Work lies in its queue, but nobody is there for whom it would be done."""
    script = tmp_path / "parent.py"
    script.write_text(LATE.format(folder=str(tmp_path)))
    command = [sys.executable, str(script)]
    # A file: the worker would hold a pipe open.
    with (tmp_path / "pid").open("w") as stream:
        parent = subprocess.run(command, cwd=tmp_path, stdout=stream, timeout=300)
    assert parent.returncode == -signal.SIGKILL
    worker = int((tmp_path / "pid").read_text())
    assert is_alive(worker)
    (tmp_path / "go").touch()
    try:
        wait_until(lambda: not is_alive(worker), limit_s=120)
    finally:
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)
    assert not (tmp_path / "ran").exists()


SLEEPER = """
import os, sys, time
from pathlib import Path
from nipype import Node, Workflow
from nipype.interfaces.utility import Function
from m2m_bids.bids.locks import locked
from m2m_bids.cli.multiproc import SturdyMultiProcPlugin
from m2m_bids.cli.environment import termination_interrupts
from m2m_bids.cli.progress import Progress

def sleep(file):
    import os, time
    from pathlib import Path
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)
    return file

if __name__ == "__main__":
    folder = Path({folder!r})
    workflow = Workflow("w", base_dir=folder / "work")
    node = Node(Function(["file"], ["out"], sleep), name="sleep")
    node.inputs.file = str(folder / "worker")
    workflow.add_nodes([node])
    progress = Progress(["w.sleep"])
    plugin = SturdyMultiProcPlugin({{"n_procs": 1, "memory_gb": 1, "n_gpu_procs": 0,
                                    "mp_context": "forkserver", "status_callback": progress}})
    try:
        with termination_interrupts(), locked(folder / "x.lock"):
            with progress.watching(sys.stderr):
                workflow.run(plugin)
    except KeyboardInterrupt:
        worker = Path("/proc", (folder / "worker").read_text())
        print("interrupted", worker.exists(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_end_with_a_run_that_is_terminated(tmp_path):
    """When its locks are free again: another run may begin."""
    script, worker = tmp_path / "script.py", tmp_path / "worker"
    script.write_text(SLEEPER.format(folder=str(tmp_path)))
    with (tmp_path / "out").open("w") as stream:
        main = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, stdout=stream)
    wait_until(lambda: worker.is_file() and worker.read_text(), limit_s=300)
    main.send_signal(signal.SIGTERM)
    try:
        assert main.wait(timeout=120) == 0
    finally:
        main.kill()
    assert (tmp_path / "out").read_text().endswith("\ninterrupted False\n")


def wait_until(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    """Tell whether a process runs; one that has ended and waits to be fetched does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
