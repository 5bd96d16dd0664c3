import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec

from m2m_bids.evaluation.folding import folding_percentage, mask_on_field
from m2m_bids.spatial.fields import DisplacementField

# Rotated, anisotropic axes.
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
AFFINE = from_matvec(TURN * (2.0, 3.0, 4.0), (10, -20, 5))


def field_of(displace, shape=(20, 10, 10), affine=AFFINE):
    """Displacement as a function of the offset along the first axis, mm along that axis."""
    steps_mm = np.arange(shape[0]) * np.linalg.norm(affine[:3, 0])
    disp = displace(steps_mm)[:, None, None, None] * (affine[:3, 0] / 2.0)
    return DisplacementField(np.broadcast_to(disp, (*shape, 3)).copy(), affine)


def test_identity_and_stretch_have_no_folds():
    assert folding_percentage(field_of(lambda x: 0 * x)) == 0
    assert folding_percentage(field_of(lambda x: 0.9 * x)) == 0


def test_reflection_folds_everywhere():
    # x -> x - 2 x has determinant -1.
    assert folding_percentage(field_of(lambda x: -2 * x)) == 100


def test_determinant_of_exactly_zero_is_a_fold():
    assert folding_percentage(field_of(lambda x: -x, affine=np.diag([2.0, 3.0, 4.0, 1]))) == 100


def test_half_of_the_grid_folds():
    # Slope -2.2 up to plane 10 and 0 from there: central differences give planes 0 to 9 the
    # determinant -1.2, plane 10 (half of the slope) -0.1, and the others 1.
    folded = folding_percentage(field_of(lambda x: -2.2 * np.minimum(x, 20)))
    assert folded == pytest.approx(100 * 11 / 20)


def test_mask_selects_points_on_its_own_grid():
    field = field_of(lambda x: -2.2 * np.minimum(x, 20))
    # A mask of half the spacing with the same axes, over the field's planes 6 to 19: 5 fold.
    mask_affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1.0])
    data = np.zeros((40, 20, 20), dtype=np.uint8)
    data[12:] = 1
    mask = nb.Nifti1Image(data, mask_affine)
    inside = mask_on_field(mask, field)
    assert inside[6:].all()
    assert not inside[:6].any()
    assert folding_percentage(field, mask) == pytest.approx(100 * 5 / 14)


def test_mask_without_points_is_an_error():
    mask = nb.Nifti1Image(np.ones((4, 4, 4), dtype=np.uint8), from_matvec(np.eye(3), [500] * 3))
    with pytest.raises(ValueError, match="no grid point"):
        folding_percentage(field_of(lambda x: 0 * x), mask)
    flat = nb.Nifti1Image(np.ones((4, 4), dtype=np.uint8), np.eye(4))
    with pytest.raises(ValueError, match="3-D"):
        folding_percentage(field_of(lambda x: 0 * x), flat)
