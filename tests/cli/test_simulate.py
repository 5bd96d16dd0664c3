import json
from dataclasses import dataclass

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec

from m2m_bids.bids.naming import expected_outputs
from m2m_bids.bids.query import query
from m2m_bids.bids.status import status_row, update_status
from m2m_bids.cli.simulate import TableRow, format_table, landmark_table, main
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.itk import write_affine, write_composite
from m2m_bids.spatial.landmarks import Landmarks, write_landmarks

STEM = "sub-01_ses-M000"
PET, FA = f"{STEM}_trc-18FFDG_rec-coregiso_pet", f"{STEM}_param-FA_dwimap"
RIGID = from_matvec([[0, -1, 0], [1, 0, 0], [0, 0, 1]], (10, 0, 0))


@dataclass
class Datasets:
    bids_dir: object
    output_dir: object


@pytest.fixture
def datasets(tmp_path, rng):
    """A cohort without images' contents, whose true transform is RIGID after a shift of 3 mm."""
    bids_dir, output_dir = tmp_path / "bids", tmp_path / "out"
    dti = bids_dir / "derivatives" / "dti"
    image = nb.Nifti1Image(np.zeros((2, 2, 2), dtype=np.uint8), np.eye(4))
    for folder, name in (
        (bids_dir / "sub-01/ses-M000/anat", f"{STEM}_T1w"),
        (bids_dir / "sub-01/ses-M000/pet", PET),
        (dti / "sub-01/ses-M000/dwi", FA),
    ):
        folder.mkdir(parents=True)
        nb.save(image, folder / f"{name}.nii.gz")
    for folder in (bids_dir, dti):
        description = {"Name": "x", "BIDSVersion": "1.10.0"}
        (folder / "dataset_description.json").write_text(json.dumps(description))
    fixed = rng.uniform(20, 80, (30, 3))
    landmarks = Landmarks(fixed, apply_affine(RIGID, fixed + (0, 0, 3.0) * np.ones(3)))
    for name in (PET, FA):
        write_landmarks(landmarks, bids_dir / "sourcedata" / "truth" / name / "landmarks.tsv")
    output_dir.mkdir()
    return Datasets(bids_dir, output_dir)


def scans_of(datasets):
    dti = datasets.bids_dir / "derivatives" / "dti"
    return {scan.modality: scan for scan in query(datasets.bids_dir, derivatives={"dti": dti})}


def test_table_reads_transforms_and_status_of_a_run(datasets):
    scans = scans_of(datasets)
    shift = np.zeros((12, 12, 12, 3))
    shift[..., 2] = 3
    field = DisplacementField(shift, np.diag([10.0, 10.0, 10.0, 1.0]))
    for scan in scans.values():
        outputs = expected_outputs(scan, datasets.output_dir, "m2m")
        outputs["rigid_xfm"].parent.mkdir(parents=True, exist_ok=True)
        write_affine(RIGID, outputs["rigid_xfm"])
    write_composite(
        (RIGID, field), expected_outputs(scans["pet"], datasets.output_dir, "m2m")["m2m_xfm"]
    )
    rows = [
        status_row(scans["pet"], "done"),
        status_row(scans["fa"], "rigid only", "the map folds"),
    ]
    update_status(datasets.output_dir, rows)

    table = {row.scan: row for row in landmark_table(datasets.bids_dir, datasets.output_dir)}
    assert set(table) == {PET, FA}
    assert table[PET].status == "done"
    assert table[PET].before_mm > 20
    assert table[PET].rigid_mm == pytest.approx(3, abs=1e-3)
    assert table[PET].m2m_mm == pytest.approx(0, abs=1e-3)
    assert table[FA].status == "rigid only"
    assert table[FA].rigid_mm == pytest.approx(3, abs=1e-3)
    assert table[FA].m2m_mm is None


def test_scan_that_did_not_run_has_its_header_alone(datasets):
    row = landmark_table(datasets.bids_dir, datasets.output_dir)[0]
    assert row.before_mm > 20
    assert (row.rigid_mm, row.m2m_mm, row.status) == (None, None, "not run")


def test_format_aligns_numbers_and_averages_those_there_are():
    text = format_table(
        [
            TableRow("a_pet", 10.0, 4.0, 1.0, "done"),
            TableRow("b_dwimap", 20.0, 2.0, None, "rigid only"),
        ]
    )
    lines = text.splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["scan", "before", "rigid", "M2M-Reg", "status"],
        ["a_pet", "10.00", "4.00", "1.00", "done"],
        ["b_dwimap", "20.00", "2.00", "-", "rigid", "only"],
        ["mean", "15.00", "3.00", "1.00"],
    ]
    numbers = ("4.00", "2.00", "3.00")
    columns = {line.index(number) for line, number in zip(lines[1:], numbers, strict=True)}
    assert len(columns) == 1


def test_command_prints_the_table(datasets, capsys):
    assert main(["table", str(datasets.bids_dir), str(datasets.output_dir)]) == 0
    printed = capsys.readouterr().out
    assert PET in printed
    assert "not run" in printed


def test_command_says_what_is_missing(datasets, tmp_path, capsys):
    assert main(["table", str(tmp_path / "no"), str(datasets.output_dir)]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["cohort", str(datasets.bids_dir)]) == 1
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
