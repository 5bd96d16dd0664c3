"""Regional statistics: by hand, and through a real resampling."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from m2m_bids.quantification.names import region_names
from m2m_bids.quantification.statistics import frame_times, regional
from m2m_bids.spatial.resampling import resample


def test_statistics_are_those_of_the_voxels(rng):
    labels = rng.integers(0, 4, (8, 9, 10)).astype(np.int32) * 5
    data = rng.normal(10, 3, labels.shape).astype(np.float32)
    seen = rng.random(labels.shape) < 0.7
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, :3] = (
        Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix() @ (affine[:3, :3])
    )
    image, label_image = nb.Nifti1Image(data, affine), nb.Nifti1Image(labels, affine)
    found = regional(image, label_image, {5: "a", 10: "b", 15: "c"}, is_seen=seen)
    assert [(row.region, row.index) for row in found.statistics] == [
        ("a", 5),
        ("b", 10),
        ("c", 15),
    ]
    for row in found.statistics:
        values = data[(labels == row.index) & seen].astype(float)
        assert row.mean == pytest.approx(values.mean())
        assert row.median == pytest.approx(np.median(values))
        assert row.sd == pytest.approx(values.std())
        assert row.n_voxels == np.count_nonzero(labels == row.index)
        assert row.volume_mm3 == pytest.approx(6 * row.n_voxels)
        assert row.coverage == pytest.approx(len(values) / row.n_voxels)
    np.testing.assert_allclose(found.frame_means[0], [row.mean for row in found.statistics])


def test_frames_have_means_of_their_own(rng):
    labels = np.repeat([0, 1, 2], 5).reshape(-1, 1, 1).astype(np.int32)
    data = rng.random((15, 1, 1, 4))
    image, label_image = (nb.Nifti1Image(x, np.eye(4)) for x in (data, labels))
    weights = [1, 2, 3, 10]
    found = regional(image, label_image, {1: "a", 2: "b"}, frame_weights=weights)
    np.testing.assert_allclose(found.frame_means[:, 0], data[5:10, 0, 0].mean(axis=0))
    np.testing.assert_allclose(found.frame_means[:, 1], data[10:, 0, 0].mean(axis=0))
    expected = np.average(data[5:10, 0, 0].mean(axis=0), weights=weights)
    assert found.statistics[0].mean == pytest.approx(expected)


def test_regions_without_a_value_have_none():
    labels = nb.Nifti1Image(np.array([1, 1, 2, 2], np.int32).reshape(4, 1, 1), np.eye(4))
    data = np.array([1, np.nan, 5, 6.0]).reshape(4, 1, 1)
    seen = np.array([1, 1, 0, 0], bool).reshape(4, 1, 1)
    names = {1: "part", 2: "unseen", 3: "absent"}
    part, unseen, absent = regional(
        nb.Nifti1Image(data, np.eye(4)), labels, names, is_seen=seen
    ).statistics
    assert (part.mean, part.coverage, part.n_voxels) == (1, 0.5, 2)
    assert np.isnan(unseen.mean)
    assert (unseen.coverage, unseen.n_voxels) == (0, 2)
    assert absent.n_voxels == 0
    assert np.isnan([absent.mean, absent.coverage]).all()


def test_means_survive_the_way_to_the_t1w():
    """Thick slabs scanned on an oblique anisotropic grid, and resampled by a known transform."""
    spacing = np.array([2.2, 2.0, 2.5])
    shape = (44, 34, 28)
    centre = np.array([8.0, -15.0, 12.0])
    axes = Rotation.from_euler("xyz", [4, -6, 8], degrees=True).as_matrix()
    t1w_affine = from_matvec(axes * spacing, centre - axes @ (spacing * (np.array(shape) - 1) / 2))
    t1w2scan = from_matvec(
        Rotation.from_euler("xyz", [10, -15, 20], degrees=True).as_matrix(), [12, -7, 5]
    )

    def slab(points):
        along = (points - centre) @ axes[:, 0]
        return np.digitize(along, [-16, 16]) + 1

    t1w_points = apply_affine(t1w_affine, np.moveaxis(np.indices(shape), 0, -1))
    labels = nb.Nifti1Image(slab(t1w_points).astype(np.int32), t1w_affine)
    scan_shape, scan_spacing = np.array((40, 36, 30)), np.array([4.0, 3.5, 4.5])
    scan_axes = Rotation.from_euler("xz", [-12, 9], degrees=True).as_matrix() * scan_spacing
    scan_affine = from_matvec(
        scan_axes, apply_affine(t1w2scan, centre) - scan_axes @ ((scan_shape - 1) / 2)
    )
    # Voxels on a border of slabs mix both, by 0.9 mm of a slab of 32 mm: 0.8 % at this contrast.
    values = np.array([0, 10.0, 12.0, 9.5])
    scan = np.zeros(scan_shape)
    offsets = (np.indices((4, 4, 4)).reshape(3, -1).T + 0.5) / 4 - 0.5
    voxels = np.moveaxis(np.indices(scan_shape), 0, -1)
    for offset in offsets:
        points = apply_affine(np.linalg.inv(t1w2scan) @ scan_affine, voxels + offset)
        scan += values[slab(points)] / len(offsets)
    scan_image = nb.Nifti1Image(scan.astype(np.float32), scan_affine)
    moved = resample(scan_image, t1w2scan, labels)
    found = regional(moved, labels, region_names([1, 2, 3], "tissues"))
    for row in found.statistics:
        assert row.mean == pytest.approx(values[row.index], rel=0.01)
        assert row.median == pytest.approx(values[row.index], rel=1e-3)
    # The other way round the slabs are elsewhere.
    wrong = regional(
        resample(scan_image, np.linalg.inv(t1w2scan), labels), labels, {1: "a", 2: "b", 3: "c"}
    )
    errors = [abs(row.mean / values[row.index] - 1) for row in wrong.statistics]
    assert max(errors) > 0.02


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"FrameTimesStart": [0, 1]},
        {"FrameTimesStart": [0, 1], "FrameDuration": [1]},
        {"FrameTimesStart": [0, "x"], "FrameDuration": [1, 1]},
        {"FrameTimesStart": [0, 60], "FrameDuration": [60, -50]},
        {"FrameTimesStart": [0, 60], "FrameDuration": [60, 0]},
        {"FrameTimesStart": [0, 60], "FrameDuration": [120, 60]},
    ],
)
@pytest.mark.parametrize("n_frames", [1, 2])
def test_times_that_are_not_known(metadata, n_frames):
    assert frame_times(metadata, n_frames) is None


@pytest.mark.parametrize("times", [([3000], [1200]), (3000, 1200)])
def test_times_of_one_frame(times):
    metadata = dict(zip(("FrameTimesStart", "FrameDuration"), times, strict=True))
    assert frame_times(metadata, 1) == ([3000], [4200])


def test_every_region_has_a_name_of_its_own():
    numbers = [*range(1, 300), *range(1000, 1036), *range(2000, 2036), *range(3000, 4036)]
    names = region_names(numbers, "freesurfer")
    assert len(set(names.values())) == len(numbers)
    # As in FreeSurfer's own table.
    known = {2: "Left-Cerebral-White-Matter", 41: "Right-Cerebral-White-Matter", 58:
             "Right-Accumbens-area", 63: "Right-choroid-plexus", 2035: "ctx-rh-insula",
             1024: "ctx-lh-precentral", 4011: "wm-rh-lateraloccipital"}  # fmt: skip
    assert {number: names[number] for number in known} == known
