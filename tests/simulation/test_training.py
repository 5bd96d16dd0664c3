"""Training on simulated subjects: what it needs, and that it resumes and gives usable weights."""

import subprocess
import sys

import pytest
import torch

from m2m_bids.registration.training import Share
from m2m_bids.registration.weights import load_weights
from m2m_bids.simulation.anatomy import load_template
from m2m_bids.simulation.contrast import template_bridge
from m2m_bids.simulation.training import (
    MODALITIES,
    TEMPLATE_BRIDGE_SHARE,
    CohortCycles,
    main,
    supervised_loss,
)


def draw(cycles, iteration):
    return cycles(Share(iteration, 0, 1, torch.device("cpu")))


def test_needs_torch_and_numpy_alone():
    code = (
        "import sys, m2m_bids.simulation.training as t; t.load_template(); "
        "print({'nibabel', 'nilearn', 'nipype', 'scipy', 'ants'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


def test_cycles_depend_on_the_iteration_alone():
    template = load_template().pooled()
    first = CohortCycles(template, seed=3, n_subjects=4)
    draw(first, 0)
    again = CohortCycles(template, seed=3, n_subjects=4)
    (one,), (other,) = draw(first, 5), draw(again, 5)
    assert torch.equal(one.pairs.s, other.pairs.s)
    assert torch.equal(one.t.coordinates, other.t.coordinates)
    assert not torch.equal(one.pairs.s, draw(first, 6)[0].pairs.s)


def test_coordinates_belong_to_images():
    """A brain's voxels have coordinates of the template's brain, mirrored subjects too."""
    template = load_template().pooled()
    mask = template.data[:, 4:5]
    cycles = CohortCycles(template, seed=4, n_subjects=4)
    for iteration in range(4):
        (cycle,) = draw(cycles, iteration)
        for placed in (cycle.s, cycle.t, cycle.bridge):
            found = torch.nn.functional.grid_sample(
                mask,
                placed.coordinates.flip(1).permute(0, 2, 3, 4, 1) * 2 - 1,
                align_corners=True,
            )
            inside = placed.brain > 0.9
            assert (found[inside] > 0.5).float().mean() > 0.9


def test_bridge_is_often_that_of_use():
    """The app's bridge, the template, in its share of the cycles and in both directions."""
    template = load_template().pooled()
    cycles = CohortCycles(template, seed=6, n_subjects=4, iterations_per_subject=100)
    known = {modality: template_bridge(template, modality) for modality in MODALITIES}
    found = []
    for iteration in range(60):
        (cycle,) = draw(cycles, iteration)
        bridge = cycle.pairs.bridge_s, cycle.pairs.bridge_t
        found += [
            (modality, step)
            for modality, images in known.items()
            for step in (1, -1)
            if all(torch.equal(a, b) for a, b in zip(bridge, images[::step], strict=True))
        ]
    assert abs(len(found) / 60 - TEMPLATE_BRIDGE_SHARE) < 0.2
    assert len(set(found)) == 4


def test_supervised_loss_is_zero_for_the_same_pose():
    template = load_template().pooled()
    (cycle,) = draw(CohortCycles(template, seed=5, n_subjects=4), 0)
    size = template.size
    axis = torch.linspace(0, 1, size)
    identity = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]
    loss = supervised_loss(identity, cycle.s, cycle.s, extent_mm=template.extent_mm)
    assert loss == pytest.approx(0.01, abs=1e-3)  # the square root's guard


def test_two_stages_resume_and_give_weights(tmp_path):
    sizes = ["--coarse-iterations", "2", "--fine-iterations", "1", "--threads", "1"]
    assert main([str(tmp_path / "run"), *sizes]) == 0
    network, card = load_weights(tmp_path / "run" / "weights")
    assert network.config.n_scales == 3
    assert card.modalities == ("pet", "fa")
    # A finished run does no more; one that starts from its weights goes on from them.
    assert main([str(tmp_path / "run"), *sizes]) == 0
    again, _ = load_weights(tmp_path / "run" / "weights")
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)
    )
    start = ["--start-from", str(tmp_path / "run" / "weights")]
    none = ["--coarse-iterations", "0", "--fine-iterations", "0"]
    assert main([str(tmp_path / "other"), *none, *start]) == 0
    same, _ = load_weights(tmp_path / "other" / "weights")
    assert torch.equal(next(same.parameters()), next(network.parameters()))
