"""Quantification as a workflow: run on a phantom whose values are known."""

import csv
import json
from dataclasses import replace

import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from m2m_bids.bids.derivatives import missing_outputs
from m2m_bids.bids.labels import LabelFile
from m2m_bids.bids.methods import read_description
from m2m_bids.bids.naming import quantification_outputs
from m2m_bids.bids.obsolete import obsolete_outputs
from m2m_bids.bids.quantification import (
    QuantificationOptions,
    plan_quantification,
    quantification_record,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.spatial.images import save_image
from m2m_bids.spatial.itk import write_affine, write_composite
from m2m_bids.spatial.resampling import resample
from m2m_bids.workflows.quantification import INPUTS, init_quantification_wf

T1W2SCAN = from_matvec(
    Rotation.from_euler("xyz", [8, -12, 20], degrees=True).as_matrix(), [9, 4, -6]
)
SIDECAR = {
    "Units": "Bq/mL",
    "InjectedRadioactivity": 100,
    "InjectedRadioactivityUnits": "MBq",
    "InjectionStart": 0,
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 0,
    "PatientWeight": 50,
    "FrameTimesStart": [3000],
    "FrameDuration": [1200],
}
CEREBELLUM, CORTEX = 47, 1035
VALUES = {CEREBELLUM: 2000.0, CORTEX: 5000.0, 0: 2000.0}


def phantom_labels(points):
    """A ball of cortex in the half of a large one, of which the rest is cerebellum."""
    distance = np.linalg.norm(points, axis=-1)
    inner = np.linalg.norm(points - (-12, 0, 0), axis=-1) < 12
    return np.where(inner, CORTEX, np.where(distance < 32, CEREBELLUM, 0)).astype(np.int32)


def grid(shape, spacing, angles):
    axes = Rotation.from_euler("xz", angles, degrees=True).as_matrix() * spacing
    return from_matvec(axes, -axes @ ((np.array(shape) - 1) / 2))


@pytest.fixture
def dataset(tmp_path):
    """A scan, its T1w, labels of another grid, and the transforms between them, as files."""
    t1w_shape, scan_shape = (34, 32, 30), (24, 22, 20)
    t1w_affine = grid(t1w_shape, (2.2, 2.2, 2.4), [6, -9])
    scan_affine = T1W2SCAN @ grid(scan_shape, (3.6, 4.0, 4.4), [-15, 5])
    indices = [np.moveaxis(np.indices(shape), 0, -1) for shape in (t1w_shape, scan_shape)]
    data = np.zeros(scan_shape)
    for offset in (np.indices((3, 3, 3)).reshape(3, -1).T + 0.5) / 3 - 0.5:
        points = apply_affine(np.linalg.inv(T1W2SCAN) @ scan_affine, indices[1] + offset)
        found = phantom_labels(points)
        data += sum((found == label) * value for label, value in VALUES.items()) / 27
    scan = nb.Nifti1Image(data.astype(np.float32), scan_affine)
    on_t1w = phantom_labels(apply_affine(t1w_affine, indices[0]))
    t1w = nb.Nifti1Image(on_t1w.astype(np.float32), t1w_affine)
    conformed = np.array([[-2.0, 0, 0, 39], [0, 0, 2, -39], [0, -2, 0, 39], [0, 0, 0, 1]])
    labels = phantom_labels(apply_affine(conformed, np.moveaxis(np.indices((40, 40, 40)), 0, -1)))
    folder = tmp_path / "work"
    images = {
        "preproc": resample(scan, T1W2SCAN, t1w),
        "native_file": scan,
        "t1w_file": t1w,
        "mask_file": nb.Nifti1Image((on_t1w > 0).astype(np.uint8), t1w_affine),
        "dseg_file": nb.Nifti1Image((on_t1w > 0).astype(np.uint8), t1w_affine),
    }
    files = {name: save_image(image, folder / f"{name}.nii.gz") for name, image in images.items()}
    files["best_xfm"] = write_affine(T1W2SCAN, folder / "rigid.txt")
    files["best_inverse_xfm"] = write_affine(np.linalg.inv(T1W2SCAN), folder / "inverse.txt")
    files["frames_file"], files["frame_xfms"] = files["native_file"], []
    mgz = tmp_path / "fs/sub-1/mri/aparc+aseg.mgz"
    mgz.parent.mkdir(parents=True)
    nb.save(nb.MGHImage(labels, conformed), mgz)
    original = resample(t1w, (), nb.Nifti1Image(labels, conformed), order=1)
    nb.save(nb.MGHImage(original.get_fdata(dtype=np.float32), conformed), mgz.parent / "orig.mgz")
    return files


@pytest.fixture
def scan(tmp_path):
    bids_dir = tmp_path / "bids"
    pet, t1w = (
        bids_dir / "sub-1/pet/sub-1_trc-AV1451_pet.nii.gz",
        bids_dir / "sub-1/anat/sub-1_T1w.nii",
    )
    for file in (pet, t1w):
        file.parent.mkdir(parents=True)
        file.touch()
    entities = {"sub": "1", "trc": "AV1451"}
    return Scan("pet", pet, entities, t1w=t1w, t1w_entities={"sub": "1"}, sidecar=SIDECAR)


@pytest.fixture
def run(dataset, scan, tmp_path):
    """Build the workflow with given options, and run it in this process."""

    def quantified(scan=scan, **changes):
        options = QuantificationOptions(**changes)
        plan = plan_quantification(scan, tmp_path / "bids", options)
        datasets = {"raw": tmp_path / "bids"}
        if options.fs_subjects_dir:
            datasets["freesurfer"] = options.fs_subjects_dir
        record = quantification_record(plan, options, {})
        workflow = init_quantification_wf(
            scan=scan,
            plan=plan,
            options=options,
            output_dir=tmp_path / "out",
            datasets=datasets,
            made_from=record,
            obsolete=obsolete_outputs(scan, tmp_path / "out", Request("rigid", {}, record, {})),
        )
        workflow.base_dir = str(tmp_path / "scratch")
        for name, file in dataset.items():
            value = [str(one) for one in file] if isinstance(file, list) else str(file)
            setattr(workflow.inputs.inputnode, name, value)
        workflow.run()
        return plan

    return quantified


def table(file):
    with file.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def value_in_ball(file):
    """Value at the centre of the ball of cortex."""
    image = nb.load(file)
    voxel = np.rint((np.linalg.inv(image.affine) @ (-12, 0, 0, 1))[:3]).astype(int)
    return image.dataobj[tuple(voxel)]


def outputs(scan, tmp_path, segmentation="aparcaseg", **options):
    return quantification_outputs(scan, tmp_path / "out", segmentation, **options)


def test_labels_give_tables_suv_and_suvr(run, scan, tmp_path):
    run(fs_subjects_dir=tmp_path / "fs")
    files = outputs(scan, tmp_path)
    written = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    keys = ("stat", "tacs", "preprocSUV", "preprocSUVR")
    figure = tmp_path / "out/sub-1/figures/sub-1_trc-AV1451_desc-suvr_pet.svg"
    assert written == {figure, *(files[name] for key in keys for name in (key, f"{key}_json"))}
    assert "Reference region: cerebellar grey (labels 8, 47)" in figure.read_text()
    assert files["stat"].name == "sub-1_trc-AV1451_seg-aparcaseg_desc-preproc_stat.tsv"
    assert files["tacs"].name == "sub-1_trc-AV1451_seg-aparcaseg_desc-preproc_tacs.tsv"
    suvr_name = "sub-1_trc-AV1451_space-T1w_desc-preprocSUVR_pet.nii.gz"
    assert files["preprocSUVR"].name == suvr_name
    rows = {row["region"]: row for row in table(files["stat"])}
    assert set(rows) == {"Right-Cerebellum-Cortex", "ctx-lh-insula"}
    cerebellum = float(rows["Right-Cerebellum-Cortex"]["mean"])
    # The border with the ball is a hundredth of the region.
    assert cerebellum == pytest.approx(2000, rel=0.02)
    (tac,) = table(files["tacs"])
    assert (tac["frame_start"], tac["frame_end"]) == ("3000", "4200")
    assert float(tac["Right-Cerebellum-Cortex"]) == pytest.approx(cerebellum)
    said = json.loads(files["preprocSUVR_json"].read_text())
    assert said["ReferenceRegion"] == "cerebellar grey (labels 8, 47)"
    assert said["ReferenceRegionMean"] == [pytest.approx(cerebellum)]
    assert said["LabelFile"] == "bids:freesurfer:sub-1/mri/aparc+aseg.mgz"
    centre = np.linalg.inv(nb.load(files["preprocSUVR"]).affine) @ (-12, 0, 0, 1)
    voxel = tuple(np.rint(centre[:3]).astype(int))
    assert nb.load(files["preprocSUVR"]).dataobj[voxel] == pytest.approx(
        5000 / cerebellum, rel=0.01
    )
    suv = nb.load(files["preprocSUV"]).dataobj[voxel]
    assert suv == pytest.approx(5000 * 50e3 / 100e6, rel=0.01)
    assert json.loads(files["preprocSUV_json"].read_text())["BodyWeight"] == 50


@pytest.mark.parametrize("pvc", ["gtm", "rbv"])
def test_partial_volume_correction_restores_what_a_scanner_blurs(
    run, dataset, scan, tmp_path, pvc
):
    """The scan is blurred further, by a known width."""

    native = nb.load(dataset["native_file"])
    zooms = np.linalg.norm(native.affine[:3, :3], axis=0)
    data = ndimage.gaussian_filter(native.get_fdata(), 8 / 2.354820 / zooms, mode="nearest")
    blurred = nb.Nifti1Image(data.astype(np.float32), native.affine)
    save_image(blurred, dataset["native_file"])
    save_image(resample(blurred, T1W2SCAN, nb.load(dataset["t1w_file"])), dataset["preproc"])
    run(fs_subjects_dir=tmp_path / "fs", pvc=pvc, psf_fwhm_mm=(8.0,))
    plain, corrected = outputs(scan, tmp_path), outputs(scan, tmp_path, pvc=pvc)
    name = f"sub-1_trc-AV1451_seg-aparcaseg_pvc-{pvc}_desc-preproc_tacs.tsv"
    assert corrected["tacs"].name == name
    means = [float(table(files["tacs"])[0]["ctx-lh-insula"]) for files in (plain, corrected)]
    assert means[0] < 4000
    if pvc == "gtm":
        assert means[1] == pytest.approx(5000, rel=0.02)
        assert not corrected["preproc"].exists()
    else:
        # The voxels of the scan still blur what is near the border of a ball of 12 mm.
        assert 4300 < means[1] < 5100
        said = json.loads(corrected["preproc_json"].read_text())
        assert said["PSFFullWidthHalfMaximum"] == [8.0]
        assert corrected["preprocSUVR"].exists()
        assert value_in_ball(corrected["preproc"]) == pytest.approx(5000, rel=0.03)


# Points of the head in the static image to its points in the second frame.
MOVED = from_matvec(Rotation.from_euler("zx", [9, -5], degrees=True).as_matrix(), [6, -5, 4])
DYNAMIC = {
    **SIDECAR,
    **{"FrameTimesStart": [0, 600], "FrameDuration": [600, 1200]},
    # So that frames differ in SUV, too.
    **{"ImageDecayCorrected": False, "TracerRadionuclide": "C11"},
}


@pytest.mark.parametrize("pvc", ["gtm", "rbv"])
@pytest.mark.parametrize("has_motion", [True, False])
def test_every_frame_is_corrected_for_partial_volume(
    run, dataset, scan, tmp_path, pvc, has_motion
):
    """The second frame has half the activity, and where motion is corrected it has moved."""
    native = nb.load(dataset["native_file"])
    zooms = np.linalg.norm(native.affine[:3, :3], axis=0)
    data = ndimage.gaussian_filter(native.get_fdata(), 8 / 2.354820 / zooms, mode="nearest")
    still = nb.Nifti1Image(data.astype(np.float32), native.affine)
    second, dataset["frame_xfms"] = still, []
    if has_motion:
        second = resample(still, np.linalg.inv(MOVED), still)
        xfms = {"first": np.eye(4), "second": MOVED}
        dataset["frame_xfms"] = [
            write_affine(xfm, tmp_path / f"{name}.txt") for name, xfm in xfms.items()
        ]
    frames = np.stack([still.get_fdata(), 0.5 * second.get_fdata()], axis=-1)
    dynamic = nb.Nifti1Image(frames.astype(np.float32), native.affine)
    dataset["frames_file"] = save_image(dynamic, tmp_path / "work/frames.nii.gz")
    on_t1w = np.asarray(resample(still, T1W2SCAN, nb.load(dataset["t1w_file"])).dataobj)
    t1w_affine = nb.load(dataset["t1w_file"]).affine
    both = nb.Nifti1Image(np.stack([on_t1w, 0.5 * on_t1w], axis=-1), t1w_affine)
    save_image(both, dataset["preproc"])
    scan = replace(scan, sidecar=DYNAMIC)
    run(scan, fs_subjects_dir=tmp_path / "fs", pvc=pvc, psf_fwhm_mm=(8.0,))
    files = outputs(scan, tmp_path, pvc=pvc)
    rows = table(files["tacs"])
    assert [(row["frame_start"], row["frame_end"]) for row in rows] == [
        ("0", "600"),
        ("600", "1800"),
    ]
    # As for a volume; and what has moved is interpolated once more.
    range_ = {"gtm": (4900, 5100), "rbv": (4300, 5100)}[pvc]
    first, second = (float(row["ctx-lh-insula"]) for row in rows)
    assert range_[0] < first < range_[1]
    assert second == pytest.approx(first / 2, rel=0.03 if has_motion else 1e-4)
    if pvc == "gtm":
        return
    image = nb.load(files["preproc"])
    assert image.shape == both.shape
    said = json.loads(files["preproc_json"].read_text())
    assert said["FrameTimesStart"] == DYNAMIC["FrameTimesStart"]
    suv = json.loads(files["preprocSUV_json"].read_text())
    assert len(suv["SUVScaleFactor"]) == 2
    assert suv["SUVScaleFactor"][1] > suv["SUVScaleFactor"][0]


def test_tissues_give_tables_alone(run, scan, tmp_path):
    run()
    files = outputs(scan, tmp_path, "tissues")
    written = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    keys = ("stat", "tacs", "preprocSUV")
    assert written == {files[name] for key in keys for name in (key, f"{key}_json")}
    assert [row["region"] for row in table(files["stat"])] == ["GM"]
    said = json.loads(files["stat_json"].read_text())
    assert "no FreeSurfer labels" in said["SUVRNotComputed"]
    assert said[MADE_FROM_FIELD] == {
        **{"Segmentation": "tissues", "Files": {}, "BodyWeight": "50", "BodyWeightUnits": "kg"},
        "PartialVolumeCorrection": "none",
    }


def test_copies_are_smoothed_by_each_width_and_named_by_it(run, scan, tmp_path):
    """Of the image, and of what is computed from it; copies of other widths go."""
    options = {"fs_subjects_dir": tmp_path / "fs", "pvc": "rbv", "psf_fwhm_mm": (6.0,)}

    def copies(pvc):
        found = outputs(scan, tmp_path, pvc=pvc, smooth_fwhm_mm=(5.5, 8.0, 6.0))
        return {key: file for key, file in found.items() if "Smoothed" in key and file.is_file()}

    run(**options, smooth_fwhm_mm=(5.5, 8.0))
    for pvc in (None, "rbv"):
        expected = {
            f"preproc{kind}Smoothed{width}{end}"
            for kind in ("", "SUV", "SUVR")
            for width in ("5p5", "8")
            for end in ("", "_json")
        }
        files = copies(pvc)
        assert set(files) == expected
        assert files["preprocSUVRSmoothed5p5"].name.endswith(
            "_desc-preprocSUVRSmoothed5p5_pet.nii.gz"
        )
        widths, spreads = [], []
        for label in ("5p5", "8"):
            sidecar = json.loads(files[f"preprocSUVRSmoothed{label}_json"].read_text())
            assert "ReferenceRegion" in sidecar
            widths.append(sidecar["SmoothingFullWidthHalfMaximum"])
            spreads.append(nb.load(files[f"preprocSUVRSmoothed{label}"]).get_fdata().std())
        assert widths == [5.5, 8.0]
        assert spreads[0] > spreads[1]
    run(**options, smooth_fwhm_mm=(6.0, 8.0))
    for pvc in (None, "rbv"):
        assert {key.partition("Smoothed")[2].removesuffix("_json") for key in copies(pvc)} == {
            "6", "8",
        }  # fmt: skip


def test_results_of_other_options_are_replaced(run, scan, tmp_path):
    run(fs_subjects_dir=tmp_path / "fs", smooth_fwhm_mm=(6.0,))
    files = outputs(scan, tmp_path, smooth_fwhm_mm=(6.0,))
    assert files["preprocSUVRSmoothed6"].exists()
    run(fs_subjects_dir=tmp_path / "fs", suvr_region="none")
    assert not files["preprocSUVR"].exists()
    assert not files["preprocSUVRSmoothed6_json"].exists()
    assert json.loads(files["stat_json"].read_text())["SUVRNotComputed"] == "not asked for"


def test_fa_gets_statistics(run, scan, tmp_path):
    fa = replace(scan, modality="fa", entities={"sub": "1", "param": "fa"}, sidecar={})
    run(fa, fs_subjects_dir=tmp_path / "fs", pvc="gtm", psf_fwhm_mm=(8.0,))
    written = sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file())
    stem = "sub-1_seg-aparcaseg_param-FA_desc-preproc_stat"
    assert written == [f"{stem}.json", f"{stem}.tsv"]
    assert len(table(tmp_path / f"out/sub-1/dwi/{stem}.tsv")) == 2


def test_transform_says_what_is_seen(run, dataset, scan, tmp_path):
    """One that is far off shows nothing."""
    away = from_matvec(np.eye(3), [500, 0, 0])
    dataset["best_xfm"] = write_composite((away, T1W2SCAN), tmp_path / "forward.h5")
    run(fs_subjects_dir=tmp_path / "fs")
    rows = table(outputs(scan, tmp_path)["stat"])
    assert {(row["mean"], row["coverage"]) for row in rows} == {("n/a", "0")}


@pytest.mark.parametrize("pvc", ["gtm", "rbv"])
@pytest.mark.parametrize("hindrance", ["elsewhere", "too blurred"])
def test_a_correction_that_cannot_be_is_told_and_the_rest_is_there(
    run, dataset, scan, tmp_path, pvc, hindrance, monkeypatch
):
    """No label in the field of view, or regions that the scanner cannot tell apart."""
    options = {"fs_subjects_dir": tmp_path / "fs", "pvc": pvc, "psf_fwhm_mm": (6.0,)}
    run(scan, **options)
    corrected = outputs(scan, tmp_path, pvc=pvc)
    assert corrected["tacs"].exists()
    if hindrance == "elsewhere":
        away = from_matvec(np.eye(3), [500, 0, 0])
        dataset["best_inverse_xfm"] = write_affine(away, tmp_path / "away.txt")
    else:
        options["psf_fwhm_mm"] = (7.0,)
        monkeypatch.setattr("m2m_bids.quantification.partial_volume._MAX_CONDITION", 1.0)
    run(scan, **options)
    files = outputs(scan, tmp_path)
    assert {row["coverage"] for row in table(files["stat"])} == {"1"}
    assert files["preprocSUVR"].exists()
    said = json.loads(files["stat_json"].read_text())["PartialVolumeCorrectionNotComputed"]
    expected = "no label is in the field of view" if hindrance == "elsewhere" else "told apart"
    assert expected in said
    # What the run before has written of it is gone.
    assert not any(file.exists() for file in corrected.values())


def test_scan_is_not_finished_before_it_is_measured(run, scan, tmp_path):
    def is_missing(**changes):
        options = QuantificationOptions(**changes)
        plan = plan_quantification(scan, tmp_path / "bids", options)
        asked = Request("rigid", {}, quantification_record(plan, options, {}), {})
        missing = missing_outputs(scan, tmp_path / "out", asked)
        return any("_stat." in file.name for file in missing)

    assert is_missing()
    # Tables of other labels, made with other options, do not count.
    older = outputs(scan, tmp_path, "aseg")["stat_json"]
    older.parent.mkdir(parents=True)
    older.write_text(json.dumps({MADE_FROM_FIELD: {"Segmentation": "aseg"}}))
    assert is_missing()
    run()
    assert not is_missing()
    assert is_missing(smooth_fwhm_mm=(5.0,))
    run(smooth_fwhm_mm=(5.0, 8.0))
    assert not is_missing(smooth_fwhm_mm=(8.0, 5.0))
    assert is_missing(smooth_fwhm_mm=(5.0,))
    run()
    outputs(scan, tmp_path, "tissues")["stat"].unlink()
    assert is_missing()


@pytest.mark.parametrize("pvc", ["none", "gtm", "rbv"])
@pytest.mark.parametrize("spoil", ["elsewhere", "torn"])
def test_unusable_labels_are_told_and_suv_is_there(run, dataset, scan, tmp_path, pvc, spoil):
    """What needs no regions is made; the sidecar of the tables, without tables, says why."""
    file, original = (tmp_path / f"fs/sub-1/mri/{name}.mgz" for name in ("aparc+aseg", "orig"))
    if spoil == "torn":
        file.write_bytes(file.read_bytes()[:300])
    else:
        for one in (file, original):
            image = nb.load(one)
            moved = from_matvec(np.eye(3), [0, 0, 8]) @ image.affine
            nb.save(nb.MGHImage(np.asarray(image.dataobj), moved), one)
    psf = {"psf_fwhm_mm": (6.0,)} if pvc != "none" else {}
    run(fs_subjects_dir=tmp_path / "fs", pvc=pvc, **psf)
    files = outputs(scan, tmp_path)
    written = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert written == {files[key] for key in ("preprocSUV", "preprocSUV_json", "stat_json")}
    said = json.loads(files["stat_json"].read_text())
    reasons = {
        "torn": f"{file}: not a readable image",
        "elsewhere": f"{original}: its detail agrees with that of {dataset['t1w_file']}",
    }
    for what in ("Statistics", "SUVR", *(["PartialVolumeCorrection"] if psf else [])):
        assert reasons[spoil] in said[f"{what}NotComputed"]


def test_unusable_mask_of_the_reference_is_told(run, scan, tmp_path):
    (tmp_path / "mask.nii.gz").write_bytes(b"torn")
    run(suvr_mask=str(tmp_path / "mask.nii.gz"))
    said = json.loads(outputs(scan, tmp_path, "tissues")["stat_json"].read_text())
    assert str(tmp_path / "mask.nii.gz") in said["SUVRNotComputed"]
    assert "StatisticsNotComputed" not in said


@pytest.mark.parametrize("is_deformable", [True, False])
def test_template_gives_tissues_after_the_deformable_step_alone(
    run, dataset, scan, tmp_path, is_deformable
):
    """Neither SUVR nor a correction, for which its borders are not the person's; but SUV."""
    at_template = replace(scan, t1w=None, t1w_entities={}, template="MNI152NLin2009aSym")
    if is_deformable:
        dataset["m2m_xfms"] = [dataset["best_xfm"], dataset["best_inverse_xfm"]]
    mask = str(dataset["mask_file"])
    run(
        at_template, fs_subjects_dir=tmp_path / "fs", pvc="gtm", psf_fwhm_mm=(6.0,), suvr_mask=mask
    )
    files = outputs(at_template, tmp_path, "tissues")
    stem = "sub-1_trc-AV1451_space-MNI152NLin2009aSym"
    assert files["stat"].name == f"{stem}_seg-tissues_desc-preproc_stat.tsv"
    assert files["preprocSUV"].name == f"{stem}_desc-preprocSUV_pet.nii.gz"
    written = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    tables = {files[key] for key in ("stat", "tacs", "tacs_json")}
    assert written == {files[key] for key in ("preprocSUV", "preprocSUV_json", "stat_json")} | (
        tables if is_deformable else set()
    )
    said = json.loads(files["stat_json"].read_text())
    assert said["LabelFile"] == "tissues of MNI152NLin2009aSym"
    assert "no T1w" in said["SUVRNotComputed"]
    assert "no T1w" in said["PartialVolumeCorrectionNotComputed"]
    assert ("StatisticsNotComputed" in said) is not is_deformable


def test_inputs_are_those_of_the_workflow(scan, tmp_path):
    options = QuantificationOptions(pvc="rbv", psf_fwhm_mm=(5.0, 5.0, 6.0))
    labels = LabelFile(tmp_path / "x.mgz", "freesurfer")
    labels.file.touch()
    plan = replace(plan_quantification(scan, tmp_path / "bids", options), labels=labels)
    workflow = init_quantification_wf(
        scan=scan, plan=plan, options=options, output_dir=tmp_path / "out", datasets={}
    )
    assert tuple(workflow.get_node("inputnode").interface._fields) == INPUTS
    assert "5 x 5 x 6 mm" in workflow.__desc__


@pytest.mark.parametrize("modality", ["pet", "fa"])
def test_methods_have_a_paragraph_for_each_fact(scan, tmp_path, modality):
    """So that scans that share one fact and not another are not told twice of the first."""
    options = QuantificationOptions(
        pvc="rbv", psf_fwhm_mm=(6.0,), smooth_fwhm_mm=(5.5, 8.0), suvr_region="brainstem"
    )
    one = replace(scan, modality=modality)
    workflow = init_quantification_wf(
        scan=one,
        plan=plan_quantification(one, tmp_path / "bids", options),
        options=options,
        output_dir=tmp_path / "out",
        datasets={},
    )
    ((heading, texts),) = read_description(workflow.__desc__).items()
    assert heading == "Quantification"
    starts = ["Registered images were averaged", "Copies of registered images"]
    if modality == "pet":
        starts[1:1] = ["SUV is", "SUVR is"]
        starts.append("Partial volume effects were corrected")
    assert len(texts) == len(starts)
    assert all(text.startswith(start) for text, start in zip(texts, starts, strict=True))
    assert "Gaussian kernels of 5.5 and 8 mm" in " ".join(texts).replace("\n", " ")
    # Nothing is drawn of what an FA map cannot have.
    assert (workflow.get_node("draw_suvr") is not None) is (modality == "pet")
