"""Lines at the bottom of a real pseudo-terminal, as a terminal emulator shows them."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pyte
import pytest

COLUMNS, ROWS = 60, 10
# What is below belongs to the process under test: its own output, that of a C library, of a
# child, and a line that comes in two halves.
LINES = """
import os, subprocess, sys, time
from m2m_bids.cli.live import LiveLines, is_terminal

assert is_terminal(sys.stderr)
count = 0

def lines(columns, rows):
    global count
    count += 1
    return [f"live one {count}", "live two" + "." * columns]

print("before")
with LiveLines(sys.stderr, lines):
    for number in range(12):
        print(f"line {number}")
    os.write(2, b"half ")
    time.sleep(0.6)
    os.write(2, b"and half\\n")
    subprocess.run(["echo", "from a child"])
    time.sleep(0.6)
    print("unfinished", end="")
print("after")
"""
LOST = """
import sys, time
from pathlib import Path
from m2m_bids.cli.live import LiveLines

with LiveLines(sys.stderr, lambda columns, rows: ["live"]):
    time.sleep(2)
    print("to nobody")
Path("done").touch()
"""
WORKFLOW = """
import logging, sys
from nipype.interfaces.utility import Function
from nipype.pipeline import engine as pe
from m2m_bids.cli.progress import Progress
from m2m_bids.cli.steps import node_names

def wait(seconds, after=None):
    import sys, time
    print(f"a warning of {seconds} s", file=sys.stderr)
    time.sleep(seconds)
    return seconds

if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    main = pe.Workflow("m2m_bids_wf", base_dir=sys.argv[2])
    for label in ("01", "02"):
        image = pe.Workflow(f"sub_{label}_T1w_wf")
        nodes = []
        for name in ("conform_t1w", "extract_brain"):
            nodes.append(pe.Node(Function(function=wait, output_names=["out"]), name=name))
            nodes[-1].inputs.seconds = float(sys.argv[3])
        image.connect(nodes[0], "out", nodes[1], "after")
        subject = pe.Workflow(f"sub_{label}_wf")
        subject.add_nodes([image])
        main.add_nodes([subject])
    progress = Progress(node_names(main))
    arguments = {"status_callback": progress}
    if sys.argv[1] == "MultiProc":
        arguments.update(n_procs=2, memory_gb=4, mp_context="forkserver", maxtasksperchild=1)
    try:
        with progress.watching(sys.stderr):
            main.run(plugin=sys.argv[1], plugin_args=arguments)
    except KeyboardInterrupt:
        print("interrupted")
    print("after")
"""
SIMULATION = """
import sys, time
from m2m_bids.cli import simulate
from m2m_bids.simulation import cohort

cohort.write_subject = lambda *_, **__: time.sleep(1) or []
sys.exit(simulate.main(["cohort", "bids", "--subjects", "3"]))
"""


class Terminal:
    """A process in a pseudo-terminal of its own, and what that shows."""

    def __init__(self, code, *arguments, cwd):
        (cwd / "script.py").write_text(code)
        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._primary, secondary = pty.openpty()
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.settings = termios.tcgetattr(secondary)
        self.secondary = secondary
        self.process = subprocess.Popen(
            [sys.executable, "script.py", *map(str, arguments)],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            cwd=cwd,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        os.set_blocking(self._primary, False)

    def text(self):
        """Lines that have left the screen, and those on it."""
        above = [
            "".join(line[column].data for column in range(COLUMNS)).rstrip()
            for line in self.screen.history.top
        ]
        return [*above, *(line.rstrip() for line in self.screen.display)]

    def show(self):
        """Read what there is; a pseudo-terminal gives 4 kB at once."""
        try:
            while True:
                self._stream.feed(os.read(self._primary, 65536))
        except BlockingIOError:
            time.sleep(0.02)

    def wait_for(self, condition, seconds=90):
        """Read until a condition holds for the lines."""
        end = time.monotonic() + seconds
        while not condition(self.text()):
            assert time.monotonic() < end, self.text()
            self.show()
        return self.text()

    def close(self):
        """Go away, as a terminal does whose connection is lost."""
        os.close(self.secondary)
        os.close(self._primary)

    def finish(self):
        """Read until the process has ended; return the lines that are not empty."""
        while self.process.poll() is None:
            self.show()
        self.show()
        assert termios.tcgetattr(self.secondary) == self.settings
        return [line for line in self.text() if line]


def holds(*words):
    return lambda lines: all(any(word in line for line in lines) for word in words)


def test_output_goes_above_the_lines(tmp_path):
    terminal = Terminal(LINES, cwd=tmp_path)
    lines = terminal.wait_for(holds("live one"))
    shown = [line for line in lines if line]
    assert shown[:13] == ["before", *(f"line {n}" for n in range(12))]
    assert shown[13].startswith("live one")
    # Not wider than the terminal, and no half of a line.
    assert shown[14:] == ["live two" + "." * (COLUMNS - 9)]
    after = terminal.finish()
    assert after == [
        "before",
        *(f"line {n}" for n in range(12)),
        "half and half",
        "from a child",
        "unfinished",
        "after",
    ]
    assert not terminal.screen.cursor.hidden


def test_a_run_outlives_its_terminal(tmp_path):
    terminal = Terminal(LOST, cwd=tmp_path)
    terminal.wait_for(holds("live"))
    terminal.close()
    assert terminal.process.wait(timeout=60) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "n_running"), [("Linear", 1), ("MultiProc", 2)])
def test_running_nodes_of_a_workflow(tmp_path, plugin, n_running):
    terminal = Terminal(WORKFLOW, plugin, tmp_path / "work", 2, cwd=tmp_path)
    lines = terminal.wait_for(holds("anatomy: extract brain", "of 4 steps"))
    running = [line for line in lines if "anatomy: " in line]
    assert len(running) == n_running
    assert all(line.startswith("sub-0") for line in running)
    assert "of 4 steps" in [line for line in lines if line][-1]
    after = terminal.finish()
    assert not [line for line in after if "anatomy: " in line or "steps" in line]
    assert after[-1] == "after"
    assert sum("a warning of 2.0 s" in line for line in after) == 4
    for label in ("01", "02"):
        assert f"started  sub-{label}_T1w" in after
        assert any(re.match(rf"finished sub-{label}_T1w \(0:\d\d\)", line) for line in after)
    assert terminal.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["Linear", "MultiProc"])
def test_interruption_leaves_a_usable_terminal(tmp_path, plugin):
    terminal = Terminal(WORKFLOW, plugin, tmp_path / "work", 30, cwd=tmp_path)
    terminal.wait_for(holds("anatomy: conform T1w"))
    os.killpg(terminal.process.pid, signal.SIGINT)
    after = terminal.finish()
    assert after[-2:] == ["interrupted", "after"]
    assert not [line for line in after if "exception calling callback" in line]
    assert not [line for line in after if "anatomy: " in line or "of 4 steps" in line]
    assert not terminal.screen.cursor.hidden


@pytest.mark.slow
def test_simulation_has_a_bar(tmp_path):
    terminal = Terminal(SIMULATION, cwd=tmp_path)
    lines = terminal.wait_for(holds("1/3"))
    assert [line for line in lines if line][-1].startswith("simulating:  33%")
    after = terminal.finish()
    told = [line for line in after if line.startswith("simulating sub-")]
    assert told == [f"simulating sub-ADNI011S000{n} ({n} of 3)" for n in (1, 2, 3)]
    assert "3/3" in after[-2]


@pytest.mark.slow
def test_simulation_has_no_bar_in_a_file(tmp_path):
    (tmp_path / "script.py").write_text(SIMULATION)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == [
        f"simulating sub-ADNI011S000{n} ({n} of 3)" for n in (1, 2, 3)
    ]
