"""A run, not a plan, on a small cohort with the names that Clinica gives, old and new."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.bids.naming import (
    expected_anat_outputs,
    expected_outputs,
    quantification_outputs,
)
from m2m_bids.bids.query import query
from m2m_bids.bids.status import read_status
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.simulation.cohort import TRUTH_FOLDER, CohortOptions, write_cohort
from m2m_bids.spatial.itk import read_affine
from m2m_bids.spatial.landmarks import read_landmarks

pytestmark = pytest.mark.slow

ONE, TWO, NONE = "sub-ADNI011S0001", "sub-ADNI011S0002", "sub-ADNI033S0003"
# Heads lie elsewhere in each scan, and nothing is deformed but FA, by its distortion.
OPTIONS = CohortOptions(spacing_mm=3.0, t1w_mm=3.0, scan_mm=4.0, warp_mm=0.0, n_landmarks=60)
PET = "trc-18FFDG_rec-coregiso_pet"
# Files of the cohort, and the simulated scan that each is.
SCANS = {
    f"{ONE}/ses-M000/pet/{ONE}_ses-M000_trc-18FFDG_rec-coregiso_pet": (ONE, "pet"),
    f"{ONE}/ses-M000/pet/{ONE}_ses-M000_trc-18FFDG_rec-coregavg_pet": (ONE, "pet"),
    f"{ONE}/ses-M000/pet/{ONE}_ses-M000_trc-18FAV45_pet": (ONE, "pet"),
    f"{ONE}/ses-M000/dwi/{ONE}_ses-M000_FA": (ONE, "fa"),
    f"{ONE}/ses-M006/pet/{ONE}_ses-M006_trc-18FFDG_rec-coregavg_pet": (ONE, "pet"),
    f"{TWO}/ses-M00/pet/{TWO}_ses-M00_task-rest_acq-fdg_pet": (TWO, "pet"),
    f"{NONE}/ses-M000/pet/{NONE}_ses-M000_trc-18FFDG_pet": (TWO, "pet"),
}
SKIPPED = f"{NONE}_ses-M000_trc-18FFDG_pet"
NAMES = [
    file.rpartition("/")[2].replace("_FA", "_param-FA_dwimap")
    for file in SCANS
    if not file.startswith(NONE)
]


class Run(NamedTuple):
    """Folders of the run, and what the program said."""

    bids: Path
    out: Path
    work: Path
    truth: Path
    said: subprocess.CompletedProcess


def call(*arguments):
    command = [sys.executable, "-m", "m2m_bids", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_clinica_cohort(simulated, bids):
    """Name simulated images as Clinica does; neither T1w nor PET have sidecars."""
    for subject, session in ((ONE, "M000"), (TWO, "M00")):
        file = bids / subject / f"ses-{session}/anat/{subject}_ses-{session}_T1w.nii.gz"
        file.parent.mkdir(parents=True)
        shutil.copy(simulated / subject / f"ses-M000/anat/{subject}_ses-M000_T1w.nii.gz", file)
    for name, (subject, modality) in SCANS.items():
        file = bids / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        source = f"{subject}/ses-M000/pet/{subject}_ses-M000_{PET}.nii.gz"
        if modality == "fa":
            source = f"{subject}/ses-M000/dwi/{subject}_ses-M000_param-FA_dwimap.nii.gz"
            source = f"derivatives/dti/{source}"
        shutil.copy(simulated / source, file)
    for subject in (ONE, TWO, NONE):
        sessions = sorted(path.name for path in (bids / subject).glob("ses-*"))
        rows = "".join(f"{session}\t71.5\tn/a\n" for session in sessions)
        table = f"session_id\tage\tdiagnosis\n{rows}"
        (bids / subject / f"{subject}_sessions.tsv").write_text(table)
        for session in sessions:
            scans = bids / subject / session / f"{subject}_{session}_scans.tsv"
            scans.write_text("filename\tscan_id\tmri_field\n")
    (bids / "participants.tsv").write_text(f"participant_id\n{ONE}\n{TWO}\n{NONE}\n")
    description = {"Name": "ADNI-like", "BIDSVersion": "1.7.0"}
    (bids / "dataset_description.json").write_text(json.dumps(description))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("clinica")
    write_cohort(root / "simulated", n_subjects=2, seed=5, options=OPTIONS)
    bids, out, work = root / "bids", root / "out", root / "work"
    write_clinica_cohort(root / "simulated", bids)
    before = {file: file.stat().st_mtime_ns for file in bids.rglob("*")}
    said = call(
        *(bids, out, "participant", "-w", work, "--transform", "rigid", "--device", "cpu"),
        *("--nprocs", 1, "--omp-nthreads", 1, "--skip-bids-validation"),
    )
    assert {file: file.stat().st_mtime_ns for file in bids.rglob("*")} == before
    return Run(bids, out, work, root / "simulated" / TRUTH_FOLDER, said)


@pytest.fixture(scope="module")
def scans(run):
    return {scan.name: scan for scan in query(run.bids)}


def test_all_that_has_a_t1w_is_done(run):
    assert run.said.returncode == 0, run.said.stderr
    assert "Traceback" not in run.said.stdout + run.said.stderr
    assert "6 done, 1 skipped" in run.said.stdout
    rows = {row.scan: row for row in read_status(run.out)}
    assert {name: row.status for name, row in rows.items()} == {
        **dict.fromkeys(NAMES, "done"),
        SKIPPED: "skipped",
    }
    assert "no T1w image" in rows[SKIPPED].reason
    assert {row.t1w for name, row in rows.items() if name.startswith(ONE)} == {
        f"{ONE}_ses-M000_T1w.nii.gz"  # also of the session without one
    }
    assert not list(run.out.glob("sub-*/log/*/crash-*"))


def test_files_are_exactly_those_expected(run, scans):
    """Each scan has outputs of its own, in its own session, with all that tells it from others."""
    expected = []
    for name in NAMES:
        scan = scans[name]
        expected += expected_outputs(scan, run.out, "rigid").values()
        measured = quantification_outputs(scan, run.out, "tissues")
        tables = ("stat", "tacs") if scan.modality == "pet" else ("stat",)
        expected += [measured[f"{table}{end}"] for table in tables for end in ("", "_json")]
    assert len(set(expected)) == len(expected)
    for subject, session in ((ONE, "M000"), (TWO, "M00")):
        labels = {"sub": subject[4:], "ses": session}
        expected += expected_anat_outputs(labels, run.out).values()
    found = {file for file in run.out.glob("sub-*/ses-*/**/*") if file.is_file()}
    assert found == set(expected)
    legacy = f"{TWO}/ses-M00/pet/{TWO}_ses-M00_task-rest_acq-fdg_space-T1w_desc-preproc_pet.nii.gz"
    assert run.out / legacy in found
    assert {file.name for file in run.out.glob("*.html")} == {
        f"{subject}.html" for subject in (ONE, TWO, NONE)
    }


def test_nothing_is_invented_without_sidecars(run, scans):
    for name in NAMES:
        outputs = expected_outputs(scans[name], run.out, "rigid")
        content = json.loads(outputs["preproc_json"].read_text())
        assert (content["Transform"], content["TransformRequested"]) == ("rigid", "rigid")
        assert not {"FrameDuration", "InjectedRadioactivity", "TracerName"} & content.keys()
        if scans[name].modality == "pet":
            stat = quantification_outputs(scans[name], run.out, "tissues")["stat_json"]
            said = json.loads(stat.read_text())
            assert "no body weight" in said["SUVNotComputed"]
            assert "no FreeSurfer labels" in said["SUVRNotComputed"]


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_aligned(run, scans, name):
    """PET to less than half a voxel of 4 mm, FA but for its distortion; headers leave more."""
    scan = scans[name]
    subject, modality = SCANS[str(scan.file.relative_to(run.bids)).removesuffix(".nii.gz")]
    end = PET if modality == "pet" else "param-FA_dwimap"
    landmarks = read_landmarks(run.truth / f"{subject}_ses-M000_{end}" / "landmarks.tsv")
    xfm = read_affine(expected_outputs(scan, run.out, "rigid")["rigid_xfm"])
    before, after = (landmark_errors(chain, *landmarks).mean() for chain in ((), xfm))
    assert after < (2.0 if modality == "pet" else 4.0) < before
    image = nb.load(expected_outputs(scan, run.out, "rigid")["preproc"])
    mask = nb.load(expected_anat_outputs(scan.t1w_entities, run.out)["mask"])
    np.testing.assert_allclose(image.affine, mask.affine, atol=1e-5)
    assert np.asarray(image.dataobj)[np.asarray(mask.dataobj) > 0].mean() > 0


def test_a_second_run_has_nothing_to_do(run):
    before = {file: file.stat().st_mtime_ns for file in run.out.glob("sub-*/ses-*/**/*")}
    again = call(
        *(run.bids, run.out, "participant", "-w", run.work, "--transform", "rigid"),
        *("--device", "cpu", "--skip-bids-validation"),
    )
    assert again.returncode == 0, again.stderr
    assert "0 to register, 6 finished before, 1 left out" in again.stderr
    assert {file: file.stat().st_mtime_ns for file in run.out.glob("sub-*/ses-*/**/*")} == before


def test_the_group_keeps_tracers_apart(run):
    said = call(run.bids, run.out, "group")
    assert said.returncode == 0, said.stderr
    with (run.out / "group_pet.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert {row["scan"] for row in rows} == {SKIPPED, *(n for n in NAMES if n.endswith("_pet"))}
    kinds = {row["scan"]: row["kind"] for row in rows if row["scan"] != SKIPPED}
    # The legacy name says fdg.
    assert set(kinds.values()) == {"PET 18FFDG", "PET 18FAV45"}
    assert all(("FDG" in kind) == ("fdg" in scan.lower()) for scan, kind in kinds.items())
