"""Registration without Nipype and BIDS: directions, the check of the result, messages.

Pairs are made from the packaged template, with a known rigid motion and a known warp; the network
is one whose displacement is zero, so that everything there is comes from the refinement.
"""

import json
from dataclasses import asdict, replace

import nibabel as nb
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine, from_matvec
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from m2m_bids import api
from m2m_bids.api import (
    DEFAULT_WEIGHTS,
    DeformableOptions,
    DeviceError,
    Quality,
    check_weights,
    estimate_deformation,
    explained_out_of_memory,
    loaded_network,
    quality_limits,
    register_files,
    resolve_device,
)
from m2m_bids.preprocessing import anatomical, coregistration, pet_motion
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.weights import (
    WeightsCard,
    WeightsError,
    load_weights,
    read_card,
    save_weights,
)
from m2m_bids.simulation import contrast
from m2m_bids.simulation.anatomy import TEMPLATE_CHANNELS, load_template
from m2m_bids.simulation.contrast import FDG_WEIGHTS, fit_pet_weights, template_bridge
from m2m_bids.spatial.conform import template_grid
from m2m_bids.spatial.fields import DisplacementField
from m2m_bids.spatial.images import ImageError
from m2m_bids.spatial.resampling import resample
from m2m_bids.spatial.transforms import map_points

# Far from the identity, so that a transform in the wrong order or direction leaves the brain.
RIGID = from_matvec(Rotation.from_euler("xz", [20, 35], degrees=True).as_matrix(), [25, -60, 40])
TEMPLATE2FIXED = from_matvec(
    Rotation.from_euler("yz", [6, -8], degrees=True).as_matrix() * 1.05, [10, 5, -20]
)
GOOD = Quality(0.0, 0.6, 0.4, 0.9, 3.0, 9.0, 0.5, 1.8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of the default grid whose displacement is zero."""
    config = GradICONConfig(down_widths=(4, 8), up_widths=(4, 4), n_scales=1)
    network = GradICON(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    card = WeightsCard(
        network="gradicon",
        config=asdict(config),
        grid_size=64,
        spacing_mm=3.0,
        modalities=("pet",),
        training_data="none",
        training_command="none",
    )
    folder = tmp_path_factory.mktemp("weights")
    save_weights(network, card, folder)
    return folder


@pytest.fixture(scope="module")
def pair():
    return make_pair(FDG_WEIGHTS)


def make_pair(pet_weights):
    """Moving PET, fixed T1w, its mask, and the true warp, all of the template's anatomy."""
    bridge = template_bridge(load_template(), "pet", pet_weights=pet_weights)
    pet, t1w = (image[0, 0].numpy() for image in bridge)
    grid = template_grid(np.eye(4))
    fixed_affine = TEMPLATE2FIXED @ grid.affine
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(64, 64, 64, 3)), (7, 7, 7, 0))
    # 6 mm at most, on a grid of the fixed world.
    warp = DisplacementField(
        (6 * noise / np.abs(noise).max()).astype(np.float32),
        from_matvec(np.eye(3) * 3.3, apply_affine(fixed_affine, (0, 0, 0)) - 10),
    )
    still = nb.Nifti1Image(pet, fixed_affine)
    # Points of the scan to points of the T1w, whose PET is known: what undoes rigid and warp.
    scan_grid = nb.Nifti1Image(np.zeros((64, 64, 64), np.uint8), RIGID @ fixed_affine)
    moving = resample(still, (warp, np.linalg.inv(RIGID)), scan_grid, order=1)
    mask = nb.Nifti1Image((t1w > 0.05).astype(np.uint8), fixed_affine)
    return moving, nb.Nifti1Image(100 * t1w, fixed_affine), mask, warp


@pytest.fixture(scope="module")
def estimate(pair, weights):
    moving, fixed, mask, _ = pair

    def run(n_refine, image=moving, **options):
        return estimate_deformation(
            image,
            fixed,
            mask,
            fixed2moving=RIGID,
            template2fixed=TEMPLATE2FIXED,
            options=DeformableOptions("pet", weights, n_refine, "cpu", n_threads=1),
            **options,
        )

    return run


@pytest.fixture(scope="module")
def refined(estimate):
    return estimate(18)


def brain_points(mask, step=3):
    inside = np.argwhere(np.asarray(mask.dataobj)[::step, ::step, ::step] > 0) * step
    return apply_affine(mask.affine, inside)


# --- estimation ------------------------------------------------------------------------------


def test_no_network_and_no_refinement_is_the_identity(estimate, pair):
    result = estimate(0)
    assert np.abs(result.field.data).max() < 1e-3
    assert np.asarray(result.jacobian.dataobj) == pytest.approx(1, abs=1e-3)
    assert result.quality.similarity_gain == pytest.approx(0, abs=1e-4)
    assert result.quality.disagreement_mm < 1e-2
    gain, displacement = result.quality.objections()
    assert "mono-modal similarity" in gain
    assert "within its own error" in displacement


def test_refinement_undoes_the_warp(refined, pair):
    """The map takes points of the T1w nearer to where the scan has them."""
    _, _, mask, warp = pair
    points = brain_points(mask)
    # The scan shows at warp^-1(x), rigidly moved, what the T1w has at x.
    found = map_points((warp, refined.field), points)
    error_mm = np.linalg.norm(found - points, axis=1).mean()
    start_mm = np.linalg.norm(warp.map(points) - points, axis=1).mean()
    assert start_mm > 1.5
    assert error_mm < 0.8 * start_mm


def test_chain_is_the_rigid_map_of_the_field(refined, pair):
    moving, fixed, mask, _ = pair
    still = template_bridge(load_template(), "pet")[0][0, 0].numpy()
    inside = np.asarray(mask.dataobj) > 0
    chains = {"rigid": (RIGID,), "right": (RIGID, refined.field), "wrong": (refined.field, RIGID)}
    correlations = {
        name: np.corrcoef(resample(moving, chain, fixed).get_fdata()[inside], still[inside])[0, 1]
        for name, chain in chains.items()
    }
    assert correlations["right"] > correlations["rigid"] + 0.01
    assert correlations["right"] > correlations["wrong"]


def test_field_covers_the_fixed_image(refined, pair):
    _, fixed, _, _ = pair
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in fixed.shape])).reshape(3, -1).T
    ijk = apply_affine(np.linalg.inv(refined.field.affine) @ fixed.affine, corners)
    assert (ijk > -1).all()
    assert (ijk < np.array(refined.field.shape)).all()
    assert refined.jacobian.shape == refined.field.shape


def test_inverse_undoes_the_field(refined, pair):
    points = brain_points(pair[2])
    again = refined.inverse_field.map(refined.field.map(points))
    assert np.linalg.norm(again - points, axis=1).max() < 1.5  # half a voxel of the grid


def test_quality_is_of_the_field(refined, pair):
    _, _, mask, _ = pair
    quality = refined.quality
    lengths = np.linalg.norm(refined.field.map(brain_points(mask)) - brain_points(mask), axis=1)
    assert quality.mean_displacement_mm == pytest.approx(lengths.mean(), rel=0.1)
    assert quality.max_displacement_mm >= lengths.max() - 0.2
    determinants = np.asarray(refined.jacobian.dataobj)
    assert determinants.min() <= quality.min_jacobian < 1 < quality.max_jacobian
    assert quality.max_jacobian <= determinants.max()
    assert quality.folding_percent == 0
    assert quality.similarity_gain > 0.02
    assert refined.device == "cpu"


def test_cycle_error_lies_on_the_brain(refined, pair):
    """Its mean in the T1w's mask, taken to its grid in the T1w's world, is the disagreement."""
    error = refined.cycle_error
    inside = np.asarray(resample(pair[2], (), error, order=0).dataobj) > 0
    mean = np.asarray(error.dataobj)[inside].mean()
    assert mean == pytest.approx(refined.quality.disagreement_mm, rel=0.05)  # edges of the mask
    assert mean > 0


@pytest.fixture(scope="module")
def dseg(pair):
    """Tissues of the template on the T1w's grid: 1 GM, 2 WM, 3 CSF."""
    data = load_template().data[0]
    grey, white, inside = (
        data[TEMPLATE_CHANNELS.index(name)].numpy() for name in ("gm", "wm", "mask")
    )
    largest = np.argmax((grey, white, inside - grey - white), axis=0)
    return nb.Nifti1Image(((largest + 1) * (inside > 0.5)).astype(np.uint8), pair[1].affine)


def error_mm(estimated, mask, warp):
    points = brain_points(mask)
    return np.linalg.norm(map_points((warp, estimated.field), points) - points, axis=1).mean()


def test_tissues_of_the_t1w_are_a_second_bridge(estimate, pair, dseg):
    *_, mask, warp = pair
    start, result = estimate(0, fixed_dseg=dseg), estimate(18, fixed_dseg=dseg)
    assert error_mm(result, mask, warp) < 0.6 * error_mm(start, mask, warp)
    assert result.quality.likeness > 0.8
    assert result.quality.likeness_gain > 0.02
    assert start.quality.likeness_gain == pytest.approx(0, abs=1e-4)
    assert estimate(0).quality.likeness is None


def test_tracers_are_told_apart_after_the_network(weights, pair, dseg, tmp_path, monkeypatch):
    """14 mm off, grey and white matter of an FDG scan look alike; the network brings them back."""
    network, card = load_weights(weights)
    n_voxels = 14 / card.spacing_mm
    with torch.no_grad():
        network.unets[0].last_conv.bias[0] = -10 * n_voxels / (card.grid_size - 1)
    save_weights(network, card, tmp_path / "shifting")
    _, fixed, mask, _ = pair
    still = template_bridge(load_template(), "pet")[0][0, 0].numpy()
    shift = np.eye(4)
    shift[:3, 3] = template_grid(TEMPLATE2FIXED).affine[:3, 0] * n_voxels
    found = []

    def spy(*arguments):
        found.append(fit_pet_weights(*arguments))
        return found[-1]

    monkeypatch.setattr(contrast, "fit_pet_weights", spy)
    for folder in (weights, tmp_path / "shifting"):
        estimate_deformation(
            nb.Nifti1Image(still, fixed.affine),
            fixed,
            mask,
            fixed2moving=shift,
            template2fixed=TEMPLATE2FIXED,
            options=DeformableOptions("pet", folder, 0, "cpu", n_threads=1),
            fixed_dseg=dseg,
        )
    assert found[0] != FDG_WEIGHTS
    assert found[1] == FDG_WEIGHTS


@pytest.mark.slow
def test_a_tracer_of_white_matter_is_recognised(estimate, dseg):
    """Where white matter is brighter than grey, both bridges are, if the tissues are known."""
    moving, _, mask, warp = make_pair((0.6, 1.0, 0.1))
    known = estimate(18, moving, fixed_dseg=dseg)
    assert error_mm(known, mask, warp) < 0.6 * error_mm(estimate(0, moving), mask, warp)
    assert error_mm(known, mask, warp) < 0.6 * error_mm(estimate(18, moving), mask, warp)
    assert known.quality.similarity > 0.8


def test_images_that_do_not_overlap(estimate, pair):
    moving = pair[0]
    affine = moving.affine.copy()
    affine[:3, 3] += 1000
    with pytest.raises(ImageError, match="moving image and the brain do not overlap"):
        estimate(0, nb.Nifti1Image(np.asarray(moving.dataobj), affine))


def test_weights_of_another_modality(pair, weights):
    moving, fixed, mask, _ = pair
    with pytest.raises(WeightsError, match=r"for pet, not for fa.*--transform rigid"):
        estimate_deformation(
            moving,
            fixed,
            mask,
            fixed2moving=RIGID,
            template2fixed=TEMPLATE2FIXED,
            options=DeformableOptions("fa", weights, device="cpu"),
        )


# --- the check -------------------------------------------------------------------------------


def test_limits_have_reasons():
    limits = quality_limits()
    assert set(limits) == {
        "folding_percent",
        "disagreement_mm",
        "similarity_gain",
        "similarity",
        "likeness_gain",
        "mean_displacement_mm",
    }
    assert all(len(entry["reason"]) > 40 for entry in limits.values())


@pytest.mark.parametrize(
    ("name", "sign", "words"),
    [
        ("folding_percent", 1, "folds"),
        ("disagreement_mm", 1, "disagree"),
        ("similarity_gain", -1, "adds"),
        ("similarity", -1, "does not look like"),
        ("likeness_gain", -1, "the T1w's tissues"),
        ("mean_displacement_mm", -1, "moves the brain"),
    ],
)
def test_each_limit_is_an_objection(name, sign, words):
    limit = quality_limits()[name]["limit"]
    assert GOOD.objections() == []
    assert replace(GOOD, **{name: limit}).objections() == []
    for value in (limit + sign * 0.01, float("nan")):
        (objection,) = replace(GOOD, **{name: value}).objections()
        assert words in objection


def test_all_objections_are_listed():
    assert len(replace(GOOD, folding_percent=1, disagreement_mm=9).objections()) == 2


# --- devices and weights ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "n_gpus", "expected"),
    [
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_devices(monkeypatch, device, n_gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert str(resolve_device(device)) == expected


@pytest.mark.parametrize(("device", "n_gpus"), [("cuda", 0), ("cuda:1", 1)])
def test_missing_device(monkeypatch, device, n_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    with pytest.raises(DeviceError, match=rf"--device {device}: .* {n_gpus} GPUs.*--nv"):
        resolve_device(device)


def test_a_network_is_loaded_once_for_all_scans_of_a_process():
    loaded_network.cache_clear()
    cpu = torch.device("cpu")
    first = loaded_network(DEFAULT_WEIGHTS, "a", cpu)
    assert loaded_network(DEFAULT_WEIGHTS, "a", cpu)[0] is first[0]
    # Weights that were exchanged have another hash.
    assert loaded_network(DEFAULT_WEIGHTS, "b", cpu)[0] is not first[0]
    loaded_network.cache_clear()


def test_memory_of_a_gpu_that_runs_out_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(0.5e9), int(8e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    message = r"memory of Card \(8.0 GB, 0.5 free\) ran out: .*nvidia-smi.*, or use a smaller one"
    with pytest.raises(DeviceError, match=message), explained_out_of_memory("use a smaller one"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert emptied
    with pytest.raises(RuntimeError, match="other"), explained_out_of_memory(""):
        raise RuntimeError("other")


def test_a_registration_without_enough_gpu_memory_says_what_to_do(monkeypatch, estimate):
    """What a scan of `participant` fails with; the other scans go on."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(api, "loaded_network", fail)
    with pytest.raises(DeviceError, match=r"ran out: .*use --device cpu, or weights of a"):
        estimate(0)


def test_default_weights_are_whole_and_for_both():
    assert check_weights(DEFAULT_WEIGHTS, ["pet", "fa"]) == read_card(DEFAULT_WEIGHTS).sha256


def test_wrong_hash(weights, tmp_path):
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "sha256": "0" * 64}))
    with pytest.raises(WeightsError, match="SHA-256"):
        check_weights(tmp_path, ["pet"])


# --- from file to file -----------------------------------------------------------------------


@pytest.fixture
def files(pair, tmp_path, monkeypatch):
    """Files of the pair; brain extraction and rigid alignment are known."""
    moving, fixed, mask, _ = pair
    names = {"pet": moving, "T1w": fixed}
    for name, image in names.items():
        image.to_filename(tmp_path / f"{name}.nii.gz")
    brain = anatomical.BrainExtraction(mask, TEMPLATE2FIXED, True)
    rigid = coregistration.RigidRegistration(RIGID, 0.5, ())
    monkeypatch.setattr(anatomical, "extract_brain", lambda image, **_: brain)
    monkeypatch.setattr(anatomical, "correct_bias_field", lambda image, mask: image)
    monkeypatch.setattr(coregistration, "register_rigid", lambda *_, **__: rigid)
    return tmp_path / "pet.nii.gz", tmp_path / "T1w.nii.gz"


def test_rigid_files(files, pair):
    result = register_files(*files, modality="pet", transform="rigid")
    assert result.deformation is None
    assert result.objections == []
    np.testing.assert_array_equal(result.rigid, RIGID)
    expected = resample(pair[0], (RIGID,), pair[1])
    np.testing.assert_allclose(result.moved.get_fdata(), expected.get_fdata(), atol=1e-4)


def test_noise_below_zero_stays_in_what_is_moved(files, pair):
    below = nb.Nifti1Image(pair[0].get_fdata(dtype=np.float32) - 0.5, pair[0].affine)
    below.to_filename(files[0])
    moved = register_files(*files, modality="pet", transform="rigid").moved
    expected = resample(below, (RIGID,), pair[1])
    np.testing.assert_allclose(moved.get_fdata(), expected.get_fdata(), atol=1e-4)


def test_frames_of_files_are_corrected_for_motion(files, pair, monkeypatch):
    """As the app does: the second frame comes back to the pose of the first."""
    moving = pair[0]
    shift = nb.affines.from_matvec(np.eye(3), (6, 0, -4))
    away = nb.Nifti1Image(moving.get_fdata(dtype=np.float32), shift @ moving.affine)
    frames = np.stack([moving.get_fdata(), resample(away, (), moving).get_fdata()], axis=-1)
    nb.Nifti1Image(frames.astype(np.float32), moving.affine).to_filename(files[0])
    motion = pet_motion.FrameMotion((np.eye(4), shift), np.zeros((2, 6)), 0, ())
    monkeypatch.setattr(pet_motion, "estimate_motion", lambda *_, **__: motion)
    moved = register_files(*files, modality="pet", transform="rigid").moved.get_fdata()
    inside = np.asarray(pair[2].dataobj) > 0
    still, mixed = (
        resample(nb.Nifti1Image(np.float32(data), moving.affine), (RIGID,), pair[1]).get_fdata()
        for data in (frames[..., 0], frames.mean(axis=-1))
    )
    # What is left is the interpolation, there and back.
    assert np.abs(moved - still)[inside].mean() < 0.3 * np.abs(mixed - still)[inside].mean()


@pytest.mark.parametrize("quality", [GOOD, replace(GOOD, folding_percent=0.2)])
def test_deformable_step_of_files(files, pair, monkeypatch, quality):
    moving, fixed, _, warp = pair
    known = api.Deformation(warp, warp, fixed, fixed, quality, "cpu", "abc")
    monkeypatch.setattr(api, "estimate_deformation", lambda *_, **__: known)
    result = register_files(*files, modality="pet")
    assert result.deformation is known
    is_used = quality is GOOD
    assert bool(result.objections) is not is_used
    expected = resample(moving, (RIGID, warp) if is_used else (RIGID,), fixed)
    np.testing.assert_allclose(result.moved.get_fdata(), expected.get_fdata(), atol=1e-4)
    assert len(result.transforms) == (2 if is_used else 1)


@pytest.mark.parametrize(
    ("modality", "data", "found"),
    [
        ("pet", np.zeros((5, 5, 5), np.int16), "positive voxel"),
        ("pet", np.ones((5, 5, 5, 2, 2), np.int16), "5-D"),
        ("fa", np.full((5, 5, 5), np.nan, np.float32), "positive voxel"),
        ("fa", np.ones((5, 5, 5, 3), np.float32), "4-D"),
    ],
)
def test_bad_files_are_named(files, tmp_path, modality, data, found):
    nb.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / "bad.nii.gz")
    with pytest.raises(ImageError, match=rf"bad.nii.gz: .*{found}"):
        register_files(tmp_path / "bad.nii.gz", files[1], modality=modality)
