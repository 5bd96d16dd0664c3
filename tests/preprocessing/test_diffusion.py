import nibabel as nb
import numpy as np
import pytest

from m2m_bids.preprocessing.diffusion import clean_fa
from m2m_bids.spatial.images import ImageError


@pytest.fixture
def fa(rng):
    data = np.zeros((16, 16, 16), dtype=np.float32)
    data[3:13, 3:13, 3:13] = rng.uniform(0.1, 0.9, size=(10, 10, 10))
    return data


def cleaned(data):
    return clean_fa(nb.Nifti1Image(data, np.diag([2.0, 2.0, 2.5, 1.0]))).get_fdata()


def test_a_clean_map_is_left_alone(fa):
    np.testing.assert_array_equal(cleaned(fa), fa)
    np.testing.assert_array_equal(cleaned(fa[..., None]), fa)


def test_nan_and_negative_become_zero(fa):
    fa[5, 5, 5], fa[6, 6, 6], fa[0, 0, 0] = np.nan, -0.3, np.nan
    found = cleaned(fa)
    assert found[5, 5, 5] == found[6, 6, 6] == found[0, 0, 0] == 0


def test_failed_fits_take_the_median_of_their_valid_neighbours(fa):
    fa[8, 8, 8], fa[8, 8, 9] = 1.2, 1.1
    around = fa[7:10, 7:10, 7:10]
    expected = np.median(around[around <= 1])
    np.testing.assert_allclose(cleaned(fa)[8, 8, 8], expected, rtol=1e-6)
    assert cleaned(fa).max() <= 1


def test_spikes_outside_the_brain_go_but_a_hemisphere_stays(fa):
    fa[0, 0, 0], fa[15, 15, 14:16] = 1.2, 0.8
    fa[7:9] = 0
    found = cleaned(fa)
    assert found[0, 0, 0] == 0
    assert not found[15].any()
    np.testing.assert_array_equal(found[3:7], fa[3:7])
    np.testing.assert_array_equal(found[9:13], fa[9:13])


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0])
def test_map_without_signal_is_refused(value):
    with pytest.raises(ImageError, match="no finite positive voxel"):
        cleaned(np.full((4, 4, 4), value, dtype=np.float32))


def test_map_in_other_units_and_dimensions_is_refused(fa):
    with pytest.raises(ImageError, match="Rescale"):
        cleaned(fa * 1000)
    with pytest.raises(ImageError, match="4-D"):
        cleaned(np.stack([fa, fa], axis=-1))


def test_real_maps_are_bounded_and_keep_their_tracts(shared_data):
    files = sorted(shared_data.glob("real-bids/derivatives/dti/**/*_dwimap.nii.gz"))
    assert files
    for file in files:
        image = nb.load(file)
        raw, found = np.nan_to_num(image.get_fdata()), clean_fa(image).get_fdata()
        assert raw.max() > 1 >= found.max()
        assert np.isfinite(found).all()
        valid = (raw > 0.3) & (raw <= 1)
        assert np.mean(found[valid] == raw[valid].astype(np.float32)) > 0.97
