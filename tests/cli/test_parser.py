import json
import re
import subprocess
import sys

import pytest

from m2m_bids import __version__
from m2m_bids.cli.parser import build_parser, parse_args
from m2m_bids.cli.plugins import read_plugin_file
from m2m_bids.settings import Settings, available_cpus


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Parse arguments after ``bids out participant``, in a folder that has both."""
    (tmp_path / "bids/derivatives/dti").mkdir(parents=True)
    (tmp_path / "qsirecon").mkdir()
    monkeypatch.chdir(tmp_path)
    return lambda *options: parse_args(["bids", "out", "participant", *options])


def test_no_option_gives_the_defaults(call, tmp_path):
    settings = call()
    expected = Settings(
        bids_dir=tmp_path / "bids", output_dir=tmp_path / "out", run_uuid=settings.run_uuid
    )
    assert settings == expected
    assert settings.nprocs == available_cpus()


@pytest.mark.parametrize("separator", ["-", "_"])
def test_labels(call, separator):
    settings = call(
        f"--participant{separator}label", "sub-01", "02", "sub-01",
        f"--session{separator}label", "ses-M000", "bl",
        f"--tracer{separator}label=trc-18FFDG",
    )  # fmt: skip
    assert settings.participant_label == ("01", "02")
    assert settings.session_label == ("M000", "bl")
    assert settings.tracer_label == ("18FFDG",)


def test_values_keep_their_underscores(call, tmp_path):
    (tmp_path / "my_weights").mkdir()
    assert call("--weights=my_weights").weights == tmp_path / "my_weights"


def test_weights_of_the_package_have_a_name(call):
    assert (call("--weights", "default").weights / "card.json").is_file()


def test_synthstrip_comes_with_its_model(call, tmp_path):
    (tmp_path / "synthstrip.1.pt").touch()
    settings = call("--brain-extraction", "synthstrip", "--synthstrip-model", "synthstrip.1.pt")
    assert settings.brain_extraction == "synthstrip"
    assert settings.synthstrip_model == tmp_path / "synthstrip.1.pt"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--session-id", "ses-1"], "session_label", ("1",)),
        (["--rec-label", "rec-coregiso", "acdyn"], "rec_label", ("coregiso", "acdyn")),
        (["--no-t1w", "register-to-template"], "no_t1w", "register-to-template"),
        (["--brain-extraction", "skip"], "brain_extraction", "skip"),
        (["--run_label", "run-1"], "run_label", ("1",)),
        (
            ["--subject-anatomical-reference", "first-lex"],
            "subject_anatomical_reference",
            "first-lex",
        ),
        (["--n_cpus", "3"], "nprocs", 3),
        (["--nthreads", "3"], "nprocs", 3),
        (["--omp_nthreads", "2"], "omp_nthreads", 2),
        (["--mem", "4000"], "mem_gb", 4.0),
        (["--mem-mb", "4000"], "mem_gb", 4.0),
        (["--mem_mb", "4000"], "mem_gb", 4.0),
        (["--mem", "6G"], "mem_gb", 6.0),
        (["--mem", "1T"], "mem_gb", 1000.0),
        (["--mem", "2000000K"], "mem_gb", 2.0),
        (["--modalities", "fa"], "modalities", ("fa",)),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--transform", "rigid"], "transform", "rigid"),
        (["--refine", "0"], "refine", 0),
        (["--random-seed", "5"], "random_seed", 5),
        (["--pet-reference", "frame:2"], "pet_reference", "frame:2"),
        (["--hmc-off"], "hmc_off", True),
        (["--stop_on_first_crash"], "stop_on_first_crash", True),
        (["--skip_bids_validation"], "skip_bids_validation", True),
        (["--clean-workdir"], "clean_workdir", True),
        (["--purge-workdir-on-success"], "purge_workdir_on_success", True),
        (["--dry-run"], "dry_run", True),
        (["--write-graph"], "write_graph", True),
        (["--reports-only"], "reports_only", True),
        (["-vv"], "verbose", 2),
        (["--n_pairs", "3"], "n_pairs", 3),
        (["--networks-alone"], "networks_alone", True),
        (["--baseline-spacing", "3"], "baseline_spacing_mm", 3.0),
        (["--suvr-region", "brainstem"], "suvr_region", "brainstem"),
        (["--suvr_mask", "m/sub-{sub}.nii"], "suvr_mask", "m/sub-{sub}.nii"),
        (["--pvc", "rbv", "--psf-fwhm", "6"], "psf_fwhm_mm", (6.0,)),
        (["--psf-fwhm", "5", "5", "6.5", "--pvc", "gtm"], "psf_fwhm_mm", (5.0, 5.0, 6.5)),
        (["--smooth-fwhm", "8"], "smooth_fwhm_mm", (8.0,)),
        (["--smooth-fwhm", "6", "8", "6"], "smooth_fwhm_mm", (6.0, 8.0)),
        (["--smooth-fwhm", "6", "--smooth-fwhm", "8"], "smooth_fwhm_mm", (6.0, 8.0)),
        (
            ["--methods", "rigid", "syn-mi", "--methods", "m2m"],
            "methods",
            ("rigid", "syn-mi", "m2m"),
        ),
    ],
)
def test_options(call, options, name, value):
    assert getattr(call(*options), name) == value


def test_notrack_changes_nothing(call):
    assert call("--notrack").to_toml  # accepted


def test_derivatives(call, tmp_path):
    settings = call("-d", "fa=bids/derivatives/dti", "qsirecon", "-d", "x=bids/derivatives")
    assert settings.derivative_dirs == {
        "fa": tmp_path / "bids/derivatives/dti",
        "qsirecon": tmp_path / "qsirecon",
        "x": tmp_path / "bids/derivatives",
    }


def test_evaluation(call, tmp_path):
    (tmp_path / "pairs.tsv").touch()
    settings = call(
        "--pairs", "pairs.tsv", "--compare", "a=qsirecon", "b=bids", "--compare", "c=qsirecon",
        "--fs-subjects-dir", "qsirecon",
    )  # fmt: skip
    assert settings.pairs == tmp_path / "pairs.tsv"
    assert dict(settings.compare) == {
        "a": tmp_path / "qsirecon", "b": tmp_path / "bids", "c": tmp_path / "qsirecon",
    }  # fmt: skip
    assert settings.fs_subjects_dir == tmp_path / "qsirecon"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--participant-label", "a_b"], "is no label"),
        (["--mem", "much"], "amount of memory"),
        (["--mem", "0"], "--mem"),
        (["--pvc", "mg"], "invalid choice"),
        (["--pvc", "gtm"], "--pvc gtm and --psf-fwhm: give both"),
        (["--refine", "-3"], "'-3' is no whole number that is at least 0"),
        (["--nprocs", "0"], "at least 1"),
        (["--modalities", "ct"], "invalid choice"),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["-d", "=x"], "expected NAME=PATH"),
        (["-d", "dti=none"], "none is not a folder"),
        (["--weights", "none"], "none is not a folder"),
        (["--compare", "qsirecon"], "'qsirecon': expected NAME=PATH"),
        (["--compare", "mine=none"], "--compare mine: "),
        (["--pairs", "none.tsv"], "none.tsv is not a file"),
        (["--n-pairs", "0"], "at least 1"),
        (["--work-dir", "bids/work"], "inside it"),
        (["--config-file", "none.toml"], "none.toml"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--participant", "01"], "unrecognized arguments"),
    ],
)
def test_errors_are_one_line(call, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        call(*options)
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("m2m-bids: error: ")


def test_unknown_level(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args([str(tmp_path), str(tmp_path / "out"), "participants"])
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert "invalid choice: 'participants' (choose from" in text
    assert "group" in text


def test_output_inside_input(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args([str(tmp_path), str(tmp_path / "derivatives/m2m"), "participant"])
    assert "Inputs are never written to" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out.strip() == f"m2m-bids {__version__}"


def test_help_is_grouped_and_complete():
    text = build_parser().format_help()
    for group in (
        "which scans",
        "registration",
        "training (level 'train')",
        "evaluation (level 'evaluate')",
        "performance",
        "running",
        "information",
    ):
        assert f"\n{group}:" in text
    options = """
        --participant-label --session-label --tracer-label --modalities --derivatives
        --bids-filter-file --skip-bids-validation --work-dir --clean-workdir --nprocs
        --purge-workdir-on-success
        --omp-nthreads --mem --device --use-plugin --config-file --stop-on-first-crash
        --weights --refine --transform --random-seed --dry-run --write-graph --reports-only
        --notrack --version --modality --network --network-size --grid-size --grid-spacing
        --objective --pre-aligned --aligned-share --max-steps --validate-every --batch-size
        --learning-rate --precision --run-name --resume --prepare-only
        --suvr-region --suvr-mask --pvc --psf-fwhm --smooth-fwhm
        --pairs --n-pairs --methods --compare --networks-alone --fs-subjects-dir --baseline-spacing
    """
    assert set(options.split()) <= set(re.findall(r"--[a-z-]+", text))


class TestConfigFile:
    @pytest.fixture
    def saved(self, call):
        options = [
            "--participant-label",
            "01",
            "--refine",
            "7",
            "--device",
            "cpu",
            "-d",
            "qsirecon",
        ]
        once = ["--dry-run", "--write-graph", "--clean-workdir", "-v"]
        settings = call(*options, *once)
        return settings, settings.to_toml()

    def test_options_come_back_and_actions_do_not(self, call, saved):
        old, file = saved
        new = call("--config-file", str(file))
        assert (new.refine, new.device, new.participant_label) == (7, "cpu", ("01",))
        assert new.derivatives == old.derivatives
        assert new.run_uuid != old.run_uuid
        assert new.config_file == file
        once = (new.dry_run, new.write_graph, new.clean_workdir, new.verbose)
        assert once == (False, False, False, 0)

    def test_given_options_win(self, call, saved, tmp_path):
        _, file = saved
        new = call("--config-file", str(file), "--participant-label", "02", "--refine", "1")
        assert (new.refine, new.participant_label) == (1, ("02",))
        (tmp_path / "other").mkdir()
        moved = parse_args(["other", "o2", "participant", "--config-file", str(file)])
        assert (moved.bids_dir, moved.output_dir) == (tmp_path / "other", tmp_path / "o2")

    def test_broken_file(self, call, saved, capsys):
        _, file = saved
        file.write_text("refine = ")
        with pytest.raises(SystemExit):
            call("--config-file", str(file))
        assert "cannot be read as TOML" in capsys.readouterr().err


class TestPlugin:
    def test_plugin(self, call, tmp_path):
        file = tmp_path / "plugin.yml"
        file.write_text("plugin: MultiProc\nplugin_args: {n_procs: 2}\n")
        settings = call("--nipype-plugin-file", "plugin.yml")
        assert settings.plugin_file == file
        expected = {"plugin": "MultiProc", "plugin_args": {"n_procs": 2}}
        assert read_plugin_file(file) == expected
        file.write_text("plugin: Linear\n")
        assert read_plugin_file(file) == {"plugin": "Linear", "plugin_args": {}}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("plugin: [", "cannot be read as YAML"),
            ("!!python/object/apply:os.system ['touch pwned']", "cannot be read as YAML"),
            ("plugin: !!bool x", "cannot be read as YAML"),
            ("plugin: !!timestamp 9999-99-99", "cannot be read as YAML"),
            ("[" * 3000, "cannot be read as YAML"),
            ("n_procs: 2", "expected 'plugin: NAME'"),
            ("[1]", "expected 'plugin: NAME'"),
            ("plugin: Linear\nargs: {}", "unknown keys ['args']"),
            ("plugin: Linear\nplugin_args: 3", "plugin_args must be a table"),
        ],
    )
    def test_bad_plugin_files(self, call, tmp_path, capsys, text, message):
        (tmp_path / "plugin.yml").write_text(text)
        with pytest.raises(SystemExit) as error:
            call("--use-plugin", "plugin.yml")
        assert error.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "pwned").exists()


def test_parser_imports_nothing_heavy():
    code = (
        "import sys, json, m2m_bids.cli.parser;"
        "heavy = {'bids', 'torch', 'nipype', 'nibabel', 'numpy', 'ants', 'yaml', 'pandas'};"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(result.stdout) == []
