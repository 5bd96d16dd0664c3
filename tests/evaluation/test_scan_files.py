import json

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.evaluation.scan_files import ScanFiles, save_scan_files
from m2m_bids.interfaces.scan_files import FILES, SaveScanFiles
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.itk import read_affine, write_affine

AFFINE = from_matvec(Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix(), [1, 2, 3])
DESCRIPTION = {"name": "sub-01_pet", "scan": ["pet.nii", 12, 34]}


@pytest.fixture
def files(tmp_path, rng):
    """The files of a scan, images uncompressed as the workflow has them."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    made = {}
    for number, name in enumerate(("moving_file", "t1w_file", "mask_file", "dseg_file")):
        data = rng.integers(0, 4, (4, 5, 6 + number)).astype(np.int16)
        made[name] = folder / f"{name}.nii"
        nb.Nifti1Image(data, AFFINE).to_filename(made[name])
    for number, name in enumerate(("rigid_xfm", "template2anat")):
        made[name] = write_affine(AFFINE @ AFFINE if number else AFFINE, folder / f"{name}.txt")
    return ScanFiles(**made)


def test_round_trip(files, tmp_path):
    folder = tmp_path / "scans" / "sub-01_pet"
    assert save_scan_files(folder, DESCRIPTION, files) == folder
    copied = ScanFiles.below(folder)
    for name in FILES:
        source, copy = getattr(files, name), getattr(copied, name)
        if name.endswith("_file"):
            one, other = nb.load(source), nb.load(copy)
            assert copy.name.endswith(".nii.gz")
            np.testing.assert_array_equal(one.dataobj, other.dataobj)
            np.testing.assert_allclose(one.affine, other.affine, atol=1e-6)
        else:
            np.testing.assert_array_equal(read_affine(source), read_affine(copy))
    assert json.loads((folder / "scan.json").read_text()) == DESCRIPTION


def test_a_folder_is_whole_or_absent(files, tmp_path):
    folder = tmp_path / "scans" / "sub-01_pet"
    files.template2anat.write_text("no transform")
    with pytest.raises(ValueError, match="template2anat"):
        save_scan_files(folder, DESCRIPTION, files)
    assert list(folder.parent.iterdir()) == []


def test_a_failure_leaves_what_was_there(files, tmp_path):
    folder = save_scan_files(tmp_path / "scan", DESCRIPTION, files)
    files.mask_file.write_bytes(b"")
    with pytest.raises(ImageError, match="mask_file"):
        save_scan_files(folder, {"name": "new"}, files)
    assert json.loads((folder / "scan.json").read_text()) == DESCRIPTION


def test_interface(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scans" / "sub-01_pet"
    inputs = {name: str(getattr(files, name)) for name in FILES}
    interface = SaveScanFiles(**inputs, description=DESCRIPTION, out_dir=str(folder))
    assert interface.run().outputs.out_dir == str(folder)
    assert json.loads((folder / "scan.json").read_text()) == DESCRIPTION
