"""Partial volume correction: exact where its model holds, and better than none elsewhere."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage

from m2m_bids.quantification.partial_volume import correct, region_fractions
from m2m_bids.spatial.images import ImageError

FWHM = (7.0, 6.0, 8.0)
BACKGROUND = 0.5


@pytest.fixture(scope="module")
def true_values(phantom):
    return {phantom.outer: 2.0, phantom.beside: 5.0, phantom.inner: 9.0}


@pytest.fixture(scope="module")
def empty_scan(scan_grid):
    shape, affine = scan_grid
    return nb.Nifti1Image(np.zeros(shape, np.float32), affine)


@pytest.fixture(scope="module")
def regions(labels, empty_scan, phantom):
    return region_fractions(labels, empty_scan, phantom.scan2t1w, FWHM)


@pytest.fixture(scope="module")
def modelled(regions, empty_scan, true_values):
    """True and seen image of the model, on the grid of the scan, made on a grid that holds it."""
    values = np.array([true_values[label] for label in regions.labels]) - BACKGROUND
    box = (regions.fractions.T @ values).reshape(regions.shape)
    zooms = np.linalg.norm(empty_scan.affine[:3, :3], axis=0)
    # The scan's axes are nearly those of the world.
    sigmas = np.array(FWHM) / 2.354820045 / zooms
    seen = ndimage.gaussian_filter(box, sigmas, mode="constant")
    images = []
    for data in (box, seen):
        whole = np.full(np.array(empty_scan.shape) + 80, BACKGROUND)
        corner = 40 + np.array(regions.start)
        whole[tuple(slice(a, a + n) for a, n in zip(corner, regions.shape, strict=True))] += data
        images.append(nb.Nifti1Image(whole[40:-40, 40:-40, 40:-40], empty_scan.affine))
    return images


def test_fractions_keep_the_volume(labels, regions, empty_scan):
    voxel = abs(np.linalg.det(empty_scan.affine[:3, :3]))
    own = abs(np.linalg.det(labels.affine[:3, :3]))
    volumes = np.asarray(regions.fractions.sum(axis=1)).ravel() * voxel
    for label, volume in zip(regions.labels, volumes, strict=True):
        # 8 samples a voxel of regions of more than 10 cm3.
        assert volume == pytest.approx(np.count_nonzero(labels.dataobj == label) * own, rel=0.01)
    assert np.asarray(regions.fractions.sum(axis=0)).max() <= 1 + 1e-6


def test_fractions_are_where_the_transform_says(regions, empty_scan, phantom):
    """Against the phantom itself, at points that the inverse transform takes to the T1w."""
    voxels = np.moveaxis(np.indices(regions.shape), 0, -1) + regions.start
    offsets = (np.indices((6, 6, 6)).reshape(3, -1).T + 0.5) / 6 - 0.5
    inner = np.zeros(regions.shape)
    for offset in offsets:
        points = apply_affine(phantom.scan2t1w @ empty_scan.affine, voxels + offset)
        inner += (phantom.labels_at(points) == phantom.inner) / len(offsets)
    found = (
        regions.fractions[[regions.labels.index(phantom.inner)]].toarray().reshape(regions.shape)
    )
    # Labels of 2 mm are not a ball of 14 mm: on a border, a voxel of 4 mm may differ by a third.
    assert np.abs(found - inner).max() < 0.35
    assert np.abs(found - inner).mean() / inner.mean() < 0.1
    centre = ndimage.center_of_mass(found) + np.array(regions.start)
    expected = apply_affine(np.linalg.inv(empty_scan.affine) @ phantom.t1w2scan, phantom.centre_mm)
    np.testing.assert_allclose(centre, expected, atol=0.05)


def test_gtm_is_exact_where_its_model_holds(modelled, regions, true_values):
    _, seen = modelled
    frames = nb.Nifti1Image(
        np.stack([seen.dataobj, 3 * np.asarray(seen.dataobj)], -1), seen.affine
    )
    result = correct(frames, regions, FWHM, voxelwise=False)
    true = np.array([true_values[label] for label in result.labels])
    np.testing.assert_allclose(result.values, [true, 3 * true], rtol=1e-6)
    np.testing.assert_allclose(result.background, [BACKGROUND, 3 * BACKGROUND], rtol=1e-6)
    assert result.image is None


def test_rbv_restores_the_true_image_where_its_model_holds(modelled, regions):
    true, seen = modelled
    result = correct(seen, regions, FWHM, voxelwise=True)
    # float32
    np.testing.assert_allclose(result.image.get_fdata(), true.get_fdata(), rtol=1e-5)


def test_uniform_scans_stay_as_they_are(regions, empty_scan):
    scan = nb.Nifti1Image(np.full(empty_scan.shape, 3.0, np.float32), empty_scan.affine)
    result = correct(scan, regions, FWHM, voxelwise=True)
    np.testing.assert_allclose(result.values, 3, rtol=1e-5)
    np.testing.assert_allclose(result.image.get_fdata(), 3, rtol=1e-5)


@pytest.fixture(scope="module")
def scanned(scan_grid, phantom, true_values):
    """The phantom itself, blurred on a fine grid, averaged over the voxels of the scan."""
    shape, affine = scan_grid
    fine = 3
    inner = from_matvec(np.eye(3) / fine, np.full(3, (1 / fine - 1) / 2))
    points = apply_affine(
        phantom.scan2t1w @ affine @ inner, np.moveaxis(np.indices(np.array(shape) * fine), 0, -1)
    )
    true = np.full(points.shape[:3], BACKGROUND)
    found = phantom.labels_at(points)
    for label, value in true_values.items():
        true[found == label] = value
    zooms = np.linalg.norm(affine[:3, :3], axis=0) / fine
    blurred = ndimage.gaussian_filter(true, np.array(FWHM) / 2.354820045 / zooms, mode="nearest")
    data = blurred.reshape(shape[0], fine, shape[1], fine, shape[2], fine).mean(axis=(1, 3, 5))
    return nb.Nifti1Image(data.astype(np.float32), affine)


def means(image, regions):
    """Mean of each region by its fractions; the box is inside the image or cut."""
    low = np.maximum(0, regions.start)
    high = np.minimum(image.shape, np.array(regions.start) + regions.shape)
    inside, native = (
        tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        for start in (regions.start, (0, 0, 0))
    )
    whole = np.zeros(regions.shape)
    whole[inside] = image.get_fdata()[native]
    sums = np.asarray(regions.fractions.sum(axis=1)).ravel()
    return dict(zip(regions.labels, (regions.fractions @ whole.ravel()) / sums, strict=True))


def test_contrast_of_a_blurred_phantom_is_recovered(
    scanned, modelled, regions, phantom, true_values
):
    seen = means(scanned, regions)
    result = correct(scanned, regions, FWHM, voxelwise=True)
    gtm = dict(zip(result.labels, result.values[0], strict=True))
    for label, value in true_values.items():
        assert abs(gtm[label] / value - 1) < 0.01 < abs(seen[label] / value - 1)
    contrast = gtm[phantom.inner] / gtm[phantom.outer]
    assert contrast == pytest.approx(4.5, rel=0.01)
    assert seen[phantom.inner] / seen[phantom.outer] < 0.8 * 4.5
    # The corrected image still has the voxels of the scan, as has the true one to compare with.
    rbv, voxels = means(result.image, regions), means(modelled[0], regions)
    for label in true_values:
        assert abs(rbv[label] / voxels[label] - 1) < 0.015 < abs(seen[label] / voxels[label] - 1)


def test_what_was_not_scanned_is_not_known(labels, scanned, empty_scan, phantom):
    """A scan that ends below the inner ball, and one of elsewhere."""
    near = nb.Nifti1Image(scanned.get_fdata()[:, :, :7], scanned.affine)
    regions = region_fractions(labels, near, phantom.scan2t1w, FWHM)
    result = correct(near, regions, FWHM, voxelwise=True)
    known = dict(zip(result.labels, np.isfinite(result.values[0]), strict=True))
    assert not known[phantom.inner]
    assert known[phantom.outer] or known[phantom.beside]
    assert np.isfinite(result.image.get_fdata()).all()
    far = nb.Nifti1Image(
        empty_scan.dataobj, from_matvec(np.eye(3), [500, 0, 0]) @ empty_scan.affine
    )
    with pytest.raises(ImageError, match="no label is in the field of view"):
        region_fractions(labels, far, phantom.scan2t1w, FWHM)


def test_regions_too_small_for_the_scanner_are_refused(labels, scanned, phantom):
    data = np.asarray(labels.dataobj)
    checkers = 1 + np.indices(data.shape).sum(axis=0) % 2
    mixed = nb.Nifti1Image(np.where(data > 0, checkers, 0).astype(np.int32), labels.affine)
    regions = region_fractions(mixed, scanned, phantom.scan2t1w, 40.0)
    with pytest.raises(ImageError, match="cannot be told apart"):
        correct(scanned, regions, 40.0, voxelwise=False)
