import csv
import json
import subprocess

import nibabel as nb
import numpy as np
import pytest
from scipy import ndimage

from m2m_bids.bids.query import query
from m2m_bids.evaluation.landmarks import landmark_errors
from m2m_bids.evaluation.overlap import dice_per_label
from m2m_bids.simulation.cohort import TRUTH_FOLDER, TRUTH_XFM, CohortOptions, write_cohort
from m2m_bids.simulation.truth import LABELS
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.images import load_image
from m2m_bids.spatial.itk import read_composite
from m2m_bids.spatial.landmarks import read_landmarks
from m2m_bids.spatial.resampling import resample

OPTIONS = CohortOptions(spacing_mm=3.5, t1w_mm=3.0, scan_mm=3.0, n_landmarks=80)
STEM = "sub-ADNI011S0001_ses-M000"
PET = f"{STEM}_trc-18FFDG_rec-coregiso_pet"
FA = f"{STEM}_param-FA_dwimap"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """One subject at 3 mm."""
    out_dir = tmp_path_factory.mktemp("cohort") / "bids"
    files = write_cohort(out_dir, n_subjects=1, seed=3, options=OPTIONS)
    return out_dir, {"pet": files[0], "fa": files[1]}


@pytest.fixture(scope="module")
def t1w(cohort):
    return load_image(cohort[0] / f"sub-ADNI011S0001/ses-M000/anat/{STEM}_T1w.nii.gz")


def truth(cohort, modality):
    folder = cohort[0] / TRUTH_FOLDER / {"pet": PET, "fa": FA}[modality]
    return read_composite(folder / TRUTH_XFM), read_landmarks(folder / "landmarks.tsv"), folder


def t1w_labels(cohort):
    return load_image(cohort[0] / TRUTH_FOLDER / f"{STEM}_T1w" / "dseg.nii.gz")


def correlation_with_t1w(cohort, modality, transforms):
    """Correlate a scan, brought to the T1w, with what its labels let expect, inside the brain."""
    labels = np.asarray(t1w_labels(cohort).dataobj)
    weights = {"pet": {"GM": 1.0, "WM": 0.35}, "fa": {"WM": 1.0, "GM": 0.1}}[modality]
    expected = sum(w * (labels == LABELS[name]) for name, w in weights.items())
    expected = ndimage.gaussian_filter(expected, 0.8)
    moved = resample(load_image(cohort[1][modality]), transforms, t1w_labels(cohort), order=1)
    inside = labels > 0
    return np.corrcoef(moved.get_fdata()[inside], expected[inside])[0, 1]


def test_dataset_is_what_clinica_makes_of_adni(cohort):
    out_dir, files = cohort
    written = {path.relative_to(out_dir).as_posix() for path in out_dir.rglob("*.*")}
    assert f"sub-ADNI011S0001/ses-M000/anat/{STEM}_T1w.nii.gz" in written
    assert f"sub-ADNI011S0001/ses-M000/pet/{PET}.nii.gz" in written
    assert f"derivatives/dti/sub-ADNI011S0001/ses-M000/dwi/{FA}.nii.gz" in written
    assert all(path.is_file() for path in files.values())
    assert not any(path.endswith(".json") and "sub-" in path for path in written)
    with (out_dir / "participants.tsv").open() as stream:
        assert [row["participant_id"] for row in csv.DictReader(stream)] == ["sub-ADNI011S0001"]
    for folder, kind in ((".", "raw"), ("derivatives/dti", "derivative")):
        text = (out_dir / folder / "dataset_description.json").read_text()
        assert json.loads(text)["DatasetType"] == kind


def test_query_finds_the_scans_with_their_t1w_and_not_the_truth(cohort):
    out_dir, files = cohort
    scans = query(out_dir, derivatives={"dti": out_dir / "derivatives" / "dti"})
    assert {(scan.modality, scan.file) for scan in scans} == set(files.items())
    for scan in scans:
        assert not scan.reason
        assert scan.t1w.name == f"{STEM}_T1w.nii.gz"
    assert [scan.modality for scan in query(out_dir)] == ["pet"]


def test_validator_misses_only_the_sidecars_that_adni_lacks(cohort):
    pytest.importorskip("bids_validator_deno")
    command = ["bids-validator-deno", str(cohort[0]), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    issues = json.loads(result.stdout)["issues"]["issues"]
    errors = {issue["code"] for issue in issues if issue["severity"] == "error"}
    assert errors == {"SIDECAR_KEY_REQUIRED"}


@pytest.mark.parametrize(("modality", "max_mm"), [("pet", 40), ("fa", 90)])
def test_true_transform_maps_t1w_landmarks_to_the_scan(cohort, modality, max_mm):
    chain, landmarks, _ = truth(cohort, modality)
    pose, field, inverse_pose = chain
    assert isinstance(field, DisplacementField)
    assert len(landmarks.fixed) > 70
    before, rigid, after = (
        landmark_errors(transforms, *landmarks) for transforms in ((), pose @ inverse_pose, chain)
    )
    assert 5 < before.mean() < max_mm
    assert 2 < rigid.mean() < 5
    # The field is interpolated over 3 mm.
    assert after.max() < 0.2
    assert landmark_errors(chain, *landmarks[::-1]).mean() > 5


def mean_dice(*label_images):
    maps = (np.asarray(image.dataobj) for image in label_images)
    return np.mean(list(dice_per_label(*maps).values()))


@pytest.mark.parametrize("modality", ["pet", "fa"])
def test_true_transform_brings_labels_and_image_to_the_t1w(cohort, modality):
    chain, _, folder = truth(cohort, modality)
    labels = load_image(folder / "dseg.nii.gz")
    scan = load_image(cohort[1][modality])
    np.testing.assert_allclose(labels.affine, scan.affine)
    reference = t1w_labels(cohort)
    rigid = chain[0] @ chain[2]
    dice, correlation = (
        [measure(transforms) for transforms in ((), rigid, chain)]
        for measure in (
            lambda transforms: mean_dice(
                resample(labels, transforms, reference, order=0), reference
            ),
            lambda transforms: correlation_with_t1w(cohort, modality, transforms),
        )
    )
    assert dice[0] < dice[1] < dice[2]
    assert dice[2] > 0.75
    assert correlation[0] < correlation[1] < correlation[2]
    # Uptake and anisotropy vary within a tissue, which the labels do not know.
    assert correlation[2] > max(0.6, correlation[1] + 0.05)


def test_t1w_has_a_head_and_is_oblique(cohort, t1w):
    labels = np.asarray(t1w_labels(cohort).dataobj)
    data = t1w.get_fdata()
    assert t1w.get_data_dtype() == np.int16
    means = {name: data[labels == label].mean() for name, label in LABELS.items()}
    assert means["WM"] > 1.1 * means["GM"] > 1.3 * means["ventricles"]
    # Scalp and neck: outside the brain, half as many voxels again are as bright as grey matter.
    bright = data > 0.6 * means["GM"]
    assert (bright & (labels == 0)).sum() > 0.5 * (labels > 0).sum()
    angles = nb.affines.obliquity(t1w.affine)
    assert 1 < np.rad2deg(angles.max()) < 12
    np.testing.assert_allclose(t1w.get_sform(), t1w.get_qform(), atol=1e-3)


def test_fa_is_of_the_brain_alone_with_failures_at_its_rim(cohort):
    data = load_image(cohort[1]["fa"]).get_fdata()
    labels = np.asarray(load_image(truth(cohort, "fa")[2] / "dseg.nii.gz").dataobj)
    assert data[ndimage.binary_dilation(labels > 0, iterations=2) == 0].max() == 0
    above = data > 1
    assert 0 < above.sum() < 0.005 * (labels > 0).sum()
    depth = ndimage.distance_transform_edt(labels > 0)
    assert depth[above].max() < 3
    assert data[labels == LABELS["WM"]].mean() > 2 * data[labels == LABELS["GM"]].mean()


def test_pet_is_flipped_and_uptake_is_in_grey_matter(cohort):
    image = load_image(cohort[1]["pet"])
    assert nb.aff2axcodes(image.affine) == ("L", "A", "S")
    labels = np.asarray(load_image(truth(cohort, "pet")[2] / "dseg.nii.gz").dataobj)
    data = image.get_fdata()
    assert data.min() >= 0
    assert data[labels == LABELS["GM"]].mean() > 1.2 * data[labels == LABELS["WM"]].mean()
    assert data[labels == 0].mean() < 0.4 * data[labels == LABELS["GM"]].mean()


def test_folder_that_is_in_use_and_wrong_numbers_are_errors(cohort, tmp_path):
    with pytest.raises(ValueError, match="not empty"):
        write_cohort(cohort[0], n_subjects=1)
    with pytest.raises(ValueError, match="n_subjects must be at least 1, got 0"):
        write_cohort(tmp_path / "none", n_subjects=0)
    with pytest.raises(ValueError, match="seed must not be negative, got -2"):
        write_cohort(tmp_path / "none", seed=-2)
    assert not (tmp_path / "none").exists()
