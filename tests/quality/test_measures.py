import nibabel as nb
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import normalized_mutual_info_score

from m2m_bids.quality import measures
from m2m_bids.quality.measures import Anatomy
from m2m_bids.quality.sides import compare_sides
from m2m_bids.spatial.resampling import resample

AFFINE = nb.affines.from_matvec(np.diag([2.0, 2, 2]), [-47, -47, -47])
RANDOM = np.random.default_rng(0)


def rigid(angles, shift):
    matrix = np.eye(4)
    matrix[:3, :3] = nb.eulerangles.euler2mat(*np.deg2rad(angles))
    matrix[:3, 3] = shift
    return matrix


@pytest.fixture(scope="module")
def anatomy():
    """A ball of grey matter with lobes of white matter that differ left and right."""
    ijk = np.indices((48, 48, 48))
    points = np.moveaxis(ijk * 2.0 - 47, 0, -1)
    mask = np.linalg.norm(points, axis=-1) < 40
    dseg = mask.astype(np.uint8)
    lobes = [((-18, 8, 6), 14), ((16, -4, -8), 11), ((20, 16, 14), 9), ((-8, -20, -10), 10)]
    for centre, radius in lobes:
        dseg[np.linalg.norm(points - centre, axis=-1) < radius] = 2
    t1w = ndimage.gaussian_filter(np.array([0, 60, 100.0])[dseg], 0.6)
    images = (nb.Nifti1Image(data.astype(np.float32), AFFINE) for data in (t1w, mask, dseg))
    return Anatomy(*images, np.eye(4))


@pytest.fixture(scope="module")
def scan(anatomy):
    """FA of it, in another pose: x of the T1w is found at `pose` x of the scan."""
    pose = rigid((10, -20, 15), (22, -30, 8))
    fa = np.array([0, 0.2, 0.6])[anatomy.dseg.get_fdata().astype(int)]
    fa = nb.Nifti1Image(ndimage.gaussian_filter(fa, 0.8).astype(np.float32), AFFINE)
    grid = nb.Nifti1Image(
        np.zeros((60, 56, 50), np.uint8),
        pose @ nb.affines.from_matvec(np.diag([-2.0, 2, 2.5]), [59, -56, -60]),
    )
    moved = resample(fa, (np.linalg.inv(pose),), grid, order=1)
    data = moved.get_fdata() * (moved.get_fdata() > 0.05)
    return nb.Nifti1Image(data.astype(np.float32), grid.affine), pose


def test_a_scan_in_its_place(anatomy, scan):
    image, pose = scan
    numbers = measures.measure_scan(image, anatomy, modality="fa", rigid=pose, used=(pose,))
    assert numbers["brain_dice"] > 0.93 > 0.8 > numbers["brain_dice_initial"]
    assert numbers["nmi"] > numbers["nmi_initial"] + 0.1
    assert numbers["nmi"] == numbers["nmi_rigid"]
    assert numbers["edge_agreement"] > 0.8 > 0.5 > numbers["edge_agreement_initial"]
    assert numbers["white_above_grey"] > 0.95
    assert numbers["side_gap"] > 0.1
    assert numbers["fov_cut_percent"] == 0
    assert numbers["noise_percent"] < 3
    centre = nb.affines.apply_affine(pose, [0, 0, 0])
    assert numbers["header_shift_mm"] == pytest.approx(np.linalg.norm(centre), abs=0.3)
    angle = np.degrees(np.arccos((np.trace(pose[:3, :3]) - 1) / 2))
    assert numbers["header_rotation_deg"] == pytest.approx(angle)


def test_swapped_sides_are_seen(anatomy, scan):
    image, pose = scan
    mirror = np.diag([-1.0, 1, 1, 1])
    # What a converter does that loses the sign of an axis: voxels stay, the world is mirrored.
    swapped = nb.Nifti1Image(image.get_fdata().astype(np.float32), mirror @ image.affine)
    # T1w points lie at the mirrored pose of the mirrored points: nearly right, as a ball is.
    start = mirror @ pose @ mirror
    sides = compare_sides(
        swapped, anatomy.dseg, anatomy.mask, fixed2moving=start, template2fixed=np.eye(4)
    )
    assert sides.gap < -0.1
    assert sides.mirrored > 0.8


def test_mutual_information_is_that_of_scikit_learn():
    first = RANDOM.integers(0, 32, 20_000)
    second = np.where(RANDOM.random(20_000) < 0.5, first, RANDOM.integers(0, 32, 20_000))
    found = measures.normalized_mutual_information(first.astype(float), second.astype(float))
    # Their I / mean(H) is 2 - 2 / ours. The bins at the ends differ by the clipped percentile.
    expected = normalized_mutual_info_score(first, second)
    assert 2 - 2 / found == pytest.approx(expected, abs=0.01)
    assert np.isnan(measures.normalized_mutual_information(first * 0.0, second * 1.0))


def test_edges_of_unrelated_images_agree_by_a_third():
    first, second = (ndimage.gaussian_filter(RANDOM.normal(size=(40,) * 3), 1.5) for _ in "ab")
    mask = np.ones(first.shape, bool)
    assert measures.edge_agreement(first, second, mask) == pytest.approx(1 / 3, abs=0.02)
    assert measures.edge_agreement(first, -2 * first, mask) == pytest.approx(1)
    assert np.isnan(measures.edge_agreement(first, first * 0, mask))


def test_probability_above():
    assert measures.probability_above(np.array([3, 4.0]), np.array([1, 2.0])) == 1
    assert measures.probability_above(np.array([1, 4.0]), np.array([2.0, 3])) == 0.5
    assert measures.probability_above(np.array([2.0]), np.array([2.0])) == 0.5
    assert np.isnan(measures.probability_above(np.array([]), np.array([1.0])))


def test_field_of_view_is_where_voxels_are_not_zero():
    data = np.zeros((10, 10, 10), np.float32)
    data[:, :, 2:8] = 1
    image = nb.Nifti1Image(data, np.diag([3.0, 3, 3, 1]))
    points = nb.affines.apply_affine(image.affine, np.argwhere(np.ones_like(data)))
    assert measures.cut_percent(image, points) == pytest.approx(40)
    assert measures.cut_percent(nb.Nifti1Image(data * 0, np.eye(4)), points) == 100


def test_noise_is_recovered():
    ramp = np.linspace(90, 110, 40)[:, None, None] + np.zeros((40, 40, 40))
    image = nb.Nifti1Image(ramp + RANDOM.normal(0, 5, ramp.shape), np.eye(4))
    assert measures.noise_percent(image, np.ones(ramp.shape, bool)) == pytest.approx(5, rel=0.03)
    flat = nb.Nifti1Image(ramp[:, :, :1], np.eye(4))
    assert measures.noise_percent(flat, np.ones((40, 40, 1), bool)) == pytest.approx(0, abs=1e-9)
    assert np.isnan(measures.noise_percent(image, np.zeros(ramp.shape, bool)))


def test_brain_of_a_pet_scan_is_the_largest_bright_piece():
    data = np.full((30, 30, 30), 1.0, np.float32)
    data[8:22, 8:22, 8:22] = 10
    data[14:16, 14:16, 14:16] = 2
    data[1:4, 1:4, 1:4] = 12
    brain = measures.scan_brain(nb.Nifti1Image(data, np.eye(4)), "pet")
    expected = np.zeros(data.shape, bool)
    expected[8:22, 8:22, 8:22] = True
    np.testing.assert_array_equal(brain, expected)
    assert not measures.scan_brain(nb.Nifti1Image(data * 0, np.eye(4)), "pet").any()


def test_names_of_the_deformable_step():
    found = measures.deformation_numbers({"disagreement_mm": 0.5, "likeness": None})
    assert found == {"cycle_error_mm": 0.5}
    assert measures.deformation_numbers({}) == {}
