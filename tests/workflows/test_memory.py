import nibabel as nb
import numpy as np
import pytest
from nipype import Node
from nipype.interfaces.utility import IdentityInterface

from m2m_bids.workflows.memory import MEASURED_GB, declare_memory


def nodes():
    return {
        name: Node(IdentityInterface(fields=["a"]), name=name, mem_gb=4)
        for name in ("extract_brain", "register_m2m", "fit_tensor")
    }


def image(folder, name, shape):
    data = np.zeros(shape, np.uint8)
    nb.Nifti1Image(data, np.eye(4)).to_filename(folder / name)
    return folder / name


def test_steps_declare_what_was_measured(tmp_path):
    made = nodes()
    declare_memory(made.values(), [image(tmp_path, "T1w.nii", (192, 240, 240))])
    declared = {name: node.mem_gb for name, node in made.items()}
    expected = {"extract_brain": MEASURED_GB["extract_brain"], "fit_tensor": 4}
    assert declared.pop("register_m2m") == 1.1
    assert declared == pytest.approx(expected)


def test_larger_images_take_more_and_the_largest_counts(tmp_path):
    made = nodes()
    small, large = (192, 240, 60), (192, 240, 480)
    files = [image(tmp_path, "a.nii", small), image(tmp_path, "b.nii", large)]
    declare_memory(made.values(), files)
    expected = 0.1 + 2 * (MEASURED_GB["extract_brain"] - 0.1)
    assert made["extract_brain"].mem_gb == pytest.approx(expected)
    assert made["register_m2m"].mem_gb == 1.1


def test_an_image_that_cannot_be_read_is_left_to_its_step(tmp_path):
    (tmp_path / "T1w.nii.gz").touch()
    made = nodes()
    declare_memory(made.values(), [tmp_path / "T1w.nii.gz", tmp_path / "missing.nii"])
    assert made["extract_brain"].mem_gb == pytest.approx(MEASURED_GB["extract_brain"])
