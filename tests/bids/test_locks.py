import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from m2m_bids.bids.locks import (
    empty_work_folder,
    hold_level,
    hold_participants,
    holder_of,
    is_held,
    level_lock,
    locked,
    remove_all_unfinished,
    remove_unfinished,
)

HOLD = """
import sys, time
from pathlib import Path
from m2m_bids.bids.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock, and the lock's file."""
    file = tmp_path / "x.lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process, file
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_process_gives_its_lock_up(holder, caplog):
    process, file = holder
    assert is_held(file)
    entered = threading.Event()

    def enter():
        with locked(file, "sub-01 in out"):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(0.3)
    assert f"waiting for another run (process {process.pid} on " in caplog.text
    assert "works on sub-01 in out" in caplog.text
    process.kill()
    thread.join(10)
    assert entered.is_set()
    assert file.read_text() == ""


def test_only_one_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / "folder" / "x.lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80
    assert max(most) == 1
    assert os.listdir(tmp_path / "folder") == ["x.lock"]


def test_the_file_of_a_lock_stays(tmp_path):
    """Another machine may have it open, or remember it, when it is given up."""
    file = tmp_path / "x.lock"
    with locked(file):
        first = file.stat().st_ino
        assert file.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert (file.stat().st_ino, file.read_text()) == (first, "")
    with locked(file):
        assert file.stat().st_ino == first


def test_file_that_stayed_is_not_held(tmp_path, caplog):
    """A process of this machine was killed."""
    file = tmp_path / "x.lock"
    file.write_text(f"process 1 on {socket.gethostname()}")
    assert not is_held(file)
    assert not is_held(tmp_path / "y.lock")
    with locked(file):
        assert is_held(file)
    assert not caplog.records


def test_locks_that_do_not_reach_other_machines(tmp_path, caplog):
    """The file system gives a lock that another machine says it has."""
    file = tmp_path / ".sub-01.lock"
    file.write_text("process 1 on elsewhere")
    assert holder_of(file) == "process 1 on elsewhere"
    with pytest.raises(ValueError, match=rf"held by process 1 on elsewhere\..* remove {file}\."):
        empty_work_folder(tmp_path, own=[])
    with locked(file):
        pass
    (line,) = caplog.messages
    assert line.startswith(f"{file}: process 1 on elsewhere has not given it up.")
    assert not is_held(file)
    empty_work_folder(tmp_path, own=[])
    assert file.exists()


def test_file_systems_without_locks(tmp_path, caplog, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    file = tmp_path / "x.lock"
    with locked(file):
        assert is_held(file)
    assert "No locks available" in caplog.text
    assert not is_held(file)


def test_exclusive_locks_of_nfs(holder, monkeypatch):
    """They are given to files that are open for writing, as to locks of fcntl."""
    process, file = holder
    real = fcntl.flock

    def flock(stream, how):
        if fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(stream, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert holder_of(file) == f"process {process.pid} on {socket.gethostname()}"


def test_a_lock_that_cannot_be_asked_for_counts_as_held(tmp_path):
    (tmp_path / "x.lock").mkdir()
    assert holder_of(tmp_path / "x.lock") == "another process"


def test_participants_are_held_in_each_folder(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    with hold_participants((out, work), {"01", "02"}):
        held = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.lock"))
        assert held == [
            "out/.sub-01.lock",
            "out/.sub-02.lock",
            "work/.sub-01.lock",
            "work/.sub-02.lock",
        ]
        assert all(is_held(tmp_path / file) for file in held)
    assert not any(map(is_held, tmp_path.rglob("*.lock")))


MANY = """
import resource, sys
from pathlib import Path
from m2m_bids.bids.locks import hold_participants
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[2])))
folders = Path(sys.argv[1], "out"), Path(sys.argv[1], "work")
with hold_participants(folders, [f"{number:03}" for number in range(200)]):
    print(len(list(folders[0].glob(".sub-*.lock"))))
"""


def hold_many(folder, most_files):
    """Hold 200 participants where a process may have 256 open files, or more if it asks."""
    command = [sys.executable, "-c", MANY, str(folder), str(most_files)]
    return subprocess.run(command, capture_output=True, text=True)


def test_more_participants_than_open_files(tmp_path):
    done = hold_many(tmp_path, 4096)
    assert done.stdout == "200\n", done.stderr
    refused = hold_many(tmp_path, 1000)
    assert "400 locks of participants need 1424 open files, and the system allows 1000" in (
        refused.stderr
    )


def test_levels_do_not_wait_for_each_other(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    with hold_level("evaluate", [work, out]), hold_level("group", [out]):
        held = [level_lock("evaluate", work), level_lock("evaluate", out), out / ".group.lock"]
        assert all(is_held(file) for file in held)
    assert not any(map(is_held, held))


def test_what_killed_runs_left_in_a_folder_is_removed(tmp_path):
    left = tmp_path / "scans" / f".sub-01_pet.{'0' * 32}" / "scan.json"
    kept = tmp_path / "scans" / "sub-01_pet" / "scan.json"
    for file in (left, kept):
        file.parent.mkdir(parents=True)
        file.touch()
    remove_all_unfinished(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


SHARED = [
    "logs/.status.tsv.a_b1c2d3.tmp",
    "logs/.m2m-bids-config.xyz01234/config_1.toml",
    "..bidsignore.a_b1c2d3.tmp",
    ".dataset_description.json.a_b1c2d3.tmp",
    ".group.html.partial",
    "caches/nipype/.nipype.cfg.a_b1c2d3.tmp",
]
OF_OTHERS = [
    ".sub-02_pet.json.a_b1c2d3.tmp",
    ".sub-02.html.partial",
    ".bidsignore",
    "logs/.status.lock",
    "logs/status.tsv",
    "logs/.others.tmp",
]


@pytest.mark.parametrize("hold", [hold_participants, hold_level])
def test_old_files_of_no_participant_are_removed(tmp_path, hold):
    """Those that are young may be another run's; so may those of other participants."""
    young = [name.replace("a_b1c2d3", "e_f4g5h6") for name in SHARED if "a_b1c2d3" in name]
    for name in (*SHARED, *OF_OTHERS, *young):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (*SHARED, *OF_OTHERS):
        path = tmp_path / name
        path = path.parent if "config." in path.parent.name else path
        os.utime(path, (time.time() - 4000,) * 2)
    first, second = ([tmp_path], ["01"]) if hold is hold_participants else ("group", [tmp_path])
    with hold(first, second):
        there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there - {".sub-01.lock", ".group.lock"} == {*OF_OTHERS, *young}


def test_what_killed_runs_left_is_removed_of_one_participant(tmp_path):
    left = [
        "sub-01/pet/.0123456789abcdef0123456789abcdef.nii.gz",
        "sub-01/pet/.sub-01_pet.json.a_b1c2d3.tmp",
        ".m2m-bids-sub-01.xyz/sub-01/anat/sub-01_T1w.nii.gz",
        f".sub-01_ses-M000_pet.{'0' * 32}/scan.json",
        ".sub-01.html.part",
    ]
    kept = [
        "sub-01/pet/sub-01_pet.nii.gz",
        "sub-01/.DS_Store",
        "sub-01/.others.tmp",
        "sub-02/pet/.0123456789abcdef0123456789abcdef.nii.gz",
        ".m2m-bids-sub-011.xyz/a",
        f".sub-011_ses-M000_pet.{'0' * 32}/scan.json",
        ".bidsignore",
    ]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, "01")
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there == set(kept)
