"""The level ``evaluate``: what is told before anything runs, and a run on a simulated cohort."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.cli.evaluation_plan import choose_methods
from m2m_bids.cli.evaluation_report import _shares, _trained_on
from m2m_bids.cli.run import main
from m2m_bids.registration.weights import CARD_NAME
from m2m_bids.settings import Settings
from m2m_bids.simulation.cohort import TRUTH_FOLDER, TRUTH_XFM, CohortOptions, write_cohort

SCRIPT = str(Path(sys.executable).with_name("m2m-bids"))
OPTIONS = CohortOptions(spacing_mm=3.0, t1w_mm=2.5, scan_mm=3.0, warp_mm=0.0, n_landmarks=20)
SUBJECTS = ("ADNI011S0001", "ADNI011S0002", "ADNI011S0003")
PET = [f"sub-{subject}_ses-M000_trc-18FFDG_rec-coregiso_pet" for subject in SUBJECTS]


def change_card(folder, **details):
    """Change what a card tells of a training; the tensors keep their hash."""
    card = json.loads((folder / CARD_NAME).read_text())
    (folder / CARD_NAME).write_text(json.dumps({**card, **details}))


@pytest.fixture
def weights(tmp_path):
    """Copy the package's weights, under a training's name, with details of a training."""

    def make(name, **details):
        folder = tmp_path / name / "weights"
        shutil.copytree(DEFAULT_WEIGHTS, folder)
        change_card(folder, details=details)
        return folder

    return make


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        (tmp_path / "bids").mkdir(exist_ok=True)
        return Settings(
            bids_dir=tmp_path / "bids",
            output_dir=tmp_path / "out",
            work_dir=tmp_path / "work",
            analysis_level="evaluate",
            **changes,
        )

    return make


# --- methods ---------------------------------------------------------------------------------


def test_all_methods_by_default(settings):
    methods = choose_methods(settings())
    keys = [method.key for method in methods]
    assert keys[:3] == ["initial", "rigid", "syn-mi"]
    assert keys[-1] == "m2m:default"
    assert methods[-1].weights == DEFAULT_WEIGHTS
    assert methods[-1].n_refine == 60


def test_methods_are_in_the_order_of_tables(settings):
    given = settings(methods=("m2m", "rigid", "initial"))
    keys = [method.key for method in choose_methods(given)]
    assert keys == ["initial", "rigid", "m2m:default"]


def test_further_weights(settings, weights):
    mine = weights("mine", objective={"is_m2m": True})
    plain = weights("plain", objective={"is_m2m": False})
    given = settings(methods=("rigid",), compare=(("a", mine), ("b", plain)), refine=7)
    rigid, own, conventional = choose_methods(given)
    assert (own.key, own.title, own.n_refine) == ("m2m:a", "M2M-Reg (a)", 7)
    assert (conventional.title, conventional.n_refine) == ("b (without M2M-Reg)", 0)
    assert own.weights_sha256 == conventional.weights_sha256 != rigid.weights_sha256


def test_networks_alone_are_those_to_compare(settings, weights):
    mine = weights("mine", objective={"is_m2m": True})
    given = settings(methods=("m2m",), compare=(("a", mine),), networks_alone=True)
    own, compared = choose_methods(given)
    assert (own.key, own.n_refine) == ("m2m:default", 60)
    assert (compared.title, compared.n_refine) == ("M2M-Reg (a), network alone", 0)


def test_weights_of_the_run_have_the_name_of_their_training(settings, weights):
    (method,) = choose_methods(settings(methods=("m2m",), weights=weights("gradicon-m2m")))
    assert method.key == "m2m:gradicon-m2m"


@pytest.mark.parametrize(
    ("methods", "names", "message"),
    [
        (("rigid", "syn"), (), "--methods: 'syn' is unknown; known are initial, rigid, syn-mi"),
        (("m2m",), ("gradicon",), "--compare: the name 'gradicon' is that of --weights"),
        (("rigid",), ("a-b", "a.b"), "--compare: m2m:a-b and m2m:a.b are too alike"),
    ],
)
def test_methods_that_cannot_be_told_apart(settings, weights, methods, names, message):
    folder = weights("gradicon")
    given = settings(
        methods=methods, weights=folder, compare=tuple((name, folder) for name in names)
    )
    with pytest.raises(ValueError, match=message):
        choose_methods(given)


def test_unusable_weights_are_told_first(settings, weights):
    folder = weights("mine")
    change_card(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        choose_methods(settings(compare=(("mine", folder),)))


# --- what the page adds ----------------------------------------------------------------------


def summary(method, kind="between"):
    return {"method": method, "kind": kind, "modality": "pet", "dsc_mean": 0.5}


def test_table_2_is_of_trainings_that_differ_in_the_share_alone(settings, weights):
    details = {"objective": {"is_m2m": True}, "training_subjects": 20}
    folders = {f"p{n}": weights(f"p{n}", **details, pre_aligned_subjects=n) for n in (0, 5, 20)}
    folders["other"] = weights(
        "other", **{**details, "objective": {"is_m2m": True, "gradcycon_weight": 1}},
        pre_aligned_subjects=1,
    )  # fmt: skip
    folders["unknown"] = weights("unknown")
    methods = choose_methods(settings(compare=tuple(folders.items())))
    rows = [summary(method.key, kind) for method in methods for kind in ("between", "within")]
    shares = _shares(methods, rows)
    assert [(share, row["method"]) for share, row in shares] == [
        (0, "m2m:p0"),
        (25, "m2m:p5"),
        (100, "m2m:p20"),
    ]
    assert all(row["kind"] == "between" for _, row in shares)
    assert _shares(methods[:-4], rows) == []


def test_participants_of_the_training_are_known(settings, weights):
    folder = weights("mine")
    (folder.parent / "splits.tsv").write_text(
        "participant_id\tsplit\nsub-01\ttrain\nsub-02\ttest\nsub-03\ttrain\n"
    )
    rigid, mine = choose_methods(settings(methods=("rigid",), compare=(("mine", folder),)))
    assert _trained_on(mine) == {"01", "03"}
    assert _trained_on(rigid) == set()


# --- before a run ----------------------------------------------------------------------------


@pytest.fixture
def empty_cohort(tmp_path):
    """The files of a simulated cohort, with nothing in them."""
    root = tmp_path / "bids"
    files = ["dataset_description.json"]
    for subject, pet in zip(SUBJECTS, PET, strict=True):
        folder, t1w = f"sub-{subject}/ses-M000", f"sub-{subject}_ses-M000_T1w"
        files += [f"{folder}/pet/{pet}.nii.gz", f"{folder}/anat/{t1w}.nii.gz"]
        files += [f"{TRUTH_FOLDER}/{stem}/dseg.nii.gz" for stem in (pet, t1w)]
        files += [f"{TRUTH_FOLDER}/{pet}/{name}" for name in ("landmarks.tsv", TRUTH_XFM)]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("image")
    (root / files[0]).write_text(json.dumps({"Name": "Test", "BIDSVersion": "1.10.0"}))
    return root


@pytest.fixture
def told(empty_cohort, tmp_path, monkeypatch, capsys):
    """Call ``evaluate`` in this process, and return its exit code and what it said."""
    monkeypatch.setattr("m2m_bids.cli.evaluate.prepare_environment", lambda settings: None)

    def run(*options):
        arguments = [empty_cohort, tmp_path / "out", "evaluate", "-w", tmp_path / "work"]
        code = main([str(argument) for argument in (*arguments, "--device", "cpu", *options)])
        return code, capsys.readouterr()

    return run


def test_dry_run_lists_pairs_and_what_is_missing(told, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NIFTYREGDIR", raising=False)
    code, said = told("--dry-run", "--n-pairs", "2", "--modality", "pet")
    assert code == 0
    lines = said.out.splitlines()
    assert lines[0].endswith("methods on 4 pairs.")
    assert "Labels: true tissues of the simulated cohort, of its scans too" in lines
    (niftyreg,) = [line for line in lines if "niftyreg-lncc" in line]
    assert "missing: NiftyReg's reg_f3d" in niftyreg
    (rigid,) = [line for line in lines if line.split()[:1] == ["rigid"]]
    assert "missing" not in rigid
    assert sum(line.startswith("  between sub-") for line in lines) == 2
    within = [line for line in lines if line.startswith("  within  sub-")]
    assert len(within) == 2
    assert all("landmarks and reference_xfm known" in line for line in within)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "demons"], "--methods: 'demons' is unknown"),
        (["--participant-label", "1"], "no participant 1"),
        (["--device", "cuda:63"], "--device cuda:63"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(told, tmp_path, options, message):
    code, said = told(*options)
    assert code == 2
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_table_is_told_with_its_lines(told, tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text(f"moving\tfixed\n{PET[0]}\t{PET[1]}\n{PET[0]}\tnobody\n")
    code, said = told("--pairs", str(file))
    assert code == 2
    assert f"{file}: line 3: fixed 'nobody' is no scan" in said.err


# --- a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A simulated cohort, and the folders of its output and work."""
    root = tmp_path_factory.mktemp("evaluate")
    write_cohort(root / "bids", n_subjects=len(SUBJECTS), seed=3, options=OPTIONS)
    return root


@pytest.fixture(scope="module")
def evaluate(folders):
    """Call the console script on the CPU."""

    def run(*options, out="out"):
        arguments = [
            folders / "bids", folders / out, "evaluate", "-w", folders / "work",
            "--skip-bids-validation", "--refine", 2, *options,
        ]  # fmt: skip
        return subprocess.run(
            [SCRIPT, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )

    return run


@pytest.fixture(scope="module")
def evaluated(evaluate):
    return evaluate("--methods", "initial", "rigid", "m2m", "--n-pairs", 1, "--modality", "pet")


def table(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


@pytest.mark.slow
def test_records_of_all_pairs_and_methods(folders, evaluated):
    assert evaluated.returncode == 0, evaluated.stderr
    folder = folders / "out/evaluation"
    rows = table(folder / "evaluation.tsv")
    assert [(row["kind"], row["method"], row["status"]) for row in rows] == [
        (kind, method, "done")
        for kind in ("between", "within")
        for method in ("initial", "rigid", "m2m:default")
    ]
    numbers = {(row["kind"], row["method"]): row for row in rows}
    for kind in ("between", "within"):
        initial, rigid = (float(numbers[kind, name]["dsc"]) for name in ("initial", "rigid"))
        assert rigid > initial + 0.1
        assert float(numbers[kind, "rigid"]["folding_percent"]) == 0
    # The cohort has no warp: of a scan and its own T1w the rigid transform is the truth.
    assert float(numbers["within", "rigid"]["landmark_error_mm"]) < 2
    assert numbers["between", "rigid"]["landmark_error_mm"] == "n/a"
    assert float(numbers["between", "m2m:default"]["seconds"]) > 0
    assert all(row["moving_subject"] != row["fixed_subject"] for row in rows[:3])
    assert len(table(folder / "summary.tsv")) == 6


@pytest.mark.slow
def test_the_closing_table_and_the_page(folders, evaluated):
    folder = folders / "out/evaluation"
    lines = evaluated.stdout.splitlines()
    assert lines[0].split() == [
        "scan", "subjects", "method",
        "pairs", "DSC", "folds", "(%)", "landmarks", "(mm)", "seconds",
    ]  # fmt: skip
    assert sum(line.startswith("pet") for line in lines) == 6
    assert f"Report:  {folder / 'evaluation.html'}" in lines
    page = (folder / "evaluation.html").read_text()
    for text in ("M2M-Reg (default)", "true tissues of the simulated cohort", "Pictures", "<svg"):
        assert text in page
    assert "simulated by the software under test" in page


@pytest.mark.slow
def test_what_is_done_is_not_done_again(folders, evaluated, evaluate):
    records = sorted((folders / "out/evaluation/pairs").glob("*/*/record.json"))
    before = [file.stat().st_mtime_ns for file in records]
    again = evaluate("--methods", "initial", "rigid", "m2m", "--n-pairs", 1, "--modality", "pet")
    assert again.returncode == 0, again.stderr
    assert [file.stat().st_mtime_ns for file in records] == before
    assert again.stdout == evaluated.stdout
    shutil.rmtree(records[0].parent)
    evaluate("--methods", "initial", "rigid", "m2m", "--n-pairs", 1, "--modality", "pet")
    after = [file.stat().st_mtime_ns for file in records]
    assert after[0] > before[0]
    assert after[1:] == before[1:]


@pytest.mark.slow
def test_a_scan_that_fails_is_told_beside_the_others(folders, evaluated, evaluate, tmp_path):
    stem = f"sub-{SUBJECTS[2]}/ses-M000/pet/{PET[2]}.nii.gz"
    whole = (folders / "bids" / stem).read_bytes()
    (folders / "bids" / stem).write_bytes(whole[:1000])
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(f"moving\tfixed\n{PET[2]}\t{PET[1]}\n{PET[0]}\t{PET[1]}\n")
    try:
        done = evaluate("--methods", "rigid", "--pairs", pairs, out="broken")
    finally:
        (folders / "bids" / stem).write_bytes(whole)
    assert done.returncode == 1
    failed, good = table(folders / "broken/evaluation/evaluation.tsv")
    assert (failed["status"], good["status"]) == ("failed", "done")
    assert "truncated" in failed["reason"]
    assert f"  failed: Rigid: {PET[2]}: " in done.stdout
