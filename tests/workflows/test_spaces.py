"""Outputs in other spaces: the graph, and what is written against ANTs."""

import json
from dataclasses import replace
from pathlib import Path

import ants
import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from nipype.pipeline.engine.nodes import NodeExecutionError

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.bids.diffusion import GradientFiles
from m2m_bids.bids.naming import (
    expected_diffusivity_outputs,
    expected_space_outputs,
    expected_template_outputs,
    static_outputs,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import FRAMES, made_from
from m2m_bids.bids.spaces import parse_space
from m2m_bids.preprocessing.mutual_information import rotation_matrix
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.itk import read_affine, read_composite, write_affine, write_composite
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.templates import embedded_template
from m2m_bids.spatial.transforms import map_points
from m2m_bids.workflows.registration import RegistrationOptions
from m2m_bids.workflows.spaces import (
    init_scan_space_wf,
    init_template_target_wf,
    init_template_wf,
)

OPTIONS = RegistrationOptions("m2m", DEFAULT_WEIGHTS, "abc", 7, "cpu", False, 0, 1)
FORWARD = {
    "best": from_matvec(rotation_matrix(np.array([0.4, -0.2, 0.3])), (12, -7, 5)),
    "template": from_matvec(rotation_matrix(np.array([-0.3, 0.2, 0.5])) * 0.9, (-8, 20, 3)),
}


@pytest.fixture(scope="module")
def field():
    """A bend of up to 8 mm that falls to zero at its border."""
    affine = from_matvec(np.eye(3) * 8, (-120, -140, -100))
    axes = [np.sin(np.linspace(0, np.pi, n)) ** 2 for n in (31, 36, 26)]
    bump = 8 * axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return DisplacementField(np.stack([bump, -0.5 * bump, 0.7 * bump], axis=-1), affine)


@pytest.fixture
def scan(tmp_path):
    """A PET of smooth blobs, on an oblique grid of anisotropic voxels."""
    shape = (60, 50, 44)
    matrix = rotation_matrix(np.array([0.2, 0.1, -0.3])) @ np.diag([-3.0, 4.0, 3.5])
    affine = from_matvec(matrix, -matrix @ ((np.array(shape) - 1) / 2))
    points = np.moveaxis(np.indices(shape), 0, -1) / 7.0
    data = 100 + 40 * np.sin(points).sum(axis=-1)
    files = {
        name: tmp_path / f"bids/sub-01/{name}/sub-01_{name}.nii.gz" for name in ("pet", "T1w")
    }
    for file in files.values():
        file.parent.mkdir(parents=True)
        nb.save(nb.Nifti1Image(data.astype(np.float32), affine), file)
    return Scan("pet", files["pet"], {"sub": "01"}, files["T1w"], {"sub": "01"})


FRAMES_REQUEST = {"Reference": "auto", "MotionCorrection": True}


def run(scan, tmp_path, space, xfms, given_xfms=None, **inputs):
    """Run the workflow of a space; return its outputs."""
    out = tmp_path / "out"
    workflow = init_scan_space_wf(
        space=parse_space(space),
        scan=scan,
        templateflow_home=tmp_path / "no_archive",
        output_dir=out,
        datasets={"raw": tmp_path / "bids", "fmriprep": tmp_path},
        options=OPTIONS,
        given_xfms=given_xfms,
        made_from={"Target": "T1w", FRAMES: FRAMES_REQUEST},
    )
    workflow.base_dir = str(tmp_path / "work")
    given = {"moving_file": scan.file, "t1w_file": scan.t1w, **xfms}
    if scan.modality == "pet":
        given |= {"frames_file": scan.file, "frame_xfms": [], "reference_method": "3-D image"}
    given |= inputs
    for name, value in given.items():
        is_list = isinstance(value, list)
        setattr(workflow.inputs.inputnode, name, value if is_list else str(value))
    workflow.run(plugin="Linear")
    return expected_space_outputs(
        scan, out, parse_space(space), "m2m" if given["m2m_xfms"] else "rigid"
    )


@pytest.fixture
def xfms(tmp_path, field):
    """Transforms of the scan and of its T1w, as the workflows before give them."""
    best = (FORWARD["best"], field)
    template = (FORWARD["template"], field)
    written = {
        "best_xfm": write_composite(best, tmp_path / "best.h5"),
        "template_xfm": write_composite(template, tmp_path / "template.h5"),
    }
    for name in ("best", "template"):
        inverse = write_affine(np.linalg.inv(FORWARD[name]), tmp_path / f"{name}_inverse.txt")
        written[f"{name}_inverse_xfm"] = inverse
    return {**written, "m2m_xfms": [str(written["best_xfm"]), str(written["best_inverse_xfm"])]}


def test_template_space_is_what_ants_makes_of_the_written_transform(scan, tmp_path, xfms, field):
    outputs = run(scan, tmp_path, "MNI152NLin2009aSym:res-4", xfms)
    assert all(file.is_file() for file in outputs.values())
    image = nb.load(outputs["image"])
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), 4)
    # From a point of the template through the T1w to the scan.
    points = np.array([[0.0, 0, 0], [40, -60, 30], [-30, 20, -15]])
    chain = (FORWARD["best"], field, FORWARD["template"], field)
    found = map_points(read_composite(outputs["xfm"]), points)
    np.testing.assert_allclose(found, map_points(chain, points), atol=1e-3)
    inverse = np.linalg.inv(FORWARD["template"]) @ np.linalg.inv(FORWARD["best"])
    found = map_points(read_composite(outputs["inverse_xfm"]), points)
    np.testing.assert_allclose(found, nb.affines.apply_affine(inverse, points), atol=1e-3)
    expected = ants.apply_transforms(
        ants.image_read(str(outputs["image"])),
        ants.image_read(str(scan.file)),
        [str(outputs["xfm"])],
        interpolator="bSpline",
    ).numpy()
    data = np.asarray(image.dataobj)
    inside = (data != 0) & (expected != 0)
    assert inside.mean() > 0.2
    # Both are cubic splines; at the rim ITK mirrors the image in another way.
    assert np.median(np.abs(data - expected)[inside]) < 0.05
    assert np.percentile(np.abs(data - expected)[inside], 99) < 3
    sidecar = json.loads(outputs["image_json"].read_text())
    assert sidecar["Transform"] == "m2m"
    assert sidecar["Resolution"] == "The template's resolution number 4."  # BIDS asks for it
    assert sidecar["Sources"] == ["bids:raw:sub-01/pet/sub-01_pet.nii.gz",
                                  "bids:raw:sub-01/T1w/sub-01_T1w.nii.gz"]  # fmt: skip


def run_given(scan, tmp_path, given, mask):
    """Take transforms of another program over, for a T1w whose brain is known."""
    workflow = init_template_wf(
        space=parse_space("MNI152NLin2009aSym"),
        t1w_file=scan.t1w,
        t1w_entities=scan.t1w_entities,
        templateflow_home=tmp_path / "no_archive",
        output_dir=tmp_path / "out",
        datasets={"raw": tmp_path / "bids", "fmriprep": tmp_path},
        options=OPTIONS,
        given_xfms=given,
    )
    workflow.config["execution"]["crashdump_dir"] = str(tmp_path)
    assert workflow.get_node("normalize_t1w") is None
    assert "was precomputed" in workflow.__desc__
    workflow.base_dir = str(tmp_path / "work")
    nb.save(mask, tmp_path / "mask.nii")
    inputs = {"t1w_file": scan.t1w, "mask_file": tmp_path / "mask.nii", "template2anat": scan.t1w}
    for name, value in inputs.items():
        setattr(workflow.inputs.inputnode, name, str(value))
    workflow.inputs.inputnode.is_skull_stripped = False
    workflow.run(plugin="Linear")


@pytest.fixture
def given(tmp_path):
    """Transforms between the template and a T1w."""
    affine = FORWARD["template"]
    return (
        write_composite(affine, tmp_path / "there.h5"),
        write_composite(np.linalg.inv(affine), tmp_path / "back.h5"),
    )


def brain(shift_mm=0):
    """The brain that the transforms are of, or where it was before the T1w's header changed."""
    mask = embedded_template("mask", 4)
    moved = from_matvec(np.eye(3), [0, 0, shift_mm]) @ FORWARD["template"] @ mask.affine
    return nb.Nifti1Image(np.asarray(mask.dataobj).astype(np.uint8), moved)


def test_transforms_of_another_program_are_used_and_named(scan, tmp_path, given):
    run_given(scan, tmp_path, given, brain())
    outputs = expected_template_outputs(
        scan.t1w_entities, tmp_path / "out", parse_space("MNI152NLin2009aSym")
    )
    assert all(file.is_file() for file in outputs.values())
    assert outputs["xfm"].read_bytes() == given[0].read_bytes()
    assert outputs["inverse_xfm"].read_bytes() == given[1].read_bytes()
    sidecar = json.loads(outputs["preproc_json"].read_text())
    assert sidecar["Sources"][1:] == ["bids:fmriprep:there.h5"]
    assert "another program" in sidecar["Description"]
    assert "SyN" not in sidecar["Description"]


@pytest.mark.parametrize("is_inverse", [False, True])
def test_transforms_of_another_image_are_refused(scan, tmp_path, given, is_inverse):
    """By the brain: 15 mm off, or the wrong way around."""
    pair = given[::-1] if is_inverse else given
    with pytest.raises(NodeExecutionError, match=rf"{pair[0].name}: brings only \d+ % of the"):
        run_given(scan, tmp_path, pair, brain(0 if is_inverse else 15))


def test_given_transforms_are_sources_of_scans(scan, tmp_path, xfms):
    pair = xfms["template_xfm"], xfms["template_inverse_xfm"]
    outputs = run(scan, tmp_path, "MNI152NLin2009aSym:res-8", xfms, given_xfms=pair)
    assert json.loads(outputs["image_json"].read_text())["Sources"] == [
        "bids:raw:sub-01/pet/sub-01_pet.nii.gz",
        "bids:raw:sub-01/T1w/sub-01_T1w.nii.gz",
        "bids:fmriprep:template.h5",
    ]


def test_further_grids_of_the_template_that_stands_for_the_t1w(scan, tmp_path, xfms):
    """The scan's own transform leads there: no other one is composed or written."""
    at_template = replace(scan, t1w=None, t1w_entities={}, template="MNI152NLin2009aSym")
    xfms = {name: value for name, value in xfms.items() if not name.startswith("template")}
    affine = {"best_xfm": write_affine(FORWARD["best"], tmp_path / "affine.txt"), "m2m_xfms": []}
    outputs = run(
        at_template, tmp_path, "MNI152NLin2009aSym:res-8", {**xfms, **affine}, t1w_file=scan.t1w
    )
    assert set(outputs) == {"image", "image_json"}
    image = nb.load(outputs["image"])
    expected = resample(nb.load(scan.file), FORWARD["best"], image)
    np.testing.assert_allclose(image.get_fdata(), expected.get_fdata(), atol=1e-2)
    sidecar = json.loads(outputs["image_json"].read_text())
    assert sidecar["Transform"] == "affine"
    assert sidecar["Sources"] == ["bids:raw:sub-01/pet/sub-01_pet.nii.gz"]
    assert "SpatialReference" not in sidecar


def test_the_template_is_prepared_as_a_t1w_is(tmp_path):
    workflow = init_template_target_wf()
    workflow.base_dir = str(tmp_path / "work")
    (node,) = workflow.run().nodes
    outputs = node.result.outputs
    np.testing.assert_array_equal(read_affine(outputs.template2anat), np.eye(4))
    images = [nb.load(f) for f in (outputs.t1w_file, outputs.mask_file, outputs.dseg_file)]
    assert len({image.shape for image in images}) == 1
    assert np.unique(images[2].dataobj).tolist() == [0, 1, 2, 3]


def test_native_voxels_in_the_t1w_space(scan, tmp_path, xfms):
    outputs = run(scan, tmp_path, "T1w:res-native", xfms)
    assert set(outputs) == {"image", "image_json"}
    image = nb.load(outputs["image"])
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (3, 4, 3.5))
    sidecar = json.loads(outputs["image_json"].read_text())
    assert sidecar["SpatialReference"] == "bids::sub-01/anat/sub-01_desc-preproc_T1w.nii.gz"
    assert sidecar["Resolution"] == "Voxels of the size of the scan's own."


def test_a_volume_has_no_times_of_several_frames(scan, tmp_path, xfms):
    outputs = run(replace(scan, sidecar=TIMING), tmp_path, "T1w:res-native", xfms)
    sidecar = json.loads(outputs["image_json"].read_text())
    assert sidecar["TracerName"] == "FDG"
    assert not {"FrameTimesStart", "FrameDuration"} & set(sidecar)


TIMING = {"FrameTimesStart": [0, 60], "FrameDuration": [60, 180], "TracerName": "FDG"}
# Points of the head in the static image to its points in the second frame.
MOVED = from_matvec(rotation_matrix(np.array([0.1, 0.5, -0.4])), (15, -10, 8))
DOSES = 1.0, 0.4


def activity(points):
    """What is where, mm in the world of the static image; extremes, which are cut, at corners."""
    return 3000 + points @ (4, -3, 5) + 200 * np.sin(points / 20).sum(axis=-1)


@pytest.fixture
def dynamic(scan, tmp_path):
    """Two frames of one head, which has moved; integers with a scale factor, as scanners write."""
    static = nb.load(scan.file)
    points = apply_affine(static.affine, np.moveaxis(np.indices(static.shape), 0, -1))
    frames = np.stack(
        [
            dose * activity(apply_affine(np.linalg.inv(motion), points))
            for dose, motion in zip(DOSES, (np.eye(4), MOVED), strict=True)
        ],
        axis=-1,
    )
    image = nb.Nifti1Image(frames, static.affine)
    image.set_data_dtype(np.int16)
    nb.save(image, scan.file)
    assert nb.load(scan.file).dataobj.slope not in (0, 1)
    mean = np.average(DOSES, weights=TIMING["FrameDuration"]) * activity(points)
    static_file = tmp_path / "static.nii.gz"
    nb.save(nb.Nifti1Image(mean.astype(np.float32), static.affine), static_file)
    frame_xfms = [
        str(write_affine(motion, tmp_path / f"frame_{index}.txt"))
        for index, motion in enumerate((np.eye(4), MOVED))
    ]
    inputs = {
        **{"moving_file": static_file, "frame_xfms": frame_xfms},
        "reference_method": "mean of 2 frames, weighted by duration",
    }
    return replace(scan, sidecar=TIMING), inputs


@pytest.mark.parametrize("space", ["MNI152NLin2009aSym:res-4", "T1w:res-native"])
def test_frames_go_through_motion_and_all_transforms_at_once(
    dynamic, tmp_path, xfms, field, space
):
    scan, inputs = dynamic
    outputs = run(scan, tmp_path, space, xfms, **inputs)
    files = static_outputs(scan, tmp_path / "out", parse_space(space))
    image, static = nb.load(outputs["image"]), nb.load(files["static"])
    assert image.shape == (*static.shape, 2)
    np.testing.assert_array_equal(image.affine, static.affine)
    assert (image.get_data_dtype(), image.dataobj.slope, image.dataobj.inter) == ("<f4", 1, 0)
    points = apply_affine(image.affine, np.moveaxis(np.indices(static.shape), 0, -1))
    chain = (FORWARD["best"], field)
    if parse_space(space).is_template:
        chain += (FORWARD["template"], field)
    points = map_points(chain, points.reshape(-1, 3)).reshape(points.shape)
    native = nb.load(scan.file)
    doses = [*DOSES, np.average(DOSES, weights=TIMING["FrameDuration"])]
    volumes = np.concatenate([image.get_fdata(), static.get_fdata()[..., None]], axis=-1)
    for index, (dose, motion) in enumerate(zip(doses, (np.eye(4), MOVED, np.eye(4)), strict=True)):
        seen = apply_affine(np.linalg.inv(native.affine) @ motion, points)
        # Splines bend at the border, and integers come in steps of 0.05.
        inside = ((seen > 6) & (seen < np.array(native.shape[:3]) - 7)).all(axis=-1)
        assert inside.sum() > 1000
        error = volumes[..., index] - dose * activity(points)
        assert np.abs(error[inside]).max() < 0.1


def test_frames_keep_their_times_and_the_static_image_has_none(dynamic, tmp_path, xfms):
    scan, inputs = dynamic
    outputs = run(scan, tmp_path, "T1w:res-native", xfms, **inputs)
    files = static_outputs(scan, tmp_path / "out", parse_space("T1w:res-native"))
    frames, static = (
        json.loads(file.read_text()) for file in (outputs["image_json"], files["static_json"])
    )
    assert {key: frames.get(key) for key in TIMING} == TIMING
    assert frames["MadeFrom"] == {"Target": "T1w", FRAMES: FRAMES_REQUEST}
    assert static["TracerName"] == "FDG"
    assert not {"FrameTimesStart", "FrameDuration"} & set(static)
    assert "mean of 2 frames, weighted by duration" in static["Description"]
    for key in ("Transform", "Resolution", "SpatialReference", "Sources"):
        assert static[key] == frames[key]


def test_a_scan_that_is_no_longer_dynamic_leaves_no_static_image(dynamic, tmp_path, xfms):
    scan, inputs = dynamic
    run(scan, tmp_path, "T1w:res-native", xfms, **inputs)
    files = static_outputs(scan, tmp_path / "out", parse_space("T1w:res-native"))
    assert all(file.is_file() for file in files.values())
    volume = nb.load(inputs["moving_file"])
    nb.save(volume, scan.file)
    outputs = run(scan, tmp_path, "T1w:res-native", xfms)
    assert nb.load(outputs["image"]).ndim == 3
    assert not any(file.exists() for file in files.values())
    # Which does not depend on how frames are used either.
    assert made_from(outputs["image_json"]) == {"Target": "T1w"}


@pytest.mark.parametrize("space", ["MNI152NLin2009aSym:res-8", "T1w:res-native", "T1w:res-4"])
@pytest.mark.parametrize("is_fitted", [True, False], ids=["fitted", "given"])
def test_diffusivities_are_where_fa_is(scan, tmp_path, xfms, space, is_fitted):
    """Multiples of FA stay multiples of it: of one grid, by one transform, interpolated once."""
    image = nb.load(scan.file)
    factors = {"MD": 2e-6, "AD": 3e-6, "RD": 1e-6}
    maps = {name: scan.file.with_name(f"sub-01_{name}.nii.gz") for name in factors}
    for name, file in maps.items():
        nb.save(
            nb.Nifti1Image(factors[name] * image.get_fdata(dtype=np.float32), image.affine), file
        )
    gradients = [scan.file.with_name(f"sub-01_pet.{end}") for end in ("bval", "bvec")]
    scan = replace(scan, modality="fa", gradients=GradientFiles(*gradients) if is_fitted else None)
    if not is_fitted:
        scan = replace(scan, file=scan.file.rename(scan.file.with_name("sub-01_FA.nii.gz")))
    fields = {f"{name.lower()}_file": file for name, file in maps.items()}
    pair = xfms["template_xfm"], xfms["template_inverse_xfm"]
    outputs = run(scan, tmp_path, space, xfms, pair, **(fields if is_fitted else {}))
    fa, told = nb.load(outputs["image"]), json.loads(outputs["image_json"].read_text())
    assert np.count_nonzero(fa.get_fdata()) > 1000
    for name, factor in factors.items():
        files = expected_diffusivity_outputs(scan, tmp_path / "out", name, parse_space(space))
        found = nb.load(files["image"])
        np.testing.assert_array_equal(found.affine, fa.affine)
        expected = factor * fa.get_fdata()
        np.testing.assert_allclose(found.get_fdata(), expected, atol=1e-5 * expected.max())
        sidecar = json.loads(files["image_json"].read_text())
        assert sidecar.pop("Units", None) == ("mm^2/s" if is_fitted else None)
        assert space in sidecar["Description"]
        first = [] if is_fitted else [f"bids:raw:sub-01/pet/sub-01_{name}.nii.gz"]
        assert sidecar.pop("Sources") == [*first, *told["Sources"]]
        alike = told.keys() - {"Description", "Sources"}
        assert {key: sidecar[key] for key in alike} == {key: told[key] for key in alike}


def test_a_rejected_step_leaves_nothing_of_an_accepted_one(scan, tmp_path, xfms):
    space = "MNI152NLin2009aSym:res-8"
    before = run(scan, tmp_path, space, xfms)
    rigid = {
        "best_xfm": write_affine(FORWARD["best"], tmp_path / "rigid.txt"),
        "m2m_xfms": [],
    }
    after = run(scan, tmp_path, space, {**xfms, **rigid})
    assert all(file.is_file() for file in after.values())
    assert after["xfm"] != before["xfm"]
    assert not before["xfm"].exists()
    assert not before["inverse_xfm"].exists()
    assert json.loads(Path(after["image_json"]).read_text())["Transform"] == "rigid"
