"""Choose the Nipype plugin of a run."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2m_bids.cli.environment import available_memory_gb, count_gpus, gpu_names
from m2m_bids.settings import Settings

if TYPE_CHECKING:
    from m2m_bids.cli.progress import Progress

_KEYS = {"plugin", "plugin_args"}
# Of values that are not what their tag says, keys that are no keys, and deep nesting.
_YAML_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
# Those that are not Nipype's as they are.
_OWN = {
    "MultiProc": "m2m_bids.cli.executors:GpuMultiProcPlugin",
    "Dask": "m2m_bids.cli.executors:DaskPlugin",
    "SLURM": "m2m_bids.cli.slurm:SLURMPlugin",
    "SLURMGraph": "m2m_bids.cli.slurm:SLURMGraphPlugin",
}
_ON_THIS_MACHINE = ("MultiProc", "Dask")
_IN_JOBS = ("SLURM", "SLURMGraph")


def read_plugin_file(file: Path) -> dict[str, Any]:
    """
    Read a Nipype plugin file.

    Returns
    -------
    dict
        ``plugin`` and ``plugin_args``, to pass to Nipype's ``Workflow.run``.

    Raises
    ------
    ValueError
        If the file cannot be read, is not YAML, or does not hold these two.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, *_YAML_ERRORS, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--use-plugin {file}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, dict) or not isinstance(content.get("plugin"), str):
        raise ValueError(f"--use-plugin {file}: expected 'plugin: NAME' and 'plugin_args:' in it")
    if unknown := sorted(map(str, set(content) - _KEYS)):
        raise ValueError(f"--use-plugin {file}: unknown keys {unknown}, expected plugin_args")
    arguments = content.get("plugin_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"--use-plugin {file}: plugin_args must be a table, found {arguments!r}")
    return {"plugin": content["plugin"], "plugin_args": arguments}


def count_run_gpus(settings: Settings) -> int:
    """
    Count the GPUs of a run.

    Jobs of SLURM may see others than the host that submits them: there a GPU that is asked for by
    name is taken to be one for each job, which looks for it.

    Raises
    ------
    ValueError
        If a GPU of this machine is named and there is none, or not so many.
    """
    name = read_plugin_file(settings.plugin_file)["plugin"] if settings.plugin_file else ""
    if name in _IN_JOBS and settings.device.startswith("cuda"):
        return 1
    return count_gpus(settings.device)


def choose_plugin(
    settings: Settings, progress: "Progress", *, use_gpu: bool, ends_early: bool = False
) -> dict[str, Any]:
    """
    Choose the plugin of a run, that of the plugin file if there is one, and its arguments.

    Parameters
    ----------
    settings : Settings
    progress : Progress
        Status callback.
    use_gpu : bool
        Whether GPUs are used, each by one node at a time.
    ends_early : bool
        Whether nodes of little memory go before the others.

    Returns
    -------
    dict
        ``plugin``, a name, and ``plugin_args``.
    """
    name, given = "MultiProc", {}
    if settings.plugin_file:
        name, given = read_plugin_file(settings.plugin_file).values()
    elif settings.nprocs == 1 and not ends_early:
        name = "Linear"
    defaults: dict[str, Any] = {"status_callback": progress}
    if name in _ON_THIS_MACHINE:
        n_gpus = count_gpus(settings.device) if use_gpu else 0
        defaults |= {
            "n_procs": settings.nprocs,
            "memory_gb": settings.mem_gb or available_memory_gb(),
            "n_gpu_procs": n_gpus,
            "gpus": gpu_names(settings.device, n_gpus),
            "raise_insufficient": False,
            "mp_context": "forkserver",
            "scheduler": "mem_thread" if ends_early else "tsort",
        }
    return {"plugin": name, "plugin_args": defaults | given}


def start_plugin(plugin: str, plugin_args: dict[str, Any]) -> dict[str, Any]:
    """
    Start a plugin; return what Nipype's ``Workflow.run`` takes.

    Raises
    ------
    ValueError
        If there is no such plugin, or a package that it needs is missing.
    """
    if plugin not in _OWN:
        if not hasattr(import_module("nipype.pipeline.plugins"), f"{plugin}Plugin"):
            raise ValueError(
                f"--use-plugin: there is no plugin {plugin!r}; there are {', '.join(_OWN)}, Linear"
            )
        return {"plugin": plugin, "plugin_args": plugin_args}
    module, _, name = _OWN[plugin].partition(":")
    try:
        return {"plugin": getattr(import_module(module), name)(plugin_args)}
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--use-plugin: {plugin} needs the package {error.name}: pip install 'm2m-bids[dask]'"
        ) from error
