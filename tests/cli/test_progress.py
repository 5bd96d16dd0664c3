import io
import signal
from types import SimpleNamespace

import pytest
from nipype.pipeline import engine as pe

from m2m_bids.cli import progress as module
from m2m_bids.cli.environment import termination_interrupts
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
    clock = iter([9.0, 10.0, 12.5, 13.0, 20.0])
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


PET_WF = "m2m_bids_wf.sub_01_wf.sub_01_trc_FDG_pet_wf"
T1W_WF = "m2m_bids_wf.sub_01_wf.sub_01_T1w_wf"


def report(progress, *events):
    """Call a progress as Nipype does."""
    for name, status in events:
        progress(SimpleNamespace(fullname=name), status)


def test_each_node_is_logged_if_asked_for(caplog):
    progress = Progress(logs_nodes=True)
    name = f"{PET_WF}.registration_wf.register_rigid"
    with caplog.at_level("INFO"):
        report(progress, (name, "end"))  # of a node that was not run
        report(progress, *((name, status) for status in ("start", "end", "exception")))
    words = [
        (record.getMessage().split()[0], record.getMessage()[9:]) for record in caplog.records
    ]
    name = name.partition(".")[2]
    assert words == [("started", name), ("finished", name), ("FAILED", name)]


def test_each_image_is_logged_once(caplog):
    """Its start, its end, and nothing of one that was finished before or failed."""
    pet = [f"{PET_WF}.{node}" for node in ("reference_wf.a", "registration_wf.b")]
    t1w = [f"{T1W_WF}.c", "m2m_bids_wf.sub_01_wf.outputs_sub_01_T1w_wf.d"]
    cached = ["m2m_bids_wf.sub_02_wf.sub_02_T1w_wf.c"]
    progress = Progress([*pet, *t1w, *cached])
    with caplog.at_level("INFO"):
        report(progress, (cached[0], "end"))
        report(progress, *((name, status) for name in t1w for status in ("start", "end")))
        report(progress, (pet[0], "start"), (pet[0], "exception"), (pet[1], "end"))
    assert [record.getMessage() for record in caplog.records] == [
        "started  sub-01_T1w",
        "finished sub-01_T1w (0:00)",
        "started  sub-01_trc-FDG_pet",
        "FAILED   sub_01_wf.sub_01_trc_FDG_pet_wf.reference_wf.a",
    ]


def test_lines_of_what_is_running(monkeypatch):
    """Two of four nodes: one like a finished one, which took 60 s, and one of another kind."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    first, second = (f"m2m_bids_wf.sub_0{n}_wf.sub_0{n}_T1w_wf.extract_brain" for n in (1, 2))
    rigid = f"{PET_WF}.registration_wf.register_rigid"
    progress = Progress([first, second, rigid, f"{PET_WF}.outputs_wf.save_scan"])
    assert progress.lines(80, 10) == ["[" + "-" * 40 + "] 0 of 4 steps, 0:00"]
    report(progress, (first, "start"))
    now[0] = 60.0
    report(progress, (first, "end"), (second, "start"), (rigid, "start"))
    now[0] = 70.0
    *running, total = progress.lines(80, 10)
    assert [" ".join(line.split()) for line in running] == [
        "sub-02_T1w anatomy: extract brain 0:10 of about 1:00",
        "sub-01_trc-FDG_pet registration: register rigidly 0:10",
    ]
    # 50 s of the brain are left; the other two are expected to take 33 and 2 s at this speed, and
    # 80 s of work were done in 70 s.
    assert total.endswith("] 1 of 4 steps, 1:10, about 1:05 left")
    assert total.count("#") == round(total.index("]") / 4)
    for columns, rows in ((80, 2), (30, 10), (12, 1), (4, 10), (0, 10)):
        lines = progress.lines(columns, rows)
        assert len(lines) <= rows
        assert "steps" in lines[-1]
        assert all(len(line) <= columns for line in lines[:-1])


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


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def on_interrupt(request):
    """What a shell sets for processes in the foreground, and in the background."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


def test_termination_interrupts_once(on_interrupt):
    before = signal.getsignal(signal.SIGTERM)
    with termination_interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_termination_ends_a_run(on_interrupt):
    """As Ctrl-C does; Nipype alone takes it for the failure of one node."""
    progress = Progress()
    with termination_interrupts(), progress.watching(io.StringIO()):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            report(progress, (f"{PET_WF}.next", "start"))
