import tempfile
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import Function

from m2m_bids.cli.multiproc import SturdyMultiProcPlugin
from m2m_bids.interfaces.preprocessing import (
    AlignTemplate,
    EstimateMotion,
    ExtractBrain,
    FitTensor,
    RegisterRigid,
)
from m2m_bids.interfaces.scratch import temporary_files_in
from m2m_bids.interfaces.spaces import NormalizeT1w
from m2m_bids.spatial.itk import write_affine


class SeenError(Exception):
    """Ends a step when it has come as far as what calls ANTs."""


@pytest.fixture
def files(tmp_path):
    """Images and a transform, by name."""
    ones = np.ones((4, 4, 4, 2), np.float32)
    for name, data in (("image.nii", ones[..., 0]), ("frames.nii", ones)):
        nb.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / name)
    write_affine(np.eye(4), tmp_path / "affine.txt")
    return {file.name: str(file) for file in tmp_path.iterdir()}


IMAGE = "image.nii"
TIMING = {"FrameTimesStart": [0, 60], "FrameDuration": [60, 60]}


@pytest.mark.parametrize(
    ("interface", "function", "inputs"),
    [
        (ExtractBrain, "anatomical.extract_brain", {"in_file": IMAGE}),
        (AlignTemplate, "anatomical.align_template", {"in_file": IMAGE, "mask_file": IMAGE}),
        (EstimateMotion, "pet_motion.estimate_motion", {"in_file": "frames.nii"}),
        (FitTensor, "tensor.fit_dwi", {"in_file": "frames.nii", "is_raw": True}),
        (
            RegisterRigid,
            "coregistration.register_rigid",
            {"moving_file": IMAGE, "fixed_file": IMAGE, "mask_file": IMAGE},
        ),
        (
            NormalizeT1w,
            "normalization.normalize_t1w",
            {"t1w_file": IMAGE, "mask_file": IMAGE, "template2anat": "affine.txt"},
        ),
    ],
)
def test_temporary_files_of_ants_are_in_the_folder_of_the_node(
    interface, function, inputs, files, tmp_path, monkeypatch
):
    seen = []

    def stand_in(*args, **options):
        with tempfile.TemporaryDirectory() as folder:
            seen.append(Path(folder).parent)
        raise SeenError

    monkeypatch.setattr(f"m2m_bids.preprocessing.{function}", stand_in)
    folder = tmp_path / "node"
    folder.mkdir()
    step = interface(**{name: files.get(value, value) for name, value in inputs.items()})
    if interface is EstimateMotion:
        step.inputs.sidecar = TIMING
    if interface is FitTensor:
        step.inputs.bval_file = step.inputs.bvec_file = files["affine.txt"]
    monkeypatch.setattr("m2m_bids.interfaces.spaces._load_template", lambda inputs: None)
    before = tempfile.gettempdir()
    with pytest.raises(SeenError):
        step.run(cwd=str(folder))
    assert seen == [folder]
    assert tempfile.gettempdir() == before


def die_with_a_temporary_folder(marker):
    """Be killed while there is a temporary folder; not again."""
    import os
    import signal
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from m2m_bids.interfaces.scratch import temporary_files_in

    with temporary_files_in(os.getcwd()), TemporaryDirectory(prefix="m2m-ants-") as folder:
        if not Path(marker).exists():
            Path(marker).write_text(folder)
            os.kill(os.getpid(), signal.SIGKILL)
    return marker


def test_nothing_stays_of_a_step_that_was_killed(tmp_path):
    workflow = Workflow("w", base_dir=str(tmp_path / "work"))
    workflow.config["execution"]["poll_sleep_duration"] = "0.1"
    node = Node(Function(["marker"], ["out"], die_with_a_temporary_folder), name="node")
    node.inputs.marker = str(tmp_path / "marker")
    workflow.add_nodes([node])
    arguments = {"n_procs": 1, "memory_gb": 4, "n_gpu_procs": 0, "mp_context": "forkserver"}
    workflow.run(plugin=SturdyMultiProcPlugin(arguments))
    left = Path((tmp_path / "marker").read_text())
    assert left.is_relative_to(tmp_path / "work" / "w" / "node")
    assert not list((tmp_path / "work").rglob("m2m-ants-*"))


def test_the_folder_is_that_of_before_after_an_error(tmp_path):
    before = tempfile.tempdir
    with pytest.raises(SeenError), temporary_files_in(str(tmp_path)):
        raise SeenError
    assert tempfile.tempdir == before
