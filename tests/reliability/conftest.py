"""A cohort that the app is through with soon, and the app's runs in processes of their own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from m2m_bids.simulation.cohort import TRUTH_FOLDER, CohortOptions, write_cohort
from m2m_bids.spatial.conform import BRAIN_CENTER_MM
from m2m_bids.spatial.itk import write_affine

# Rigid registration works at 2 mm: a head of less than half the size takes a tenth of the time.
SHRINK = 0.4
OPTIONS = CohortOptions(spacing_mm=6.0, t1w_mm=7.0, scan_mm=8.0, warp_mm=5.0, n_landmarks=10)


class Run(NamedTuple):
    """What a run gave."""

    code: int
    text: str
    seconds: float


class Data(NamedTuple):
    """A dataset, and derivatives that spare the app the preparation of the T1w image."""

    bids: Path
    derivatives: dict[str, Path]

    @property
    def options(self):
        named = (f"{name}={path}" for name, path in self.derivatives.items())
        return [part for name in named for part in ("-d", name)]


def _with_anatomy(bids_dir, folder):
    """Write what fMRIPrep would have of each T1w image, from the simulation's own labels."""
    truth = bids_dir / TRUTH_FOLDER
    for t1w in bids_dir.glob("sub-*/ses-*/anat/*_T1w.nii.gz"):
        stem = t1w.name.removesuffix("_T1w.nii.gz")
        anat = folder / t1w.parent.relative_to(bids_dir)
        anat.mkdir(parents=True)
        dseg = nb.load(truth / f"{stem}_T1w" / "dseg.nii.gz")
        labels = np.asarray(dseg.dataobj)
        tissues = np.where(labels > 3, 3, labels).astype(np.uint8)
        nb.Nifti1Image(tissues, dseg.affine).to_filename(anat / f"{stem}_dseg.nii.gz")
        # A voxel wider, as the template is only shifted and scaled to it.
        mask = nb.Nifti1Image(binary_dilation(tissues > 0).astype(np.uint8), dseg.affine)
        mask.to_filename(anat / f"{stem}_desc-brain_mask.nii.gz")
        shutil.copyfile(t1w, anat / f"{stem}_desc-preproc_T1w.nii.gz")
        to_t1w = np.diag([SHRINK, SHRINK, SHRINK, 1.0])
        to_t1w[:3, 3] = _centre(mask) - SHRINK * np.array(BRAIN_CENTER_MM)
        write_affine(to_t1w, anat / f"{stem}_from-T1w_to-MNI152NLin2009aSym_mode-image_xfm.txt")
    description = {"Name": "anat", "BIDSVersion": "1.10.0", "DatasetType": "derivative",
                   "GeneratedBy": [{"Name": "fMRIPrep"}]}  # fmt: skip
    (folder / "dataset_description.json").write_text(json.dumps(description))


def _shrink(file):
    """Make an image smaller in its world."""
    image = nb.load(file)
    affine = np.diag([SHRINK, SHRINK, SHRINK, 1.0]) @ image.affine
    nb.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(file)


def _centre(mask):
    """Mean position of a mask's voxels, RAS+ mm."""
    ijk = np.argwhere(np.asarray(mask.dataobj) > 0)
    return nb.affines.apply_affine(mask.affine, ijk.mean(axis=0))


def make_data(root, n_subjects):
    """Simulate people with PET and FA; their anatomy is given, so that a run is short."""
    write_cohort(root / "bids", n_subjects=n_subjects, options=OPTIONS)
    for file in (root / "bids").rglob("*.nii.gz"):
        _shrink(file)
    shutil.move(root / "bids" / "derivatives" / "dti", root / "dti")
    shutil.rmtree(root / "bids" / "derivatives")
    _with_anatomy(root / "bids", root / "anat")
    shutil.rmtree(root / "bids" / TRUTH_FOLDER.parts[0])
    return Data(root / "bids", {"dti": root / "dti", "anat": root / "anat"})


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """One person."""
    return make_data(tmp_path_factory.mktemp("data"), 1)


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Four people, as few as a training takes."""
    return make_data(tmp_path_factory.mktemp("people"), 4)


class App(NamedTuple):
    """The app's command line on a dataset, with an output and a work folder."""

    data: Data
    out: Path
    work: Path
    options: tuple[str, ...] = ("--transform", "rigid")
    level: str = "participant"

    def command(self, *more):
        """Arguments of a process."""
        common = ["--skip-bids-validation", "--device", "cpu", "--nprocs", "1"]
        return [sys.executable, "-m", "m2m_bids", self.data.bids, self.out, self.level,
                "-w", self.work, *self.data.options, *common, "--omp-nthreads", "1",
                *self.options, *more]  # fmt: skip

    def start(self, *more, prefix=(), **environment):
        """Start a run; what it writes on the terminal goes to files beside the output folder."""
        own = {**os.environ, **environment}
        log = self.out.with_name(f"{self.out.name}.{time.monotonic_ns()}.log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*map(str, prefix), *map(str, self.command(*more))],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in own.items() if value is not None},
                cwd=log.parent,
            )
        process.log = log
        return process

    def run(self, *more, **options):
        """Run to the end."""
        begin = time.monotonic()
        process = self.start(*more, **options)
        code = process.wait(timeout=1800)
        return Run(code, process.log.read_text(), time.monotonic() - begin)

    def results(self):
        """
        Hash the results of a run by their path.

        Left out are what tells of the run itself: reports and logs hold its number and times.
        """
        return {
            str(file.relative_to(self.out)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(self.out.glob("sub-*/ses-*/**/*"))
            if file.is_file() and not file.name.startswith(".")
        }

    def everything(self):
        """Times of change and content of all files of the output folder, but for locks."""
        return {
            str(file.relative_to(self.out)): (file.stat().st_mtime_ns, file.read_bytes())
            for file in sorted(self.out.rglob("*"))
            if file.is_file() and file.suffix != ".lock"
        }


class Undisturbed(NamedTuple):
    """A run that nothing happened to."""

    app: App
    results: dict[str, str]
    seconds: float


@pytest.fixture
def app(data, tmp_path):
    """A run that has not begun."""
    return App(data, tmp_path / "out", tmp_path / "work")


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """Results of a run that nothing happened to, and how long it took."""
    root = tmp_path_factory.mktemp("undisturbed")
    app = App(data, root / "out", root / "work")
    run = app.run()
    assert run.code == 0, run.text
    return Undisturbed(app, app.results(), run.seconds)
