import tracemalloc

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from m2m_bids.spatial.fields import DisplacementField, grid_points
from m2m_bids.spatial.resampling import resample, resample_frames
from m2m_bids.spatial.transforms import map_points

ROTATION = Rotation.from_euler("xyz", [25, -15, 40], degrees=True).as_matrix()


def centered(matrix, shape):
    """Affine whose world origin is the centre of the grid."""
    return from_matvec(matrix, -matrix @ (np.array(shape) - 1) / 2)


# Oblique, anisotropic, left-handed.
MOVING_AFFINE = centered(ROTATION.T * [-2.5, 2, 3], (28, 30, 26))
FIXED_AFFINE = centered(ROTATION * [2, -3, 2.5], (24, 22, 20))
RIGID = from_matvec(ROTATION @ ROTATION, [6, -4, 9])


def moving_image(rng, shape=(28, 30, 26), dtype=np.float32):
    data = gaussian_filter(rng.normal(size=shape), 2)
    return nb.Nifti1Image((1000 * data + 500).astype(dtype), MOVING_AFFINE)


def fixed_image():
    return nb.Nifti1Image(np.zeros((24, 22, 20), np.uint8), FIXED_AFFINE)


def wave_field(amplitude_mm=6.0):
    affine = from_matvec(ROTATION * 4, [-60, -60, -60])
    points = grid_points((32, 32, 32), affine)
    return DisplacementField(amplitude_mm * np.sin(points[..., [1, 2, 0]] / 12), affine)


def test_identity_returns_the_image(rng):
    image = moving_image(rng)
    for order in (0, 1, 3):
        for chain in ((), np.eye(4), (RIGID, np.linalg.inv(RIGID))):
            output = resample(image, chain, image, order=order)
            np.testing.assert_allclose(output.dataobj, image.dataobj, rtol=2e-4)


def test_output_is_the_image_at_the_mapped_points():
    """The value of the moving image is its world position: the output must be the map."""
    image = nb.Nifti1Image(np.zeros((28, 30, 26), np.float32), MOVING_AFFINE)
    positions = grid_points(image.shape, image.affine)
    chain = (RIGID, wave_field())
    reference = fixed_image()
    expected = map_points(chain, grid_points(reference.shape, reference.affine))
    inside = np.ones(reference.shape, dtype=bool)
    for axis in range(3):
        component = nb.Nifti1Image(positions[..., axis].astype(np.float32), image.affine)
        output = np.asarray(resample(component, chain, reference, order=1, cval=np.nan).dataobj)
        inside &= np.isfinite(output)
        ijk = apply_affine(np.linalg.inv(image.affine), expected)
        well_inside = ((ijk > 0) & (ijk < np.array(image.shape) - 1)).all(axis=-1)
        np.testing.assert_allclose(
            output[well_inside], expected[..., axis][well_inside], atol=1e-3
        )
        assert well_inside.mean() > 0.3
        outside = ((ijk < -0.5) | (ijk > np.array(image.shape) - 0.5)).any(axis=-1)
        assert np.isnan(output[outside]).all()
    assert 0.3 < inside.mean() < 1


def test_slabs_do_not_show(rng, monkeypatch):
    image, chain = moving_image(rng), (RIGID, wave_field())
    whole = resample(image, chain, fixed_image())
    monkeypatch.setattr("m2m_bids.spatial.resampling._POINTS_PER_SLAB", 1000)
    np.testing.assert_array_equal(resample(image, chain, fixed_image()).dataobj, whole.dataobj)


def test_cubic_does_not_leave_the_range_but_cval_may(rng):
    data = np.zeros((20, 20, 20), np.float32)
    data[6:14, 6:14, 6:14] = 1
    image = nb.Nifti1Image(data, np.eye(4))
    shifted = np.eye(4)
    shifted[:3, 3] = 0.4
    output = np.asarray(resample(image, shifted, image, cval=-9).dataobj)
    assert output[:19, :19, :19].min() == 0
    assert output.max() == 1
    far = shifted.copy()
    far[0, 3] = 5.4
    output = np.asarray(resample(image, far, image, cval=-9).dataobj)
    np.testing.assert_array_equal(output[15:], -9)
    assert output[:14].min() == 0
    assert output[:14].max() == 1


def test_cubic_is_closer_than_linear_to_a_smooth_function():
    def gaussian(points):
        return np.exp(-(points**2).sum(axis=-1) / (2 * 8**2)).astype(np.float32)

    image = nb.Nifti1Image(gaussian(grid_points((28, 30, 26), MOVING_AFFINE)), MOVING_AFFINE)
    reference, chain = fixed_image(), (np.linalg.inv(RIGID), wave_field(), RIGID)
    points = map_points(chain, grid_points(reference.shape, reference.affine))
    ijk = apply_affine(np.linalg.inv(MOVING_AFFINE), points)
    inside = ((ijk >= 1) & (ijk <= np.array(image.shape) - 2)).all(axis=-1)
    # The peak lies between voxels, above their range.
    inside &= gaussian(points) < np.max(image.dataobj)
    errors = [
        np.abs(
            np.asarray(resample(image, chain, reference, order=order).dataobj) - gaussian(points)
        )[inside].max()
        for order in (1, 3)
    ]
    assert errors[1] < 0.1 * errors[0] < 0.01


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32])
def test_labels_keep_type_and_values(rng, dtype):
    labels = nb.Nifti1Image(
        rng.integers(0, 9, size=(28, 30, 26)).astype(dtype), MOVING_AFFINE, dtype=dtype
    )
    output = resample(labels, (RIGID, wave_field()), fixed_image(), order=0)
    assert output.get_data_dtype() == dtype
    assert set(np.unique(output.dataobj)) <= set(range(9))


def test_other_orders_give_float32(rng):
    for order in (1, 3):
        output = resample(moving_image(rng, dtype=np.int16), RIGID, fixed_image(), order=order)
        assert output.get_data_dtype() == np.float32


def test_frames_are_resampled_alike(rng):
    frames = [moving_image(rng) for _ in range(3)]
    data = np.stack([frame.dataobj for frame in frames], axis=-1)
    series = nb.Nifti1Image(data, MOVING_AFFINE)
    series.header.set_xyzt_units("mm", "sec")
    series.header.set_zooms((2.5, 2, 3, 60))
    output = resample(series, (RIGID, wave_field()), fixed_image())
    assert output.shape == (24, 22, 20, 3)
    assert output.header.get_zooms()[3] == 60
    assert output.header.get_xyzt_units() == ("mm", "sec")
    for t, frame in enumerate(frames):
        single = resample(frame, (RIGID, wave_field()), fixed_image())
        np.testing.assert_array_equal(output.dataobj[..., t], single.dataobj)


def test_not_finite_voxels_count_as_zero(rng):
    image = moving_image(rng)
    clean, dirty = np.array(image.dataobj), np.array(image.dataobj)
    clean[4:9, 5, 6], dirty[4:9, 5, 6] = 0, [np.nan, np.inf, -np.inf, np.nan, np.nan]
    outputs = [
        resample(nb.Nifti1Image(data, MOVING_AFFINE), RIGID, fixed_image()).dataobj
        for data in (clean, dirty)
    ]
    np.testing.assert_array_equal(*outputs)


def test_thin_images(rng):
    image = nb.Nifti1Image(rng.uniform(size=(20, 20, 1)).astype(np.float32), np.eye(4))
    for order in (0, 1, 3):
        output = resample(image, (), image, order=order)
        np.testing.assert_allclose(output.dataobj, image.dataobj, atol=1e-5)


def test_header_follows_the_reference(rng):
    reference = fixed_image()
    reference.set_qform(FIXED_AFFINE, 1)
    reference.set_sform(FIXED_AFFINE, 4)
    header = resample(moving_image(rng), RIGID, reference).header
    np.testing.assert_allclose(header.get_qform(), FIXED_AFFINE, atol=1e-5)
    np.testing.assert_allclose(header.get_sform(), FIXED_AFFINE, atol=1e-5)
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 4)


def test_five_axes_are_rejected(rng):
    image = nb.Nifti1Image(np.zeros((4, 4, 4, 1, 3), "f4"), np.eye(4))
    with pytest.raises(ValueError, match="3-D or 4-D"):
        resample(image, (), image)


@pytest.mark.parametrize("name", ["frames.nii", "frames.nii.gz"])
def test_frames_have_chains_of_their_own(rng, tmp_path, name):
    """As `resample` gives for each frame; only the file is put together here."""
    image = moving_image(rng, (28, 30, 26, 2), np.int16)
    image.header.set_zooms((2.5, 2, 3, 60))
    image.header.set_xyzt_units("mm", "sec")
    chains = [(RIGID, wave_field()), (np.eye(4),)]
    output = nb.load(resample_frames(image, chains, fixed_image(), tmp_path / name))
    for index, chain in enumerate(chains):
        frame = nb.Nifti1Image(image.dataobj[..., index], image.affine)
        expected = resample(frame, chain, fixed_image())
        np.testing.assert_array_equal(output.dataobj[..., index], expected.dataobj)
    np.testing.assert_allclose(output.affine, FIXED_AFFINE, atol=1e-5)
    assert output.header.get_zooms()[3] == 60
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_scale_factors_of_frames_and_grid_are_not_those_of_the_result(rng, tmp_path):
    """Of integers that a header scales, as files of scanners hold them."""
    frames = moving_image(rng, (28, 30, 26, 2))
    grid = nb.Nifti1Image(rng.normal(size=(24, 22, 20)), FIXED_AFFINE)
    stored = {}
    for name, image in (("frames", frames), ("grid", grid)):
        image.set_data_dtype(np.int16)
        nb.save(image, tmp_path / f"{name}.nii.gz")
        stored[name] = nb.load(tmp_path / f"{name}.nii.gz")
        assert stored[name].dataobj.slope not in (0, 1)
    chains = [(RIGID,), (np.eye(4),)]
    file = resample_frames(stored["frames"], chains, stored["grid"], tmp_path / "output.nii")
    output = nb.load(file)
    assert (output.dataobj.slope, output.dataobj.inter) == (1, 0)
    for index, chain in enumerate(chains):
        frame = nb.Nifti1Image(frames.get_fdata(dtype=np.float32)[..., index], MOVING_AFFINE)
        expected = resample(frame, chain, grid).get_fdata()
        # The values are of 0 to 1000, in steps of 1/65.
        np.testing.assert_allclose(output.dataobj[..., index], expected, atol=0.1)


def test_memory_does_not_grow_with_frames(tmp_path):
    """What numpy takes beside the frames as they came; the result is a file."""
    grid = nb.Nifti1Image(np.zeros((48, 48, 48), np.uint8), np.eye(4))
    peaks = []
    for n_frames in (2, 12):
        frames = nb.Nifti1Image(np.ones((8, 8, 8, n_frames), np.float32), np.eye(4))
        tracemalloc.start()
        resample_frames(frames, [()] * n_frames, grid, tmp_path / f"{n_frames}.nii.gz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_frame = 4 * 48**3
    assert peaks[0] > one_frame
    assert peaks[1] - peaks[0] < one_frame


def test_every_frame_needs_a_chain(rng, tmp_path):
    image = moving_image(rng, (28, 30, 26, 2))
    with pytest.raises(ValueError, match="4-D image of 1 frames"):
        resample_frames(image, [(RIGID,)], fixed_image(), tmp_path / "frames.nii")
