import dataclasses
import json
import logging
import os
import tomllib
from pathlib import Path

import pytest

from m2m_bids import settings as module
from m2m_bids.settings import (
    DEFAULT_REFINE_STEPS,
    Settings,
    available_cpus,
    new_run_uuid,
    read_toml,
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    bids_dir = tmp_path / "bids"
    for name in ("sub-01", "derivatives/dti"):
        (bids_dir / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return {"bids_dir": bids_dir, "output_dir": tmp_path / "out"}


def test_defaults(folders, tmp_path):
    settings = Settings(**folders)
    assert settings.work_dir == tmp_path / "work"
    assert settings.modalities == ("pet", "fa")
    assert settings.refine == DEFAULT_REFINE_STEPS == 60
    assert settings.nprocs >= 1
    assert 1 <= settings.omp_nthreads <= settings.nprocs
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.refine = 1


def test_paths_become_absolute(folders, tmp_path):
    settings = Settings(
        bids_dir=Path("bids"),
        output_dir=Path("x/../out"),
        derivatives=(("dti", Path("bids/derivatives/dti")),),
    )
    assert settings.bids_dir == tmp_path / "bids"
    assert settings.output_dir == tmp_path / "out"
    assert settings.derivative_dirs == {"dti": tmp_path / "bids/derivatives/dti"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bids_dir": "none"}, "none is not a folder"),
        ({"output_dir": "bids"}, "is the BIDS folder .* or inside it"),
        ({"output_dir": "bids/derivatives/m2m"}, "is the BIDS folder .* or inside it"),
        ({"output_dir": "link/out"}, "is the BIDS folder .* or inside it"),
        ({"output_dir": "a_file"}, "output_dir: .* is a file"),
        ({"work_dir": "bids/work"}, "--work-dir: .* inside it"),
        ({"work_dir": "."}, "--work-dir: .* holds the BIDS or the output folder"),
        ({"work_dir": "out"}, "--work-dir: .* holds the BIDS or the output folder"),
        ({"work_dir": "a_file"}, "--work-dir: .* is a file"),
        ({"analysis_level": "cohort"}, "analysis level"),
        ({"participant_label": ("../x",)}, "--participant-label: '../x'"),
        ({"modalities": ("pet", "ct")}, "--modalities"),
        ({"modalities": ()}, "--modalities"),
        ({"transform": "affine"}, "--transform"),
        ({"output_spaces": ("T1w", "T1w:2mm")}, "--output-spaces"),
        ({"pet_reference": "mean"}, "--pet-reference: 'mean' must be auto, twa, sum or frame:N"),
        ({"pet_reference": "frame:-1"}, "--pet-reference"),
        ({"pet_reference": "frame:"}, "--pet-reference"),
        ({"network_size": "huge"}, "--network-size"),
        ({"precision": "float16"}, "--precision"),
        ({"max_steps": 0}, "--max-steps"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"aligned_share": 1.5}, "--aligned-share"),
        ({"grid_size": 96}, "--grid-size and --grid-spacing"),
        ({"grid_size": 96, "grid_spacing_mm": 0.0}, "--grid-size and --grid-spacing"),
        ({"run_name": "../x"}, "--run-name"),
        ({"device": "gpu"}, "--device: 'gpu' must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "--device"),
        ({"refine": -1}, "--refine: -1"),
        ({"nprocs": -1}, "--nprocs"),
        ({"mem_gb": 0.0}, "--mem"),
        ({"random_seed": 2**32}, "--random-seed"),
        ({"derivatives": (("dti", "none"),)}, "--derivatives: dti=.*none is not a folder"),
        ({"derivatives": (("raw", "other"),)}, "--derivatives: 'raw'"),
        ({"derivatives": (("d", "other"), ("d", "bids"))}, "--derivatives: 'd'"),
        ({"derivatives": (("a/b", "other"),)}, "--derivatives: 'a/b'"),
        ({"derivatives": (("d", "out"),)}, "holds the output"),
        ({"weights": "none"}, "--weights: .*none is not a folder"),
        ({"compare": (("mine", "none"),)}, "--compare mine: .*none is not a folder"),
        ({"compare": (("a b", "other"),)}, "--compare: 'a b'"),
        ({"compare": (("default", "other"),)}, "--compare: 'default'"),
        ({"compare": (("a", "other"), ("a", "bids"))}, "--compare: 'a'"),
        ({"suvr_region": "pons"}, "--suvr-region"),
        ({"pvc": "mg", "psf_fwhm_mm": (5.0,)}, "--pvc"),
        ({"pvc": "gtm"}, "--pvc gtm and --psf-fwhm: give both or none"),
        ({"psf_fwhm_mm": (5.0,)}, "--pvc none and --psf-fwhm: give both or none"),
        ({"pvc": "gtm", "psf_fwhm_mm": (5.0, 6.0)}, "--psf-fwhm: .* one or three widths"),
        ({"pvc": "gtm", "psf_fwhm_mm": (0.1,)}, "--psf-fwhm"),
        ({"smooth_fwhm_mm": (0.0,)}, "--smooth-fwhm: 0.0 mm must be"),
        ({"smooth_fwhm_mm": (6.0, 31.0)}, "--smooth-fwhm: 31.0 mm must be"),
        ({"suvr_mask": "x", "suvr_region": "brainstem"}, "--suvr-mask and --suvr-region"),
        ({"suvr_mask": "{subject}/x.nii"}, "--suvr-mask"),
        ({"suvr_mask": "{sub.x}"}, "--suvr-mask"),
        ({"no_t1w": "template"}, "--no-t1w: .*skip, register-to-template"),
        ({"brain_extraction": "bet"}, "--brain-extraction: .*auto, template, synthstrip, skip"),
        ({"brain_extraction": "synthstrip"}, "--brain-extraction synthstrip needs its weights"),
        ({"synthstrip_model": "none"}, "--synthstrip-model: .*none is not a file"),
        (
            {"brain_extraction": "skip", "synthstrip_model": "a_file"},
            "--brain-extraction skip and --synthstrip-model: give one of both",
        ),
        ({"rec_label": ("a_b",)}, "--rec-label: 'a_b' is no label"),
        ({"run_label": ("",)}, "--run-label: ''"),
        ({"subject_anatomical_reference": "unbiased"}, "--subject-anatomical-reference: "),
        ({"subjects_sessions_tsv": "none"}, "--subjects-sessions-tsv: .*none is not a file"),
        ({"bids_database_dir": "bids/db"}, "--bids-database-dir: .*in the dataset bids_dir="),
        ({"bids_database_dir": "link/db"}, "--bids-database-dir: .*in the dataset bids_dir="),
        ({"bids_database_dir": "other/x", "derivatives": (("q", "other"),)}, "dataset q="),
        ({"bids_database_dir": "a_file"}, "--bids-database-dir: .*a_file is a file"),
        ({"fs_subjects_dir": "other", "work_dir": "other/w"}, "--fs-subjects-dir: .*holds the"),
        ({"fs_subjects_dir": "none"}, "--fs-subjects-dir: .*none is not a folder"),
        ({"pairs": "other"}, "--pairs: .*other is not a file"),
        ({"n_pairs": 0}, "--n-pairs: 0"),
        ({"baseline_spacing_mm": 0.1}, "--baseline-spacing: 0.1 mm"),
        ({"bids_filter_file": "none"}, "--bids-filter-file: .*none is not a file"),
        ({"plugin_file": "none"}, "--use-plugin: .*none is not a file"),
        ({"run_uuid": "../../x"}, "run_uuid"),
    ],
)
def test_invalid_options(folders, tmp_path, change, message):
    (tmp_path / "a_file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(folders["bids_dir"])
    with pytest.raises(ValueError, match=message):
        Settings(**{**folders, **change})


@pytest.fixture
def unusual(folders, tmp_path):
    for name in ("weights", "other"):
        (tmp_path / name).mkdir()
    for name in ("filter.json", "plugin.yml", "old.toml", "pairs.tsv", "synthstrip.1.pt"):
        (tmp_path / name).touch()
    return Settings(
        **folders,
        participant_label=("01", "02"),
        session_label=("M000",),
        tracer_label=("18FFDG",),
        rec_label=("coregiso",),
        brain_extraction="synthstrip",
        synthstrip_model=tmp_path / "synthstrip.1.pt",
        run_label=("1", "2"),
        subjects_sessions_tsv=tmp_path / "pairs.tsv",
        subject_anatomical_reference="sessionwise",
        bids_database_dir=tmp_path / "database",
        modalities=("fa",),
        derivatives=(("other", tmp_path / "other"), ("with.dot", tmp_path / "bids/derivatives")),
        bids_filter_file=tmp_path / "filter.json",
        skip_bids_validation=True,
        work_dir=tmp_path / "w",
        clean_workdir=True,
        purge_workdir_on_success=True,
        nprocs=1003,
        omp_nthreads=1002,
        mem_gb=7.5,
        device="cuda:1",
        plugin_file=tmp_path / "plugin.yml",
        config_file=tmp_path / "old.toml",
        stop_on_first_crash=True,
        weights=tmp_path / "weights",
        refine=0,
        no_t1w="register-to-template",
        transform="rigid",
        output_spaces=("T1w", "MNI152NLin2009aSym:res-2"),
        templateflow_home=tmp_path / "archive",
        pet_reference="frame:3",
        hmc_off=True,
        random_seed=7,
        network="corrmlp",
        network_size="paper",
        grid_size=96,
        grid_spacing_mm=2.0,
        objective="mi",
        pre_aligned="10%",
        aligned_share=0.5,
        max_steps=9,
        validate_every=3,
        batch_size=4,
        learning_rate=1e-4,
        precision="float32",
        run_name="mine",
        resume=True,
        prepare_only=True,
        pairs=tmp_path / "pairs.tsv",
        n_pairs=3,
        methods=("rigid", "m2m"),
        compare=(("mine", tmp_path / "other"), ("with.dot", tmp_path / "weights")),
        networks_alone=True,
        fs_subjects_dir=tmp_path / "other",
        suvr_region="brainstem",
        pvc="rbv",
        psf_fwhm_mm=(5.0, 5.0, 6.5),
        smooth_fwhm_mm=(6.0, 8.0),
        baseline_spacing_mm=3.0,
        dry_run=True,
        write_graph=True,
        reports_only=True,
        verbose=2,
    )


def test_every_option_survives_toml(unusual):
    default = Settings(bids_dir=unusual.bids_dir, output_dir=unusual.output_dir)
    for item in dataclasses.fields(Settings):
        # A mask and the name of a region exclude each other.
        if item.name not in ("bids_dir", "output_dir", "analysis_level", "suvr_mask"):
            assert getattr(unusual, item.name) != getattr(default, item.name), item.name
    file = unusual.to_toml()
    assert file == unusual.output_dir / "logs" / f"config_{unusual.run_uuid}.toml"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert Settings.from_toml(file) == unusual


def test_one_width_of_a_settings_file_needs_no_list(folders, tmp_path):
    """As files had it while there was but one."""
    file = Settings(**folders, smooth_fwhm_mm=(8.0,)).to_toml(tmp_path / "a.toml")
    table = "smooth_fwhm_mm = [\n    8.0,\n]"
    assert table in file.read_text()
    file.write_text(file.read_text().replace(table, "smooth_fwhm_mm = 8.0"))
    assert Settings.from_toml(file).smooth_fwhm_mm == (8.0,)
    file.write_text(file.read_text().replace("smooth_fwhm_mm = 8.0", "smooth_fwhm_mm = [8, 6]"))
    assert [type(width) for width in Settings.from_toml(file).smooth_fwhm_mm] == [float, float]
    file.write_text(file.read_text().replace("= [8, 6]", '= "8"'))
    with pytest.raises(ValueError, match=r"smooth_fwhm_mm: .* is of the wrong type"):
        Settings.from_toml(file)


def test_masks_survive_toml(folders, tmp_path):
    settings = Settings(**folders, suvr_mask="masks/sub-{sub}_mask.nii.gz")
    assert Settings.from_toml(settings.to_toml(tmp_path / "a.toml")) == settings


def test_labels_of_freesurfer_are_a_dataset(folders, tmp_path):
    (tmp_path / "fs").mkdir()
    assert Settings(**folders).datasets == {"raw": folders["bids_dir"]}
    settings = Settings(**folders, fs_subjects_dir=tmp_path / "fs")
    assert settings.datasets["freesurfer"] == tmp_path / "fs"


def test_defaults_survive_toml(folders, tmp_path):
    settings = Settings(**folders)
    assert Settings.from_toml(settings.to_toml(tmp_path / "a.toml")) == settings


def test_overrides(unusual, tmp_path):
    again = Settings.from_toml(unusual.to_toml(), refine=5, output_dir=tmp_path / "new")
    assert (again.refine, again.output_dir) == (5, tmp_path / "new")
    assert again.participant_label == unusual.participant_label


def test_spaces_beside_the_grid_of_the_t1w(folders):
    given = ("T1w", "MNI152NLin2009aSym:res-2", "T1w:res-native", "T1w")
    found = Settings(**folders, output_spaces=given).further_spaces
    assert [str(space) for space in found] == ["MNI152NLin2009aSym:res-2", "T1w:res-native"]
    assert Settings(**folders).further_spaces == []


def test_the_archive_of_templates_is_where_the_environment_says(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "tf"))
    assert Settings(**folders).templateflow_home == tmp_path / "tf"
    monkeypatch.delenv("TEMPLATEFLOW_HOME")
    assert Settings(**folders).templateflow_home == Path("~/.cache/templateflow").expanduser()


def test_unknown_options_are_named(folders, tmp_path, caplog):
    file = Settings(**folders).to_toml(tmp_path / "a.toml")
    file.write_text(file.read_text().replace("[settings]", "[settings]\nfrobnicate = 3"))
    with caplog.at_level(logging.WARNING):
        assert "frobnicate" not in read_toml(file)
    assert "frobnicate" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "cannot be read as TOML"),
        ("a = 1", "no settings of m2m-bids"),
        ("schema_version = 99\n[settings]\n", "schema version 99"),
        ("schema_version = 1\n[settings]\nrefine = '5'\n", "option refine: '5'"),
        ("schema_version = 1\n[settings]\nrefine = true\n", "option refine: True"),
        ("schema_version = 1\n[settings]\nmodalities = 'pet'\n", "option modalities"),
        ("schema_version = 1\n[settings]\nderivatives = ['a']\n", "option derivatives"),
        ("schema_version = 1\n[settings]\nderivatives = {a = 1}\n", "option derivatives"),
        ("schema_version = 1\n[settings]\nweights = 1\n", "option weights"),
        ("schema_version = 1\n[settings]\ncompare = 'a=b'\n", "option compare"),
        ("schema_version = 1\n[settings]\nmethods = 'rigid'\n", "option methods"),
        ("schema_version = 1\n[settings]\nn_pairs = '5'\n", "option n_pairs"),
    ],
)
def test_bad_settings_files(tmp_path, text, message):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_toml(file)


def test_missing_settings_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml"):
        read_toml(tmp_path / "none.toml")


def test_the_schema_version_is_saved(folders, tmp_path):
    file = Settings(**folders).to_toml(tmp_path / "a.toml")
    assert tomllib.loads(file.read_text())["schema_version"] == module.SCHEMA_VERSION


def test_run_uuid():
    first, second = new_run_uuid(), new_run_uuid()
    assert first != second
    assert module._RUN_UUID.fullmatch(first)


def test_takes_the_nested_derivatives_unless_some_are_named(tmp_path):
    bids_dir = tmp_path / "bids"
    for name in ("dti", "m2m-old", "sourceless"):
        (bids_dir / "derivatives" / name).mkdir(parents=True)
    for name in ("dti", "m2m-old"):
        (bids_dir / "derivatives" / name / "sub-01").mkdir()
    own = {"GeneratedBy": [{"Name": "m2m-bids"}]}
    (bids_dir / "derivatives" / "m2m-old" / "dataset_description.json").write_text(json.dumps(own))
    options = {"bids_dir": bids_dir, "output_dir": tmp_path / "out", "work_dir": tmp_path / "work"}
    nested = bids_dir / "derivatives" / "dti"
    assert Settings(**options).derivative_dirs == {"dti": nested}
    other = tmp_path / "other"
    other.mkdir()
    assert Settings(**options, derivatives=(("fa", other),)).derivative_dirs == {"fa": other}


@pytest.mark.parametrize(("share", "expected"), [("1", 1), ("100000", 3), ("", 3), (None, 3)])
def test_processors_of_a_job(monkeypatch, share, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if share is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", share)
    assert available_cpus() == expected


def test_cores_of_a_job_without_a_number_for_its_tasks(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert available_cpus() == 1
