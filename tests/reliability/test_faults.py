"""Disks that are full, folders that vanish, and input that must not be touched."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROGRAMS = ("mount", "umount", "unshare", "setpriv")


def call(program, *arguments):
    """Run a program of the system; return its exit code."""
    return subprocess.run([shutil.which(program), *map(str, arguments)], check=False).returncode


def can_mount():
    """Tell whether this process may mount file systems, and leave its user and the network."""
    if sys.platform != "linux" or os.geteuid() or not all(map(shutil.which, PROGRAMS)):
        return False
    return call("unshare", "-m", "-n", "true") == 0


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="mounts and name spaces need root on Linux, unshare and setpriv"
)


@contextlib.contextmanager
def mounted(*arguments):
    """Mount something at the last argument."""
    assert call("mount", *arguments) == 0
    try:
        yield
    finally:
        call("umount", "-l", arguments[-1])


def wait_for(process, text, limit_s=600):
    """Wait until a run has said something."""
    end = time.monotonic() + limit_s
    while text not in process.log.read_text():
        assert time.monotonic() < end
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.1)


def is_part_of(app, undisturbed):
    """Check that each file under a final name is that of the undisturbed run."""
    found = app.results()
    assert not [name for name in found if found[name] != undisturbed.results.get(name)]


@needs_mounts
@pytest.mark.parametrize(("folder", "size_kb"), [("out", 64), ("out", 700), ("work", 1000)])
def test_full_disk(app, undisturbed, folder, size_kb):
    """A small file system for one folder; once it is larger, the same command goes on."""
    full = app.out if folder == "out" else app.work
    full.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", full):
        failed = app.run()
        assert failed.code in (1, 2), failed.text
        assert "No space left on device" in failed.text
        assert "Traceback" not in failed.text
        is_part_of(app, undisturbed)
        assert call("mount", "-o", "remount,size=200m", full) == 0
        done = app.run()
        assert done.code == 0, done.text
        assert app.results() == undisturbed.results


@needs_mounts
def test_full_disk_of_a_training(tmp_path):
    """A checkpoint for which there is no room is told, and the one before is as it was."""
    import torch

    from m2m_bids.registration.training import TrainingError, _WholeFiles

    with mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path):
        file = tmp_path / "checkpoint.ckpt"
        _WholeFiles().save_checkpoint({"network": torch.zeros(1000)}, file)
        before = file.read_bytes()
        with pytest.raises(TrainingError, match=r"could not be written .*No space left"):
            _WholeFiles().save_checkpoint({"network": torch.zeros(100_000)}, file)
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]


@needs_mounts
def test_input_that_vanishes(app, undisturbed, tmp_path):
    """The derivatives with FA are gone once the run has begun, as a network mount that is lost."""
    lost = tmp_path / "dti"
    lost.mkdir()
    changed = app._replace(
        data=app.data._replace(derivatives={**app.data.derivatives, "dti": lost})
    )
    with mounted("--bind", app.data.derivatives["dti"], lost):
        process = changed.start()
        wait_for(process, "2 to register")
        assert call("umount", "-l", lost) == 0
        assert process.wait(timeout=1800) == 1, process.log.read_text()
        text = process.log.read_text()
        assert "1 done, 1 failed" in text
        assert "Traceback" not in text
        (line,) = [line for line in text.splitlines() if "failed: sub-" in line]
        assert f"{lost}/sub-" in line
        assert "FA_dwimap.nii.gz" in line
    with mounted("--bind", app.data.derivatives["dti"], lost):
        done = changed.run()
        assert done.code == 0, done.text
    same = {name for name, content in changed.results().items()
            if content == undisturbed.results[name]}  # fmt: skip
    # Sources have the same names, whatever the folder.
    assert same == set(undisturbed.results)


ISOLATED = """
set -e
for folder in {inputs}; do
    mount --bind "$folder" "$folder"
    mount -o remount,ro,bind "$folder"
done
if touch "{bids}/x" 2>/dev/null; then echo "not read-only"; exit 9; fi
exec setpriv --reuid 54321 --regid 54321 --clear-groups \
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \
    --bounding-set=-all,+dac_read_search "$@"
"""


@needs_mounts
def test_without_network_home_and_rights(app, undisturbed):
    """Read-only input, no network, no home directory, a user that does not exist: all at once."""
    # Not in pytest's own folder, which is closed to other users.
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        run_isolated(app._replace(out=Path(root, "out"), work=Path(root, "work")), undisturbed)


def run_isolated(app, undisturbed):
    empty = app.out.with_name("tmp")
    for folder in (app.out, app.work, empty):
        folder.mkdir()
        os.chown(folder, 54321, 54321)
    inputs = [app.data.bids, *app.data.derivatives.values()]
    before = {file: file.stat() for root in inputs for file in root.rglob("*")}
    script = ISOLATED.format(
        inputs=" ".join(f"'{folder}'" for folder in inputs), bids=app.data.bids
    )
    prefix = ["unshare", "-m", "-n", "sh", "-c", script, "sh"]
    done = app.run(prefix=prefix, HOME="/nonexistent", TMPDIR=str(empty), USER=None, LOGNAME=None)
    assert done.code == 0, done.text
    assert "Traceback" not in done.text
    assert "writable" not in done.text
    assert app.results() == undisturbed.results
    after = {file: file.stat() for root in inputs for file in root.rglob("*")}
    assert {f: (s.st_mtime_ns, s.st_size) for f, s in after.items()} == {
        f: (s.st_mtime_ns, s.st_size) for f, s in before.items()
    }
    assert not list(empty.iterdir())
    owners = {path.stat().st_uid for path in app.out.rglob("*")}
    assert owners == {54321}
