"""Files and directions against ANTs, which reads images and transforms from disk by itself."""

import h5py
import nibabel as nb
import numpy as np
import pandas as pd
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.itk import (
    read_affine,
    read_chain,
    read_composite,
    write_affine,
    write_composite,
)
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import compose, invert, map_points

ROTATION = Rotation.from_euler("xyz", [25, -15, 40], degrees=True).as_matrix()
MOVING_AFFINE = from_matvec(ROTATION.T * [-2.5, 2, 3], [50, -30, -55])
FIXED_AFFINE = from_matvec(ROTATION * [2, -3, 2.5], [-5, 50, -55])
# Large and not commuting with the field: 55 degrees, 30 mm, scales and shears.
AFFINE = from_matvec(
    Rotation.from_euler("zyx", [-30, 20, 40], degrees=True).as_matrix()
    @ [[1.1, 0.2, 0], [0, 0.9, -0.1], [0, 0, 1.05]],
    [-6, 24, 15],
)
SECOND = from_matvec(Rotation.from_euler("xz", [15, -25], degrees=True).as_matrix(), [4, 12, -7])


def smooth_field(seed=1, amplitude_mm=12.0):
    """Random field on an oblique, anisotropic, left-handed grid that ends within the image."""
    affine = from_matvec(ROTATION @ ROTATION * [-4, 5, 4.5], [40, -20, -60])
    noise = np.random.default_rng(seed).normal(size=(22, 18, 20, 3))
    data = gaussian_filter(noise, (3, 3, 3, 0))
    return DisplacementField(amplitude_mm * data / np.abs(data).max(), affine)


CHAINS = {
    "affine": (AFFINE,),
    "two affines": (AFFINE, SECOND),
    "field": (smooth_field(),),
    "affine of field": (AFFINE, smooth_field()),
    "field of affine": (smooth_field(), AFFINE),
    "fields between affines": (SECOND, smooth_field(2), AFFINE, smooth_field()),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    return CHAINS[request.param]


@pytest.fixture
def images(tmp_path, rng):
    """Moving and fixed image files: oblique, anisotropic, of both handednesses."""
    files = {}
    grids = {"moving": ((44, 46, 34), MOVING_AFFINE), "fixed": ((38, 30, 36), FIXED_AFFINE)}
    for name, (shape, affine) in grids.items():
        data = gaussian_filter(rng.normal(size=shape), 1.5)
        image = nb.Nifti1Image((100 * data / data.std()).astype(np.float32), affine)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        image.to_filename(tmp_path / f"{name}.nii.gz")
        files[name] = tmp_path / f"{name}.nii.gz"
    return files


def points_by_ants(points, files):
    import ants

    table = pd.DataFrame(points * [-1, -1, 1], columns=["x", "y", "z"])
    mapped = ants.apply_transforms_to_points(3, table, [str(file) for file in files])
    return mapped[["x", "y", "z"]].to_numpy() * [-1, -1, 1]


def image_by_ants(images, files, interpolator):
    import ants

    fixed, moving = (ants.image_read(str(images[name])) for name in ("fixed", "moving"))
    return ants.apply_transforms(
        fixed, moving, [str(file) for file in files], interpolator=interpolator
    ).numpy()


def world_points(rng, n_points=400):
    """Points in and around the field's grid."""
    field = smooth_field()
    return apply_affine(field.affine, rng.uniform(-3, np.array(field.shape) + 2, (n_points, 3)))


def test_ants_maps_the_same_points(tmp_path, chain, rng):
    points = world_points(rng)
    file = write_composite(chain, tmp_path / "xfm.h5")
    # ANTs computes points in double precision; fields are float32 of up to 12 mm.
    np.testing.assert_allclose(
        points_by_ants(points, [file]), map_points(chain, points), atol=1e-4
    )


def test_the_order_of_the_chain_matters_here(rng):
    field = smooth_field()
    points = apply_affine(field.affine, rng.uniform(0, np.array(field.shape) - 1, (400, 3)))
    for name in ("two affines", "affine of field"):
        chain = CHAINS[name]
        difference = map_points(chain, points) - map_points(chain[::-1], points)
        assert np.median(np.linalg.norm(difference, axis=1)) > 3


@pytest.mark.parametrize(("interpolator", "order"), [("linear", 1), ("bSpline", 3)])
def test_ants_makes_the_same_image(tmp_path, images, chain, interpolator, order):
    file = write_composite(chain, tmp_path / "xfm.h5")
    by_ants = image_by_ants(images, [file], interpolator)
    moving, fixed = nb.load(images["moving"]), nb.load(images["fixed"])
    image = np.asarray(resample(moving, chain, fixed, order=order).dataobj)
    filled = (image != 0) & (by_ants != 0)
    assert filled.mean() > 0.2
    # The rims are decided in float32 there.
    assert ((image != 0) != (by_ants != 0)).mean() < 0.002
    # Intensities have a standard deviation of 100; cubic overshoot is clipped only here.
    difference = np.abs(image - np.clip(by_ants, *np.percentile(moving.dataobj, [0, 100])))
    assert np.percentile(difference[filled], 99.5) < 0.1
    assert difference[filled].mean() < 0.02


def test_ants_makes_the_same_labels(tmp_path, images, chain, rng):
    labels = nb.Nifti1Image(rng.integers(1, 6, size=(44, 46, 34)).astype(np.int16), MOVING_AFFINE)
    labels.to_filename(images["moving"])
    file = write_composite(chain, tmp_path / "xfm.h5")
    by_ants = image_by_ants(images, [file], "nearestNeighbor")
    image = resample(labels, chain, nb.load(images["fixed"]), order=0).dataobj
    assert (image == by_ants).mean() > 0.998


def test_text_affines_are_chained_by_ants_like_ours(tmp_path, images, rng):
    points = world_points(rng)
    files = [
        write_affine(AFFINE, tmp_path / "a.txt"),
        write_composite(smooth_field(), tmp_path / "b.h5"),
        write_affine(SECOND, tmp_path / "c.txt"),
    ]
    chain = (AFFINE, smooth_field(), SECOND)
    # A composite holds the outermost first, but of several files ANTs applies the first first.
    mapped = points_by_ants(points, files[::-1])
    np.testing.assert_allclose(mapped, map_points(chain, points), atol=1e-4)
    image = resample(nb.load(images["moving"]), chain, nb.load(images["fixed"]), order=1)
    by_ants = image_by_ants(images, files[::-1], "linear")
    assert np.percentile(np.abs(image.dataobj - by_ants), 99) < 0.1


def test_written_inverse_undoes_the_written_forward_in_ants(tmp_path):
    """Half a voxel of the finest image, for points that stay where the field is known."""
    chain = (AFFINE, smooth_field(amplitude_mm=8.0))
    forward = write_composite(chain, tmp_path / "forward.h5")
    inverse = write_composite(invert(chain), tmp_path / "inverse.h5")
    field = chain[1]
    inner = np.stack(np.meshgrid(*(np.arange(4, n - 4) + 0.5 for n in field.shape)), axis=-1)
    points = apply_affine(field.affine, inner.reshape(-1, 3))
    distance_mm = np.linalg.norm(points_by_ants(points, [inverse, forward]) - points, axis=1)
    assert distance_mm.max() < 1.0
    swapped = np.linalg.norm(points_by_ants(points, [forward, forward]) - points, axis=1)
    assert np.median(swapped) > 10


def test_affine_round_trip(tmp_path):
    file = write_affine(AFFINE, tmp_path / "new" / "xfm.txt")
    np.testing.assert_allclose(read_affine(file), AFFINE, rtol=1e-15, atol=1e-15)
    assert [path.name for path in file.parent.iterdir()] == ["xfm.txt"]


def test_composite_round_trip(tmp_path, chain):
    file = write_composite(chain, tmp_path / "xfm.h5")
    result = read_composite(file)
    assert len(result) == len(chain)
    for read, written in zip(result, chain, strict=True):
        if isinstance(written, DisplacementField):
            np.testing.assert_array_equal(read.data, written.data)
            np.testing.assert_allclose(read.affine, written.affine, atol=1e-12)
        else:
            np.testing.assert_allclose(read, written, rtol=1e-14, atol=1e-14)


def test_composite_is_compressed_and_compact(tmp_path):
    field = DisplacementField(np.zeros((40, 40, 40, 3)), np.eye(4))
    file = write_composite((AFFINE, field), tmp_path / "xfm.h5")
    assert file.stat().st_size < field.data.nbytes / 10
    with h5py.File(file) as h5:
        assert h5["TransformGroup/2/TransformParameters"].dtype == np.float32
        assert h5["TransformGroup/2/TransformParameters"].compression == "gzip"


def test_reads_what_ants_wrote(tmp_path, rng):
    """A composite written by ITK: double precision, affine about a center, first applied last."""
    import ants

    field = smooth_field()
    vectors = ants.from_numpy(
        field.data * np.float32([-1, -1, 1]),
        origin=tuple(field.affine[:3, 3] * [-1, -1, 1]),
        spacing=tuple(field.spacing_mm),
        direction=field.affine[:3, :3] * [[-1], [-1], [1]] / field.spacing_mm,
        has_components=True,
    )
    linear = ants.create_ants_transform(
        transform_type="AffineTransform",
        matrix=AFFINE[:3, :3],
        translation=[3, -8, 20],
        center=[10, 20, -30],
    )
    # ANTs takes the first applied first.
    composite = ants.compose_ants_transforms(
        [ants.transform_from_displacement_field(vectors), linear]
    )
    file = tmp_path / "ants.h5"
    ants.write_transform(composite, str(file))
    chain = read_composite(file)
    assert isinstance(chain[1], DisplacementField)
    points = apply_affine(field.affine, rng.uniform(1, np.array(field.shape) - 2, (50, 3)))
    expected = [composite.apply_to_point(tuple(point * [-1, -1, 1])) for point in points]
    np.testing.assert_allclose(
        map_points(chain, points), np.array(expected) * [-1, -1, 1], atol=1e-4
    )


def test_reads_text_affines_of_ants(tmp_path, rng):
    import ants

    linear = ants.create_ants_transform(
        transform_type="AffineTransform",
        matrix=AFFINE[:3, :3],
        translation=[3, -8, 20],
        center=[10, 20, -30],
    )
    ants.write_transform(linear, str(tmp_path / "xfm.txt"))
    point = np.array([11.0, -7, 5])
    expected = np.array(linear.apply_to_point(tuple(point * [-1, -1, 1]))) * [-1, -1, 1]
    # ants creates transforms in single precision.
    mapped = map_points(read_affine(tmp_path / "xfm.txt"), point)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)


def test_nitransforms_reads_the_affine(tmp_path, rng):
    from nitransforms.linear import load

    loaded = load(write_affine(AFFINE, tmp_path / "xfm.txt"), fmt="itk")
    points = rng.uniform(-50, 50, size=(10, 3))
    # nitransforms reads text transforms in single precision.
    np.testing.assert_allclose(loaded.map(points), map_points(AFFINE, points), atol=1e-4)


def test_a_chain_may_be_written_after_composition(tmp_path, rng):
    rigid, field = SECOND, smooth_field()
    file = write_composite(compose(rigid, field), tmp_path / "xfm.h5")
    points = world_points(rng)
    np.testing.assert_allclose(
        points_by_ants(points, [file]), map_points(rigid, field.map(points)), atol=1e-4
    )


def test_other_transforms_are_rejected(tmp_path):
    file = write_affine(AFFINE, tmp_path / "xfm.txt")
    file.write_text(file.read_text().replace("AffineTransform", "BSplineTransform"))
    with pytest.raises(ValueError, match=r"xfm\.txt: .*BSplineTransform.* is not supported"):
        read_affine(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "something else",
        "#Insight Transform File V1.0\nTransform: AffineTransform_double_3_3\nParameters: 1 0\n",
    ],
)
def test_unreadable_affines_name_the_file(tmp_path, text):
    (tmp_path / "xfm.txt").write_text(text)
    with pytest.raises(ValueError, match=r"xfm\.txt: "):
        read_affine(tmp_path / "xfm.txt")
    with pytest.raises(ValueError, match=r"absent\.txt: "):
        read_affine(tmp_path / "absent.txt")


def test_two_affines_in_one_text_file_are_rejected(tmp_path):
    file = write_affine(AFFINE, tmp_path / "xfm.txt")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines + lines[1:]) + "\n")
    with pytest.raises(ValueError, match="one transform"):
        read_affine(file)


def test_unreadable_composites_name_the_file(tmp_path):
    file = write_composite((AFFINE, smooth_field()), tmp_path / "xfm.h5")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"xfm\.h5: not a readable ITK composite"):
        read_composite(file)
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5["data"] = [1]
    with pytest.raises(ValueError, match=r"other\.h5: not a readable ITK composite"):
        read_composite(tmp_path / "other.h5")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_composite((), tmp_path / "xfm.h5")
    with pytest.raises(ValueError, match=r"\.h5"):
        write_composite(AFFINE, tmp_path / "xfm.hdf5")
    with pytest.raises(ValueError, match=r"\.txt"):
        write_affine(AFFINE, tmp_path / "xfm.mat")


def test_chains_keep_the_order_of_files(tmp_path):
    files = [write_affine(AFFINE, tmp_path / "a.txt"), write_composite(SECOND, tmp_path / "b.h5")]
    points = np.random.default_rng(0).normal(scale=40, size=(9, 3))
    expected = apply_affine(AFFINE @ SECOND, points)
    np.testing.assert_allclose(map_points(read_chain(*files), points), expected, atol=1e-9)
    wrong = map_points(read_chain(*files[::-1]), points)
    assert np.abs(wrong - expected).max() > 5
