"""Wrappers of the deformable step and of resampling: chains in the right order, both ways."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from m2m_bids import api
from m2m_bids.interfaces.registration import RegisterImages, ResampleImage
from m2m_bids.spatial.fields import DisplacementField, invert_displacement
from m2m_bids.spatial.itk import read_affine, read_composite, write_affine, write_composite
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import map_points

# Large, and not commuting with the field.
RIGID = from_matvec(Rotation.from_euler("xz", [25, -60], degrees=True).as_matrix(), [12, -45, 8])
GRID = from_matvec(np.eye(3) * 5.0, [-50, -50, -50])
TEMPLATE = from_matvec(np.eye(3) * 1.1, [3, 4, 5])
GOOD = api.Quality(0.0, 0.5, 0.4, 0.9, 3.0, 9.0, 0.5, 1.8)
FOLDED = api.Quality(0.3, 0.5, 0.4, 0.9, 3.0, 9.0, -0.2, 1.8)


def smooth_field(amplitude_mm=8.0):
    noise = np.random.default_rng(2).normal(size=(21, 21, 21, 3))
    data = gaussian_filter(noise, (3, 3, 3, 0))
    return DisplacementField(amplitude_mm * data / np.abs(data).max(), GRID)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Interfaces write where they run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path, rng):
    """Images and transforms that the interfaces take."""
    grids = {"moving_file": (24, 20, 22), "fixed_file": (20, 21, 19), "mask_file": (20, 21, 19)}
    paths = {}
    for name, shape in grids.items():
        data = gaussian_filter(rng.random(shape), 2).astype(np.float32)
        paths[name] = str(tmp_path / f"{name}.nii")
        nb.Nifti1Image(data, GRID).to_filename(paths[name])
    paths["rigid_xfm"] = str(write_affine(RIGID, tmp_path / "rigid.txt"))
    inverse = write_affine(np.linalg.inv(RIGID), tmp_path / "rigid_inverse.txt")
    paths["rigid_inverse_xfm"] = str(inverse)
    paths["template2anat"] = str(write_affine(TEMPLATE, tmp_path / "template2anat.txt"))
    return paths


@pytest.fixture
def register(files, tmp_path, monkeypatch):
    """Run `RegisterImages` with a deformation that is known; also return what it was asked."""
    (tmp_path / "weights").mkdir()
    asked = {}

    def run(quality, **inputs):
        field = smooth_field()

        def estimate_deformation(moving, fixed, fixed_mask, **options):
            asked.update(options, shapes=(moving.shape, fixed.shape, fixed_mask.shape))
            return api.Deformation(
                field=field,
                inverse_field=invert_displacement(field)[0],
                jacobian=nb.Nifti1Image(np.ones(field.shape, np.float32), GRID),
                cycle_error=nb.Nifti1Image(np.full(field.shape, 0.5, np.float32), GRID),
                quality=quality,
                device="cpu",
                weights_sha256="abc",
            )

        monkeypatch.setattr(api, "estimate_deformation", estimate_deformation)
        interface = RegisterImages(
            **files, modality="fa", weights=str(tmp_path / "weights"), **inputs
        )
        return interface.run().outputs, asked

    return run


def test_accepted_step_is_written_both_ways(register, tmp_path, rng):
    outputs, _ = register(GOOD)
    assert outputs.best_xfm == str(tmp_path / "m2m.h5")
    assert outputs.m2m_xfms == [str(tmp_path / "m2m.h5"), str(tmp_path / "m2m_inverse.h5")]
    assert outputs.best_inverse_xfm == outputs.m2m_xfms[1]
    assert outputs.objections == []
    points = rng.uniform(-20, 20, (50, 3))
    # From a point of the T1w: the field first, then the rigid map to the scan.
    there = map_points(read_composite(outputs.best_xfm), points)
    np.testing.assert_allclose(there, apply_affine(RIGID, smooth_field().map(points)), atol=1e-3)
    again = map_points(read_composite(outputs.m2m_xfms[1]), there)
    # A tenth of the field's voxel: between its points the inverse is interpolated.
    np.testing.assert_allclose(again, points, atol=0.5)
    assert nb.load(outputs.jacobian_file).shape == (21, 21, 21)
    np.testing.assert_array_equal(nb.load(outputs.cycle_error_file).dataobj, 0.5)
    displacement = nb.load(outputs.displacement_file)
    np.testing.assert_allclose(displacement.dataobj, smooth_field().data)
    np.testing.assert_allclose(displacement.affine, GRID, atol=1e-4)  # stored as float32
    assert outputs.quality["similarity_gain"] == 0.4
    assert (outputs.device_used, outputs.sha256) == ("cpu", "abc")


def test_rejected_step_gives_the_rigid_transform(register, files, tmp_path):
    outputs, _ = register(FOLDED)
    assert outputs.best_xfm == files["rigid_xfm"]
    assert outputs.best_inverse_xfm == files["rigid_inverse_xfm"]
    assert outputs.m2m_xfms == []
    assert len(outputs.objections) == 1
    assert "folds" in outputs.objections[0]
    assert outputs.quality["folding_percent"] == 0.3
    assert not list(tmp_path.glob("*.h5"))
    # What was rejected is drawn.
    assert nb.load(outputs.displacement_file).shape == (21, 21, 21, 3)


def test_inputs_reach_the_estimation(register, tmp_path):
    _, asked = register(GOOD, n_refine=7, device="cuda:1", n_threads=3)
    assert asked["shapes"] == ((24, 20, 22), (20, 21, 19), (20, 21, 19))
    np.testing.assert_allclose(asked["fixed2moving"], RIGID, atol=1e-6)
    np.testing.assert_allclose(asked["template2fixed"], TEMPLATE, atol=1e-6)
    assert asked["options"] == api.DeformableOptions(
        "fa", weights=tmp_path / "weights", n_refine=7, device="cuda:1", n_threads=3
    )


def test_tissues_reach_the_estimation(register, files):
    assert register(GOOD)[1]["fixed_dseg"] is None
    _, asked = register(GOOD, dseg_file=files["mask_file"])
    assert asked["fixed_dseg"].shape == (20, 21, 19)


def test_only_what_changes_results_changes_the_hash():
    def hash_of(**inputs):
        return RegisterImages(**inputs).inputs.get_hashval()[1]

    plain = hash_of()
    assert hash_of(device="cpu", use_gpu=True, n_threads=4) == plain
    others = {"n_refine": 5}, {"weights_sha256": "other"}, {"modality": "pet"}
    assert len({plain, *(hash_of(**inputs) for inputs in others)}) == 4


@pytest.mark.parametrize(
    ("names", "chain"),
    [
        (["rigid.txt"], (RIGID,)),
        (["m2m.h5"], (RIGID, smooth_field())),
        # Outermost first.
        (["template2anat.txt", "m2m.h5", "rigid.txt"], (TEMPLATE, RIGID, smooth_field(), RIGID)),
    ],
)
def test_resampling_follows_the_chain(files, tmp_path, names, chain):
    write_composite((RIGID, smooth_field()), tmp_path / "m2m.h5")
    outputs = (
        ResampleImage(
            in_file=files["moving_file"],
            reference_file=files["fixed_file"],
            xfm=[str(tmp_path / name) for name in names],
        )
        .run()
        .outputs
    )
    moving, fixed = nb.load(files["moving_file"]), nb.load(files["fixed_file"])
    expected = resample(moving, chain, fixed, order=3)
    found = nb.load(outputs.out_file)
    assert outputs.out_file == str(tmp_path / "resampled.nii.gz")
    np.testing.assert_allclose(found.affine, fixed.affine)
    assert np.asarray(expected.dataobj).std() > 0.01
    np.testing.assert_allclose(found.get_fdata(), expected.get_fdata(), atol=1e-3)


def test_labels_stay_labels(files, tmp_path, rng):
    labels = rng.integers(0, 4, (20, 20, 20)).astype(np.uint8)
    nb.Nifti1Image(labels, GRID).to_filename(tmp_path / "dseg.nii")
    outputs = (
        ResampleImage(
            in_file=str(tmp_path / "dseg.nii"),
            reference_file=files["fixed_file"],
            xfm=files["rigid_xfm"],
            order=0,
        )
        .run()
        .outputs
    )
    image = nb.load(outputs.out_file)
    assert image.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(image.dataobj))) == {0, 1, 2, 3}
    np.testing.assert_allclose(read_affine(files["rigid_xfm"]), RIGID, atol=1e-6)
