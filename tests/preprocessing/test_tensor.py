"""Tensors fitted to simulated volumes whose tensors are known, in the world."""

import nibabel as nb
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.preprocessing import tensor
from m2m_bids.preprocessing.motion import correct_motion, estimate_motion, find_poses
from m2m_bids.preprocessing.tensor import brain_mask, choose_mask, fit_dwi
from m2m_bids.spatial.gradients import Gradients, count_axes, read_gradients
from m2m_bids.spatial.images import ImageError

SHAPE = (28, 28, 18)
ZOOMS = (2.2, 3.0, 2.6)
# Principal directions (world) and eigenvalues (1e-3 mm^2/s) of the slabs of the phantom.
AXES = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, -1, 1], [0.3, -0.5, 0.9]], float)
AXES /= np.linalg.norm(AXES, axis=1, keepdims=True)
EIGENVALUES = 1e-3 * np.array([[1.7, 0.3, 0.3], [1.4, 0.5, 0.4], [1.2, 0.6, 0.4],
                               [1.0, 0.6, 0.5], [1.6, 0.25, 0.2]])  # fmt: skip
# Balls of fluid, by which the pose can be seen: centre (voxels from the middle), radius (mm).
FLUID = (((-3, 6, 3), 7), ((4, 5, -2), 6), ((2, -7, 3), 8), ((-5, -4, -4), 6), ((8, 0, 0), 5))
FA = np.sqrt(1.5 * ((EIGENVALUES - EIGENVALUES.mean(1, keepdims=True)) ** 2).sum(1)
             / (EIGENVALUES**2).sum(1))  # fmt: skip


def vox2ras(sign):
    """An oblique anisotropic affine, with a determinant of a sign."""
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [14, -9, 21], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([sign * ZOOMS[0], *ZOOMS[1:]])
    affine[:3, 3] = [-15, 20, -40]
    return affine


def tensors():
    """One tensor per slab, in the world, and that of fluid."""
    found = []
    for axis, values in zip(AXES, EIGENVALUES, strict=True):
        frame = np.linalg.svd(axis[None])[2].T
        frame[:, 0] = axis
        found.append(frame @ np.diag(values) @ frame.T)
    return np.array([*found, 3e-3 * np.eye(3)])


def sphere_points(n):
    """Directions spread over a half-sphere (golden spiral), not along any axis."""
    z = (np.arange(n) + 0.5) / n
    phi = np.arange(n) * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - z**2)
    return np.column_stack([radius * np.cos(phi), radius * np.sin(phi), z])


def labels_at(points, affine):
    """Label at world points: 0 outside the brain, 1 to 5 in its slabs, 6 in balls of fluid."""
    voxels = nb.affines.apply_affine(np.linalg.inv(affine), points)
    middle = (np.array(SHAPE) - 1) / 2
    radius = np.linalg.norm((voxels - middle) / (0.40 * np.array(SHAPE)), axis=-1)
    slab = np.clip(np.floor(5 * (voxels[..., 0] / SHAPE[0] - 0.1) / 0.8), 0, 4).astype(int)
    labels = np.where(radius < 1, 1 + slab, 0)
    for centre, size in FLUID:
        distance = np.linalg.norm((voxels - middle - centre) * ZOOMS, axis=-1)
        labels = np.where(distance < size, 6, labels)
    return labels


def world_grid(affine):
    return nb.affines.apply_affine(affine, np.moveaxis(np.indices(SHAPE), 0, -1))


def fsl_files(folder, b_values, directions, affine, name="dwi"):
    """Write world directions as FSL and BIDS define them: by the image's own axes."""
    turn = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    components = directions @ turn
    if np.linalg.det(affine[:3, :3]) > 0:
        components[:, 0] *= -1
    bval, bvec = folder / f"{name}.bval", folder / f"{name}.bvec"
    np.savetxt(bval, b_values[None], fmt="%g")
    np.savetxt(bvec, components.T, fmt="%.6f")
    return bval, bvec


def rician(signal, rng, sigma):
    return np.hypot(signal + rng.normal(0, sigma, signal.shape),
                    rng.normal(0, sigma, signal.shape))  # fmt: skip


def simulate(affine, b_values, directions, *, poses=None, rng=None, snr=None):
    """Volumes of the phantom, seen after it moved by a pose (reference to volume) each."""
    b0 = 1000.0 * np.array([0, 0.8, 1.0, 0.7, 0.9, 1.1, 2.5])
    known, points, volumes = tensors(), world_grid(affine), []
    for index, (b_value, direction) in enumerate(zip(b_values, directions, strict=True)):
        pose = np.eye(4) if poses is None else poses[index]
        labels = labels_at(nb.affines.apply_affine(np.linalg.inv(pose), points), affine)
        # The gradient stands still while the tensors turn with the head.
        seen = pose[:3, :3].T @ direction
        weight = np.exp(-b_value * np.einsum("i,nij,j->n", seen, known, seen))
        signal = (b0 * np.concatenate([[0], weight]))[labels]
        volumes.append(signal)
    data = np.stack(volumes, axis=-1)
    if snr is not None:
        data = rician(data, rng, 1000 / snr)
    return nb.Nifti1Image(data.astype(np.float32), affine)


def angle_deg(found, true):
    return np.rad2deg(np.arccos(np.clip(np.abs(found @ true), 0, 1)))


def interior(affine, n):
    """Voxels of one slab, away from its borders."""
    return ndimage.binary_erosion(labels_at(world_grid(affine), affine) == n + 1)


@pytest.fixture(params=[1, -1], ids=["positive", "negative"])
def affine(request):
    return vox2ras(request.param)


@pytest.fixture
def protocol():
    b_values = np.array([0, 5, *[1000] * 32, 0, *[3000] * 6], float)
    directions = np.zeros((len(b_values), 3))
    directions[2:34], directions[35:] = sphere_points(32), sphere_points(6)
    return b_values, directions


def test_tensors_are_found_in_the_world(affine, protocol, tmp_path, rng):
    """At an SNR of 30 of the brightest b0 tissue; bias of single voxels is averaged away."""
    b_values, directions = protocol
    image = simulate(affine, b_values, directions, rng=rng, snr=30)
    maps = fit_dwi(image, *fsl_files(tmp_path, b_values, directions, affine), is_raw=False)
    for n, axis in enumerate(AXES):
        inside = interior(affine, n)
        assert inside.sum() > 50
        fa, md, ad, rd = (m.get_fdata()[inside] for m in (maps.fa, maps.md, maps.ad, maps.rd))
        values = EIGENVALUES[n]
        assert abs(np.mean(fa) - FA[n]) < 0.02
        np.testing.assert_allclose(np.mean(md), values.mean(), rtol=0.02)
        np.testing.assert_allclose(np.mean(ad), values[0], rtol=0.05)
        np.testing.assert_allclose(np.mean(rd), values[1:].mean(), rtol=0.05)
        found = maps.direction[inside]
        mean_axis = np.linalg.eigh(found.T @ found)[1][:, -1]
        assert angle_deg(mean_axis, axis) < 1.5
        assert np.median(angle_deg(found, axis)) < 5
    assert "32 volumes with b <= 1000 and 3 without" in maps.method
    assert "eddy" not in maps.method


def test_without_noise_the_fit_is_exact(affine, protocol, tmp_path):
    b_values, directions = protocol
    image = simulate(affine, b_values, directions)
    maps = fit_dwi(image, *fsl_files(tmp_path, b_values, directions, affine), is_raw=False)
    for n, axis in enumerate(AXES):
        inside = labels_at(world_grid(affine), affine) == n + 1
        inside &= maps.fa.get_fdata() > 0
        np.testing.assert_allclose(maps.fa.get_fdata()[inside], FA[n], atol=1e-3)
        assert angle_deg(maps.direction[inside], axis).max() < 0.2


def test_brain_is_found_or_given(protocol, tmp_path, rng):
    affine = vox2ras(1)
    b_values, directions = protocol
    image = simulate(affine, b_values, directions, rng=rng, snr=30)
    files = fsl_files(tmp_path, b_values, directions, affine)
    brain = labels_at(world_grid(affine), affine) > 0
    found = fit_dwi(image, *files, is_raw=False).md.get_fdata() > 0
    # A rim of one voxel is missed in places, 10 % of this small brain; what is outside is noise,
    # of high FA.
    assert (found & ~brain).sum() < 0.01 * brain.sum()
    assert 2 * (found & brain).sum() / (found.sum() + brain.sum()) > 0.9
    given = brain.copy()
    given[:10] = False
    mask = tmp_path / "mask.nii"
    nb.Nifti1Image(given.astype(np.uint8), affine).to_filename(mask)
    maps = fit_dwi(image, *files, is_raw=False, mask_file=mask)
    np.testing.assert_array_equal(maps.md.get_fdata() > 0, given)
    assert "in the brain mask that came with the image;" in maps.method


def b0_of_the_phantom(affine, rng):
    return nb.Nifti1Image(
        simulate(affine, np.zeros(1), np.zeros((1, 3)), rng=rng, snr=30).get_fdata()[..., 0],
        affine,
    )


def test_a_mask_of_another_grid_is_resampled(affine, rng, tmp_path):
    """Voxels of 1 mm along the world's axes, beyond the field of view of the image."""
    b0 = b0_of_the_phantom(affine, rng)
    fine = np.eye(4)
    corners = world_grid(affine).reshape(-1, 3)
    fine[:3, 3] = corners.min(axis=0) - 7
    shape = np.ceil(np.ptp(corners, axis=0)).astype(int) + 14
    points = nb.affines.apply_affine(fine, np.moveaxis(np.indices(shape), 0, -1))
    is_brain = labels_at(points, affine) > 0
    nb.Nifti1Image(is_brain.astype(np.uint8), fine).to_filename(tmp_path / "mask.nii")
    found, chosen = choose_mask(tmp_path / "mask.nii", b0)
    assert chosen == "in the brain mask that came with the image, resampled from another grid"
    brain = labels_at(world_grid(affine), affine) > 0
    # A voxel's nearest one of 1 mm is at most 0.9 mm away.
    assert np.mean(found != brain) < 0.02
    np.testing.assert_array_equal(found & ~ndimage.binary_dilation(brain), False)


@pytest.mark.parametrize("spoil", ["elsewhere", "empty", "torn", "4-D"])
def test_a_mask_of_no_use_is_told_and_the_brain_found(rng, tmp_path, spoil, caplog):
    affine = vox2ras(1)
    b0, mask = b0_of_the_phantom(affine, rng), tmp_path / "mask.nii"
    brain = (labels_at(world_grid(affine), affine) > 0).astype(np.uint8)
    placed = {"elsewhere": nb.affines.from_matvec(np.eye(3), [30, 0, 0]) @ affine}
    data = {"empty": 0 * brain, "4-D": np.stack([brain, brain], -1)}
    nb.Nifti1Image(data.get(spoil, brain), placed.get(spoil, affine)).to_filename(mask)
    if spoil == "torn":
        mask.write_bytes(mask.read_bytes()[:400])
    found, chosen = choose_mask(mask, b0)
    np.testing.assert_array_equal(found, brain_mask(b0))
    for told in (chosen, caplog.text):
        assert str(mask) in told
    assert "median_otsu; the one that came with it cannot be used" in chosen


@pytest.mark.parametrize("form", ["columns", "unnormalised", "nan at b0", "commas"])
def test_gradient_files_of_all_forms(affine, protocol, tmp_path, form):
    b_values, directions = protocol
    bval, bvec = fsl_files(tmp_path, b_values, directions, affine)
    table = np.loadtxt(bvec)
    if form == "columns":
        np.savetxt(bvec, table.T)
    elif form == "unnormalised":
        np.savetxt(bvec, table * np.linspace(0.5, 2, table.shape[1]))
    elif form == "nan at b0":
        table[:, 0] = np.nan
        np.savetxt(bvec, table)
    else:
        np.savetxt(bvec, table, delimiter=",")
    found = read_gradients(bval, bvec, n_volumes=len(b_values), vox2ras=affine)
    np.testing.assert_array_equal(found.b_values, b_values)
    np.testing.assert_allclose(found.directions, directions, atol=1e-5)
    assert list(np.flatnonzero(~found.is_used)) == list(range(35, 41))


def test_volumes_without_direction_are_left_out(tmp_path):
    """Scanners append averages over directions: a b-value, no direction."""
    directions = np.vstack([np.zeros((1, 3)), sphere_points(6), np.zeros((1, 3))])
    b_values = np.array([0, *[1000] * 7], float)
    files = fsl_files(tmp_path, b_values, directions, vox2ras(1))
    found = read_gradients(*files, n_volumes=8, vox2ras=vox2ras(1))
    assert list(found.is_used) == [True] * 7 + [False]


@pytest.mark.parametrize(
    ("bval", "bvec", "message"),
    [
        ("0 1000", "0 1 0\n0 0 1\n0 0 0", "dwi.bval: 2 b-values, expected 3"),
        ("0 1000 1000", "0 1\n0 0\n0 0", r"dwi.bvec: 3 x 2|dwi.bvec: 2 x 3"),
        ("0 1000 nan", "0 1 0\n0 0 1\n0 0 0", "dwi.bval: a b-value is negative or not finite"),
        ("0 1000 x", "0 1 0\n0 0 1\n0 0 0", "dwi.bval: cannot be read"),
        ("0 1000 1000", "0 1 0\n0 0 1\n0 0", "dwi.bvec: cannot be read"),
        ("0 1000 1000", "", "dwi.bvec: empty"),
    ],
)
def test_wrong_gradient_files_are_named(tmp_path, bval, bvec, message):
    (tmp_path / "dwi.bval").write_text(bval)
    (tmp_path / "dwi.bvec").write_text(bvec)
    with pytest.raises(ImageError, match=message):
        read_gradients(tmp_path / "dwi.bval", tmp_path / "dwi.bvec", n_volumes=3,
                       vox2ras=np.eye(4))  # fmt: skip


@pytest.mark.parametrize(
    ("b_values", "directions", "message"),
    [
        ([0] + [1000] * 5, sphere_points(5), "5 directions"),
        ([0] + [1000] * 10, np.vstack([sphere_points(5), -sphere_points(5)]), "5 directions"),
        ([0] + [2000] * 8, sphere_points(8), "0 directions"),
        ([100] + [1000] * 8, sphere_points(8), "no volume without diffusion weighting"),
        ([0] + [1000] * 8, np.column_stack([*Rotation.from_euler("z", np.arange(8) * 0.37).
                                           as_matrix()[:, 0, :2].T, np.zeros(8)]),
         "determine a tensor"),
    ],
)  # fmt: skip
def test_too_few_directions(tmp_path, b_values, directions, message):
    directions = np.vstack([np.zeros((1, 3)), directions])
    files = fsl_files(tmp_path, np.array(b_values, float), directions, np.eye(4))
    image = nb.Nifti1Image(np.ones((4, 4, 4, len(b_values)), np.float32), np.eye(4))
    with pytest.raises(ImageError, match=message):
        fit_dwi(image, *files, is_raw=False)


def test_axes_are_counted_up_to_their_sign():
    assert count_axes(sphere_points(30)) == 30
    assert count_axes(np.vstack([sphere_points(9), -sphere_points(9)])) == 9


def test_image_of_three_dimensions_is_refused(tmp_path):
    with pytest.raises(ImageError, match="3-D image"):
        fit_dwi(nb.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4)), "a", "b", is_raw=False)


def test_image_without_signal_is_refused(tmp_path):
    b_values, directions = np.array([0, *[1000] * 6], float), np.zeros((7, 3))
    directions[1:] = sphere_points(6)
    files = fsl_files(tmp_path, b_values, directions, np.eye(4))
    with pytest.raises(ImageError, match="no signal"):
        fit_dwi(nb.Nifti1Image(np.zeros((3, 3, 3, 7), np.float32), np.eye(4)), *files,
                is_raw=False)  # fmt: skip


def poses(n, rng, affine):
    """Rotations of some degrees about the middle of the head, and shifts; none at first."""
    middle = nb.affines.apply_affine(affine, (np.array(SHAPE) - 1) / 2)
    found = [np.eye(4)]
    for _ in range(n - 1):
        pose = np.eye(4)
        axis = rng.normal(size=3)
        angle = rng.uniform(10, 14) * axis / np.linalg.norm(axis)
        pose[:3, :3] = Rotation.from_rotvec(angle, degrees=True).as_matrix()
        pose[:3, 3] = middle + rng.uniform(-2, 2, 3) - pose[:3, :3] @ middle
        found.append(pose)
    return found


def test_motion_is_found(rng):
    affine = vox2ras(-1)
    b_values, directions = np.array([0.0, 1000]), np.array([[0, 0, 0], [0.6, 0, 0.8]])
    true = poses(2, rng, affine)[1]
    data = simulate(affine, b_values, directions, poses=[np.eye(4), true], rng=rng,
                    snr=30).get_fdata()  # fmt: skip
    found = estimate_motion(data[..., 0], data[..., 1], affine)
    points = world_grid(affine)[labels_at(world_grid(affine), affine) > 0]
    apart = nb.affines.apply_affine(found, points) - nb.affines.apply_affine(true, points)
    assert np.linalg.norm(apart, axis=1).mean() < 1.3  # half a voxel


@pytest.mark.parametrize("n_directions", [6, 20])
def test_volumes_that_moved_are_aligned_with_the_others(rng, n_directions):
    """By their mean where directions are few, else by the tensor of the others; faint signal.

    Slabs of one tensor each differ by the direction more than tissue does, hence the low b-value.
    """
    affine = vox2ras(1)
    b_values = np.array([0.0, 0.0, *[400.0] * n_directions])
    directions = np.vstack([np.zeros((2, 3)), sphere_points(n_directions)])
    true = [np.eye(4)]
    middle = nb.affines.apply_affine(affine, (np.array(SHAPE) - 1) / 2)
    for _ in b_values[1:]:
        turn = Rotation.from_rotvec(rng.normal(0, 2.5, 3), degrees=True).as_matrix()
        true.append(nb.affines.from_matvec(turn, middle + rng.normal(0, 1.3, 3) - turn @ middle))
    data = simulate(affine, b_values, directions, poses=true, rng=rng, snr=12).get_fdata()
    found = find_poses(data, affine, Gradients(b_values, directions))
    np.testing.assert_array_equal(found[0], np.eye(4))
    points = world_grid(affine)[labels_at(world_grid(affine), affine) > 0]

    def errors(poses):
        pairs = zip(poses, true, strict=True)
        return np.array(
            [
                np.linalg.norm(
                    nb.affines.apply_affine(one, points) - nb.affines.apply_affine(other, points),
                    axis=1,
                ).mean()
                for one, other in pairs
            ]
        )

    assert errors([np.eye(4)] * len(true)).mean() > 1.6
    # A third of a voxel of 2.2 to 3 mm, for a head of 60 mm.
    assert errors(found).mean() < 0.9
    assert errors(found).max() < 1.6


def test_gradients_turn_with_the_head(affine, tmp_path, rng, monkeypatch):
    """All weighted volumes of a head that turned by 12 degrees: directions are off without it."""
    b_values = np.array([0.0, *[1000] * 12])
    directions = np.vstack([np.zeros((1, 3)), sphere_points(12)])
    turned = poses(2, np.random.default_rng(3), affine)[1]
    image = simulate(affine, b_values, directions, poses=[np.eye(4)] + [turned] * 12, rng=rng,
                     snr=30)  # fmt: skip
    files = fsl_files(tmp_path, b_values, directions, affine)
    kept = []

    def keep(*arguments, **options):
        kept.append(correct_motion(*arguments, **options))
        return kept[0]

    monkeypatch.setattr(tensor, "correct_motion", keep)
    maps = fit_dwi(image, *files, is_raw=True)
    assert "without correction of eddy currents and susceptibility" in maps.method

    def errors(direction):
        off = []
        for n, axis in enumerate(AXES):
            found = direction[interior(affine, n)]
            mean_axis = np.linalg.eigh(found.T @ found)[1][:, -1]
            off.append(angle_deg(mean_axis, axis))
        return np.array(off)

    turned_errors = errors(maps.direction)
    assert turned_errors.max() < 4
    monkeypatch.setattr(
        tensor,
        "correct_motion",
        lambda data, vox2ras, gradients, *, random_seed: kept[0]._replace(gradients=gradients),
    )
    unturned = fit_dwi(image, *files, is_raw=True)
    assert errors(unturned.direction).max() > 7
    assert errors(unturned.direction).mean() > 2 * turned_errors.mean()


def test_real_volumes_agree_with_other_fits(tmp_path):
    """Volumes of a person that DIPY ships, a corner of white matter; another fit of the signal."""
    from dipy.core.gradients import gradient_table
    from dipy.data import get_fnames
    from dipy.reconst.dti import TensorModel

    file, bval, bvec = get_fnames(name="small_64D")
    image = nb.load(file)
    mask = tmp_path / "mask.nii"
    nb.Nifti1Image(np.ones(image.shape[:3], np.uint8), image.affine).to_filename(mask)
    maps = fit_dwi(image, bval, bvec, is_raw=False, mask_file=mask)
    table = gradient_table(np.loadtxt(bval), bvecs=np.nan_to_num(np.loadtxt(bvec)))
    fa, md = maps.fa.get_fdata(), maps.md.get_fdata()
    # The same fit by the image's own axes: a tensor's shape does not depend on them.
    same = TensorModel(table, fit_method="WLS").fit(image.get_fdata())
    np.testing.assert_allclose(fa, same.fa, atol=1e-5)
    # The logarithm of noisy signals is biased by some percent of the diffusivity.
    other = TensorModel(table, fit_method="NLLS").fit(image.get_fdata())
    assert np.median(np.abs(fa - other.fa)) < 0.02
    np.testing.assert_allclose(np.median(md), np.median(other.md), rtol=0.05)
    assert 0.6e-3 < np.median(md) < 1.0e-3
