import nibabel as nb
import numpy as np
import pytest

from m2m_bids.preprocessing.pet import static_reference
from m2m_bids.spatial.images import ImageError


def image(data):
    return nb.Nifti1Image(np.asarray(data, dtype=np.float32), np.diag([2.0, 3.0, 4.0, 1.0]))


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_static_scan_passes_through(rng, shape):
    data = rng.uniform(size=shape)
    reference = static_reference(image(data))
    np.testing.assert_allclose(reference.image.get_fdata(), data.reshape(4, 5, 6), rtol=1e-6)
    np.testing.assert_array_equal(reference.image.affine, np.diag([2.0, 3.0, 4.0, 1.0]))
    assert reference.method == "3-D image"


def test_frames_are_weighted_by_duration(rng):
    data = rng.uniform(size=(4, 4, 4, 3))
    reference = static_reference(image(data), [60, 120, 300])
    expected = np.average(data, axis=3, weights=[60, 120, 300])
    np.testing.assert_allclose(reference.image.get_fdata(), expected, rtol=1e-5)
    assert reference.method == "mean of 3 frames, weighted by duration"


@pytest.mark.parametrize(
    ("durations", "method"),
    [
        (None, "mean of 3 frames"),
        ([60, 60], "mean of 3 frames, unweighted: 2 durations given"),
        ([60, 0, 60], "mean of 3 frames, unweighted: a duration is not positive"),
        ([60, np.nan, 60], "mean of 3 frames, unweighted: a duration is not positive"),
    ],
)
def test_without_usable_durations_frames_count_alike(rng, durations, method):
    data = rng.uniform(size=(4, 4, 4, 3))
    reference = static_reference(image(data), durations)
    np.testing.assert_allclose(reference.image.get_fdata(), data.mean(axis=3), rtol=1e-5)
    assert reference.method == method


def test_what_is_negative_or_not_finite_counts_as_zero():
    data = np.ones((3, 3, 3, 2))
    data[0, 0, 0] = (np.nan, 4)
    data[1, 1, 1] = (-5, 4)
    data[2, 2, 2] = (np.inf, 0)
    found = static_reference(image(data)).image.get_fdata()
    assert found[0, 0, 0] == 2
    assert found[1, 1, 1] == 2
    assert found[2, 2, 2] == 0


@pytest.mark.parametrize("value", [0.0, np.nan, -1.0])
def test_scan_without_signal_is_refused(value):
    with pytest.raises(ImageError, match="no finite positive voxel"):
        static_reference(image(np.full((4, 4, 4), value)))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 2, 2), (4, 4, 4, 1, 2)])
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ImageError, match=f"{len(shape)}-D image"):
        static_reference(image(np.ones(shape)))
