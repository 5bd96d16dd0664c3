"""Nipype's MultiProc plugin for processes that may be killed, as for want of memory."""

import logging
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer, run_node

from m2m_bids.processes import end_with_parent

LOGGER = logging.getLogger("m2m_bids")

_KILLED = (
    "WorkerKilledError: its process was killed, and once more when it was tried again. Most often"
    " memory was not enough: give the job more memory or fewer --nprocs, and the same command"
    " again, which goes on from here"
)


class SturdyMultiProcPlugin(MultiProcPlugin):
    """
    Run nodes in processes, and go on where one of them is killed.

    Nipype's own plugin waits for ever for the node of a process that was killed. Here the nodes
    that were lost with it run once more, one after another, each in a process of its own; one
    that is lost again has failed. Processes end with the one that started them.

    Parameters
    ----------
    plugin_args : dict, optional
        As of Nipype's plugin.
    """

    def __init__(self, plugin_args: dict[str, Any] | None = None):
        super().__init__(plugin_args=plugin_args)
        self.pool = self._new_pool(self.processors)
        self._jobs: dict[int, tuple[Any, bool]] = {}
        self._lost: list[int] = []
        self._alone: int | None = None

    def run(self, graph: Any, config: Any, updatehash: bool = False) -> None:
        """Run all nodes; end their processes if the run is interrupted, before its locks go."""
        try:
            super().run(graph, config, updatehash=updatehash)
        except KeyboardInterrupt:
            self._end_processes()
            raise

    def _end_processes(self) -> None:
        processes = multiprocessing.active_children()
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def _new_pool(self, n_processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=n_processes,
            initializer=_initialise_worker,
            initargs=(self._cwd,),
            mp_context=multiprocessing.get_context(self.plugin_args.get("mp_context")),
        )

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        self._jobs[self._taskid] = node, updatehash
        try:
            self._task_obj[self._taskid] = self._submit(self.pool, self._taskid)
        except BrokenProcessPool:
            self.pool = self._new_pool(self.processors)
            self._task_obj[self._taskid] = self._submit(self.pool, self._taskid)
        return self._taskid

    def _submit(self, pool: ProcessPoolExecutor, taskid: int) -> Future:
        node, updatehash = self._jobs[taskid]
        return pool.submit(run_node, node, updatehash, taskid)

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        """Return what a node gave, or None while it runs or waits to run again."""
        if taskid in self._lost:
            self._run_alone(taskid)
            return None
        if not self._task_obj[taskid].done():
            return None
        was_alone = taskid == self._alone
        if was_alone:
            self._alone = None
        try:
            return self._task_obj[taskid].result()
        except BrokenProcessPool:
            if was_alone:
                return {"result": None, "traceback": [_KILLED], "taskid": taskid}
        name = self._jobs[taskid][0].fullname.partition(".")[2]
        LOGGER.warning("a process was killed: %s runs once more, by itself", name)
        self._lost.append(taskid)
        return None

    def _run_alone(self, taskid: int) -> None:
        """Run a lost node in a pool of one process, if no other one has its turn."""
        if self._alone is not None:
            return
        self._alone = taskid
        self._lost.remove(taskid)
        pool = self._new_pool(1)
        self._task_obj[taskid] = self._submit(pool, taskid)
        pool.shutdown(wait=False)  # once the node has ended

    def _clear_task(self, taskid: int) -> None:
        super()._clear_task(taskid)
        del self._jobs[taskid]


def _initialise_worker(cwd: str) -> None:
    """Prepare a process as Nipype does; on Linux it ends when the main process does."""
    process_initializer(cwd)
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with_parent(parent.sentinel)
