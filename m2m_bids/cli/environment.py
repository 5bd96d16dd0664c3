"""What a run needs of its process: environment variables, Nipype's configuration, GPUs."""

import configparser
import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

from m2m_bids.settings import Settings

GPU_COUNT_CODE = "import torch; print(torch.cuda.device_count())"


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
    }.items():
        (caches / folder).mkdir(exist_ok=True)
        os.environ[name] = str(caches / folder)
    # Nipype's SLURM plugin needs it; containers with a clean environment lack it.
    os.environ.setdefault("LOGNAME", os.environ.get("USER", "m2m-bids"))


def use_one_heap() -> None:
    """
    Let the threads of this process share one heap, where the C library is glibc.

    Threads that train at the same time otherwise keep what others have freed: a quarter of a
    training's memory. The variable that glibc reads is too late once a process has started.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        m_arena_max = -8  # <malloc.h>
        set_option(m_arena_max, 1)


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
        },
    }
    parser = configparser.ConfigParser()
    parser.read_dict(options)
    file = Path(os.environ["NIPYPE_CONFIG_DIR"], "nipype.cfg")
    with file.open("w", encoding="utf-8") as stream:
        parser.write(stream)
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
        At most 1 where one device is named, 0 for the CPU.

    Raises
    ------
    ValueError
        If a GPU is named and there is none, or not so many.
    """
    if device == "cpu":
        return 0
    command = [sys.executable, "-c", GPU_COUNT_CODE]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    n_gpus = int(answer.stdout) if answer.returncode == 0 else 0
    if device == "auto":
        return min(n_gpus, 1)
    _, _, index = device.partition(":")
    if int(index or 0) >= n_gpus:
        from m2m_bids.api import missing_gpu_message

        raise ValueError(missing_gpu_message(device, n_gpus))
    return 1


def available_memory_gb() -> float:
    """Memory that may be used: nine tenths of what is there or of the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return 0.9 * (min(total, int(text) / 1e9) if text.isdigit() else total)
