"""Where nodes run beside the processes of `m2m_bids.cli.multiproc`: on GPUs, and on Dask."""

import os
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from m2m_bids.cli.multiproc import SturdyMultiProcPlugin


def _see_gpu(gpu: str) -> None:
    """Let this process see one GPU alone; before it starts CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


class GpuMultiProcPlugin(SturdyMultiProcPlugin):
    """
    Run nodes in processes, of which each GPU has one for itself.

    That process is kept, so that CUDA starts and a network is loaded once, and not for each scan.

    Parameters
    ----------
    plugin_args : dict
        As of Nipype's MultiProc, and ``gpus``: what ``CUDA_VISIBLE_DEVICES`` calls each GPU.
        Without it, nodes that take a GPU slot run among the others.
    """

    def __init__(self, plugin_args: dict[str, Any]):
        super().__init__(plugin_args=plugin_args)
        self._gpus: tuple[str, ...] = tuple(plugin_args.get("gpus", ()))
        self._gpu_pools = [self._new_gpu_pool(gpu) for gpu in self._gpus]
        self._gpu_of_job: dict[int, int] = {}

    def _new_gpu_pool(self, gpu: str) -> ProcessPoolExecutor:
        pool = self._new_pool(1)
        # It has one process, which does this first.
        pool.submit(_see_gpu, gpu)
        return pool

    def _submit(self, pool: Executor, taskid: int) -> Future:
        """Take the process of a free GPU for a node that needs one."""
        if not self._gpus or not self._jobs[taskid][0].is_gpu_node():
            return super()._submit(pool, taskid)
        # Nipype starts no more of them than there are slots.
        free = set(range(len(self._gpus))) - set(self._gpu_of_job.values())
        index = self._gpu_of_job.setdefault(taskid, min(free, default=0))
        try:
            return super()._submit(self._gpu_pools[index], taskid)
        except BrokenProcessPool:
            self._gpu_pools[index] = self._new_gpu_pool(self._gpus[index])
            return super()._submit(self._gpu_pools[index], taskid)

    def _clear_task(self, taskid: int) -> None:
        super()._clear_task(taskid)
        self._gpu_of_job.pop(taskid, None)

    def _postrun_check(self) -> None:
        for pool in self._gpu_pools:
            pool.shutdown()
        super()._postrun_check()


class DaskPlugin(SturdyMultiProcPlugin):
    """
    Run nodes on the workers of a Dask cluster: one that is there, or one on this machine.

    A worker takes one node at a time (``--nthreads 1``), since nodes change the folder they are
    in; the work folder is the same for all of them. Workers are given no GPUs.

    Parameters
    ----------
    plugin_args : dict
        As of Nipype's MultiProc, of all workers together, and ``address`` or ``scheduler_file``
        of a scheduler. Without both, ``n_procs`` workers are started here.
    """

    def __init__(self, plugin_args: dict[str, Any]):
        from distributed import Client, LocalCluster

        names = ("address", "scheduler_file")
        known = {name: plugin_args[name] for name in names if name in plugin_args}
        self._cluster = None
        if not known:
            self._cluster = LocalCluster(
                n_workers=plugin_args["n_procs"],
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address=None,
            )
            known = {"address": self._cluster}
        self._client = Client(**known)
        super().__init__(plugin_args=plugin_args)

    def _new_pool(self, n_processes: int) -> Executor:
        """All workers, whatever the number: Dask runs anew what a killed one has left."""
        return self._client.get_executor(pure=False, retries=0)

    def _end_processes(self) -> None:
        """Take nodes back; a worker that is not of this run ends the one that it is at."""
        self.pool.shutdown(wait=False)
        self._close()

    def _postrun_check(self) -> None:
        super()._postrun_check()
        self._close()

    def _close(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()
