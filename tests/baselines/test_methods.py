"""The registry, what is said to be missing, and real registrations by each method."""

from dataclasses import replace
from importlib.util import find_spec

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.baselines import fireants
from m2m_bids.baselines.base import Options
from m2m_bids.baselines.methods import METHODS, find_method
from m2m_bids.evaluation.folding import folding_percentage

OPTIONS = Options(device="cpu", n_threads=1, spacing_mm=6.0, n_refine=0)
HAS_FIREANTS = all(find_spec(name) for name in fireants.PACKAGES)
needs_fireants = pytest.mark.skipif(not HAS_FIREANTS, reason="FireANTs is not installed")


def test_registry():
    assert list(METHODS) == [
        "initial",
        "rigid",
        "syn-mi",
        "niftyreg-lncc",
        "fireants-mi",
        "fireants-lncc",
    ]
    assert all(key == method.key for key, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_m2m_takes_weights():
    method = find_method("m2m:mine", DEFAULT_WEIGHTS)
    assert (method.key, method.title) == ("m2m:mine", "M2M-Reg (mine)")
    assert method.missing("pet") is None
    assert method.missing(None) is None


@pytest.mark.parametrize("key", ["syn", "m2m", "m2m:", ""])
def test_unknown_method(key):
    with pytest.raises(ValueError, match="expected one of initial, rigid, syn-mi"):
        find_method(key, DEFAULT_WEIGHTS)


def test_m2m_without_weights():
    with pytest.raises(ValueError, match="needs a folder of weights"):
        find_method("m2m:mine")


def test_missing_weights_are_named(tmp_path):
    assert str(tmp_path) in find_method("m2m:mine", tmp_path).missing("pet")


def test_missing_programs_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NIFTYREGDIR", raising=False)
    message = METHODS["niftyreg-lncc"].missing(None)
    assert "reg_f3d and reg_transform not found" in message
    assert "conda install -c conda-forge niftyreg" in message
    (tmp_path / "reg_f3d").touch(mode=0o755)
    assert "NiftyReg's reg_transform not found" in METHODS["niftyreg-lncc"].missing(None)
    (tmp_path / "reg_transform").touch(mode=0o755)
    assert METHODS["niftyreg-lncc"].missing(None) is None
    # Nipype looks in this folder instead, where it is named.
    monkeypatch.setenv("NIFTYREGDIR", str(tmp_path / "none"))
    assert METHODS["niftyreg-lncc"].missing(None)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(fireants, "PACKAGES", ("fireants_of_nobody", "numpy"))
    message = METHODS["fireants-mi"].missing("pet")
    assert "fireants_of_nobody not installed" in message
    assert "pip install --no-deps fireants" in message


def test_given_transforms(images, error_mm):
    assert METHODS["initial"].register(images, OPTIONS) == ((), "")
    chain, _ = METHODS["rigid"].register(images, OPTIONS)
    # The headers of the pair differ by a motion, which the rigid alignment knows.
    assert error_mm(chain) < error_mm(()) - 1


@pytest.mark.parametrize(
    "key",
    [
        "syn-mi",
        "niftyreg-lncc",
        pytest.param("fireants-mi", marks=[needs_fireants, pytest.mark.slow]),
        pytest.param("fireants-lncc", marks=needs_fireants),
    ],
)
def test_landmarks_come_closer(key, images, error_mm, request):
    if key == "niftyreg-lncc":
        request.getfixturevalue("niftyreg")
    rigid_mm = error_mm((images.fixed2moving,))
    chain, reason = METHODS[key].register(images, OPTIONS)
    assert reason == ""
    # A field that is read the wrong way round, or in another frame, makes it larger.
    assert error_mm(chain) < 0.75 * rigid_mm
    assert folding_percentage(chain, images.fixed_mask) < 0.1


def test_syn_repeats_by_its_seed(images):
    options = replace(OPTIONS, spacing_mm=12.0)
    fields = [
        METHODS["syn-mi"].register(images, replace(options, random_seed=seed)).chain[1].data
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(fields[0], fields[1])
    assert np.abs(fields[0] - fields[2]).max() > 0


def test_m2m_says_why_its_deformable_step_is_not_applied(images, rng):
    noise = rng.random(images.moving.shape).astype(np.float32)
    moving = nb.Nifti1Image(noise, images.moving.affine)
    method = find_method("m2m:default", DEFAULT_WEIGHTS)
    refined = replace(OPTIONS, n_refine=2)
    chain, reason = method.register(replace(images, moving=moving), refined)
    assert len(chain) == 1
    np.testing.assert_array_equal(chain[0], images.fixed2moving)
    assert reason.startswith("deformable step not applied: ")
    assert "does not look like one of its kind" in reason


def test_a_network_alone_is_not_checked(images, rng):
    noise = rng.random(images.moving.shape).astype(np.float32)
    moving = nb.Nifti1Image(noise, images.moving.affine)
    method = find_method("m2m:default", DEFAULT_WEIGHTS)
    chain, reason = method.register(replace(images, moving=moving), OPTIONS)
    assert len(chain) == 2
    assert reason == ""


@pytest.mark.slow
def test_m2m_brings_landmarks_closer(images, error_mm):
    method = find_method("m2m:default", DEFAULT_WEIGHTS)
    chain, reason = method.register(images, replace(OPTIONS, n_refine=60))
    assert reason == ""
    assert error_mm(chain) < 0.75 * error_mm((images.fixed2moving,))
