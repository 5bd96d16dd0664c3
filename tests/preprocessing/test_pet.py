import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing.pet import static_reference
from m2m_bids.preprocessing.pet_timing import frame_timing
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


def durations(values, n_frames=3):
    return frame_timing({"FrameDuration": values}, n_frames)


@pytest.mark.parametrize("kind", ["auto", "twa"])
def test_frames_are_weighted_by_duration(rng, kind):
    data = rng.uniform(size=(4, 4, 4, 3))
    reference = static_reference(image(data), durations([60, 120, 300]), kind=kind)
    expected = np.average(data, axis=3, weights=[60, 120, 300])
    np.testing.assert_allclose(reference.image.get_fdata(), expected, rtol=1e-5)
    assert reference.method == "mean of 3 frames, weighted by duration"


@pytest.mark.parametrize(
    ("timing", "reason"),
    [
        (None, "FrameDuration is not given"),
        (durations(None), "FrameDuration is missing"),
        (durations([60, 60]), "FrameDuration has 2 values for 3 frames"),
        (durations([60, 0, 60]), "FrameDuration has a value that is not positive"),
    ],
)
def test_without_usable_durations_frames_count_alike(rng, timing, reason):
    data = rng.uniform(size=(4, 4, 4, 3))
    reference = static_reference(image(data), timing)
    np.testing.assert_allclose(reference.image.get_fdata(), data.mean(axis=3), rtol=1e-5)
    assert reference.method == f"mean of 3 frames, unweighted: {reason}"
    with pytest.raises(ImageError, match=f"{reason}, which --pet-reference twa needs"):
        static_reference(image(data), timing, kind="twa")


def test_sum_and_single_frames(rng):
    data = rng.uniform(size=(4, 4, 4, 3))
    total = static_reference(image(data), durations([60, 120, 300]), kind="sum")
    np.testing.assert_allclose(total.registered.get_fdata(), data.sum(axis=3), rtol=1e-5)
    # A sum is not in the units of the scan: what is measured is the mean.
    mean = np.average(data, axis=3, weights=[60, 120, 300])
    np.testing.assert_allclose(total.image.get_fdata(), mean, rtol=1e-5)
    assert total.method == "mean of 3 frames, weighted by duration; registered by their sum"
    last = static_reference(image(data), kind="frame:2")
    for one in (last.image, last.registered):
        np.testing.assert_allclose(one.get_fdata(), data[..., 2], rtol=1e-6)
    assert last.method == "frame 2 of 3, from 0"
    with pytest.raises(ImageError, match=r"3 frames, --pet-reference frame:3 .* at most frame:2"):
        static_reference(image(data), kind="frame:3")


@pytest.mark.parametrize("kind", ["twa", "sum", "frame:7"])
def test_kind_is_of_dynamic_scans_alone(rng, kind):
    data = rng.uniform(size=(4, 5, 6))
    reference = static_reference(image(data), kind=kind)
    np.testing.assert_allclose(reference.image.get_fdata(), data, rtol=1e-6)
    assert reference.method == "3-D image"


def test_frames_are_aligned_before_they_are_averaged():
    """A point that moves by whole voxels along an oblique axis comes to lie on itself."""
    affine = from_matvec(
        Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix() @ np.diag([2, 3, 4]),
        [5, 6, 7],
    )
    data = np.zeros((9, 9, 9, 2), np.float32)
    data[4, 4, 4, 0] = data[6, 3, 4, 1] = 1
    forward = from_matvec(np.eye(3), affine[:3, :3] @ (2, -1, 0))
    scan = nb.Nifti1Image(data, affine)
    reference = static_reference(scan, reference2frames=[np.eye(4), forward])
    # Cubic splines through voxel centres give back the voxels, to rounding of their filter.
    np.testing.assert_allclose(reference.image.get_fdata(), data[..., 0], atol=1e-4)
    assert reference.method.endswith(", aligned")


def test_what_is_not_finite_counts_as_zero_and_what_is_negative_in_registration():
    data = np.ones((3, 3, 3, 2))
    data[0, 0, 0] = (np.nan, 4)
    data[1, 1, 1] = (-5, 4)
    data[2, 2, 2] = (np.inf, 0)
    found = static_reference(image(data))
    places = ([0, 1, 2],) * 3
    np.testing.assert_array_equal(found.image.get_fdata()[places], [2, -0.5, 0])
    np.testing.assert_array_equal(found.registered.get_fdata()[places], [2, 2, 0])


@pytest.mark.parametrize("n_frames", [1, 20])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_noise_does_not_bias_the_mean(rng, n_frames, is_aligned):
    """Noise of three times the signal; what is registered is not negative all the same."""
    data = rng.normal(1, 3, (16, 16, 16, n_frames))
    shift = from_matvec(np.eye(3), [1.0, 0, 0])
    motion = {"reference2frames": [shift] * n_frames} if is_aligned and n_frames > 1 else {}
    found = static_reference(image(data), **motion)
    # Five standard errors; beside the shift nothing is seen at the border.
    inside = found.image.get_fdata()[1:-1]
    error = 5 * 3 / np.sqrt(inside.size * n_frames)
    assert inside.mean() == pytest.approx(1, abs=error)
    assert found.registered.get_fdata().min() >= 0


@pytest.mark.parametrize("value", [0.0, np.nan, -1.0])
def test_scan_without_signal_is_refused(value):
    with pytest.raises(ImageError, match="no finite positive voxel"):
        static_reference(image(np.full((4, 4, 4), value)))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 2, 2), (4, 4, 4, 1, 2)])
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ImageError, match=f"{len(shape)}-D image"):
        static_reference(image(np.ones(shape)))
