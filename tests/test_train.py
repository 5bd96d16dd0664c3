"""The level ``train``, from a BIDS dataset to weights that ``participant`` takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from m2m_bids.bids.status import read_status
from m2m_bids.cli.run import main
from m2m_bids.cohort import find_training_scans
from m2m_bids.registration.weights import read_card
from m2m_bids.simulation.cohort import CohortOptions, write_cohort

SCRIPT = str(Path(sys.executable).with_name("m2m-bids"))
OPTIONS = CohortOptions(spacing_mm=3.0, t1w_mm=2.5, scan_mm=3.0, warp_mm=0.0, n_landmarks=20)
GRID = ("--grid-size", "36", "--grid-spacing", "5.4")
N_SUBJECTS = 4


def call(*arguments):
    """Run the console script on the CPU."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cohort of which one PET is broken, and the folders of its output and work."""
    root = tmp_path_factory.mktemp("train")
    write_cohort(root / "bids", n_subjects=N_SUBJECTS, seed=3, options=OPTIONS)
    for file in root.glob("bids/derivatives/*/sub-*/**/*FA*"):
        file.unlink()
    broken = sorted(root.glob("bids/sub-*/**/*_pet.nii.gz"))[-1]
    broken.write_bytes(broken.read_bytes()[:1000])
    return root


@pytest.fixture(scope="module")
def train(folders):
    """Call ``train`` with options."""
    common = ("--modality", "pet", *GRID, "-w", folders / "work", "--skip-bids-validation")

    def run(*options):
        return call(folders / "bids", folders / "out", "train", *common, *options)

    return run


@pytest.fixture(scope="module")
def trained(folders, train):
    """Train for two steps; one scan cannot be prepared."""
    return train("--max-steps", 2, "--batch-size", 1, "--pre-aligned", 1)


@pytest.mark.slow
def test_training_ends_with_weights_and_names_what_failed(folders, trained):
    assert trained.returncode == 1, trained.stderr
    assert "failed: sub-" in trained.stdout
    assert "truncated" in trained.stdout
    run_dir = folders / "out/training/gradicon-m2m+gcc"
    assert f"participant --weights {run_dir / 'weights'}" in trained.stdout
    card = read_card(run_dir / "weights")
    assert (card.grid_size, card.spacing_mm, card.modalities) == (36, 5.4, ("pet",))
    assert card.details["pre_aligned_subjects"] == 1
    assert "--pre-aligned 1" in card.training_command
    lines = (run_dir / "splits.tsv").read_text().splitlines()
    assert len(lines) == 1 + N_SUBJECTS - 1
    assert not list(folders.glob("out/sub-*/**/*.nii.gz"))


@pytest.mark.slow
def test_prepared_images_are_brains_on_the_grid(folders, trained):
    images_dir = folders / "out/training/images/36x5.4mm"
    names = [path.name for path in images_dir.iterdir()]
    scans = find_training_scans(images_dir, names)
    assert len(scans) == N_SUBJECTS - 1
    for scan in scans:
        functional, t1w, labels = (
            np.load(scan.folder / f"{name}.npy") for name in ("functional", "t1w", "labels")
        )
        assert functional.shape == t1w.shape == labels.shape == (36, 36, 36)
        assert (functional.dtype, labels.dtype) == (np.float16, np.uint8)
        assert functional.max() == t1w.max() == 1
        assert set(np.unique(labels)) == {0, 1, 2, 3}
        # Rigidly aligned: PET is brighter in grey (1) than in white matter (2), T1w darker.
        means = {
            name: [image[labels == label].mean() for label in (1, 2)]
            for name, image in (("pet", functional), ("t1w", t1w))
        }
        assert means["pet"][0] > means["pet"][1]
        assert means["t1w"][0] < means["t1w"][1]


@pytest.mark.slow
def test_weights_are_those_of_participant(folders, trained):
    weights = folders / "out/training/gradicon-m2m+gcc/weights"
    subject = sorted(path.name for path in (folders / "bids").glob("sub-*"))[0]
    out = folders / "registered"
    done = call(
        folders / "bids", out, "participant", "--participant-label", subject, "--modalities",
        "pet", "--weights", weights, "--refine", 4, "-w", folders / "work",
        "--skip-bids-validation",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = read_status(out)
    assert row.status in ("done", "rigid only")
    (sidecar,) = out.glob(f"{subject}/**/*desc-preproc_pet.json")
    text = json.loads(sidecar.read_text())
    assert read_card(weights).sha256 in json.dumps(text) or row.status == "rigid only"


def test_split_by_hand_is_kept_and_its_lack_is_told(folders, told):
    run_dir = folders / "out/training/mine"
    run_dir.mkdir(parents=True)
    subjects = sorted(path.name for path in (folders / "bids").glob("sub-*"))
    lines = ["participant_id\tsplit", *(f"{name}\tvalidation" for name in subjects[1:])]
    (run_dir / "splits.tsv").write_text("\n".join(lines) + "\n")
    code, said = told("--objective", "lncc", "--run-name", "mine", "--max-steps", "1")
    assert code == 2
    assert "1 with pet; one cycle needs 2 different subjects" in said.err


@pytest.fixture
def told(folders, monkeypatch, capsys):
    """Call ``train`` in this process, and return its exit code and what it said."""
    monkeypatch.setattr("m2m_bids.cli.train.prepare_environment", lambda settings: None)
    common = ["--modality", "pet", *GRID, "-w", str(folders / "work"), "--skip-bids-validation"]

    def run(*options):
        code = main([str(folders / "bids"), str(folders / "out"), "train", *common, *options])
        return code, capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network", "unet"], "--network: 'unet' is unknown; known are corrmlp, gradicon"),
        (["--objective", "ssd"], "--objective: 'ssd' is unknown; known are lncc"),
        (["--pre-aligned", "9"], "expected a number from 0 to 4"),
        (["--participant-label", "ADNI011S0001"], "needs 4 different subjects"),
        (["--grid-size", "32"], "--grid-size 32: the network gradicon needs 33 voxels or more"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(told, options, message):
    code, said = told("--run-name", "wrong", *options)
    assert code == 2
    assert message in said.err
    assert len(said.err.splitlines()) == 1


def test_too_little_gpu_memory_says_what_to_do(told, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("m2m_bids.cli.train.prepare_images", lambda *_: {})
    monkeypatch.setattr("m2m_bids.cohort.find_training_scans", lambda *_: [])
    monkeypatch.setattr("m2m_bids.cohort.train_network", fail)
    code, said = told("--run-name", "large")
    assert code == 2
    assert "ran out: end other programs on it" in said.err
    assert "give a smaller --batch-size with --resume" in said.err
    assert "Traceback" not in said.err


def test_dry_run_says_what_would_be_trained_on(folders, told):
    code, said = told("--dry-run", "--run-name", "dry")
    assert code == 0
    assert "would train gradicon with m2m+gcc on" in said.out
    assert f"{N_SUBJECTS} pet scans of {N_SUBJECTS} participants" in said.out
    assert not (folders / "out/training/dry").exists()


@pytest.mark.slow
def test_training_is_not_begun_twice_but_continued(folders, trained, told):
    code, said = told("--max-steps", "2")
    assert code == 2
    assert "there is a training already. Continue it with --resume" in said.err
    # Without the scan that failed, which would be tried again.
    names = sorted(path.name for path in (folders / "out/training/images/36x5.4mm").iterdir())
    subjects = [name.split("_")[0] for name in names]
    options = ["--batch-size", "2", "--pre-aligned", "1", "--participant-label", *subjects]
    code, said = told("--max-steps", "2", "--resume", *options)
    assert code == 2
    assert "batch_size was 1, is 2" in said.err
