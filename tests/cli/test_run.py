"""The command line in this process, with the workflow's run replaced; see also test_end_to_end."""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import signal

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.bids.locks import locked
from m2m_bids.bids.naming import expected_anat_outputs, expected_outputs, quantification_outputs
from m2m_bids.bids.query import query
from m2m_bids.bids.request import MADE_FROM_FIELD
from m2m_bids.bids.status import read_status
from m2m_bids.cli import run as module
from m2m_bids.cli.progress import Progress
from m2m_bids.registration.weights import CARD_NAME, TENSORS_NAME, read_card
from m2m_bids.settings import Settings
from m2m_bids.workflows.base import scan_request
from m2m_bids.workflows.cohort import EvaluationImages
from m2m_bids.workflows.registration import RegistrationOptions

SHA256 = read_card(DEFAULT_WEIGHTS).sha256


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """A run sets variables for its process; this one goes on."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bids_dir(tmp_path):
    """Two PET scans and one FA map, of two subjects; the files are empty."""
    root = tmp_path / "bids"
    for name in (
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/pet/sub-1_trc-FDG_pet.nii.gz",
        "sub-1/pet/sub-1_trc-AV45_pet.nii.gz",
        "sub-2/anat/sub-2_T1w.nii.gz",
        "sub-2/dwi/sub-2_FA.nii.gz",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("image")
    content = {"Name": "Test", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def weights(tmp_path):
    shutil.copytree(DEFAULT_WEIGHTS, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def main(bids_dir, tmp_path, capsys, monkeypatch):
    """Call the command line; return exit code, standard output and error, and scans run."""

    def call(*options, out="out"):
        started = []

        def run_workflow(settings, scans, registration):
            started.extend(scan.name for scan in scans)
            return Progress()

        monkeypatch.setattr(module, "run_workflow", run_workflow)
        arguments = [bids_dir, tmp_path / out, "participant", "--skip-bids-validation", *options]
        if "--device" not in options:
            arguments += ["--device", "cpu"]
        try:
            code = module.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err, started

    return call


def scans_of(bids_dir):
    return {scan.name: scan for scan in query(bids_dir)}


@pytest.fixture
def finish(fill):
    """Write what a finished scan consists of."""

    def write(scan, out_dir, transform="m2m", **fields):
        outputs = expected_outputs(scan, out_dir, transform)
        anatomical = expected_anat_outputs(scan.t1w_entities, out_dir) if scan.t1w else {}
        measured = quantification_outputs(scan, out_dir, "tissues")
        tables = [measured[key] for key in ("stat", "tacs") if key in measured]
        fill(*outputs.values(), *anatomical.values(), *tables)
        bids_dir = out_dir.parent / "bids"
        settings = Settings(
            bids_dir=bids_dir, output_dir=out_dir, work_dir=out_dir.parent / "work"
        )
        request = scan_request(scan, settings, options(n_refine=60, random_seed=0))
        # Scans of one frame do not depend on how frames are used.
        made_from = {key: value for key, value in request.registration.items() if key != "Frames"}
        content = {"Transform": transform, MADE_FROM_FIELD: made_from, **fields}
        outputs["preproc_json"].write_text(json.dumps(content))
        content = {MADE_FROM_FIELD: request.quantification}
        measured["stat_json"].write_text(json.dumps(content))

    return write


def options(**changes):
    given = {
        "transform": "m2m",
        "weights": DEFAULT_WEIGHTS,
        "weights_sha256": SHA256,
        "n_refine": 7,
        "device": "cpu",
        "use_gpu": False,
        "random_seed": 5,
        "omp_nthreads": 2,
    }
    return RegistrationOptions(**{**given, **changes})


# --- nothing can be started ------------------------------------------------------------------


def change_card(folder, **changes):
    file = folder / CARD_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / CARD_NAME).unlink(), [CARD_NAME]),
        (lambda folder: (folder / TENSORS_NAME).unlink(), [TENSORS_NAME]),
        (lambda folder: (folder / CARD_NAME).write_text("no JSON"), [CARD_NAME, "not a weights"]),
        (lambda folder: change_card(folder, sha256="0" * 64), [TENSORS_NAME, "SHA-256", "0" * 64]),
        (lambda folder: change_card(folder, modalities=["fa"]), ["for fa, not for pet"]),
        (lambda folder: (folder / TENSORS_NAME).write_bytes(b"x"), [TENSORS_NAME, "SHA-256"]),
    ],
    ids=["no card", "no tensors", "card is text", "wrong hash", "other modality", "damaged"],
)
def test_unusable_weights(main, weights, tmp_path, spoil, words):
    spoil(weights)
    code, out, err, started = main("--weights", weights)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert all(word in err for word in (str(weights), *words))
    assert (out, started) == ("", [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--participant-label", "7"], ["no participant 7", "1, 2"]),
        (["--tracer-label", "PIB"], ["PIB", "FDG"]),
        (["--weights", "absent"], ["--weights", "absent"]),
        (["--device", "gpu"], ["--device", "gpu"]),
        (["--device", "cuda:63"], ["--device cuda:63", "--nv"]),
        (
            ["--synthstrip-model", "bids/dataset_description.json"],
            ["dataset_description.json", "SynthStrip"],
        ),
        (["-w", "bids/work"], ["--work-dir", "bids/work"]),
        (["--config-file", "bids/dataset_description.json"], ["--config-file"]),
    ],
)
def test_unusable_argument(main, tmp_path, options, words):
    code, out, err, started = main(*options)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)
    assert (out, started) == ("", [])
    assert not (tmp_path / "out").exists()


def test_output_inside_the_bids_folder(main, bids_dir):
    before = sorted(bids_dir.rglob("*"))
    code, _, err, _ = main(out="bids/derivatives/m2m-bids")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "output_dir" in err
    assert sorted(bids_dir.rglob("*")) == before


def test_output_of_another_application(main, tmp_path):
    (tmp_path / "out").mkdir()
    other = {"Name": "fMRIPrep", "GeneratedBy": [{"Name": "fMRIPrep"}]}
    (tmp_path / "out/dataset_description.json").write_text(json.dumps(other))
    code, _, err, started = main()
    assert (code, started) == (2, [])
    assert "made by fMRIPrep" in err.splitlines()[-1]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["dataset_description.json"]


# --- what is run -----------------------------------------------------------------------------


def test_only_what_is_missing_is_run(main, bids_dir, tmp_path, finish):
    scans = scans_of(bids_dir)
    code, out, _, started = main()
    assert sorted(started) == sorted(scans)
    assert code == 1
    assert out.startswith("3 failed\n")
    for name in ("sub-1_trc-FDG_pet", "sub-2_param-FA_dwimap"):
        finish(scans[name], tmp_path / "out")
    code, out, _, started = main()
    assert started == ["sub-1_trc-AV45_pet"]
    finish(scans["sub-1_trc-AV45_pet"], tmp_path / "out", "rigid", TransformFallbackReason="folds")
    code, out, _, started = main()
    assert started == []
    assert code == 0
    assert "2 done, 1 rigid only" in out
    assert "rigid only: sub-1_trc-AV45_pet: folds" in out


@pytest.mark.parametrize(
    "options",
    [
        ["--refine", "5"],
        ["--transform", "rigid"],
        ["--weights", "other"],
        ["--smooth-fwhm", "8"],
        ["--random-seed", "1"],
        ["--brain-extraction", "skip"],
        ["--pvc", "gtm", "--psf-fwhm", "6"],
        ["--suvr-region", "brainstem"],
        ["--output-spaces", "T1w:res-native"],
    ],
    ids=lambda options: options[0],
)
def test_other_results_are_run_anew(main, bids_dir, tmp_path, weights, options, finish):
    scan = scans_of(bids_dir)["sub-1_trc-FDG_pet"]
    finish(scan, tmp_path / "out")
    if "--weights" in options:
        weights.rename(tmp_path / "other")
        data = (tmp_path / "other" / TENSORS_NAME).read_bytes() + b" "
        (tmp_path / "other" / TENSORS_NAME).write_bytes(data)
        change_card(tmp_path / "other", sha256=hashlib.sha256(data).hexdigest())
    assert scan.name not in main()[3]
    assert scan.name in main(*options)[3]


def test_other_sources_are_run_anew(main, bids_dir, tmp_path, caplog, finish):
    """A file that was replaced, a map computed elsewhere, anatomy of another program, metadata."""
    pet, fa = (scans_of(bids_dir)[name] for name in ("sub-1_trc-FDG_pet", "sub-2_param-FA_dwimap"))
    for scan in (pet, fa):
        finish(scan, tmp_path / "out")
    assert not {pet.name, fa.name} & set(main()[3])
    original = pet.file.read_text()
    pet.file.write_text(f"{original} longer")
    with caplog.at_level("INFO"):
        assert pet.name in main()[3]
    assert f"{pet.name} is made anew: changed is Files" in caplog.text
    pet.file.write_text(original)
    # Another file of the same size counts, another time of the same file does not.
    fa.file.write_text("old")
    finish(fa, tmp_path / "out")
    os.utime(fa.file, (1, 1))
    assert fa.name not in main()[3]
    fa.file.write_text("new")
    assert fa.name in main()[3]
    fa.file.write_text(original)
    finish(fa, tmp_path / "out")
    dti = tmp_path / "dti/sub-2/dwi/sub-2_param-FA_dwimap.nii.gz"
    dti.parent.mkdir(parents=True)
    dti.write_text("image")
    started = main("-d", f"dti={tmp_path / 'dti'}")[3]
    assert fa.name in started
    assert pet.name not in started
    prepared = tmp_path / "fmriprep/sub-1/anat/sub-1_desc-brain_mask.nii.gz"
    prepared.parent.mkdir(parents=True)
    image = nb.Nifti1Image(np.ones((2, 3, 4), np.uint8), np.eye(4))
    for file in (prepared, pet.t1w):
        image.to_filename(file)
    finish(pet, tmp_path / "out")
    assert pet.name not in main()[3]
    assert pet.name in main("-d", f"fmriprep={tmp_path / 'fmriprep'}")[3]
    sidecar = bids_dir / "sub-1/pet/sub-1_trc-FDG_pet.json"
    sidecar.write_text(json.dumps({"PatientWeight": 70}))
    assert pet.name in main()[3]
    finish(scans_of(bids_dir)[pet.name], tmp_path / "out")
    assert pet.name not in main()[3]


def test_scans_without_t1w_are_skipped_or_go_to_the_template(main, bids_dir, tmp_path, finish):
    for file in bids_dir.glob("sub-1/anat/*"):
        file.unlink()
    names = ["sub-1_trc-AV45_pet", "sub-1_trc-FDG_pet"]
    assert main()[3] == ["sub-2_param-FA_dwimap"]
    code, out, _, started = main("--no-t1w", "register-to-template")
    assert started == [*names, "sub-2_param-FA_dwimap"]
    scans = query(bids_dir, template="MNI152NLin2009aSym")
    for scan in scans:
        finish(scan, tmp_path / "out")
    code, out, _, started = main("--no-t1w", "register-to-template")
    assert (code, started) == (0, [])
    assert out.startswith("3 done\n")
    told = "no T1w image .* registered to the template MNI152NLin2009aSym instead"
    assert len(re.findall(rf"done: sub-1_trc-\w+_pet: {told}", out)) == 2
    rows = {row.scan: row for row in read_status(tmp_path / "out")}
    assert rows[names[0]].t1w == "n/a"
    assert re.search(told, rows[names[0]].reason)
    assert re.search(told, (tmp_path / "out/sub-1.html").read_text())
    # Without the option, they are left out again; nothing of theirs is taken for T1w results.
    assert main()[1].startswith("1 done, 2 skipped\n")


def test_template_is_for_the_level_participant(bids_dir, tmp_path, capsys):
    arguments = [bids_dir, tmp_path / "out", "train", "--modality", "pet", "--device", "cpu"]
    options = ["--no-t1w", "register-to-template"]
    assert module.main([str(argument) for argument in (*arguments, *options)]) == 2
    assert "only for the level participant" in capsys.readouterr().err


def test_rigid_run_needs_no_weights(main, tmp_path, monkeypatch):
    monkeypatch.setattr("m2m_bids.api.check_weights", None)
    code, _, _, started = main("--transform", "rigid")
    assert (code, len(started)) == (1, 3)


def test_settings_and_status_are_written(main, tmp_path):
    main("--participant-label", "1", "--refine", "7")
    (file,) = (tmp_path / "out/logs").glob("config_*.toml")
    settings = Settings.from_toml(file)
    assert (settings.refine, settings.participant_label) == (7, ("1",))
    rows = read_status(tmp_path / "out")
    assert {row.scan: row.status for row in rows} == {
        "sub-1_trc-AV45_pet": "failed",
        "sub-1_trc-FDG_pet": "failed",
    }


def test_a_template_that_is_not_there_is_told_at_once(main, tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "archive"))
    code, _, err, _ = main("--dry-run", "--output-spaces", "MNI152NLin2009cAsym:res-2")
    assert code == 2
    assert "TEMPLATEFLOW_HOME" in err
    assert "tpl-MNI152NLin2009cAsym_res-02_T1w.nii.gz is not there" in err
    assert main("--dry-run", "--output-spaces", "MNI152NLin2009aSym", "T1w:res-native")[0] == 0


def test_dry_run(main, tmp_path):
    code, out, _, started = main("--dry-run")
    assert (code, started) == (0, [])
    assert "would register 3 of 3 scans" in out
    assert f"{DEFAULT_WEIGHTS} (SHA-256 {SHA256[:12]}...)" in out
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()


def test_sessions_of_the_table_without_scans_are_listed(main, bids_dir, tmp_path):
    """Those that are absent, and those with a folder alone; until a scan is there."""
    for name in ("sub-3/ses-A/anat/sub-3_ses-A_T1w.nii", "sub-3/ses-A/pet/sub-3_ses-A_pet.nii"):
        (bids_dir / name).parent.mkdir(parents=True)
        (bids_dir / name).write_text("image")
    (bids_dir / "sub-3/ses-B").mkdir()
    table = tmp_path / "pairs.tsv"
    pairs = [("sub-3", "ses-A"), ("sub-3", "ses-B"), ("sub-3", "ses-C"), ("sub-4", "ses-A")]
    lines = ["participant_id\tsession_id", *("\t".join(pair) for pair in pairs)]
    table.write_text("\n".join(lines) + "\n")
    _, out, _, started = main("-tsv", table)
    assert started == ["sub-3_ses-A_pet"]
    assert "skipped: sub-4_ses-A: " in out
    rows = {row.scan: row for row in read_status(tmp_path / "out")}
    assert list(rows) == ["sub-3_ses-A_pet", "sub-3_ses-B", "sub-3_ses-C", "sub-4_ses-A"]
    for name, words in (("sub-3_ses-B", "no scan"), ("sub-4_ses-A", f"{bids_dir} has no such")):
        assert (rows[name].status, rows[name].modality) == ("skipped", "n/a")
        assert words in rows[name].reason
        assert str(table) in rows[name].reason
    (bids_dir / "sub-3/ses-B/pet").mkdir()
    (bids_dir / "sub-3/ses-B/pet/sub-3_ses-B_pet.nii").write_text("image")
    main("-tsv", table, "--participant-label", "3")
    names = [row.scan for row in read_status(tmp_path / "out")]
    assert names == ["sub-3_ses-A_pet", "sub-3_ses-B_pet", "sub-3_ses-C", "sub-4_ses-A"]


def test_reports_only_runs_nothing(main, tmp_path):
    code, _, _, started = main("--reports-only")
    assert (code, started) == (1, [])
    assert {file.name for file in (tmp_path / "out").glob("*.html")} == {
        "sub-1.html",
        "sub-2.html",
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--refine", "10"], "RefinementSteps"),
        (["--transform", "rigid"], "Transform"),
        (["--output-spaces", "MNI152NLin2009aSym:res-2"], "output space MNI152NLin2009aSym:res-2"),
        (["--smooth-fwhm", "8"], "SmoothingFullWidthHalfMaximum"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_reports_alone_make_no_finished_scan_a_failed_one(
    main, bids_dir, tmp_path, caplog, options, told, finish
):
    """They are of what is there, whatever options are given or forgotten."""
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
    main()
    table = tmp_path / "out/logs/status.tsv"
    timed = table.read_text().replace("done\tn/a\tn/a", "done\tn/a\t514.6")
    table.write_text(timed)
    caplog.clear()
    with caplog.at_level("INFO"):
        code, out, _, started = main("--reports-only", *options)
    assert (code, started) == (0, [])
    assert out.startswith("3 done\n")
    assert "made anew" not in caplog.text
    assert "to register" not in caplog.text
    for row in read_status(tmp_path / "out"):
        assert (row.status, row.seconds) == ("done", "514.6")
        assert row.reason.startswith("made with other options: ")
        assert told in row.reason
    assert "Failed" not in (tmp_path / "out/sub-1.html").read_text()
    # With the options of before, nothing is left of that.
    main("--reports-only")
    assert table.read_text() == timed


def test_reports_alone_leave_scans_that_are_left_out_now(main, bids_dir, tmp_path, finish):
    """Those that went to a template, where that option is forgotten."""
    (bids_dir / "sub-2/anat/sub-2_T1w.nii.gz").unlink()
    (scan,) = query(bids_dir, template="MNI152NLin2009aSym", modalities=("fa",))
    finish(scan, tmp_path / "out", LinearScore=0.6123)
    main("--no-t1w", "register-to-template")
    before = [row for row in read_status(tmp_path / "out") if row.scan == scan.name]
    assert before[0].status == "done"
    main("--reports-only")
    assert [row for row in read_status(tmp_path / "out") if row.scan == scan.name] == before
    table = tmp_path / "out/sub-2/figures/sub-2_desc-numbers_report.html"
    assert ">0.6123<" in table.read_text()


def test_reports_alone_take_another_t1w_for_another_option(main, bids_dir, tmp_path, finish):
    scan = scans_of(bids_dir)["sub-2_param-FA_dwimap"]
    finish(scan, tmp_path / "out")
    main()
    scan.t1w.rename(scan.t1w.with_name("sub-2_acq-fast_T1w.nii.gz"))
    main("--reports-only")
    (row,) = [row for row in read_status(tmp_path / "out") if row.scan == scan.name]
    assert (row.status, row.reason) == ("done", "made with other options: Files")


def test_reports_alone_tell_what_is_gone(main, bids_dir, tmp_path, finish):
    pet, fa = (scans_of(bids_dir)[name] for name in ("sub-1_trc-FDG_pet", "sub-2_param-FA_dwimap"))
    for scan in (pet, fa):
        finish(scan, tmp_path / "out")
    expected_outputs(pet, tmp_path / "out", "m2m")["preproc"].unlink()
    main("--reports-only")
    row = {row.scan: row for row in read_status(tmp_path / "out")}[pet.name]
    assert row.status == "failed"
    assert row.reason == "sub-1_trc-FDG_space-T1w_desc-preproc_pet.nii.gz is not there"


def test_report_of_a_few_scans_tells_of_the_others(main, bids_dir, tmp_path, finish):
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out", LinearScore=0.6123)
    main()
    main("--reports-only", "--tracer-label", "FDG")
    figures = tmp_path / "out/sub-1/figures"
    table = (figures / "sub-1_desc-numbers_report.html").read_text()
    assert re.findall(r"<td>(sub-1_trc-\w+_pet)</td><td>(\w+ [\w ]+)</td>", table) == [
        ("sub-1_trc-AV45_pet", "an earlier one"),
        ("sub-1_trc-FDG_pet", "this one"),
    ]
    assert table.count(">0.6123<") == 2
    assert table.count(">done<") == 2
    assert "sub-1_trc-AV45_pet:" in (figures / "sub-1_desc-summary_report.html").read_text()


def test_reasons_of_earlier_failures_stay(main, bids_dir, tmp_path):
    """Those that are not run again: in the table, in the report, with the crash file."""
    main()
    table = tmp_path / "out/logs/status.tsv"
    table.write_text(
        re.sub("failed\t[^\t]*", "failed\tImageError: T1w is torn", table.read_text())
    )
    log = tmp_path / "out/sub-1/log/20200101-000000_old"
    log.mkdir(parents=True)
    node = "m2m_bids_wf.sub_1_wf.sub_1_T1w_wf.conform_t1w"
    (log / "crash-1.txt").write_text(f"Node: {node}\n\nImageError: T1w is torn\n")
    for options in (["--reports-only"], ["--reports-only", "--tracer-label", "FDG"]):
        main(*options)
        rows = [row for row in read_status(tmp_path / "out") if row.modality == "pet"]
        assert [row.reason for row in rows] == ["ImageError: T1w is torn"] * 2
        page = (tmp_path / "out/sub-1.html").read_text()
        assert f"<summary>{node}</summary>" in page
        assert "sub-1_trc-AV45_pet failed: ImageError: T1w is torn" in page
        assert "No errors to report" not in page
    # Without a crash file too, what has failed is told.
    page = (tmp_path / "out/sub-2.html").read_text()
    assert "sub-2_param-FA_dwimap failed: " in page


def test_a_space_or_a_width_more_is_told(main, bids_dir, tmp_path, caplog, finish):
    scan = scans_of(bids_dir)["sub-1_trc-FDG_pet"]
    finish(scan, tmp_path / "out")
    with caplog.at_level("INFO"):
        assert scan.name in main("--output-spaces", "T1w:res-2", "--smooth-fwhm", "6", "8")[3]
    changed = "output space T1w:res-2, SmoothingFullWidthHalfMaximum"
    assert f"{scan.name} is made anew: changed is {changed}" in caplog.text


@pytest.mark.parametrize("part", [0, 0.5])
def test_an_output_that_is_cut_off_is_made_anew(main, bids_dir, tmp_path, part, finish, caplog):
    """As after a power cut; a scan that shares no such file is left alone."""
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
    assert main()[3] == []
    damaged = scans_of(bids_dir)["sub-1_trc-FDG_pet"]
    file = expected_outputs(damaged, tmp_path / "out", "m2m")["preproc"]
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    code, out, _, _ = main("--reports-only")
    assert code == 1
    assert f"{file.name} is damaged: run the scan again" in out
    assert main()[3] == [damaged.name]
    assert f"{damaged.name} is made anew: {file} is empty or cut off" in caplog.text


@pytest.mark.parametrize("content", ['{"a": ', "[]", '{"a": 1}', ""])
def test_a_damaged_sidecar_is_named_and_stops_nothing(main, bids_dir, tmp_path, content, finish):
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
    damaged = scans_of(bids_dir)["sub-1_trc-FDG_pet"]
    sidecar = expected_outputs(damaged, tmp_path / "out", "m2m")["preproc_json"]
    sidecar.write_text(content)
    code, out, _, _ = main("--reports-only")
    assert code == 1
    assert out.startswith("2 done, 1 failed\n")
    assert f"{sidecar.name} is damaged: run the scan again" in out
    assert (tmp_path / "out/sub-2.html").is_file()
    # Which is what the same command does without the option.
    assert main()[3] == [damaged.name]


@pytest.mark.parametrize(
    ("name", "value"),
    [("warnings", 5), ("warnings", [5]), ("noise_percent", "much"), ("noise_percent", 10**400)],
    ids=["no list", "no texts", "no number", "huge"],
)
def test_damaged_numbers_stop_no_report(main, bids_dir, tmp_path, name, value, finish):
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
        numbers = expected_outputs(scan, tmp_path / "out", "m2m")["qc_json"]
        numbers.write_text(json.dumps({name: value}))
    assert main("--reports-only")[:2][0] == 0
    assert len(list((tmp_path / "out").glob("sub-*.html"))) == 2


def test_one_report_that_cannot_be_written_does_not_stop_the_others(
    main, bids_dir, tmp_path, caplog, finish
):
    for scan in scans_of(bids_dir).values():
        score = "high" if scan.subject == "1" else 0.6
        finish(scan, tmp_path / "out", LinearScore=score)
    code, out, _, _ = main("--reports-only")
    assert code == 0
    assert "sub-2.html" in out
    assert "sub-1.html" not in out
    assert f"{tmp_path / 'out/sub-1.html'} was not written" in caplog.text


def test_work_folder_is_emptied_if_asked_for(main, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/old").touch()
    main()
    assert (tmp_path / "work/old").exists()
    main("--clean-workdir")
    assert not (tmp_path / "work/old").exists()


def test_no_graph_of_nothing(main, bids_dir, tmp_path, caplog, finish):
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
    assert main("--write-graph")[0] == 0
    assert "no graph was written" in caplog.text


# --- parts -----------------------------------------------------------------------------------


@pytest.fixture
def settings(bids_dir, tmp_path):
    def make(**changes):
        given = {"output_dir": tmp_path / "out", "work_dir": tmp_path / "work"}
        return Settings(bids_dir=bids_dir, **{**given, **changes})

    return make


def fake_validator(tmp_path, monkeypatch, code):
    """Put a validator beside a make-believe interpreter."""
    program = tmp_path / "bin/bids-validator-deno"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "bin/python"))


@pytest.mark.parametrize(("code", "is_warned"), [(0, False), (16, True)])
def test_validator_is_advice(bids_dir, tmp_path, monkeypatch, caplog, code, is_warned):
    fake_validator(tmp_path, monkeypatch, code)
    module._validate(bids_dir)
    assert ("finds errors" in caplog.text) is is_warned


def test_validator_need_not_be_there(bids_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with caplog.at_level("INFO"):
        module._validate(bids_dir)
    assert "was not validated" in caplog.text


def test_failure_of_one_scan_is_told_to_all_that_need_it(
    main, bids_dir, tmp_path, monkeypatch, capsys, finish
):
    """A T1w that cannot be read fails both PET scans of its subject, with its reason."""

    def crash(settings, scans, registration):
        folder = settings.output_dir / "sub-1/log" / settings.run_uuid
        folder.mkdir(parents=True)
        node = "m2m_bids_wf.sub_1_wf.sub_1_T1w_wf.conform_t1w"
        text = f"Node: {node}\n\n\tm2m_bids.spatial.images.ImageError: T1w.nii.gz: torn\n"
        (folder / "crash-1.txt").write_text(text)
        finish(scans_of(bids_dir)["sub-2_param-FA_dwimap"], settings.output_dir)
        return Progress()

    monkeypatch.setattr(module, "run_workflow", crash)
    arguments = [str(bids_dir), str(tmp_path / "out"), "participant", "--skip-bids-validation"]
    assert module.main([*arguments, "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("1 done, 2 failed\n")
    assert len(re.findall(r"failed: sub-1_trc-\w+_pet: T1w.nii.gz: torn", out)) == 2
    assert "torn" in (tmp_path / "out/sub-1.html").read_text()


def test_crash_of_the_workflow_is_no_crash_of_the_app(settings, bids_dir, monkeypatch, caplog):
    """Nipype raises after a run for the nodes that failed."""

    def fail(self, **plugin):
        raise RuntimeError("2 raised.\nRe-raising first.")

    monkeypatch.setattr("niworkflows.engine.workflows.LiterateWorkflow.run", fail)
    monkeypatch.setattr(module, "configure_nipype", lambda settings: None)
    run = settings(write_graph=False)
    scans = list(scans_of(bids_dir).values())
    progress = module.run_workflow(run, scans, options())
    assert progress.seconds == {}
    assert "some steps failed: 2 raised." in caplog.text
    # What is cited is what was made; a cohort level has a text of its own.
    images = EvaluationImages(run.evaluation_dir / "scans")
    rigid = options(transform="rigid", weights=None, weights_sha256="", n_refine=0)
    module.run_workflow(run, scans, rigid, images)
    assert not list((run.output_dir / "logs").glob("CITATION*"))
    text = (run.evaluation_dir / "CITATION.md").read_text()
    assert text.count("#### Registration") == 1


# --- mistakes of the app ---------------------------------------------------------------------


def test_unexpected_errors_leave_their_traceback_in_a_file(main, monkeypatch, tmp_path):
    def fail(settings):
        raise KeyError("so\nmething\x1b[31m")

    monkeypatch.setattr(module, "find_scans", fail)
    code, out, err, _ = main()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    (file,) = (tmp_path / "out" / "logs").glob("crash-*.txt")
    assert line.startswith("m2m-bids: error: unexpected KeyError: ")
    assert line.endswith(f"Please report it with {file}.")
    assert line.isprintable()
    assert "Traceback" in file.read_text()


def test_termination_is_told_as_an_interruption(main, monkeypatch):
    monkeypatch.setattr(module, "find_scans", lambda _: signal.raise_signal(signal.SIGTERM))
    code, _, err, started = main()
    assert (code, started) == (130, [])
    assert err == "m2m-bids: interrupted; the same command goes on from here\n"


def test_a_full_disk_is_told(main, monkeypatch, tmp_path):
    def fail(settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "find_scans", fail)
    code, _, err, _ = main()
    assert code == 2
    assert f"No space left on device: make room in {tmp_path / 'out'} or " in err


def test_images_larger_than_mem_are_left_out(main, bids_dir, tmp_path):
    for file in bids_dir.rglob("*.nii.gz"):
        nb.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_filename(file)
    header = nb.Nifti1Header()
    header.set_data_shape((2000, 2000, 2000))
    header.set_data_dtype(np.uint8)
    pet = bids_dir / "sub-1/pet/sub-1_trc-FDG_pet.nii.gz"
    pet.write_bytes(gzip.compress(header.binaryblock + bytes(4)))
    _, out, _, started = main("--mem", "16000")
    assert started == ["sub-1_trc-AV45_pet", "sub-2_param-FA_dwimap"]
    assert f"skipped: sub-1_trc-FDG_pet: {pet}: 32.0 GB of voxels by its header" in out


def changes(folder):
    """Times of the last change of files, but for those of locks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {file: file.stat().st_mtime_ns for file in files}


def test_a_second_run_leaves_reports_alone(main, bids_dir, tmp_path, finish):
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
    main()
    before = changes(tmp_path / "out")
    assert main()[0] == 0
    assert changes(tmp_path / "out") == before
    (tmp_path / "out" / "sub-2.html").unlink()
    main()
    assert (tmp_path / "out" / "sub-2.html").is_file()


def test_clean_workdir_spares_other_runs(main, tmp_path):
    work = tmp_path / "work"
    (work / "m2m_bids_wf").mkdir(parents=True)
    with locked(work / ".sub-9.lock"):
        code, _, err, started = main("-w", work, "--clean-workdir")
        assert (code, started) == (2, [])
        assert "another run works in" in err
        assert (work / "m2m_bids_wf").is_dir()
    code, _, _, started = main("-w", work, "--clean-workdir")
    assert len(started) == 3
    assert not (work / "m2m_bids_wf").exists()


def test_purge_spares_participants_that_are_left_out(main, bids_dir, tmp_path, finish):
    """This run holds no lock of theirs; another one that has it may be at work on them."""
    folders = [tmp_path / "work" / "m2m_bids_wf" / f"sub_{label}_wf" for label in (1, 2)]
    for folder in folders:
        folder.mkdir(parents=True)
    for scan in scans_of(bids_dir).values():
        finish(scan, tmp_path / "out")
    (bids_dir / "sub-2/anat/sub-2_T1w.nii.gz").unlink()
    with locked(tmp_path / "work" / ".sub-2.lock"):
        main("-w", tmp_path / "work", "--purge-workdir-on-success")
    assert [folder.exists() for folder in folders] == [False, True]
