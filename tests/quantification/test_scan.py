"""SUV, SUVR and tables of a scan that is resampled by the app's own functions."""

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from m2m_bids.quantification.scan import (
    Quantification,
    field_of_view,
    quantify,
    smoothed_copies,
)
from m2m_bids.quantification.tables import write_statistics, write_tacs
from m2m_bids.spatial.resampling import resample

METADATA = {
    "Units": "kBq/mL",
    "InjectedRadioactivity": 5,
    "InjectedRadioactivityUnits": "mCi",
    "InjectionStart": 0,
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 109.77 * 60,
    "TracerRadionuclide": "F18",
    "FrameTimesStart": [0, 300],
    "FrameDuration": [300, 100],
}
# 185 MBq in 60 kg; half of it is left at the time of the image.
SUV_PER_KBQ_ML = 1000 * 60e3 / (185e6 / 2)


@pytest.fixture(scope="module")
def scan_of(scan_grid, phantom):
    """Scan of the phantom with given values, each voxel averaged over 64 points."""
    shape, affine = scan_grid

    def make(values, n_slices=None):
        data = np.zeros(shape)
        voxels = np.moveaxis(np.indices(shape), 0, -1)
        for offset in (np.indices((4, 4, 4)).reshape(3, -1).T + 0.5) / 4 - 0.5:
            found = phantom.labels_at(apply_affine(phantom.scan2t1w @ affine, voxels + offset))
            for label, value in values.items():
                data += (found == label) * (value / 64)
        return nb.Nifti1Image(data[:, :, :n_slices].astype(np.float32), affine)

    return make


@pytest.fixture(scope="module")
def moved(scan_of, labels, phantom):
    """A scan on the grid of the T1w."""
    values = {phantom.outer: 4.0, phantom.beside: 6.0, phantom.inner: 8.0, 0: 4.0}
    scan = scan_of(values)
    seen = field_of_view(scan, (phantom.t1w2scan,), labels)
    return values, resample(scan, phantom.t1w2scan, labels), seen


def rows(quantities):
    return {row.index: row for row in quantities.regional.statistics}


def test_means_suv_and_suvr_are_within_one_percent(moved, labels, phantom):
    values, image, seen = moved
    data = np.asarray(labels.dataobj)
    # Away from borders, where voxels of the scan mix what is on both sides.
    cores = {label: ndimage.binary_erosion(data == label, iterations=3) for label in values}
    reference = nb.Nifti1Image(cores[phantom.outer].astype(np.uint8), labels.affine)
    scan = Quantification(
        "freesurfer",
        METADATA,
        weight="60",
        weight_units="kg",
        weight_source="participants.tsv",
        suvr_mask=reference,
    )
    found = quantify(image, labels, seen, scan)
    assert set(found.images) == {"preprocSUV", "preprocSUVR"}
    assert found.times == ([0], [400])
    for label in (phantom.outer, phantom.beside, phantom.inner):
        suv, ratio = (found.images[f"preproc{name}"].get_fdata() for name in ("SUV", "SUVR"))
        assert suv[cores[label]].mean() == pytest.approx(values[label] * SUV_PER_KBQ_ML, rel=0.01)
        assert ratio[cores[label]].mean() == pytest.approx(values[label] / 4, rel=0.01)
    said = found.facts["preprocSUVR"]
    assert said["ReferenceRegionMean"] == [pytest.approx(4.0, rel=0.01)]
    assert said["ReferenceRegion"] == "mask given with --suvr-mask"
    assert found.facts["preprocSUV"]["Units"] == "g/mL"
    assert found.facts["preprocSUV"]["SUVInjectedRadioactivity"] == pytest.approx(92.5e6)


def test_frames_are_scaled_one_by_one(moved, labels):
    _, image, seen = moved
    data = np.asarray(image.dataobj)
    frames = nb.Nifti1Image(np.stack([data, 3 * data], -1), image.affine)
    # The label of the half beside is that of the right half of the cerebellum.
    scan = Quantification(
        "freesurfer",
        METADATA,
        weight_source="no body weight",
        suvr_region="cerebellar-grey",
    )
    found = quantify(frames, labels, seen, scan)
    np.testing.assert_allclose(
        found.regional.frame_means[1], 3 * found.regional.frame_means[0], rtol=1e-6
    )
    # In the mean over time, 300 s of the one and 100 s of the other.
    one = found.regional.frame_means[0, 0]
    assert found.regional.statistics[0].mean == pytest.approx(one * (300 + 3 * 100) / 400)
    assert found.times == ([0, 300], [300, 400])
    assert found.facts["stat"] == {"SUVNotComputed": "no body weight"}
    ratio = found.images["preprocSUVR"].get_fdata()
    np.testing.assert_allclose(ratio[..., 0], ratio[..., 1], rtol=1e-5)
    assert set(found.images) == {"preprocSUVR"}


def test_copies_are_smoothed_by_each_width(moved):
    """A ridge along an axis gets the width that the kernel and it have together."""
    _, image, _ = moved
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)[0]
    shape = image.shape[:3]
    place = spacing * (np.arange(shape[0]) - shape[0] // 2)
    ridge = np.exp(-0.5 * (place / 5) ** 2)[:, None, None] * np.ones(shape)
    images = {"a": nb.Nifti1Image(ridge, image.affine), "b": nb.Nifti1Image(-ridge, image.affine)}
    copies = list(smoothed_copies(images, (6.0, 9.0), np.ones(shape, bool)))
    assert [copy[:2] for copy in copies] == [("a", 6), ("b", 6), ("a", 9), ("b", 9)]
    for desc, width, copy in copies:
        sigma = np.hypot(5, width / np.sqrt(8 * np.log(2)))
        peak = copy.get_fdata()[shape[0] // 2, shape[1] // 2, shape[2] // 2]
        assert peak == pytest.approx((1 if desc == "a" else -1) * 5 / sigma, rel=0.01)


@pytest.mark.parametrize("duration", [[0], 0, [-1]])
def test_duration_of_a_volume_does_not_weigh_it(moved, labels, duration):
    _, image, seen = moved
    metadata = {**METADATA, "FrameTimesStart": [0], "FrameDuration": duration}
    found = quantify(image, labels, seen, Quantification("freesurfer", metadata))
    plain = quantify(image, labels, seen, Quantification("freesurfer", METADATA))
    assert found.regional.statistics == plain.regional.statistics
    assert found.times is None
    remark = "FrameDuration has a value that is not positive"
    assert found.facts["stat"]["TimingRemarks"] == [remark]


def test_frames_of_unusable_durations_count_alike(moved, labels):
    _, image, seen = moved
    data = np.asarray(image.dataobj)
    frames = nb.Nifti1Image(np.stack([data, 2 * data], -1), image.affine)
    metadata = {**METADATA, "FrameTimesStart": [0, 60], "FrameDuration": [60, -50]}
    found = quantify(frames, labels, seen, Quantification("freesurfer", metadata))
    means = found.regional.frame_means.mean(axis=0)
    assert [row.mean for row in found.regional.statistics] == pytest.approx(means)
    remark = "FrameDuration has a value that is not positive"
    assert found.facts["stat"]["TimingRemarks"] == [remark]
    # Durations weigh frames whatever is known of their starts.
    metadata = {**METADATA, "FrameTimesStart": None}
    found = quantify(frames, labels, seen, Quantification("freesurfer", metadata))
    one = found.regional.frame_means[0]
    expected = one * (300 + 2 * 100) / 400
    assert [row.mean for row in found.regional.statistics] == pytest.approx(expected)


def test_frames_without_a_reference_have_no_suvr(moved, labels):
    """As the first one of a scan that begins with the injection; the others have theirs."""
    _, image, seen = moved
    data = np.asarray(image.dataobj)
    frames = nb.Nifti1Image(np.stack([-0.1 * data, data], -1), image.affine)
    scan = Quantification("freesurfer", METADATA, suvr_region="cerebellar-grey")
    found = quantify(frames, labels, seen, scan)
    alone = quantify(image, labels, seen, scan)
    (copy,), (copy_alone,) = (
        [smoothed for *_, smoothed in smoothed_copies(of.images, (6.0,), seen)]
        for of in (found, alone)
    )
    pairs = [(found.images["preprocSUVR"], alone.images["preprocSUVR"]), (copy, copy_alone)]
    for ratio, expected in pairs:
        assert np.isnan(ratio.get_fdata()[..., 0]).all()
        np.testing.assert_allclose(ratio.get_fdata()[..., 1], expected.get_fdata(), rtol=1e-6)
    said = found.facts["preprocSUVR"]
    assert said["FramesWithoutSUVR"] == [0]
    assert said["ReferenceRegionMean"][0] < 0
    assert "FramesWithoutSUVR" not in alone.facts["preprocSUVR"]


def test_suv_of_frames_that_were_not_corrected_for_decay_is(moved, labels):
    _, image, seen = moved
    metadata = {
        **{**METADATA, "FrameTimesStart": [60], "FrameDuration": [300]},
        **{"ImageDecayCorrected": False, "InjectionStart": 30},
    }
    scan = Quantification("freesurfer", metadata, weight="60", weight_units="kg")
    said = quantify(image, labels, seen, scan).facts["preprocSUV"]
    assert (said["ImageDecayCorrected"], said["ImageDecayCorrectionTime"]) == (True, 30)


def test_nothing_is_made_up(moved, labels):
    _, image, seen = moved
    scan = Quantification("freesurfer", {}, weight=60, weight_units="kg", suvr_region="brainstem")
    found = quantify(image, labels, seen, scan)
    assert found.images == {}
    assert found.times is None
    assert "Units None" in found.facts["stat"]["SUVNotComputed"]
    assert "no brainstem" in found.facts["stat"]["SUVRNotComputed"]
    fa = quantify(image, labels, seen, Quantification("tissues", is_pet=False))
    assert (fa.images, fa.facts) == ({}, {"stat": {}})


def test_means_are_of_what_the_scan_shows(scan_of, labels, phantom):
    """A scan that ends in the middle: the mean stays, the coverage says how much is seen."""
    scan = scan_of({phantom.inner: 5.0, phantom.outer: 5.0, phantom.beside: 5.0, 0: 5.0}, 11)
    seen = field_of_view(scan, (phantom.t1w2scan,), labels)
    image = resample(scan, phantom.t1w2scan, labels)
    row = rows(quantify(image, labels, seen, Quantification("freesurfer")))[phantom.inner]
    assert row.mean == pytest.approx(5.0, rel=1e-4)
    # Half of a ball, to a voxel.
    assert row.coverage == pytest.approx(0.5, abs=0.1)


def test_tables(moved, labels, tmp_path):
    _, image, seen = moved
    found = quantify(image, labels, seen, Quantification("freesurfer", METADATA))
    regions = [row.region for row in found.regional.statistics]
    tacs = write_tacs(tmp_path / "x_tacs.tsv", regions, found.regional.frame_means, found.times)
    header, row = (line.split("\t") for line in tacs.read_text().splitlines())
    assert header == ["frame_start", "frame_end", "Left-Cerebral-White-Matter",
                      "Right-Cerebellum-Cortex", "ctx-lh-isthmuscingulate"]  # fmt: skip
    np.testing.assert_allclose([float(x) for x in row[2:]], found.regional.frame_means[0], 1e-6)
    assert row[:2] == ["0", "400"]
    unknown = write_tacs(tmp_path / "y_tacs.tsv", ["a"], np.array([[np.nan]]), None)
    assert unknown.read_text() == "frame_start\tframe_end\ta\nn/a\tn/a\tn/a\n"
    stat = write_statistics(tmp_path / "x_stat.tsv", found.regional.statistics)
    header, *lines = (line.split("\t") for line in stat.read_text().splitlines())
    assert header == ["region", "index", "mean", "median", "sd", "volume_mm3", "n_voxels",
                      "coverage"]  # fmt: skip
    assert [line[1] for line in lines] == ["2", "47", "1010"]
    assert [line[-1] for line in lines] == ["1", "1", "1"]
