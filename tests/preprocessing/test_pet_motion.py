import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing import pet_motion
from m2m_bids.preprocessing.pet import static_reference
from m2m_bids.preprocessing.pet_motion import (
    FrameMotion,
    _nearest,
    _usable_frames,
    corrected_reference,
    estimate_motion,
    motion_parameters,
)
from m2m_bids.preprocessing.pet_timing import frame_timing
from m2m_bids.spatial.images import ImageError

SHAPE = (30, 36, 28)
# Oblique, anisotropic, left-handed.
AFFINE = from_matvec(
    Rotation.from_euler("xyz", [12, -8, 15], degrees=True).as_matrix() @ np.diag([-5.5, 5.0, 6.0])
)
AFFINE[:3, 3] = (9.0, -14.0, 22.0) - AFFINE[:3, :3] @ (np.array(SHAPE) - 1) / 2
CENTRE = apply_affine(AFFINE, (np.array(SHAPE) - 1) / 2)
STARTS_S = [0, 30, 130, 400, 1000, 1600, 2200]
DURATIONS_S = [30, 100, 270, 600, 600, 600, 600]
TIMING = frame_timing({"FrameTimesStart": STARTS_S, "FrameDuration": DURATIONS_S}, 7)
# True pose of the head in each frame: shift (mm) and angles (degrees) about the centre.
POSES = [
    ((0, 0, 0), (0, 0, 0)),
    ((0, 0, 0), (0, 0, 0)),
    ((1.0, -2.0, 0.5), (1, 0, -1)),
    ((0, 0, 0), (0, 0, 0)),
    ((4.0, 3.0, -5.0), (5, -4, 3)),
    ((-6.0, 2.0, 4.0), (-3, 2, 7)),
    ((-3.0, 1.0, 2.0), (-2, 3, 4)),
]


def pose_matrix(shift_mm, angles_deg):
    """Rotate about the centre of the head, then shift: map from head to frame points."""
    rotation = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    return from_matvec(rotation, CENTRE + shift_mm - rotation @ CENTRE)


def head(points, grey, white):
    """Activity of an analytic head: white matter in an ellipsoid, with folds of grey matter."""
    places = np.random.default_rng(7)
    unit = (points - CENTRE) / (62.0, 78.0, 58.0)
    inside = 1 / (1 + np.exp(12 * (np.linalg.norm(unit, axis=1) - 1)))
    share = np.zeros(len(points))
    for _ in range(40):
        place = places.normal(size=3)
        place *= places.uniform(0.3, 0.95) / np.linalg.norm(place)
        distance = ((unit - place) ** 2).sum(axis=1)
        share += np.exp(-distance / (2 * places.uniform(0.1, 0.2) ** 2))
    share = 1 - np.exp(-2 * share)
    return inside * (share * grey + (1 - share) * white)


def scan(poses=POSES, noise=0.05, seed=0):
    """Simulate frames: grey rises, white falls, and so does the noise, as frames get longer."""
    rng = np.random.default_rng(seed)
    points = apply_affine(AFFINE, np.indices(SHAPE).reshape(3, -1).T)
    frames = []
    for index, (shift, angles) in enumerate(poses):
        in_head = apply_affine(np.linalg.inv(pose_matrix(shift, angles)), points)
        late = index / (len(poses) - 1)
        level = 0.02 if index == 0 else 1.0
        values = level * head(in_head, 1.0 + 0.4 * late, 0.6 - 0.2 * late)
        sigma = noise * np.sqrt(600 / DURATIONS_S[index])
        frames.append((values + rng.normal(scale=sigma, size=len(values))).reshape(SHAPE))
    return nb.Nifti1Image(np.stack(frames, axis=-1).astype(np.float32) * 5000, AFFINE)


def brain_points():
    points = apply_affine(AFFINE, np.indices(SHAPE).reshape(3, -1).T)
    return points[np.linalg.norm((points - CENTRE) / (62.0, 78.0, 58.0), axis=1) < 1]


@pytest.fixture(scope="module")
def motion():
    return estimate_motion(scan(), TIMING)


def test_known_motion_is_recovered(motion):
    """Noise of 5 % leaves less than 0.3 mm and 0.3 degrees of 5 to 8 mm and degrees."""
    truth = [pose_matrix(*pose) for pose in POSES]
    points = brain_points()
    to_reference = np.linalg.inv(truth[motion.reference_frame])
    for index in range(2, len(POSES)):
        expected = truth[index] @ to_reference
        found = motion.reference2frames[index]
        error = apply_affine(found, points) - apply_affine(expected, points)
        assert np.linalg.norm(error, axis=1).mean() < 0.3, index
        turn = Rotation.from_matrix(found[:3, :3] @ expected[:3, :3].T).magnitude()
        assert np.rad2deg(turn) < 0.3, index
    np.testing.assert_array_equal(motion.reference2frames[motion.reference_frame], np.eye(4))


def test_early_frames_follow_the_nearest(motion):
    assert motion.followers == (0, 1)
    for index in motion.followers:
        np.testing.assert_array_equal(motion.reference2frames[index], motion.reference2frames[2])


def test_parameters_say_where_the_head_went(motion):
    assert motion.parameters.shape == (len(POSES), 6)
    reference = pose_matrix(*POSES[motion.reference_frame])
    for index in range(2, len(POSES)):
        relative = pose_matrix(*POSES[index]) @ np.linalg.inv(reference)
        # The centre of mass is found in a noisy frame, some millimetres from the true centre.
        centre = apply_affine(reference, CENTRE)
        expected = motion_parameters(relative, centre)
        np.testing.assert_allclose(motion.parameters[index, 3:], expected[3:], atol=0.005)
        np.testing.assert_allclose(motion.parameters[index, :3], expected[:3], atol=1.5)


def test_parameters_are_a_shift_of_the_centre_and_angles():
    matrix = pose_matrix((1.0, -2.0, 3.0), (4, 5, -6))
    found = motion_parameters(matrix, CENTRE)
    np.testing.assert_allclose(found[:3], (1.0, -2.0, 3.0), atol=1e-9)
    np.testing.assert_allclose(np.rad2deg(found[3:]), (4, 5, -6), atol=1e-9)


def test_without_timing_frames_of_little_signal_follow_by_their_place():
    motion = estimate_motion(scan([POSES[0]] * 3, noise=0.01), frame_timing({}, 3))
    assert motion.followers == (0,)
    np.testing.assert_array_equal(motion.reference2frames[0], motion.reference2frames[1])


@pytest.mark.parametrize("starts", [[0, 300, 600], [3000, 3300, 3600]])
def test_long_first_frames_are_registered(starts):
    """Also of scans that begin long after the injection."""
    times = frame_timing({"FrameTimesStart": starts, "FrameDuration": [300] * 3}, 3)
    assert _usable_frames(np.ones(3), times) == [0, 1, 2]
    assert _usable_frames(np.array([1.0, 0.04, 1.0]), times) == [0, 2]


def test_frame_nearest_in_time():
    times = frame_timing({"FrameTimesStart": [0, 10, 1000], "FrameDuration": [10, 990, 10]}, 3)
    assert _nearest([0, 2], 3, times) == [0, 0, 2]
    starts = frame_timing({"FrameTimesStart": [0, 900, 1000]}, 3)
    assert _nearest([0, 2], 3, starts) == [0, 2, 2]
    assert _nearest([1], 3, frame_timing({}, 3)) == [1, 1, 1]


def test_short_scans_are_registered_from_their_start():
    """Where all frames are before 120 s, signal alone decides."""
    times = frame_timing({"FrameTimesStart": [0, 30, 60], "FrameDuration": [30, 30, 30]}, 3)
    assert estimate_motion(scan([POSES[0]] * 3, noise=0.01), times).followers == (0,)


def test_a_scan_without_signal_is_refused():
    image = nb.Nifti1Image(np.zeros((8, 8, 8, 3), np.float32), AFFINE)
    with pytest.raises(ImageError, match="no finite positive voxel"):
        estimate_motion(image, frame_timing({}, 3))


def test_a_volume_is_refused():
    with pytest.raises(ImageError, match="expected a 4-D PET scan"):
        estimate_motion(
            nb.Nifti1Image(np.ones((8, 8, 8), np.float32), AFFINE), frame_timing({}, 1)
        )


def test_reference_is_of_aligned_frames(monkeypatch):
    """With the true motion, frames of a moved head give the image of one that lies still."""
    affines = tuple(pose_matrix(*pose) for pose in POSES)
    seen = []

    def estimate(image, timing, *, random_seed):
        seen.append((timing.durations_s.tolist(), random_seed))
        return FrameMotion(affines, np.zeros((7, 6)), 0, ())

    monkeypatch.setattr(pet_motion, "estimate_motion", estimate)
    sidecar = {"FrameTimesStart": STARTS_S, "FrameDuration": DURATIONS_S}
    still = scan([((0, 0, 0), (0, 0, 0))] * 7, noise=0)
    found = corrected_reference(scan(noise=0), sidecar, random_seed=3)
    assert seen == [([float(value) for value in DURATIONS_S], 3)]
    assert found.method == "mean of 7 frames, weighted by duration, aligned"
    expected = static_reference(still, TIMING).image.get_fdata()
    left = static_reference(scan(noise=0), TIMING).image.get_fdata()
    error = np.abs(found.image.get_fdata() - expected).mean()
    assert error < 0.2 * np.abs(left - expected).mean()


def test_reference_of_a_volume_needs_no_motion(monkeypatch):
    monkeypatch.setattr(pet_motion, "estimate_motion", None)
    volume = nb.Nifti1Image(np.ones((*SHAPE, 1), np.float32), AFFINE)
    assert corrected_reference(volume, {}).method == "3-D image"
