from types import SimpleNamespace

import pytest
from nipype.pipeline import engine as pe

from m2m_bids.cli import progress as module
from m2m_bids.cli.progress import Progress, crash_reasons
from m2m_bids.interfaces.preprocessing import ConformT1w

# The inner tracebacks are indented with tabs.
CRASH = """Node: {node}
Working directory: /work/m2m_bids_wf

Node inputs:

in_file = /data/sub-01_T1w.nii.gz

Traceback (most recent call last):
  File "/lib/nipype/pipeline/plugins/multiproc.py", line 67, in run_node
    result["result"] = node.run(updatehash=updatehash)
nipype.pipeline.engine.nodes.NodeExecutionError: Exception raised while executing Node x.

Traceback:
>>Traceback (most recent call last):
>>  File "/lib/gzip.py", line 518, in read
>>    raise EOFError("Compressed file ended")
>>EOFError: Compressed file ended

>>The above exception was the direct cause of the following exception:

>>Traceback (most recent call last):
>>  File "/lib/core.py", line 402, in run
>>    runtime = self._run_interface(runtime)
>>{error}


""".replace(">>", "\t")


def test_seconds_of_workflows(monkeypatch):
    clock = iter([10.0, 12.5, 13.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    progress = Progress()
    first = SimpleNamespace(fullname="m2m_bids_wf.sub_01_wf.scan_wf.first")
    second = SimpleNamespace(fullname="m2m_bids_wf.sub_01_wf.second")
    progress(first, "start")
    progress(first, "end")
    progress(second, "start")
    progress(second, "exception")
    assert progress.elapsed_s("scan_wf") == 2.5
    assert progress.elapsed_s("sub_01_wf") == 10.0
    assert progress.elapsed_s("other_wf") is None


def test_failures_are_logged(caplog):
    progress = Progress()
    node = SimpleNamespace(fullname="m2m_bids_wf.sub_01_wf.scan_wf.node")
    with caplog.at_level("INFO"):
        progress(node, "end")  # of a node that was not run
        for status in ("start", "end", "exception"):
            progress(node, status)
    words = [
        (record.getMessage().split()[0], record.getMessage()[9:]) for record in caplog.records
    ]
    name = "sub_01_wf.scan_wf.node"
    assert words == [("started", name), ("finished", name), ("FAILED", name)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("m2m_bids.spatial.images.ImageError: a.nii: 5-D: fix it.", "a.nii: 5-D: fix it."),
        ("m2m_bids.registration.weights.WeightsError: w: wrong hash", "w: wrong hash"),
        ("m2m_bids.api.DeviceError: --device cuda: 0 GPUs", "--device cuda: 0 GPUs"),
        ("RuntimeError: out of paper", "RuntimeError: out of paper"),
        ("OSError: [Errno 28] No space: '/a'", "OSError: [Errno 28] No space: '/a'"),
        ("MemoryError", "MemoryError"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_last_exception_is_the_reason(tmp_path, error, reason):
    file = tmp_path / "crash-20261123-140336-ada-x-d714241b.txt"
    file.write_text(CRASH.format(node="m2m_bids_wf.sub_01_wf.x", error=error))
    assert crash_reasons(tmp_path) == {"m2m_bids_wf.sub_01_wf.x": reason}


def test_no_crash_no_reason(tmp_path):
    assert crash_reasons(tmp_path / "absent") == {}
    (tmp_path / "crash-1.txt").write_text("Node: a.b\nkilled by the system\n")
    assert crash_reasons(tmp_path) == {"a.b": "killed by the system"}
    (tmp_path / "crash-1.txt").write_text("")
    assert crash_reasons(tmp_path) == {"": "unknown"}


def test_crash_files_are_read_as_nipype_writes_them(tmp_path):
    (tmp_path / "sub-01_T1w.nii.gz").write_bytes(b"no image")
    workflow = pe.Workflow(name="sub_01_wf", base_dir=str(tmp_path / "work"))
    node = pe.Node(ConformT1w(in_file=str(tmp_path / "sub-01_T1w.nii.gz")), name="conform_t1w")
    workflow.add_nodes([node])
    workflow.config["execution"].update(
        crashdump_dir=str(tmp_path / "crashes"), crashfile_format="txt", poll_sleep_duration="0.1"
    )
    progress = Progress()
    with pytest.raises(RuntimeError):
        workflow.run(plugin="Linear", plugin_args={"status_callback": progress})
    reasons = crash_reasons(tmp_path / "crashes")
    assert list(reasons) == ["sub_01_wf.conform_t1w"]
    assert reasons["sub_01_wf.conform_t1w"].startswith(f"{tmp_path}/sub-01_T1w.nii.gz: not a read")
    assert progress.elapsed_s("sub_01_wf") >= 0
