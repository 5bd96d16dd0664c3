"""Runs that are killed, run again, or run at once, with the whole app."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from m2m_bids.bids.locks import is_held

pytestmark = pytest.mark.slow


def whole(app, undisturbed):
    """Results of a run; each must be that of the undisturbed run."""
    found = app.results()
    different = [name for name in found if found[name] != undisturbed.results.get(name)]
    assert not different
    return found


def test_killed_at_any_time(app, undisturbed):
    """Kill the run at random moments, each time later, until one gets to its end."""
    generator = random.Random(1)  # noqa: S311
    kills = 0
    for part in (0.1, 0.25, 0.5, 0.75):
        process = app.start()
        try:
            process.wait(timeout=undisturbed.seconds * part * generator.uniform(0.6, 1.4))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            whole(app, undisturbed)
    assert kills >= 2
    done = app.run()
    assert done.code == 0, done.text
    assert whole(app, undisturbed) == undisturbed.results
    assert not unfinished(app.out)


def unfinished(folder):
    """Hidden files that a killed run may have left."""
    hidden = [path for path in folder.rglob(".*") if path.name != ".bidsignore"]
    return [path for path in hidden if path.suffix != ".lock"]


def children(pid):
    """Processes that a process has started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def test_killed_worker(app, undisturbed, tmp_path):
    """
    Kill the process of a step, as the kernel does for want of memory; the run goes on.

    When ANTs has temporary files: they are in the work folder, where nothing stays of them.
    """
    system = tmp_path / "tmp"
    system.mkdir()
    process = app.start("--nprocs", "2", "-v", TMPDIR=str(system))
    end = time.monotonic() + 600
    while not any(app.work.rglob("m2m-ants-*/fixed.nii")):
        assert time.monotonic() < end
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.2)
    workers = [pid for pid in children(process.pid) if is_worker(pid)]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=1800) == 0
    assert "a process was killed" in process.log.read_text()
    assert whole(app, undisturbed) == undisturbed.results
    assert not list(system.iterdir())
    assert not list(app.work.rglob("m2m-ants-*"))


def is_worker(pid):
    """Tell the processes of steps: children of the fork server, which the main process started."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        of_parent = Path(f"/proc/{parent}/cmdline").read_bytes().decode().split("\0")
    except FileNotFoundError:
        return False
    return any("forkserver" in word for word in command) and command == of_parent


def test_second_run_does_nothing(undisturbed):
    app = undisturbed.app
    before = app.everything()
    again = app.run()
    assert again.code == 0, again.text
    assert "0 to register, 2 finished before" in again.text
    assert app.everything() == before


def test_outputs_that_lost_their_end(app, undisturbed):
    """As in a power cut: what is empty, cut off or ends in zeros is made anew, the same."""
    shutil.copytree(undisturbed.app.out, app.out)
    patterns = ("*_desc-preproc_pet.nii.gz", "*_to-T1w_*_xfm.txt", "*_desc-brain_mask.nii.gz")
    for pattern, spoil in zip(
        patterns,
        (
            lambda content: content[: len(content) // 2] + bytes(len(content) // 2),
            lambda content: b"",
            lambda content: content[:-1],
        ),
        strict=True,
    ):
        file = next(app.out.rglob(pattern))
        file.write_bytes(spoil(file.read_bytes()))
    assert app.results() != undisturbed.results
    again = app.run()
    assert again.code == 0, again.text
    assert "is empty or cut off" in again.text
    assert whole(app, undisturbed) == undisturbed.results


def test_two_runs_at_once(app, undisturbed):
    """The same command twice: one waits for the other, and then has nothing to do."""
    first = app.start()
    second = app.start()
    assert first.wait(timeout=1800) == 0, first.log.read_text()
    assert second.wait(timeout=1800) == 0, second.log.read_text()
    texts = [first.log.read_text(), second.log.read_text()]
    assert sum("waiting for another run (process" in text for text in texts) == 1
    assert sum("0 to register, 2 finished before" in text for text in texts) == 1
    assert whole(app, undisturbed) == undisturbed.results
    assert not any(map(is_held, app.out.rglob("*.lock")))
