import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import from_matvec

from m2m_bids.evaluation import folding
from m2m_bids.evaluation.folding import folding_percentage, folding_percentage_paper
from m2m_bids.spatial.fields import DisplacementField, jacobian_determinant

# Rotated, anisotropic axes.
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
AFFINE = from_matvec(TURN * (2.0, 3.0, 4.0), (10, -20, 5))


def field_of(displace, shape=(20, 10, 10), affine=AFFINE):
    """Displacement as a function of the offset along the first axis, mm along that axis."""
    steps_mm = np.arange(shape[0]) * np.linalg.norm(affine[:3, 0])
    disp = displace(steps_mm)[:, None, None, None] * (affine[:3, 0] / 2.0)
    return DisplacementField(np.broadcast_to(disp, (*shape, 3)).copy(), affine)


def mask_of(shape, affine=AFFINE, planes=slice(None)):
    data = np.zeros(shape, dtype=np.uint8)
    data[planes] = 1
    return nb.Nifti1Image(data, affine)


RIGID = from_matvec(TURN.T, (30, -4, 7))
WHOLE = mask_of((20, 10, 10))


def test_identity_and_stretch_have_no_folds():
    assert folding_percentage(field_of(lambda x: 0 * x), WHOLE) == 0
    assert folding_percentage(field_of(lambda x: 0.9 * x), WHOLE) == 0


def test_reflection_folds_everywhere():
    # x -> x - 2 x has determinant -1.
    assert folding_percentage(field_of(lambda x: -2 * x), WHOLE) == 100


def test_half_of_the_grid_folds():
    # Slope -2.2 up to plane 10 and 0 from there: central differences give planes 0 to 9 the
    # determinant -1.2, plane 10 (half of the slope) -0.1, and the others 1.
    folded = folding_percentage(field_of(lambda x: -2.2 * np.minimum(x, 20)), WHOLE)
    assert folded == pytest.approx(100 * 11 / 20)


@pytest.mark.parametrize("planes", [slice(None), slice(6, 20), slice(0, 3), slice(9, 10)])
def test_chain_of_a_field_folds_as_the_field(planes):
    field = field_of(lambda x: -2.2 * np.minimum(x, 20))
    mask = mask_of((20, 10, 10), planes=planes)
    folds = jacobian_determinant(field)[mask.get_fdata() != 0] <= 0
    expected = 100 * folds.mean()
    assert folding_percentage(field, mask) == pytest.approx(expected)
    assert folding_percentage((RIGID, field), mask) == pytest.approx(expected)


def test_affine_chains_fold_where_they_mirror():
    mask = mask_of((6, 5, 4))
    mirror = np.diag([-1.0, 1, 1, 1])
    assert folding_percentage((), mask) == 0
    assert folding_percentage(RIGID, mask) == 0
    assert folding_percentage((RIGID, mirror), mask) == 100
    assert folding_percentage((mirror, RIGID, mirror), mask) == 0
    assert folding_percentage_paper((RIGID, mirror), (6, 5, 4), AFFINE) == 100
    assert folding_percentage_paper(RIGID, (6, 5, 4), AFFINE) == 0


def test_share_of_a_wave_that_folds():
    # x + a sin(k x) has the slope 1 + a k cos(k x), which is negative over arccos(1 / (a k)) / pi
    # of a period. Grid points at one of 100 places of the period: off by one place at each end.
    n, period_mm, a_k = 200, 200.0, 1.6
    k = 2 * np.pi / period_mm
    field = field_of(lambda x: a_k / k * np.sin(k * x), shape=(n, 4, 4))
    expected = 100 * np.arccos(1 / a_k) / np.pi
    assert 25 < expected < 30
    mask = mask_of((n, 4, 4))
    assert folding_percentage((RIGID, field), mask) == pytest.approx(expected, abs=2)
    found = folding_percentage_paper((RIGID, field), (n, 4, 4), AFFINE)
    assert found == pytest.approx(expected, abs=2)


def test_sheared_grids_have_the_folds_of_the_map():
    sheared = from_matvec([[2, 0.7, 0], [0, 3, 0.5], [0, 0, 4]], (1, 2, 3))
    squeeze = from_matvec([[0.2, 0.5, 0], [0, 0.1, 0], [0, 3, 0.1]])
    assert folding_percentage(squeeze, mask_of((5, 5, 5), sheared)) == 0
    assert folding_percentage_paper(squeeze, (5, 5, 5), sheared) == 0
    flip = squeeze @ np.diag([1, -1, 1, 1])
    assert folding_percentage(flip, mask_of((5, 5, 5), sheared)) == 100
    assert folding_percentage_paper(flip, (5, 5, 5), sheared) == 100


def random_field(rng, shape=(13, 13, 13)):
    """Displacement of up to a voxel or two, and in voxels."""
    disp_voxels = rng.normal(0, 0.4, (*shape, 3))
    return DisplacementField(disp_voxels @ AFFINE[:3, :3].T, AFFINE), disp_voxels


def test_paper_counts_as_the_icon_project(rng):
    torch = pytest.importorskip("torch")
    icon_losses = pytest.importorskip("icon_registration.losses")
    field, disp_voxels = random_field(rng)
    ijk = np.moveaxis(np.indices((13, 13, 13)), 0, -1)
    unit = torch.from_numpy(np.moveaxis((ijk + disp_voxels) / 12, -1, 0)[None])
    expected = icon_losses.flips(unit, in_percentage=True).item()
    assert 5 < expected < 50
    # One cell of 12 ** 3 may turn by the rounding of the field to float32.
    found = folding_percentage_paper((RIGID, field), (13, 13, 13), AFFINE)
    assert found == pytest.approx(expected, abs=100 / 12**3)


def test_paper_counts_cells_not_voxels():
    # Planes 0 to 10 are mirrored: ten of the 19 cells along the axis.
    field = field_of(lambda x: -2.2 * np.minimum(x, 20))
    found = folding_percentage_paper(field, (20, 10, 10), AFFINE)
    assert found == pytest.approx(100 * 10 / 19)


def test_determinant_of_exactly_zero_is_no_fold_in_the_paper():
    # Powers of two, so that zero is exact.
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    field = field_of(lambda x: -x, affine=affine)
    assert folding_percentage_paper(field, (20, 10, 10), affine) == 0
    assert folding_percentage(field, mask_of((20, 10, 10), affine)) == 100


def test_folds_between_neighbours_are_seen_by_the_paper_alone():
    # Planes are moved by 0.6 voxels forth and back in turns: every second pair changes places.
    field = field_of(lambda x: 1.2 * (-1) ** (x / 2), shape=(21, 5, 5))
    assert folding_percentage_paper(field, (21, 5, 5), AFFINE) == pytest.approx(50)
    inner = mask_of((21, 5, 5), planes=slice(1, 20))
    assert folding_percentage(field, inner) == 0


def test_slabs_do_not_show(rng, monkeypatch):
    field, _ = random_field(rng)
    mask = nb.Nifti1Image(rng.integers(0, 2, (13, 13, 13)).astype(np.uint8), AFFINE)
    whole = (
        folding_percentage(field, mask),
        folding_percentage_paper(field, (13, 13, 13), AFFINE),
    )
    assert min(whole) > 1
    for n_points in (1, 2 * 13**2, 5 * 13**2):
        monkeypatch.setattr(folding, "_POINTS_PER_SLAB", n_points)
        assert whole == (
            folding_percentage(field, mask),
            folding_percentage_paper(field, (13, 13, 13), AFFINE),
        )


def test_chain_without_voxels_is_an_error():
    with pytest.raises(ValueError, match="no voxel is inside"):
        folding_percentage((), mask_of((4, 4, 4), planes=slice(0, 0)))
    with pytest.raises(ValueError, match=r"3-D, got shape \(4, 4\)"):
        folding_percentage((), mask_of((4, 4)))
    with pytest.raises(ValueError, match="two points along each axis"):
        folding_percentage((), mask_of((4, 4, 1)))
    with pytest.raises(ValueError, match=r"from 2 on, got \(4, 1, 4\)"):
        folding_percentage_paper((), (4, 1, 4), np.eye(4))
    with pytest.raises(ValueError, match="invertible"):
        folding_percentage_paper((), (4, 4, 4), np.zeros((4, 4)))
