import nibabel as nb
import numpy as np
import pytest

from m2m_bids.preprocessing.anatomical import (
    BrainExtraction,
    affine_of_transform,
    align_template,
    correct_bias_field,
    extract_brain,
    load_t1w,
    segment_tissues,
)
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.itk import write_affine, write_composite
from m2m_bids.spatial.transforms import DisplacementField


def inside(image):
    return np.asarray(image.dataobj) > 0


@pytest.fixture(scope="module")
def corrected(head):
    return correct_bias_field(head.t1w)


@pytest.fixture(scope="module")
def extraction(corrected):
    return extract_brain(corrected)


def test_bias_correction_flattens_white_matter_and_keeps_its_scale(head, corrected):
    white = np.asarray(head.labels.dataobj) == 2

    def flatness(image):
        values = image.get_fdata()[white]
        return values.std() / values.mean()

    assert flatness(corrected) < 0.92 * flatness(head.t1w)
    ratio = np.mean(corrected.get_fdata()[white]) / np.mean(head.t1w.get_fdata()[white])
    assert 0.7 < ratio < 1.4
    assert corrected.shape == head.t1w.shape
    np.testing.assert_array_equal(corrected.affine, head.t1w.affine)


def test_bias_field_of_a_uniform_image_is_one():
    data = np.zeros((30, 30, 30), dtype=np.float32)
    data[5:25, 5:25, 5:25] = 100
    image = nb.Nifti1Image(data, np.diag([4.0, 4.0, 4.0, 1.0]))
    found = correct_bias_field(image).get_fdata()
    # At its corners the cube is too thin for the region in which the field is estimated.
    np.testing.assert_allclose(found[6:24, 6:24, 6:24], 100, rtol=0.04)
    assert not found[data == 0].any()


def test_bias_in_a_mask_keeps_the_mean_of_the_logarithm(head):
    found = correct_bias_field(head.t1w, head.brain).get_fdata()[inside(head.brain)]
    before = head.t1w.get_fdata()[inside(head.brain)]
    assert abs(np.mean(np.log(found + 1) - np.log(before + 1))) < 0.05


def test_brain_of_a_head(head, extraction, tools):
    assert isinstance(extraction, BrainExtraction)
    assert not extraction.is_skull_stripped
    assert extraction.mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(extraction.mask.affine, head.t1w.affine)
    # A shift of the outline by half a voxel of 3 mm costs 0.04.
    assert tools["dice"](inside(extraction.mask), inside(head.brain)) > 0.95
    # The simulated head is the template deformed by at most 5 mm along each axis.
    assert tools["mean_distance_mm"](extraction.template2anat, np.eye(4), head.brain) < 4


@pytest.mark.slow
def test_brain_with_a_disturbed_oblique_header(head, extraction, tools):
    """The same head with a header that is off by 60 mm and 20 degrees has the same mask."""
    disturbance = tools["rigid_matrix"]((35, -35, 34), (14, -9, 11))
    moved = nb.Nifti1Image(head.t1w.get_fdata(), disturbance @ head.t1w.affine)
    found = extract_brain(moved)
    assert tools["dice"](inside(found.mask), inside(extraction.mask)) > 0.97
    expected = disturbance @ extraction.template2anat
    assert tools["mean_distance_mm"](found.template2anat, expected, head.brain) < 2


def test_stripped_image_keeps_its_outline(head, extraction, tools):
    stripped = head.t1w.get_fdata() * inside(head.brain)
    found = extract_brain(nb.Nifti1Image(stripped.astype(np.float32), head.t1w.affine))
    assert found.is_skull_stripped
    assert tools["dice"](inside(found.mask), inside(head.brain)) > 0.98
    distance = tools["mean_distance_mm"](found.template2anat, extraction.template2anat, head.brain)
    assert distance < 2


def test_brain_as_told(head, extraction, tools):
    """A stripped image is not looked at for "skip", nor one with skull for "template"."""
    stripped = head.t1w.get_fdata(dtype=np.float32) * inside(head.brain)
    skipped = extract_brain(nb.Nifti1Image(stripped, head.t1w.affine), source="skip")
    assert skipped.is_skull_stripped
    assert tools["dice"](inside(skipped.mask), inside(head.brain)) > 0.98
    whole = extract_brain(head.t1w, source="skip")
    assert whole.is_skull_stripped  # as told: the mask is the whole head
    assert inside(whole.mask).sum() > 1.3 * inside(extraction.mask).sum()
    forced = extract_brain(nb.Nifti1Image(stripped, head.t1w.affine), source="template")
    assert not forced.is_skull_stripped


def test_template_in_a_given_mask(head, extraction, tools):
    found = align_template(head.t1w, head.brain)
    assert found.mask is head.brain
    assert not found.is_skull_stripped
    assert tools["mean_distance_mm"](found.template2anat, np.eye(4), head.brain) < 4
    distance = tools["mean_distance_mm"](found.template2anat, extraction.template2anat, head.brain)
    assert distance < 2
    data = head.t1w.get_fdata(dtype=np.float32) * inside(head.brain)
    assert align_template(nb.Nifti1Image(data, head.t1w.affine), head.brain).is_skull_stripped


def test_affine_of_a_transform(head, tools, tmp_path):
    """Scale, shear, rotation and shift: the inverse and the transpose are far from it."""
    affine = tools["rigid_matrix"]((6, -4, 9), (8, -5, 12)) @ np.diag([1.06, 0.95, 1.1, 1])
    affine[0, 1] += 0.05
    mask = nb.Nifti1Image(head.brain.get_fdata(dtype=np.float32), affine @ head.brain.affine)
    file = write_affine(affine, tmp_path / "xfm.txt")
    np.testing.assert_allclose(affine_of_transform(file, mask), affine, atol=1e-4)
    grid = np.diag([10.0, 10, 10, 1])
    grid[:3, 3] = (-110, -150, -110)
    wave = np.sin(np.indices((23, 27, 23)).transpose(1, 2, 3, 0) * 2.1).astype(np.float32)
    field = DisplacementField(wave * 1.5, grid)  # short waves, that no affine follows
    warped = write_composite([affine, field], tmp_path / "xfm.h5")
    found = affine_of_transform(warped, mask)
    assert tools["mean_distance_mm"](found, affine, head.brain) < 0.3


def test_transform_of_another_image_is_told(head, tools, tmp_path):
    """Also where only its header was changed, by as little as 15 mm."""
    away = tools["rigid_matrix"]((0, 15, 0), (0, 0, 0))
    for shift in (away, np.linalg.inv(away)):
        file = write_affine(shift, tmp_path / "xfm.txt")
        with pytest.raises(ImageError, match=r"xfm\.txt: brings only \d+ % of the brain"):
            affine_of_transform(file, head.brain)


def test_tissues_of_a_known_head(head, corrected, tools):
    labels, probabilities = segment_tissues(corrected, head.brain, np.eye(4))
    found, truth = np.asarray(labels.dataobj), np.asarray(head.labels.dataobj)
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found > 0, inside(head.brain))
    # Voxels of 3 mm are mixtures of tissues nearly everywhere but in the white matter.
    assert tools["dice"](found == 1, truth == 1) > 0.82
    assert tools["dice"](found == 2, truth == 2) > 0.85
    assert tools["dice"](found == 3, truth == 3) > 0.5
    shares = np.stack([np.asarray(image.dataobj) for image in probabilities])
    np.testing.assert_allclose(shares.sum(axis=0), inside(head.brain), atol=1e-5)
    assert shares.min() >= 0
    np.testing.assert_array_equal(np.argmax(shares, axis=0)[found > 0], found[found > 0] - 1)
    for image in (labels, *probabilities):
        np.testing.assert_array_equal(image.affine, corrected.affine)


def test_tissues_without_template(head, corrected, tools):
    found = np.asarray(segment_tissues(corrected, head.brain).labels.dataobj)
    assert tools["dice"](found == 2, np.asarray(head.labels.dataobj) == 2) > 0.8


def test_bad_images_are_named(head):
    empty = nb.Nifti1Image(np.zeros((8, 8, 8), dtype=np.float32), np.eye(4))
    for call in (correct_bias_field, extract_brain):
        with pytest.raises(ImageError, match="every voxel is zero"):
            call(empty)
    with pytest.raises(ImageError, match="grid"):
        segment_tissues(head.t1w, empty)


def test_t1w_without_signal_is_named(tmp_path):
    file = tmp_path / "sub-01_T1w.nii.gz"
    nb.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)).to_filename(file)
    with pytest.raises(ImageError, match=r"sub-01_T1w.nii.gz: every voxel is zero"):
        load_t1w(file)


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "volume_ml"), [("02", (1350, 1600)), ("03", (1300, 1530))])
def test_real_heads(shared_data, tools, subject, volume_ml):
    """With and without skull the template lands in the same place; the volume is plausible."""
    folder = shared_data / f"real-bids/sub-{subject}/ses-M000/anat"
    image = nb.load(folder / f"sub-{subject}_ses-M000_T1w.nii.gz")
    whole = extract_brain(image)
    millilitres = inside(whole.mask).sum() * np.prod(image.header.get_zooms()) / 1000
    assert volume_ml[0] < millilitres < volume_ml[1]
    data = np.where(inside(whole.mask), image.get_fdata(), 0).astype(np.float32)
    stripped = extract_brain(nb.Nifti1Image(data, image.affine))
    assert not whole.is_skull_stripped
    assert stripped.is_skull_stripped
    assert tools["dice"](inside(whole.mask), inside(stripped.mask)) > 0.98
    distance = tools["mean_distance_mm"](stripped.template2anat, whole.template2anat, whole.mask)
    assert distance < 2
