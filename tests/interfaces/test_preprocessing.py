"""Wrappers of preprocessing: what they pass on, what they write, what they say of bad images."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.interfaces.preprocessing import (
    AlignTemplate,
    CleanFA,
    ConformT1w,
    CorrectBias,
    ExtractBrain,
    RegisterRigid,
    SegmentTissues,
    StaticReference,
    TakeMask,
    TakeTissues,
)
from m2m_bids.preprocessing import anatomical, coregistration
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.itk import read_affine

OBLIQUE = from_matvec(
    Rotation.from_euler("xyz", [8, -12, 15], degrees=True).as_matrix() * [-2, 3, 2.5], [40, -30, 9]
)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Interfaces write where they run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def save(tmp_path):
    def save(data, name="sub-01_T1w.nii.gz", affine=OBLIQUE):
        nb.Nifti1Image(np.asarray(data), affine).to_filename(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def t1w(save, rng):
    return save(rng.random((6, 7, 8)).astype(np.float32))


@pytest.fixture
def mask(save):
    return save(np.ones((6, 7, 8), np.uint8), "mask.nii.gz")


def test_mask_and_tissues_are_taken_over(t1w, mask, save, tmp_path):
    conformed = ConformT1w(in_file=t1w).run().outputs.out_file
    brain = TakeMask(in_file=mask, t1w_file=conformed).run().outputs.out_file
    assert brain == str(tmp_path / "mask.nii")
    data = np.asarray(nb.load(t1w).dataobj)
    ranks = np.digitize(data, np.quantile(data, [1 / 3, 2 / 3]))
    labels = save(np.array([3, 1, 2], np.uint8)[ranks], "dseg.nii.gz")
    taken = TakeTissues(in_files=[labels], t1w_file=conformed, mask_file=brain).run().outputs
    found, t1w_image = nb.load(taken.out_file), nb.load(conformed)
    assert np.allclose(found.affine, t1w_image.affine)
    values = np.asarray(t1w_image.dataobj)
    medians = [np.median(values[np.asarray(found.dataobj) == tissue]) for tissue in (3, 1, 2)]
    assert medians == sorted(medians)


@pytest.mark.parametrize("has_transform", [True, False])
def test_template_of_a_given_mask(t1w, mask, tmp_path, monkeypatch, has_transform):
    affine = from_matvec(np.diag([1.1, 0.9, 1.2]), [1, 2, 3])
    monkeypatch.setattr(
        anatomical,
        "align_template",
        lambda image, mask, random_seed: anatomical.BrainExtraction(
            mask, affine @ np.diag([random_seed, 1, 1, 1]), True
        ),
    )
    monkeypatch.setattr(anatomical, "affine_of_transform", lambda file, mask: affine)
    monkeypatch.setattr(anatomical, "is_stripped", lambda image, affine: False)
    given = {"xfm_file": mask} if has_transform else {}
    outputs = AlignTemplate(in_file=t1w, mask_file=mask, random_seed=7, **given).run().outputs
    assert outputs.is_skull_stripped is not has_transform
    expected = affine if has_transform else affine @ np.diag([7, 1, 1, 1])
    np.testing.assert_allclose(read_affine(outputs.template2anat), expected)


def test_conform_reorders_without_interpolation(t1w, tmp_path):
    result = ConformT1w(in_file=t1w).run().outputs
    assert result.out_file == str(tmp_path / "t1w.nii")
    before, after = nb.load(t1w), nb.load(result.out_file)
    assert nb.aff2axcodes(before.affine) == ("L", "A", "S")
    assert nb.aff2axcodes(after.affine) == ("R", "A", "S")
    for ijk in ((0, 0, 0), (5, 2, 7), (3, 6, 1)):
        point = nb.affines.apply_affine(before.affine, ijk)
        found = nb.affines.apply_affine(np.linalg.inv(after.affine), point)
        np.testing.assert_allclose(found, np.rint(found), atol=1e-4)
        value = after.get_fdata()[tuple(np.rint(found).astype(int))]
        assert value == before.get_fdata()[ijk]


def test_conform_takes_one_volume_only(save, rng):
    one = save(rng.random((6, 7, 8, 1)).astype(np.float32), "one_T1w.nii.gz")
    assert nb.load(ConformT1w(in_file=one).run().outputs.out_file).ndim == 3
    two = save(rng.random((6, 7, 8, 1, 2)).astype(np.float32), "two_T1w.nii.gz")
    with pytest.raises(ImageError, match=r"two_T1w.nii.gz: 5-D image"):
        ConformT1w(in_file=two).run()


def test_brain_mask_and_affine_of_the_template(t1w, mask, monkeypatch, tmp_path):
    given = []

    def extract_brain(image, **options):
        given.append(options)
        return anatomical.BrainExtraction(nb.load(mask), OBLIQUE, True, "By hand.")

    monkeypatch.setattr(anatomical, "extract_brain", extract_brain)
    result = ExtractBrain(in_file=t1w, source="skip", random_seed=5).run().outputs
    ExtractBrain(in_file=t1w, source="synthstrip", synthstrip_model=mask, n_threads=3).run()
    assert given == [
        {"source": "skip", "synthstrip_model": None, "random_seed": 5, "n_threads": 0},
        {"source": "synthstrip", "synthstrip_model": str(mask), "random_seed": 0, "n_threads": 3},
    ]
    assert result.method == "By hand."
    assert result.is_skull_stripped is True
    assert nb.load(result.mask_file).get_fdata().all()
    # The direction of the function's matrix, MNI points to T1w points, is that of the file.
    np.testing.assert_allclose(read_affine(result.template2anat), OBLIQUE, atol=1e-6)


def test_image_and_mask_are_not_exchanged(t1w, mask, monkeypatch, tmp_path):
    def divided(image, mask):
        assert mask.get_data_dtype() == np.uint8
        return nb.Nifti1Image(image.get_fdata() / 2, image.affine)

    monkeypatch.setattr(anatomical, "correct_bias_field", divided)
    result = CorrectBias(in_file=t1w, mask_file=mask).run().outputs
    np.testing.assert_allclose(nb.load(result.out_file).get_fdata(), nb.load(t1w).get_fdata() / 2)


def test_tissues_start_from_the_template(t1w, mask, monkeypatch, tmp_path):
    from m2m_bids.spatial.itk import write_affine

    seen = []

    def segment_tissues(image, mask, template2anat):
        seen.append(template2anat)
        labels = nb.Nifti1Image(np.asarray(mask.dataobj) * np.uint8(2), image.affine)
        parts = (np.full(mask.shape, share, np.float32) for share in (0.1, 0.7, 0.2))
        return anatomical.Tissues(
            labels, tuple(nb.Nifti1Image(part, image.affine) for part in parts)
        )

    monkeypatch.setattr(anatomical, "segment_tissues", segment_tissues)
    affine_file = write_affine(OBLIQUE, tmp_path / "template2anat.txt")
    result = SegmentTissues(in_file=t1w, mask_file=mask, template2anat=affine_file).run().outputs
    np.testing.assert_allclose(seen[0], OBLIQUE, atol=1e-6)
    assert nb.load(result.out_file).get_data_dtype() == np.uint8
    shares = [nb.load(file).get_fdata()[0, 0, 0] for file in result.probability_files]
    np.testing.assert_allclose(shares, [0.1, 0.7, 0.2], atol=1e-6)


def test_static_reference_weights_frames(save, rng):
    frames = rng.random((4, 5, 6, 2)).astype(np.float32)
    file = save(frames, "sub-01_pet.nii.gz")
    plain = StaticReference(in_file=file).run().outputs
    assert plain.method == "mean of 2 frames, unweighted: FrameDuration is missing"
    weighted = (
        StaticReference(in_file=file, sidecar={"FrameDuration": [60.0, 180.0]}).run().outputs
    )
    assert weighted.method == "mean of 2 frames, weighted by duration"
    expected = frames @ np.float32([0.25, 0.75])
    np.testing.assert_allclose(nb.load(weighted.out_file).get_fdata(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (np.zeros((4, 5, 6), np.int16), "no finite positive voxel"),
        (np.ones((4, 5, 6, 2, 2), np.int16), "5-D image"),
    ],
)
def test_bad_pet_is_named(save, data, found):
    file = save(data, "sub-01_trc-FDG_pet.nii.gz")
    with pytest.raises(ImageError, match=f"sub-01_trc-FDG_pet.nii.gz: {found}"):
        StaticReference(in_file=file).run()


def test_clean_fa(save, tmp_path):
    data = np.full((5, 5, 5), 0.4, np.float32)
    data[0, 0, 0], data[1, 0, 0], data[2, 2, 2] = np.nan, -0.1, 1.3
    result = CleanFA(in_file=save(data, "sub-01_param-FA_dwimap.nii.gz")).run().outputs
    assert result.out_file == str(tmp_path / "fa.nii")
    cleaned = nb.load(result.out_file).get_fdata()
    assert cleaned[0, 0, 0] == cleaned[1, 0, 0] == 0
    # What `method` says of values above 1: the median of their neighbours.
    assert cleaned[2, 2, 2] == pytest.approx(0.4)
    assert "above 1 the median of their neighbours" in result.method


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (np.full((4, 5, 6), np.nan, np.float32), "no finite positive voxel"),
        (np.full((4, 5, 6, 3), 0.5, np.float32), "4-D image"),
    ],
)
def test_bad_fa_is_named(save, data, found):
    file = save(data, "sub-01_param-FA_dwimap.nii.gz")
    with pytest.raises(ImageError, match=f"sub-01_param-FA_dwimap.nii.gz: {found}"):
        CleanFA(in_file=file).run()


@pytest.mark.parametrize("is_affine", [False, True])
def test_rigid_transform_both_ways(t1w, mask, save, monkeypatch, is_affine):
    rigid = from_matvec(Rotation.from_euler("xz", [20, 70], degrees=True).as_matrix(), [9, -4, 60])
    starts = [coregistration.StartScore("centres of mass", 0.7)]
    starts.append(coregistration.StartScore("header", 0.2))
    calls = []

    def register_rigid(moving, fixed, fixed_mask, *, random_seed):
        calls.append((moving.shape, fixed.shape, random_seed))
        return coregistration.RigidRegistration(rigid, 0.71, tuple(starts))

    name = "register_affine" if is_affine else "register_rigid"
    monkeypatch.setattr(coregistration, name, register_rigid)
    pet = save(np.ones((4, 4, 3), np.float32), "pet.nii.gz")
    inputs = {"moving_file": pet, "fixed_file": t1w, "mask_file": mask, "random_seed": 3}
    result = RegisterRigid(**inputs, is_affine=is_affine).run().outputs
    assert calls == [((4, 4, 3), (6, 7, 8), 3)]
    np.testing.assert_allclose(read_affine(result.xfm), rigid, atol=1e-6)
    np.testing.assert_allclose(read_affine(result.inverse_xfm) @ rigid, np.eye(4), atol=1e-6)
    assert (result.score, result.start) == (0.71, "centres of mass")
