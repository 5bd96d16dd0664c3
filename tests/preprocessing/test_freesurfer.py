"""FreeSurfer's brain on the grid of a T1w: analytic heads, conformed by another formula."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.interfaces.preprocessing import TakeFreeSurfer
from m2m_bids.preprocessing.freesurfer import detail_correlation, take_freesurfer
from m2m_bids.spatial.images import ImageError, save_image

CENTRE_MM = np.array([5.0, -12.0, 20.0])
# As FreeSurfer conforms: 1 mm, to the left, inferior, anterior.
SIZE = 64
AXES = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
CONFORMED = from_matvec(AXES, CENTRE_MM - AXES @ np.full(3, (SIZE - 1) / 2))
OBLIQUE = Rotation.from_euler("xz", [12, -20], degrees=True).as_matrix() * (1.6, 1.3, 2.0)
SHAPE = (34, 40, 28)
T1W = from_matvec(OBLIQUE, CENTRE_MM - OBLIQUE @ (np.array(SHAPE) / 2))
# No two directions are alike: a flip or an exchange of axes moves everything.
RADII_MM = np.array([24.0, 20.0, 17.0])
VENTRICLE_MM = CENTRE_MM + np.array([7.0, -4.0, 3.0])


def points_of(affine, shape):
    return apply_affine(affine, np.moveaxis(np.indices(shape, dtype=float), 0, -1))


def depth(points, scale=1.0):
    """1 at the surface of the brain, less inside."""
    return np.linalg.norm((points - CENTRE_MM) / (scale * RADII_MM), axis=-1)


def numbers(points):
    """White matter left and right, cortex of aparc, a ventricle, and brainstem as white matter."""
    right = points[..., 0] > CENTRE_MM[0]
    white, cortex = np.where(right, 41, 2), np.where(right, 2035, 1035)
    labels = np.where(depth(points) < 0.75, white, np.where(depth(points) < 1, cortex, 0))
    labels[np.linalg.norm(points - VENTRICLE_MM, axis=-1) < 5] = 43
    return labels.astype(np.int32)


def tissues(points):
    lut = np.zeros(3000, np.uint8)
    lut[[2, 41]], lut[[1035, 2035]], lut[43] = 2, 1, 3
    return lut[numbers(points)]


def intensities(points, shift_mm=(0, 0, 0)):
    """Tissues with texture that is the same function of the world."""
    points = points - np.asarray(shift_mm)
    texture = np.sin(points @ (0.9, 0.2, 0.1)) + np.sin(points @ (-0.2, 0.8, 0.5))
    return np.array([10, 60, 100, 20.0])[tissues(points)] + 6 * texture + 12


def mgz(file, data, affine=CONFORMED):
    nb.MGHImage(data, affine).to_filename(file)
    return file


@pytest.fixture
def mri(tmp_path):
    points = points_of(CONFORMED, (SIZE,) * 3)
    brainmask = intensities(points) * (depth(points, 1.1) < 1)
    brainmask[depth(points, 1.1) >= 1] = 1  # erased by an editor
    mgz(tmp_path / "aparc+aseg.mgz", numbers(points))
    voxels = apply_affine(np.linalg.inv(T1W), points)
    conformed = ndimage.map_coordinates(
        intensities(points_of(T1W, SHAPE)), np.moveaxis(voxels, -1, 0), order=1
    )
    mgz(tmp_path / "orig.mgz", conformed.astype(np.uint8))
    mgz(tmp_path / "brainmask.mgz", brainmask.astype(np.uint8))
    return tmp_path


@pytest.fixture
def t1w():
    """The T1w, with a bias field that FreeSurfer's copy lacks."""
    points = points_of(T1W, SHAPE)
    bias = np.exp(0.015 * (points - CENTRE_MM) @ (1, -1, 0.5))
    return nb.Nifti1Image((intensities(points) * bias).astype(np.float32), T1W)


def files(mri, *names):
    return [mri / f"{name}.mgz" for name in names]


def test_tissues_and_mask_come_to_an_oblique_grid(mri, t1w):
    brain = take_freesurfer(t1w, *files(mri, "aparc+aseg", "orig", "brainmask"))
    points = points_of(T1W, SHAPE)
    for image in brain:
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_allclose(image.affine, T1W)
    mask, found = (np.asarray(image.dataobj) for image in brain)
    # Within a voxel of the surfaces only, of up to 2 mm where RADII_MM are 17 and more.
    surface = abs(depth(points, 1.1) - 1) < 1.5 / 17
    assert np.array_equal(mask[~surface], (depth(points, 1.1) < 1)[~surface])
    assert np.array_equal(found > 0, mask > 0)
    expected = np.where(mask > 0, tissues(points), 0)
    expected[(mask > 0) & (expected == 0)] = 3  # what has no label is fluid
    assert np.mean(found[mask > 0] == expected[mask > 0]) > 0.93
    ventricle = np.linalg.norm(points - VENTRICLE_MM, axis=-1) < 3.5
    assert (found[ventricle] == 3).all()
    assert (found[depth(points) < 0.4][:50] == 2).all()


def test_without_brainmask_the_labels_are_closed(mri, t1w):
    labels = nb.load(mri / "aparc+aseg.mgz")
    data = np.asarray(labels.dataobj).copy()
    points = points_of(CONFORMED, (SIZE,) * 3)
    # A sulcus of 3 mm from the surface to the centre, which has no label.
    sulcus = (abs(points[..., 0] - CENTRE_MM[0]) < 1.5) & (points[..., 2] > CENTRE_MM[2])
    data[sulcus] = 0
    mgz(mri / "aparc+aseg.mgz", data)
    brain = take_freesurfer(t1w, *files(mri, "aparc+aseg", "orig"))
    mask, found = (np.asarray(image.dataobj) for image in brain)
    points = points_of(T1W, SHAPE)
    inside = depth(points) < 0.85
    assert mask[inside].all()
    assert not mask[depth(points) > 1.15].any()
    middle = inside & (abs(points[..., 0] - CENTRE_MM[0]) < 0.5) & (points[..., 2] > 24)
    assert middle.sum() > 50
    assert (found[middle] == 3).all()


def moved(shift_mm):
    data = intensities(points_of(T1W, SHAPE), shift_mm).astype(np.float32)
    return nb.Nifti1Image(data, T1W)


def test_another_image_is_refused(mri):
    other = moved((4, 3, 0))
    other.set_filename("sub-1_T1w.nii.gz")
    with pytest.raises(ImageError, match=r"orig\.mgz: its detail .* sub-1_T1w\.nii\.gz by a corr"):
        take_freesurfer(other, *files(mri, "aparc+aseg", "orig", "brainmask"))


def test_agreement_falls_with_a_shift(mri, t1w):
    original, labels = (nb.load(file) for file in files(mri, "orig", "aparc+aseg"))
    original = nb.Nifti1Image(np.asarray(original.dataobj), original.affine)
    brain = np.asarray(labels.dataobj) > 0
    found = [
        detail_correlation(original, image, brain)
        for image in (t1w, moved((1, 0, 0)), moved((3, 0, 0)))
    ]
    assert found[0] > 0.9 > found[1] > found[2]
    empty = nb.Nifti1Image(np.zeros(SHAPE, np.float32), T1W)
    assert detail_correlation(original, empty, brain) == 0
    assert detail_correlation(original, t1w, np.zeros_like(brain)) == 0


def test_files_of_two_runs_are_told(mri, t1w):
    mgz(mri / "orig.mgz", np.ones((SIZE, SIZE, SIZE - 1), np.uint8))
    with pytest.raises(ImageError, match=r"orig\.mgz: its grid .* not of one run of FreeSurfer"):
        take_freesurfer(t1w, *files(mri, "aparc+aseg", "orig"))


def test_broken_files_are_told(mri, t1w):
    (mri / "orig.mgz").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"orig\.mgz: not a readable image"):
        take_freesurfer(t1w, *files(mri, "aparc+aseg", "orig"))


@pytest.mark.parametrize("has_brainmask", [True, False])
def test_interface(mri, t1w, tmp_path, monkeypatch, has_brainmask):
    monkeypatch.chdir(tmp_path)
    names = {"label_file": "aparc+aseg", "original_file": "orig"}
    names |= {"brainmask_file": "brainmask"} if has_brainmask else {}
    given = {field: str(mri / f"{name}.mgz") for field, name in names.items()}
    file = save_image(t1w, tmp_path / "t1w.nii")
    outputs = TakeFreeSurfer(t1w_file=str(file), **given).run().outputs
    expected = take_freesurfer(t1w, *given.values())
    for found, image in zip((outputs.mask_file, outputs.dseg_file), expected, strict=True):
        assert np.array_equal(nb.load(found).dataobj, image.dataobj)
