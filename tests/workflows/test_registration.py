"""The registration workflow in every variant, without running it."""

import inspect
import re

import pytest
from nipype.pipeline.engine import Workflow

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.workflows.anatomical import init_anatomical_wf
from m2m_bids.workflows.diffusion import init_fa_reference_wf
from m2m_bids.workflows.pet import init_pet_reference_wf
from m2m_bids.workflows.registration import (
    BEST_XFMS,
    OUTPUTS,
    RegistrationOptions,
    init_registration_wf,
)

DEFORMABLE = {"register_m2m", "resample_m2m"}
ONLY_DEFORMABLE = {"m2m_xfms", "quality", "objections", "device_used", "sha256"}


def options(**changes):
    given = {
        "transform": "m2m",
        "weights": DEFAULT_WEIGHTS,
        "weights_sha256": "abc",
        "n_refine": 7,
        "device": "cpu",
        "use_gpu": False,
        "random_seed": 5,
        "omp_nthreads": 3,
    }
    return RegistrationOptions(**{**given, **changes})


def edges(workflow):
    """Connections as {(node, output, node, input)}."""
    return {
        (source.name, output if isinstance(output, str) else output[0], target.name, name)
        for source, target, data in workflow._graph.edges(data=True)
        for output, name in data["connect"]
    }


def documented(builder, section):
    """Names under a section of a builder's docstring."""
    doc = inspect.getdoc(builder)
    found = re.search(rf"^{section}\n-+\n(.*?)(?=\n\n\S[^\n]*\n-+\n|\Z)", doc, re.DOTALL | re.M)
    if not found:
        return []
    lines = [line for line in found[1].replace("\\\n", "").splitlines() if line.strip()]
    names = [line for line in lines if not line.startswith(" ")]
    return [name.strip() for line in names for name in line.split(",")]


@pytest.mark.parametrize(
    "workflow",
    [
        init_registration_wf(modality="pet", options=options()),
        init_registration_wf(modality="fa", options=options(transform="rigid", weights=None)),
        init_anatomical_wf(random_seed=0, omp_nthreads=2),
        init_pet_reference_wf(sidecar={}),
        init_fa_reference_wf(),
    ],
    ids=["m2m", "rigid", "anatomical", "pet", "fa"],
)
def test_docstring_lists_the_fields(workflow):
    builder = {
        "registration_wf": init_registration_wf,
        "anatomical_wf": init_anatomical_wf,
    }.get(workflow.name)
    if builder is None:
        is_pet = workflow.get_node("static_reference") is not None
        builder = init_pet_reference_wf if is_pet else init_fa_reference_wf
    for section, node in (("Inputs", "inputnode"), ("Outputs", "outputnode")):
        fields = list(workflow.get_node(node).inputs.copyable_trait_names())
        assert sorted(documented(builder, section)) == sorted(fields)


@pytest.mark.parametrize("modality", ["pet", "fa"])
def test_deformable_step(modality):
    workflow = init_registration_wf(modality=modality, options=options())
    assert isinstance(workflow, Workflow)
    inputs = workflow.get_node("register_m2m").inputs
    assert inputs.modality == modality
    assert inputs.weights == str(DEFAULT_WEIGHTS)
    assert (inputs.weights_sha256, inputs.n_refine, inputs.device) == ("abc", 7, "cpu")
    assert workflow.get_node("register_rigid").inputs.random_seed == 5
    assert workflow.get_node("draw_registration").inputs.modality == modality
    connected = edges(workflow)
    assert ("register_rigid", "xfm", "register_m2m", "rigid_xfm") in connected
    assert ("inputnode", "template2anat", "register_m2m", "template2anat") in connected
    # What is registered, and drawn on its own grid, has no negative voxels.
    for name in ("register_rigid", "register_m2m", "measure_scan"):
        assert ("inputnode", "moving_file", name, "moving_file") in connected
    assert ("inputnode", "moving_file", "draw_registration", "native_file") in connected
    # Images are interpolated once: both outputs come from the native image.
    for name in ("resample_rigid", "resample_m2m"):
        assert ("inputnode", "native_file", name, "in_file") in connected
        assert ("inputnode", "t1w_file", name, "reference_file") in connected
    assert ("register_m2m", "best_xfm", "resample_m2m", "xfm") in connected
    assert ("resample_m2m", "out_file", "outputnode", "preproc") in connected
    assert ("resample_rigid", "out_file", "outputnode", "rigid") in connected
    assert "M2M-Reg" in workflow.__desc__


def test_rigid_run_has_no_deformable_step():
    workflow = init_registration_wf(
        modality="fa", options=options(transform="rigid", weights=None)
    )
    names = set(workflow.list_node_names())
    assert not DEFORMABLE & names
    connected = edges(workflow)
    for field in ("preproc", "rigid"):
        assert ("resample_rigid", "out_file", "outputnode", field) in connected
    assert "M2M-Reg" not in workflow.__desc__


@pytest.mark.parametrize("transform", ["m2m", "rigid"])
def test_every_output_has_its_source(transform):
    workflow = init_registration_wf(modality="pet", options=options(transform=transform))
    reached = {name for _, _, target, name in edges(workflow) if target == "outputnode"}
    assert reached == {*OUTPUTS, *BEST_XFMS} - (ONLY_DEFORMABLE if transform == "rigid" else set())


@pytest.mark.parametrize(("use_gpu", "n_procs"), [(True, 1), (False, 3)])
def test_gpu_slot(use_gpu, n_procs):
    """Nipype counts `n_procs` against GPU slots, so that a node with more would never run."""
    workflow = init_registration_wf(modality="pet", options=options(use_gpu=use_gpu))
    node = workflow.get_node("register_m2m")
    assert node.interface.inputs.use_gpu is use_gpu
    assert node.n_procs == n_procs
    # ANTs has one thread.
    assert workflow.get_node("register_rigid").n_procs == 1


@pytest.mark.parametrize("transform", ["rigid", "m2m"])
def test_what_nobody_sees_is_not_drawn(transform):
    """Images to train on or to evaluate are registered alone."""
    workflow = init_registration_wf(
        modality="fa", options=options(transform=transform), is_reported=False
    )
    names = set(workflow.list_node_names())
    assert "resample_rigid" in names
    assert not names & {"draw_registration", "measure_scan"}
