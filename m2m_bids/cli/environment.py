"""What a run needs of its process: environment variables, Nipype's configuration, GPUs."""

import configparser
import ctypes
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from m2m_bids.bids.derivatives import write_text
from m2m_bids.cli.cgroups import memory_limit
from m2m_bids.settings import Settings

GPU_COUNT_CODE = "import torch; print(torch.cuda.device_count())"


def name_a_home() -> None:
    """
    Name a home folder where neither the environment nor the list of users does.

    So it is for a user id that nobody has, in a container with an empty environment; pybids asks
    for the home folder when it is imported. It need not exist: nothing is written to it.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/nonexistent"


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Take SIGTERM, by which batch systems and containers end a process, for Ctrl-C; once."""

    def interrupt(_: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        on_interrupt = signal.getsignal(signal.SIGINT)
        if not callable(on_interrupt):  # shells start what is in the background without
            raise KeyboardInterrupt
        on_interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare_environment(settings: Settings) -> None:
    """
    Keep caches in the work folder, telemetry off and threads to their number.

    Worker processes inherit all of it; in this process it acts on what is imported later, so that
    it comes before Nipype, niworkflows, matplotlib and ANTs.

    Parameters
    ----------
    settings : Settings
    """
    caches = settings.work_dir / "caches"
    templateflow = caches / "templateflow"
    # One empty template keeps TemplateFlow from unpacking its 2300 placeholders.
    (templateflow / "tpl-none").mkdir(parents=True, exist_ok=True)
    threads = str(settings.omp_nthreads)
    os.environ.update(
        {
            "TEMPLATEFLOW_HOME": str(templateflow),
            "TEMPLATEFLOW_AUTOUPDATE": "off",
            "NO_ET": "1",
            "NIPYPE_NO_ET": "1",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": threads,
            # Threads that wait do not spin: on a shared machine they would stop each other.
            "OMP_WAIT_POLICY": "PASSIVE",
            # PyTorch asks for large pages: a step's arrays are new ones, and zeroing and mapping
            # small pages takes longer than most of what is computed on them.
            "THP_MEM_ALLOC_ENABLE": "1",
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # With more, ANTs sums in another order each time: results would not repeat.
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
            "ANTS_RANDOM_SEED": str(settings.random_seed or 1),
        }
    )
    for name, folder in {
        "MPLCONFIGDIR": "matplotlib",
        "XDG_CACHE_HOME": "xdg",
        "TORCH_HOME": "torch",
        "NUMBA_CACHE_DIR": "numba",
        "NIPYPE_CONFIG_DIR": "nipype",
        "DENO_DIR": "deno",  # of the BIDS validator, which ends without it
        "CUDA_CACHE_PATH": "cuda",
        "DASK_TEMPORARY_DIRECTORY": "dask",  # where it removes what killed workers have left
        "TRITON_CACHE_DIR": "triton",
    }.items():
        (caches / folder).mkdir(exist_ok=True)
        os.environ[name] = str(caches / folder)
    # Nipype's SLURM plugin needs it; containers with a clean environment lack it.
    os.environ.setdefault("LOGNAME", os.environ.get("USER", "m2m-bids"))


def use_one_heap() -> None:
    """
    Let the threads of this process share one heap and keep it, where the C library is glibc.

    Threads that train at the same time otherwise keep what others have freed: a quarter of a
    training's memory. Large arrays that are given back are mapped anew at every step, a twentieth
    of its time. The variables that glibc reads are too late once a process has started.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        m_arena_max, m_mmap_threshold, m_trim_threshold = -8, -3, -1  # <malloc.h>
        set_option(m_arena_max, 1)
        set_option(m_mmap_threshold, 2**30)
        set_option(m_trim_threshold, 2**31 - 1)


def configure_nipype(settings: Settings) -> None:
    """
    Set how Nipype executes: text crash files, no version check, no tracebacks on the terminal.

    Worker processes read the same from ``nipype.cfg`` in ``$NIPYPE_CONFIG_DIR``.

    Parameters
    ----------
    settings : Settings
    """
    from nipype import config
    from nipype import logging as nipype_logging

    # Nipype logs each failure twice, with its traceback; the crash file has that too.
    level = "INFO" if settings.verbose else "CRITICAL"
    options = {
        "logging": {
            "workflow_level": level,
            "interface_level": level,
            "utils_level": level,
            "log_to_file": "false",
        },
        "execution": {
            "check_version": "false",
            "crashfile_format": "txt",
            "stop_on_first_crash": str(settings.stop_on_first_crash).lower(),
            "poll_sleep_duration": "0.5",
            # Seconds until a job's result is seen on a network file system.
            "job_finished_timeout": "30",
        },
    }
    parser = configparser.ConfigParser()
    parser.read_dict(options)
    text = io.StringIO()
    parser.write(text)
    # In one step: workers of other runs in this work folder may be reading it.
    write_text(Path(os.environ["NIPYPE_CONFIG_DIR"], "nipype.cfg"), text.getvalue())
    config.update_config(options)
    nipype_logging.update_logging(config)
    # It has a handler of its own.
    logging.getLogger("nipype").propagate = False


def count_gpus(device: str) -> int:
    """
    Count the GPUs that a device's name may mean, in a process of its own.

    The parent process never initialises CUDA, since workers could not use it then.

    Parameters
    ----------
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns
    -------
    int
        All that are seen for ``"auto"`` and ``"cuda"``, 1 where one is named, 0 for the CPU.

    Raises
    ------
    ValueError
        If a GPU is named and there is none, or not so many.
    """
    if device == "cpu":
        return 0
    n_gpus = _answer(GPU_COUNT_CODE)
    if device == "auto":
        return n_gpus
    _, _, index = device.partition(":")
    if int(index or 0) >= n_gpus:
        from m2m_bids.api import missing_gpu_message

        raise ValueError(missing_gpu_message(device, n_gpus))
    return 1 if index else n_gpus


@cache
def _answer(code: str) -> int:
    """Run code in a process of its own and read the number that it prints; 0 if it fails."""
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 else 0


def gpu_names(device: str, n_gpus: int) -> tuple[str, ...]:
    """
    Name the GPUs of a run, each for one process, as ``CUDA_VISIBLE_DEVICES`` does.

    Parameters
    ----------
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    n_gpus : int
        As `count_gpus` says.

    Returns
    -------
    tuple of str
        A process that is to use ``cuda:N`` sees the GPUs before it too.
    """
    _, _, index = device.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    n_seen = int(index) + 1 if index else n_gpus
    names = visible.split(",") if visible else [str(number) for number in range(n_seen)]
    if not n_gpus:
        return ()
    return (",".join(names[:n_seen]),) if index else tuple(names[:n_gpus])


def available_memory_gb() -> float:
    """
    Memory that may be used: nine tenths of what is there, or of the container's or job's limit.

    SLURM may count memory without limiting it, so that its variables tell of a job's share.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9]
    if limit := memory_limit():
        limits.append(limit / 1e9)
    mib_of_node, mib_of_cpu, n_cpus = (
        int(value) if (value := os.environ.get(name, "")).isdigit() else 0
        for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
    )
    job = (mib_of_node or mib_of_cpu * max(n_cpus, 1)) * 2**20 / 1e9
    return 0.9 * min([*limits, job] if job else limits)
