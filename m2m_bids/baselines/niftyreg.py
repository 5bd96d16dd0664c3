"""
Free-form deformation of NiftyReg with local normalised cross-correlation and bending energy.

Modat et al., Computer Methods and Programs in Biomedicine 98, 2010.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import nibabel as nb
import numpy as np

from m2m_bids.api import Modality
from m2m_bids.baselines.base import (
    Images,
    Options,
    Outcome,
    chain_through_template,
    images_in_template,
)

if TYPE_CHECKING:
    from nipype.interfaces.niftyreg.base import NiftyRegCommand

PROGRAMS = ("reg_f3d", "reg_transform")
# Standard deviation of the window of LNCC, and distance of control points: on simulated pairs
# (PET and FA, 2 and 3 mm) wider windows and closer points left larger errors.
LNCC_MM = 3.0
SPLINE_MM = 10.0
BENDING_WEIGHT = 0.001


def missing_niftyreg(modality: Modality | None = None) -> str | None:
    """Say which of NiftyReg's programs is missing, and how to get it; None if none is."""
    # Where Nipype looks for them.
    folder = os.environ.get("NIFTYREGDIR", "")
    missing = [name for name in PROGRAMS if shutil.which(os.path.join(folder, name)) is None]
    if not missing:
        return None
    return (
        f"NiftyReg's {' and '.join(missing)} not found on the PATH: install it, for example by"
        " `conda install -c conda-forge niftyreg`, and put its programs on the PATH"
    )


def register_niftyreg(images: Images, options: Options) -> Outcome:
    """
    Register by ``reg_f3d`` with LNCC and bending energy, its other options by default.

    Parameters
    ----------
    images : Images
    options : Options
        Threads and the voxel size.

    Returns
    -------
    Outcome

    Raises
    ------
    ImageError
        If the images do not overlap.
    RuntimeError
        If a program ends with an error.
    """
    from nipype.interfaces.niftyreg import RegF3D

    pair = images_in_template(images, options.spacing_mm)
    with TemporaryDirectory(prefix="m2m-niftyreg-") as name:
        folder = Path(name)
        files = {role: folder / f"{role}.nii" for role in ("moving", "fixed", "region")}
        for role, file in files.items():
            getattr(pair, role).to_filename(file)
        splines = folder / "splines.nii"
        program = RegF3D(
            ref_file=str(files["fixed"]),
            flo_file=str(files["moving"]),
            rmask_file=str(files["region"]),
            lncc_val=LNCC_MM,
            be_val=BENDING_WEIGHT,
            sx_val=SPLINE_MM,
            cpp_file=str(splines),
            res_file=str(folder / "moved.nii"),
            verbosity_off_flag=True,
            **_threads(options),
        )
        _run(program, splines)
        displacement = read_displacement(splines, files["fixed"], options)
    return Outcome(chain_through_template(images, displacement, pair.fixed.affine))


def read_displacement(
    transform_file: Path, reference_file: Path, options: Options | None = None
) -> np.ndarray:
    """
    Sample a transform of NiftyReg on the grid of an image.

    NiftyReg's transforms take points of the reference to points of the floating image, in the
    world of NIfTI headers, RAS+ millimetres, and so need no flip.

    Parameters
    ----------
    transform_file : Path
        Affine (text), control points of splines, or field, of any kind that NiftyReg knows.
    reference_file : Path
        NIfTI image.
    options : Options, optional
        Threads.

    Returns
    -------
    ndarray, float32, shape (I, J, K, 3)
        Offsets at the voxels of the reference, RAS+ mm.

    Raises
    ------
    RuntimeError
        If ``reg_transform`` ends with an error.
    """
    from nipype.interfaces.niftyreg import RegTransform

    with TemporaryDirectory(prefix="m2m-niftyreg-") as folder:
        file = Path(folder) / "displacement.nii"
        program = RegTransform(
            ref1_file=str(reference_file),
            disp_input=str(transform_file),
            out_file=str(file),
            **_threads(options or Options()),
        )
        _run(program, file)
        return np.asarray(nb.load(file).dataobj, dtype=np.float32)[:, :, :, 0, :]


def _run(program: "NiftyRegCommand", output: Path) -> None:
    """Run a program, which Nipype lets end with an error or write nothing without a word."""
    runtime = program.run(cwd=str(output.parent)).runtime
    if runtime.returncode != 0 or not output.is_file():
        errors = " ".join(line.strip() for line in (runtime.stderr or "").splitlines())
        raise RuntimeError(
            f"{program.cmd} wrote no {output.name} (exit status {runtime.returncode}): {errors}"
        )


def _threads(options: Options) -> dict[str, int]:
    return {"omp_core_val": options.n_threads} if options.n_threads else {}
