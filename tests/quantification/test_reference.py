"""Reference regions: the right labels, nothing else, and a reason where there is none."""

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.quantification.reference import (
    EROSION_MM,
    NoReferenceError,
    Reference,
    reference_mean,
    reference_region,
)


def image(data, spacing=(1.0, 1.0, 1.0)):
    return nb.Nifti1Image(np.asarray(data, np.int32), np.diag([*spacing, 1]))


@pytest.fixture
def freesurfer():
    """Ten cubic centimetres of each of these labels, in slabs along the first axis."""
    slabs = [2, 41, 3, 7, 8, 46, 47, 16, 1010]
    return image(np.repeat(slabs, 10)[:, None, None] * np.ones((1, 32, 32), int))


@pytest.mark.parametrize(
    ("region", "numbers"),
    [
        ("cerebellar-grey", {8, 47}),
        ("whole-cerebellum", {7, 8, 46, 47}),
        ("brainstem", {16}),
    ],
)
def test_regions_are_their_labels(freesurfer, region, numbers):
    found = reference_region(freesurfer, "freesurfer", region)
    data = np.asarray(freesurfer.dataobj)
    np.testing.assert_array_equal(found.mask, np.isin(data, list(numbers)))
    assert all(str(number) in found.description for number in numbers)


def test_label_16_is_said_to_be_the_whole_brainstem(freesurfer):
    found = reference_region(freesurfer, "freesurfer", "brainstem")
    assert "midbrain, pons and medulla together" in found.description
    data = np.asarray(freesurfer.dataobj).copy()
    data[75:80][data[75:80] == 16] = 174
    pons = reference_region(image(data), "freesurfer", "brainstem")
    np.testing.assert_array_equal(pons.mask, data == 174)
    assert pons.description == "pons (label 174)"


def test_erosion_is_in_millimetres():
    data = np.zeros((40, 20, 20), int)
    data[5:35, 2:18, 2:18] = 2
    spacing = (0.5, 2.0, 1.5)
    found = reference_region(image(data, spacing), "tissues", "eroded-white-matter").mask
    # The centre of the nearest voxel outside is one voxel beyond the outermost one inside.
    for axis, (first, last) in enumerate(((5, 34), (2, 17), (2, 17))):
        indices = np.flatnonzero(found.any(axis=tuple({0, 1, 2} - {axis})))
        depth = np.array([indices[0] - first + 1, last - indices[-1] + 1]) * spacing[axis]
        assert (depth > EROSION_MM).all()
        assert (depth - spacing[axis] <= EROSION_MM).all()


@pytest.mark.parametrize("region", ["cerebellar-grey", "whole-cerebellum", "brainstem"])
def test_tissues_have_white_matter_alone(region):
    with pytest.raises(NoReferenceError, match=f"the {region} cannot be told"):
        reference_region(image(np.ones((8, 8, 8))), "tissues", region)


def test_missing_labels_are_told():
    with pytest.raises(NoReferenceError, match=r"no brainstem \(label 16"):
        reference_region(image(np.full((8, 8, 8), 2)), "freesurfer", "brainstem")


def test_mean_is_of_what_was_scanned(freesurfer):
    reference = reference_region(freesurfer, "freesurfer", "brainstem")
    data = np.where(reference.mask, 4.0, 100.0)
    seen = np.ones(data.shape, bool)
    seen[70], data[70] = False, 0.0
    assert reference_mean(data, reference, seen, 1.0) == pytest.approx([4.0])
    frames = np.stack([data, 2 * data], -1)
    np.testing.assert_allclose(reference_mean(frames, reference, seen, 1.0), [4, 8])


def test_means_that_mean_nothing_are_refused(freesurfer):
    reference = reference_region(freesurfer, "freesurfer", "brainstem")
    data, seen = np.ones(freesurfer.shape), np.ones(freesurfer.shape, bool)
    cut = seen.copy()
    cut[70:75] = False
    with pytest.raises(NoReferenceError, match="50 % is in the field of view"):
        reference_mean(data, reference, cut, 1.0)
    with pytest.raises(NoReferenceError, match="its mean is not positive"):
        reference_mean(0 * data, reference, seen, 1.0)
    # One frame that means something is enough.
    frames = np.stack([-data, data], -1)
    np.testing.assert_allclose(reference_mean(frames, reference, seen, 1.0), [-1, 1])
    few = Reference(np.arange(data.size).reshape(data.shape) < 100, "few")
    with pytest.raises(NoReferenceError, match="100 mm3, expected at least 500"):
        reference_mean(data, few, seen, 1.0)
