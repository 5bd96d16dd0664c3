"""One run of the console script on a coarse simulated cohort, good and bad scans together.

Everything after the first run looks at what it left, or calls the script again on a finished
output folder.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.api import DEFAULT_WEIGHTS, DeformableOptions, register_files
from m2m_bids.bids.naming import (
    expected_anat_outputs,
    expected_outputs,
    quantification_outputs,
)
from m2m_bids.bids.query import query
from m2m_bids.bids.status import read_status
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.preprocessing.diffusion import clean_fa
from m2m_bids.registration.weights import read_card
from m2m_bids.simulation.cohort import TRUTH_FOLDER, CohortOptions, write_cohort
from m2m_bids.spatial.itk import read_affine, read_composite
from m2m_bids.spatial.landmarks import read_landmarks
from m2m_bids.spatial.transforms import map_points

SCRIPT = str(Path(sys.executable).with_name("m2m-bids"))
VALIDATOR = shutil.which("bids-validator-deno", path=Path(sys.executable).parent) or shutil.which(
    "bids-validator-deno"
)
GOOD = "ADNI011S0001"
PET = f"sub-{GOOD}_ses-M000_trc-18FFDG_rec-coregiso_pet"
FA = f"sub-{GOOD}_ses-M000_param-FA_dwimap"
LATER = f"sub-{GOOD}_ses-M012"
NOISE = f"{LATER}_trc-18FFDG_run-4_pet"
OPTIONS = CohortOptions(spacing_mm=3.0, t1w_mm=2.5, scan_mm=3.0, warp_mm=8.0, n_landmarks=60)
# Name of each scan that fails or is left out, and what its reason has to say.
FAILED = {
    f"{LATER}_trc-18FFDG_run-1_pet": [f"{LATER}_trc-18FFDG_run-1_pet.nii.gz", "truncated"],
    f"{LATER}_trc-18FFDG_run-2_pet": [f"{LATER}_trc-18FFDG_run-2_pet.nii.gz", "positive voxel"],
    f"{LATER}_trc-18FFDG_run-3_pet": [f"{LATER}_trc-18FFDG_run-3_pet.nii.gz", "5-D image"],
    f"{LATER}_param-FA_dwimap": [f"{LATER}_param-FA_dwimap.nii.gz", "positive voxel"],
    "sub-flat_pet": ["sub-flat_T1w.nii.gz", "voxel size"],
    "sub-torn_pet": ["sub-torn_T1w.nii.gz", "truncated"],
    "sub-blank_pet": ["sub-blank_T1w.nii.gz", "every voxel is zero"],
}
SKIPPED = {"sub-alone_pet": ["no T1w image"]}


class Call(NamedTuple):
    """What a call of the console script gave."""

    code: int
    out: str
    err: str


class Cohort(NamedTuple):
    """Folders of the run and what the run gave."""

    bids: Path
    out: Path
    work: Path
    call: Call


def call(*arguments, **environment):
    """Run the console script."""
    done = subprocess.run(
        [SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    return Call(done.returncode, done.stdout, done.stderr)


def truncate(file):
    """Cut the end off a compressed image."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flatten_voxels(file):
    """Set the first voxel size, and what else gives it, to zero in a header."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[80:84] = bytes(4)  # pixdim[1]
    content[252:256] = bytes(4)  # qform and sform codes: the voxel sizes alone count
    file.write_bytes(gzip.compress(bytes(content)))


def blank(file):
    """Set every voxel to zero."""
    image = nb.load(file)
    nb.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine).to_filename(file)


def save_like(image, data, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    nb.Nifti1Image(data, image.affine).to_filename(file)


def add_bad_scans(bids_dir):
    """Add scans that cannot be registered to a cohort of one subject; return nothing."""
    subject = bids_dir / f"sub-{GOOD}"
    pet_file = subject / f"ses-M000/pet/{PET}.nii.gz"
    t1w_file = subject / f"ses-M000/anat/sub-{GOOD}_ses-M000_T1w.nii.gz"
    pet = nb.load(pet_file)
    runs = {
        number: subject / f"ses-M012/pet/{LATER}_trc-18FFDG_run-{number}_pet.nii.gz"
        for number in (1, 2, 3, 4)
    }
    data = np.asarray(pet.dataobj)
    save_like(pet, data, runs[1])
    truncate(runs[1])
    save_like(pet, np.zeros_like(data), runs[2])
    save_like(pet, np.stack([np.stack([data, data], -1)] * 2, -1), runs[3])
    noise = np.random.default_rng(0).integers(1, 10_000, data.shape, np.int16)
    save_like(pet, noise, runs[4])
    dti = bids_dir / "derivatives/dti"
    fa = nb.load(dti / f"sub-{GOOD}/ses-M000/dwi/{FA}.nii.gz")
    nothing = np.full(fa.shape, np.nan, np.float32)
    save_like(fa, nothing, dti / f"sub-{GOOD}/ses-M012/dwi/{LATER}_param-FA_dwimap.nii.gz")
    spoilers = {"flat": flatten_voxels, "torn": truncate, "blank": blank, "alone": Path.unlink}
    for label, spoil in spoilers.items():
        for source, folder, suffix in ((pet_file, "pet", "pet"), (t1w_file, "anat", "T1w")):
            copy = bids_dir / f"sub-{label}" / folder / f"sub-{label}_{suffix}.nii.gz"
            copy.parent.mkdir(parents=True)
            shutil.copy(source, copy)
        spoil(copy)
    (bids_dir / "sub-alone/anat").rmdir()
    labels = [GOOD, *spoilers]
    rows = ["participant_id", *(f"sub-{label}" for label in labels)]
    (bids_dir / "participants.tsv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A finished run."""
    root = tmp_path_factory.mktemp("end_to_end")
    bids, out, work = root / "bids", root / "out", root / "work"
    write_cohort(bids, n_subjects=1, seed=3, options=OPTIONS)
    add_bad_scans(bids)
    before = {file: file.stat().st_mtime_ns for file in bids.rglob("*")}
    result = call(
        *(bids, out, "participant", "-d", f"dti={bids / 'derivatives/dti'}", "-w", work),
        *("--refine", 10, "--nprocs", 2, "--omp-nthreads", 1, "--skip-bids-validation"),
    )
    assert {file: file.stat().st_mtime_ns for file in bids.rglob("*")} == before
    return Cohort(bids, out, work, result)


@pytest.fixture(scope="session")
def scans(cohort):
    """Every scan of the query, by name."""
    found = query(cohort.bids, derivatives={"dti": cohort.bids / "derivatives/dti"})
    return {scan.name: scan for scan in found}


@pytest.fixture(scope="session")
def rows(cohort):
    """Rows of the status table, by scan, as the first run left them."""
    return {row.scan: row for row in read_status(cohort.out)}


def sidecar(cohort, scans, name):
    return json.loads(expected_outputs(scans[name], cohort.out, "m2m")["preproc_json"].read_text())


# --- the run -------------------------------------------------------------------------------------


def test_every_scan_has_its_status(cohort, rows):
    assert {name: row.status for name, row in rows.items()} == {
        PET: "done",
        FA: "done",
        NOISE: "rigid only",
        **dict.fromkeys(FAILED, "failed"),
        **dict.fromkeys(SKIPPED, "skipped"),
    }
    for name in (PET, FA, NOISE):
        assert float(rows[name].seconds) > 0
        assert rows[name].t1w == f"sub-{GOOD}_ses-M000_T1w.nii.gz"


def test_exit_code_says_that_some_failed(cohort):
    assert cohort.call.code == 1
    assert "2 done, 1 rigid only, 1 skipped, 7 failed" in cohort.call.out
    assert "Traceback" not in cohort.call.out + cohort.call.err


@pytest.mark.parametrize(("name", "words"), {**FAILED, **SKIPPED}.items())
def test_bad_input_has_a_clear_message(cohort, rows, name, words):
    (line,) = [line for line in cohort.call.out.splitlines() if f": {name}: " in line]
    for word in words:
        assert word in rows[name].reason
        assert word in line


def test_files_are_exactly_those_expected(cohort, scans):
    expected = set()
    for name, transform in ((PET, "m2m"), (FA, "m2m"), (NOISE, "rigid")):
        expected |= set(expected_outputs(scans[name], cohort.out, transform).values())
        # Without labels and body weights there are tables of the tissues, and nothing else.
        measured = quantification_outputs(scans[name], cohort.out, "tissues")
        tables = ("stat", "tacs") if scans[name].modality == "pet" else ("stat",)
        expected |= {measured[f"{table}{end}"] for table in tables for end in ("", "_json")}
    expected |= set(expected_anat_outputs(scans[PET].t1w_entities, cohort.out).values())
    found = {file for file in cohort.out.glob("sub-*/ses-*/**/*") if file.is_file()}
    assert found == expected
    tops = {path.name for path in cohort.out.iterdir() if path.suffix != ".lock"}
    labels = (GOOD, "flat", "torn", "blank", "alone")
    assert tops == {
        *(".bidsignore", "dataset_description.json", "logs"),
        *(f"sub-{label}{end}" for label in labels for end in ("", ".html")),
    }
    logs = {file.name for file in (cohort.out / "logs").iterdir()}
    assert {"status.tsv", "CITATION.md"} < logs
    assert len([name for name in logs if re.fullmatch(r"config_\d{8}-\d{6}_[\w-]+\.toml", name)])


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_validator_finds_no_error(cohort):
    command = [VALIDATOR, "--json", cohort.out]
    answer = subprocess.run(command, capture_output=True, text=True)
    issues = json.loads(answer.stdout)["issues"]["issues"]
    assert not [issue for issue in issues if issue["severity"] == "error"]
    assert answer.returncode == 0


@pytest.mark.parametrize(("name", "folder"), [(PET, "raw"), (FA, "dti")])
def test_sidecar_tells_how_the_image_was_made(cohort, scans, name, folder):
    content = sidecar(cohort, scans, name)
    scan = scans[name]
    root = cohort.bids / ("derivatives/dti" if folder == "dti" else ".")
    session = f"sub-{GOOD}/ses-M000"
    assert content["Sources"] == [
        f"bids:{folder}:{scan.file.relative_to(root).as_posix()}",
        f"bids:raw:{session}/anat/sub-{GOOD}_ses-M000_T1w.nii.gz",
    ]
    preproc = f"{session}/anat/sub-{GOOD}_ses-M000_desc-preproc_T1w.nii.gz"
    assert content["SpatialReference"] == f"bids::{preproc}"
    assert (cohort.out / preproc).is_file()
    assert content["SkullStripped"] is (name == FA)
    assert (content["Transform"], content["TransformRequested"]) == ("m2m", "m2m")
    assert content["WeightsSHA256"] == read_card(DEFAULT_WEIGHTS).sha256
    assert content["RefinementSteps"] == 10
    assert content["Device"] == "cpu"
    assert {"m2m-bids", "torch", "antspyx"} <= content["SoftwareVersions"].keys()
    assert content["DeformableQuality"]["folding_percent"] == 0
    assert content["LinearScore"] > 0


def test_dataset_description(cohort):
    content = json.loads((cohort.out / "dataset_description.json").read_text())
    assert content["DatasetType"] == "derivative"
    assert content["DatasetLinks"].keys() == {"raw", "dti"}


def test_rejected_step_leaves_the_rigid_result(cohort, scans):
    content = sidecar(cohort, scans, NOISE)
    assert (content["Transform"], content["TransformRequested"]) == ("rigid", "m2m")
    assert content["TransformFallbackReason"]
    outputs = expected_outputs(scans[NOISE], cohort.out, "rigid")
    images = [nb.load(outputs[key]).get_fdata() for key in ("preproc", "rigid")]
    np.testing.assert_array_equal(*images)


def test_images_are_on_the_grid_of_the_t1w(cohort, scans):
    anatomical = expected_anat_outputs(scans[PET].t1w_entities, cohort.out)
    t1w = nb.load(anatomical["preproc"])
    assert nb.aff2axcodes(t1w.affine) == ("R", "A", "S")
    mask = np.asarray(nb.load(anatomical["mask"]).dataobj)
    assert set(np.unique(mask)) == {0, 1}
    assert set(np.unique(np.asarray(nb.load(anatomical["dseg"]).dataobj))) == {0, 1, 2, 3}
    for name in (PET, FA, NOISE):
        for key in ("preproc", "rigid"):
            image = nb.load(expected_outputs(scans[name], cohort.out, "rigid")[key])
            assert image.shape == t1w.shape
            np.testing.assert_allclose(image.affine, t1w.affine, atol=1e-5)
            assert np.asarray(image.dataobj)[mask > 0].mean() > 0


@pytest.mark.parametrize("name", [PET, FA])
def test_landmark_error_falls(cohort, scans, name):
    stem = scans[name].file.name.removesuffix(".nii.gz")
    landmarks = read_landmarks(cohort.bids / TRUTH_FOLDER / stem / "landmarks.tsv")
    outputs = expected_outputs(scans[name], cohort.out, "m2m")
    chains = ((), read_affine(outputs["rigid_xfm"]), read_composite(outputs["m2m_xfm"]))
    before, rigid, m2m = (landmark_errors(chain, *landmarks).mean() for chain in chains)
    assert m2m < rigid < before


@pytest.mark.parametrize("name", [PET, FA])
@pytest.mark.parametrize(
    ("image_key", "xfm_key"), [("preproc", "m2m_xfm"), ("rigid", "rigid_xfm")]
)
def test_ants_reproduces_the_written_image(cohort, scans, tmp_path, name, image_key, xfm_key):
    ants = pytest.importorskip("ants")
    outputs = expected_outputs(scans[name], cohort.out, "m2m")
    anatomical = expected_anat_outputs(scans[name].t1w_entities, cohort.out)
    moving = nb.load(scans[name].file)
    if name == FA:
        moving = clean_fa(moving)
    nb.Nifti1Image(moving.get_fdata(dtype=np.float32), moving.affine).to_filename(
        tmp_path / "moving.nii"
    )
    moved = ants.apply_transforms(
        fixed=ants.image_read(str(anatomical["preproc"])),
        moving=ants.image_read(str(tmp_path / "moving.nii")),
        transformlist=[str(outputs[xfm_key])],
        interpolator="bSpline",
    ).numpy()
    written = nb.load(outputs[image_key]).get_fdata()
    brain = np.asarray(nb.load(anatomical["mask"]).dataobj) > 0
    # ITK's spline is mirrored at the border in another way, and is not clipped to the range.
    difference = np.abs(written - np.clip(moved, moving.get_fdata().min(), None))[brain]
    assert np.quantile(difference, 0.999) < 0.01 * written[brain].max()


@pytest.mark.parametrize("name", [PET, FA])
def test_inverse_undoes_the_transform(cohort, scans, name):
    outputs = expected_outputs(scans[name], cohort.out, "m2m")
    brain = nb.load(expected_anat_outputs(scans[name].t1w_entities, cohort.out)["mask"])
    points = nb.affines.apply_affine(brain.affine, np.argwhere(np.asarray(brain.dataobj) > 0))
    for read, key, limit_mm in ((read_affine, "rigid", 1e-3), (read_composite, "m2m", 1.25)):
        there = map_points(read(outputs[f"{key}_xfm"]), points)
        again = map_points(read(outputs[f"{key}_inverse_xfm"]), there)
        assert np.linalg.norm(again - points, axis=1).max() < limit_mm


@pytest.mark.slow
def test_one_call_of_the_api_gives_the_same(cohort, scans):
    scan = scans[PET]
    options = DeformableOptions("pet", n_refine=10, device="cpu", n_threads=1)
    result = register_files(scan.file, scan.t1w, modality="pet", options=options)
    outputs = expected_outputs(scan, cohort.out, "m2m")
    assert result.objections == []
    brain = nb.load(expected_anat_outputs(scan.t1w_entities, cohort.out)["mask"])
    points = nb.affines.apply_affine(brain.affine, np.argwhere(np.asarray(brain.dataobj) > 0))
    apart = map_points(result.transforms, points) - map_points(
        read_composite(outputs["m2m_xfm"]), points
    )
    # ANTs adds up in another order where there are more threads.
    assert np.linalg.norm(apart, axis=1).mean() < 0.5
    assert result.moved.shape == nb.load(outputs["preproc"]).shape


def test_report_shows_every_scan_without_network(cohort, rows):
    page = (cohort.out / f"sub-{GOOD}.html").read_text()
    for name in rows:
        if name.startswith(f"sub-{GOOD}_"):
            assert name in page
    shown = set(re.findall(r'(?:data|img src)="\./([^"]+\.svg)"', page))
    figures = {str(f.relative_to(cohort.out)) for f in cohort.out.glob(f"sub-{GOOD}/**/*.svg")}
    assert shown == figures
    described = {re.search("desc-([a-z0-9]+)", name)[1] for name in figures}
    assert {"native", "rigid", "m2m", "grid", "jacobian", "cycle"} <= described
    viewers = re.findall(r'<iframe src="\./([^"]+_desc-viewer_[^"]+\.html)"', page)
    assert len(viewers) == len([name for name in figures if "desc-rigid_" in name])
    assert all(0 < (cohort.out / name).stat().st_size < 5e6 for name in viewers)
    assert not [name for name in figures if "run-4" in name and "desc-m2m_" in name]
    assert not re.search(r"""<(?:script|link|img)\b[^>]*(?:src|href)=["']https?://""", page)
    for name, words in FAILED.items():
        page = (cohort.out / f"{name.split('_')[0]}.html").read_text()
        assert all(word in page for word in words)


def test_citation_names_what_ran(cohort):
    text = (cohort.out / "logs/CITATION.md").read_text()
    for word in ("Anatomical", "PET", "Diffusion", "M2M-Reg", "ANTs"):
        assert word in text
    bibtex = (cohort.out / "logs/CITATION.bib").read_text()
    assert "{choo2025," in bibtex
    assert "{rousset1998," not in bibtex  # no correction was asked for


# --- calls on finished output ----------------------------------------------------------------


def outputs_mtimes(cohort):
    files = cohort.out.glob("sub-*/ses-*/**/*")
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


@pytest.fixture(scope="session")
def again(cohort, rows):
    """A second run of the finished scans, with the settings of the first; and what it changed."""
    before = outputs_mtimes(cohort)
    (config,) = (cohort.out / "logs").glob("config_*.toml")
    result = call(
        *(cohort.bids, cohort.out, "participant", "--config-file", config),
        *("--participant-label", GOOD, "--session-label", "M000"),
    )
    return result, before, outputs_mtimes(cohort)


def test_second_run_does_nothing(again):
    result, before, after = again
    assert result.code == 0, result.err
    assert "0 to register, 2 finished before" in result.err
    assert result.out.startswith("2 done\n")
    assert after == before


def test_second_run_keeps_what_is_known(cohort, rows, again):
    assert {row.scan: row for row in read_status(cohort.out)} == rows


def test_reports_only(cohort, rows, again):
    """The page comes back; the reasons of an earlier run are not lost."""
    before = outputs_mtimes(cohort)
    for label in (GOOD, "flat"):
        (cohort.out / f"sub-{label}.html").unlink()
    result = call(
        *(cohort.bids, cohort.out, "participant", "-d", cohort.bids / "derivatives/dti"),
        *("--refine", 10, "--reports-only", "--skip-bids-validation", "-w", cohort.work),
    )
    for label in (GOOD, "flat"):
        assert (cohort.out / f"sub-{label}.html").is_file()
    assert "sub-flat_T1w.nii.gz" in (cohort.out / "sub-flat.html").read_text()
    assert outputs_mtimes(cohort) == before
    assert {row.scan: row for row in read_status(cohort.out)} == rows
    assert result.code == 1


def test_dry_run_lists_and_writes_nothing(cohort, tmp_path):
    result = call(
        *(cohort.bids, tmp_path / "out", "participant", "-d", cohort.bids / "derivatives/dti"),
        *("-w", tmp_path / "work", "--dry-run"),
    )
    assert result.code == 0, result.err
    assert "would register 10 of 11 scans" in result.out
    assert "nearest session (ses-M000)" in result.out
    assert read_card(DEFAULT_WEIGHTS).sha256[:12] in result.out
    assert "sub-alone_pet: no T1w image" in result.out
    assert not list(tmp_path.iterdir())


def test_cuda_without_gpu_fails_at_once(cohort, tmp_path):
    result = call(
        *(cohort.bids, tmp_path / "out", "participant", "-w", tmp_path / "work"),
        *("--device", "cuda"),
    )
    assert result.code == 2
    assert "--nv" in result.err
    assert len(result.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--participant-label", "0l", ["0l", f"{GOOD}"]),
        ("--weights", "wrong", ["wrong/weights.safetensors", "SHA-256"]),
    ],
)
def test_unusable_argument_is_one_line(cohort, tmp_path, option, value, words):
    shutil.copytree(DEFAULT_WEIGHTS, tmp_path / "wrong")
    with (tmp_path / "wrong/weights.safetensors").open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"damaged")
    value = tmp_path / value if option == "--weights" else value
    result = call(
        cohort.bids, tmp_path / "out", "participant", option, value, "-w", tmp_path / "work"
    )
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert all(word in result.err for word in words)
    assert not (tmp_path / "out").exists()
