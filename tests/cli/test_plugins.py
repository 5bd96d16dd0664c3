"""The plugin of a run and its arguments; reading plugin files is in test_parser."""

import os

import pytest

from m2m_bids.cli import environment, plugins
from m2m_bids.cli.plugins import choose_plugin, count_run_gpus, start_plugin
from m2m_bids.settings import Settings


@pytest.fixture
def settings(tmp_path, monkeypatch):
    (tmp_path / "bids").mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(plugin=None, **changes):
        if plugin is not None:
            changes["plugin_file"] = tmp_path / "plugin.yml"
            changes["plugin_file"].write_text(plugin)
        return Settings(
            bids_dir=tmp_path / "bids",
            output_dir=tmp_path / "out",
            work_dir=tmp_path / "work",
            **changes,
        )

    return make


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that PyTorch sees some GPUs."""
    return lambda number: monkeypatch.setattr(
        environment, "GPU_COUNT_CODE", f"print({number})  # pretended"
    )


def test_one_process(settings):
    chosen = choose_plugin(settings(nprocs=1), print, use_gpu=False)
    assert chosen == {"plugin": "Linear", "plugin_args": {"status_callback": print}}
    early = choose_plugin(settings(nprocs=1), print, use_gpu=False, ends_early=True)
    assert early["plugin"] == "MultiProc"
    assert early["plugin_args"].items() >= {"n_procs": 1, "scheduler": "mem_thread"}.items()


def test_several_processes(settings):
    chosen = choose_plugin(settings(nprocs=3, mem_gb=7.5), print, use_gpu=False)
    assert chosen == {
        "plugin": "MultiProc",
        "plugin_args": {
            "status_callback": print,
            "n_procs": 3,
            "memory_gb": 7.5,
            "n_gpu_procs": 0,
            "gpus": (),
            "raise_insufficient": False,
            "mp_context": "forkserver",
            "scheduler": "tsort",
        },
    }


def test_every_gpu_is_a_slot(settings, gpus):
    gpus(4)
    chosen = choose_plugin(settings(nprocs=8), print, use_gpu=True)["plugin_args"]
    assert (chosen["n_gpu_procs"], chosen["gpus"]) == (4, ("0", "1", "2", "3"))
    named = choose_plugin(settings(nprocs=8, device="cuda:2"), print, use_gpu=True)["plugin_args"]
    assert (named["n_gpu_procs"], named["gpus"]) == (1, ("0,1,2",))


@pytest.mark.parametrize("plugin", ["SLURM", "SLURMGraph"])
def test_gpus_of_jobs_are_not_looked_for_where_they_are_submitted(settings, gpus, plugin):
    gpus(0)
    file = f"plugin: {plugin}"
    assert count_run_gpus(settings(file, device="cuda")) == 1
    assert [count_run_gpus(settings(file, device=device)) for device in ("auto", "cpu")] == [0, 0]
    with pytest.raises(ValueError, match="PyTorch sees 0 GPUs here"):
        count_run_gpus(settings("plugin: MultiProc", device="cuda"))


def test_plugin_file_goes_first(settings):
    chosen = choose_plugin(
        settings("plugin: MultiProc\nplugin_args: {n_procs: 2}\n", nprocs=8), print, use_gpu=False
    )["plugin_args"]
    assert (chosen["n_procs"], chosen["mp_context"]) == (2, "forkserver")
    batch = choose_plugin(
        settings("plugin: SLURM\nplugin_args: {sbatch_args: --time=5}"), print, use_gpu=False
    )
    assert batch == {
        "plugin": "SLURM",
        "plugin_args": {"sbatch_args": "--time=5", "status_callback": print},
    }


def test_plugins_start():
    own = start_plugin("SLURM", {"sbatch_args": "--time=5"})["plugin"]
    assert type(own).__module__ == "m2m_bids.cli.slurm"
    assert start_plugin("Linear", {}) == {"plugin": "Linear", "plugin_args": {}}


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no plugin 'Slurm'; there are MultiProc, Dask, SLURM"):
        start_plugin("Slurm", {})
    monkeypatch.setitem(plugins._OWN, "Dask", "a_package_that_is_not_there:DaskPlugin")
    with pytest.raises(ValueError, match=r"needs the package a_package_that_is_not_there: pip"):
        start_plugin("Dask", {})


@pytest.mark.parametrize(
    ("visible", "device", "n_gpus", "expected"),
    [
        (None, "auto", 2, ("0", "1")),
        ("3,5", "auto", 2, ("3", "5")),
        ("GPU-aa,GPU-bb", "cuda", 2, ("GPU-aa", "GPU-bb")),
        ("3,5", "cuda:1", 1, ("3,5",)),
        (None, "cuda:1", 1, ("0,1",)),
        ("3,5", "cpu", 0, ()),
    ],
)
def test_gpu_names(monkeypatch, visible, device, n_gpus, expected):
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    assert environment.gpu_names(device, n_gpus) == expected
