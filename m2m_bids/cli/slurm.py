"""Nipype's SLURM plugins with what an app needs: resources, killed jobs, waiting for the end."""

import hashlib
import itertools
import logging
import re
import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nipype.pipeline.plugins.slurm import SLURMPlugin as _SLURMPlugin
from nipype.pipeline.plugins.slurmgraph import SLURMGraphPlugin as _SLURMGraphPlugin
from nipype.pipeline.plugins.tools import report_crash

LOGGER = logging.getLogger("m2m_bids")
# One question to the controller for all jobs, no more often than this, however many there are.
POLL_S = 5.0
_COMMENTS = ("--me", "--noheader", "--format=%A|%k")
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"})
_RUNNING = frozenset({"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"})


def resource_args(node: Any, given: str) -> str:
    """
    Ask SLURM for what a node declares, where the plugin file does not say it itself.

    Parameters
    ----------
    node : Node
        Its ``n_procs``, ``mem_gb`` and GPU slot.
    given : str
        Arguments of sbatch in the plugin file.

    Returns
    -------
    str
        Further arguments.
    """
    words = shlex.split(given)
    words += ["=".join(pair) for pair in itertools.pairwise(words) if "=" not in pair[0]]

    def is_given(pattern: str) -> bool:
        return any(re.fullmatch(pattern, word) for word in words)

    wanted = []
    if not is_given(r"-c.*|--cpus-per-(task|gpu)=.*"):
        wanted.append(f"--cpus-per-task={node.n_procs}")
    if not is_given(r"--mem(-per-cpu|-per-gpu)?=.*"):
        wanted.append(f"--mem={round(1000 * node.mem_gb)}M")
    if node.is_gpu_node() and not is_given(
        r"-G.*|--gpus(-per-(node|task|socket))?=.*|--(gres|tres-per-\w+)=.*gpu.*"
    ):
        wanted.append("--gpus=1")
    return " ".join(wanted)


class RunJobs:
    """
    Jobs of a run in SLURM's queue, known by their comments.

    A comment names the folder in the work folder that a node and all of its participant (or of
    its evaluation) share, and the run. Of such a folder one run alone has the lock.
    """

    def __init__(self) -> None:
        self.run = f"-{time.time_ns()}"

    def argument(self, node: Any) -> str:
        """Give the argument of sbatch that marks a node's job; the last of its kind counts."""
        return f"--comment={_mark(node)}{self.run}"

    def cancel_own(self) -> None:
        """Take the jobs of this run out of the queue."""
        jobs = _comments(_ask("squeue", *_COMMENTS) or "")
        cancel(job for job, comment in jobs.items() if comment.endswith(self.run))

    def cancel_left(self, nodes: Iterable[Any]) -> None:
        """Cancel jobs of nodes that an earlier run left in the queue, and wait for their end."""
        marks = {_mark(node) for node in nodes}
        is_told = False
        while left := [
            job for job, comment in _queued().items() if comment.rpartition("-")[0] in marks
        ]:
            if not is_told:
                LOGGER.warning("cancelling SLURM jobs that an earlier run has left: %d", len(left))
                is_told = True
            cancel(left)
            time.sleep(POLL_S)


def _mark(node: Any) -> str:
    """Name the folder in the work folder that a node shares with all of its participant."""
    folder = Path(node.base_dir, *node.fullname.split(".")[:2]).resolve()
    return f"m2m-bids-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"


def _queued() -> dict[str, str]:
    """Comments of this user's jobs that have not ended, by number; waits for the controller."""
    while (answer := _ask("squeue", *_COMMENTS)) is None:
        time.sleep(POLL_S)
    return _comments(answer)


def _comments(answer: str) -> dict[str, str]:
    jobs = (line.partition("|") for line in answer.splitlines())
    return {job: comment for job, _, comment in jobs}


def ended_as(job: int) -> str:
    """Ask SLURM how a job ended: TIMEOUT, OUT_OF_MEMORY and the like; empty if it forgot."""
    answer = _ask("scontrol", "show", "job", "--oneliner", str(job))
    found = re.search(r"\bJobState=(\w+)", answer or "")
    return found[1] if found else ""


def _ask(*command: str) -> str | None:
    """Run one of SLURM's programs; None where the controller does not answer."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        LOGGER.debug("%s: %s", " ".join(command), answer.stderr.strip())
        return None
    return answer.stdout


def _lost(name: str, state: str, log: str) -> list[str]:
    """Say that a job left no result, as a traceback."""
    ways = {
        "TIMEOUT": "give it more time (--time in sbatch_args)",
        "OUT_OF_MEMORY": "give it more memory (--mem in sbatch_args)",
    }
    how = f" as {state}" if state else ""
    advice = ways.get(state, "the same command again goes on from here")
    return [
        f"RuntimeError: the SLURM job of {name} ended{how} without a result: {advice}; {log}\n"
    ]


class SLURMPlugin(_SLURMPlugin):
    """
    Nipype's SLURM plugin: a job for each node.

    Jobs ask for the memory, threads and GPU that nodes declare. The queue is read once for all
    jobs; a controller that does not answer is asked again. A job that was killed fails its node;
    in Nipype it ends the run.

    Parameters
    ----------
    plugin_args : dict
        As of Nipype's plugin.
    """

    def __init__(self, plugin_args: dict[str, Any]):
        super().__init__(plugin_args=plugin_args)
        self._submitted: dict[int, float] = {}
        self._queue: set[int] = set()
        self._asked = 0.0
        self._jobs = RunJobs()

    def run(self, graph, config, updatehash=False):
        """Run all nodes; take their jobs out of the queue if the run is interrupted."""
        self._jobs.cancel_left(graph.nodes())
        try:
            super().run(graph, config, updatehash=updatehash)
        except KeyboardInterrupt:
            self._jobs.cancel_own()
            raise

    def _submit_batchtask(self, scriptfile, node):
        own = node.plugin_args.get("sbatch_args", "")
        more = resource_args(node, f"{self._sbatch_args or ''} {own}")
        mark = self._jobs.argument(node)
        node.plugin_args = {**node.plugin_args, "sbatch_args": f"{own} {more} {mark}"}
        taskid = super()._submit_batchtask(scriptfile, node)
        self._submitted[taskid] = time.monotonic()
        return taskid

    def _is_pending(self, taskid):
        if time.monotonic() - self._asked > POLL_S:
            asked = time.monotonic()
            jobs = _ask("squeue", "--me", "--noheader", "--format=%A")
            if jobs is None:
                return True
            self._queue, self._asked = {int(job) for job in jobs.split()}, asked
        return taskid in self._queue or self._submitted[taskid] > self._asked

    def _get_result(self, taskid):
        result = super()._get_result(taskid)
        if result is not None and isinstance(result["traceback"], str):
            # Nipype found no file; a crash report wants a list.
            node_dir = Path(self._pending[taskid])
            log = f"its output may be below {node_dir.parents[-3]}, in batch/slurm-{taskid}.out"
            result["traceback"] = _lost(node_dir.name, ended_as(taskid), log)
        return result


class SLURMGraphPlugin(_SLURMGraphPlugin):
    """
    Nipype's SLURMGraph: all jobs at once, each waiting for those before it; then their end.

    Nipype's own returns when all are in the queue, and knows nothing of their ends.

    Parameters
    ----------
    plugin_args : dict
        As of Nipype's plugin.
    """

    def __init__(self, plugin_args: dict[str, Any]):
        callback = plugin_args.get("status_callback", lambda *_: None)
        known = {name: value for name, value in plugin_args.items() if name != "status_callback"}
        super().__init__(plugin_args={**known, "dont_resubmit_completed_jobs": True})
        self._callback = callback
        self._jobs = RunJobs()
        self._sbatch_args += " --kill-on-invalid-dep=yes"

    def run(self, graph, config, updatehash=False):
        """Submit all nodes, and wait until none is left in the queue."""
        self._jobs.cancel_left(graph.nodes())
        for node in graph.nodes():
            own = (node.plugin_args or {}).get("sbatch_args", "")
            more = resource_args(node, f"{self._sbatch_args} {own}")
            args = f" {own} {more} {self._jobs.argument(node)}"
            node.plugin_args = {**(node.plugin_args or {}), "sbatch_args": args}
        try:
            super().run(graph, config, updatehash=updatehash)
        except KeyboardInterrupt:
            self._jobs.cancel_own()
            raise

    def _submit_graph(self, pyfiles, dependencies, nodes):
        super()._submit_graph(pyfiles, dependencies, nodes)
        names = [_job_name(index, node) for index, node in enumerate(nodes)]
        states = self._wait(dict(zip(names, nodes, strict=True)))
        missing = [
            index
            for index, node in enumerate(nodes)
            if not is_done(node) or _has_failed(states.get(names[index]))
        ]
        for index in missing:
            node, script = nodes[index], Path(pyfiles[index])
            if _crashed(node) or set(dependencies[index]) & set(missing):
                continue
            log = script.with_name(f"batchscript_{script.stem}.sh.o")
            report_crash(
                node, traceback=_lost(node.name, states.get(names[index], ""), f"see {log}")
            )
        if missing:
            raise RuntimeError(f"{len(missing)} of {len(nodes)} nodes failed or were not run")

    def _wait(self, nodes: dict[str, Any]) -> dict[str, str]:
        """Follow jobs to their end; return the last known state of each."""
        states: dict[str, str] = {}
        while True:
            found = self._states()
            for name, state in found.items():
                self._tell(nodes[name], states.get(name, ""), state)
            states.update(found)
            if not any(state in _WAITING | _RUNNING for state in found.values()):
                return states
            time.sleep(POLL_S)

    def _states(self) -> dict[str, str]:
        """State of each job of this run, those that ended lately too, by name."""
        arguments = ("--me", "--noheader", "--states=all", "--format=%j|%T|%k")
        while (answer := _ask("squeue", *arguments)) is None:
            time.sleep(POLL_S)
        jobs = (line.split("|", 2) for line in answer.splitlines())
        return {name: state for name, state, comment in jobs if comment.endswith(self._jobs.run)}

    def _tell(self, node: Any, before: str, state: str) -> None:
        """Pass what became of a job on to the status callback."""
        if state == before or state in _WAITING:
            return
        if before not in _RUNNING and state != "CANCELLED":
            self._callback(node, "start")
        if state not in _RUNNING:
            self._callback(node, "end" if state == "COMPLETED" else "exception")


def _has_failed(state: str | None) -> bool:
    """Tell whether a job ended badly, perhaps before it began; None of one that was not needed."""
    return state is not None and state not in _WAITING | _RUNNING | {"COMPLETED"}


def is_done(node: Any) -> bool:
    """Tell whether a node has run to its end, once: its hash lies beside its results."""
    return any(
        not file.name.endswith("_unfinished.json")
        for file in Path(node.output_dir()).glob("_0x*.json")
    )


def cancel(jobs: Iterable[int | str]) -> None:
    """Take jobs out of the queue."""
    if names := [str(job) for job in jobs]:
        _ask("scancel", *names)


def _job_name(index: int, node: Any) -> str:
    """Name a job as Nipype's SLURMGraph does."""
    return re.sub(r"[-.:]", "_", f"j{index}_{node._id}")


def _crashed(node: Any) -> bool:
    """Tell whether a node has written a crash file itself."""
    folder = Path(node.config["execution"]["crashdump_dir"])
    return any(folder.glob(f"crash-*-{node._id}-*.txt"))
