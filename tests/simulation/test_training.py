"""Training on simulated subjects: what it needs, and that it resumes and gives usable weights."""

import subprocess
import sys

import pytest
import torch

from m2m_bids.registration.grids import sample
from m2m_bids.registration.training import Share
from m2m_bids.registration.weights import load_weights
from m2m_bids.simulation.anatomy import load_template
from m2m_bids.simulation.contrast import WHITE_MATTER_WEIGHTS, template_bridge
from m2m_bids.simulation.training import (
    TEMPLATE_BRIDGE_SHARE,
    CohortCycles,
    main,
    supervised_loss,
)

CPU = torch.device("cpu")


def draw(cycles, iteration, device=CPU):
    return cycles(Share(iteration, 0, 1, device))


def test_needs_torch_and_numpy_alone():
    code = (
        # Numba, which is not needed, asks for SciPy's version.
        "import sys; sys.modules['numba'] = None;"
        "import m2m_bids.simulation.training as t; t.load_template();"
        "print({'nibabel', 'nilearn', 'nipype', 'scipy', 'ants'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


def tensors(cycles):
    pairs, *placed = cycles
    return [*pairs[:4], *(tensor for item in placed for tensor in item)]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_cycles_depend_on_the_iteration_alone(n_workers):
    template = load_template().pooled()
    sizes = {"seed": 3, "n_subjects": 5, "batch_size": 2, "iterations_per_subject": 2}
    first = CohortCycles(template, **sizes)
    # Subjects come and go.
    before = [draw(first, iteration) for iteration in (0, 4, 9, 10)]
    again = CohortCycles(template, n_workers=n_workers, **sizes)
    try:
        # Not from the start, and back again.
        for ours, iteration in ((before[2], 9), (before[3], 10), (before[1], 4)):
            theirs = draw(again, iteration)
            assert all(map(torch.equal, tensors(ours), tensors(theirs)))
    finally:
        again.close()
    assert not torch.equal(before[2].pairs.s, before[3].pairs.s)


@pytest.mark.gpu
def test_cycles_are_the_same_on_a_gpu():
    template = load_template().pooled()
    sizes = {"seed": 3, "n_subjects": 5, "batch_size": 4}
    ours = draw(CohortCycles(template, **sizes), 0, torch.device("cuda"))
    theirs = draw(CohortCycles(template, **sizes), 0)
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-4)


def test_coordinates_belong_to_images():
    """A brain's voxels have coordinates of the template's brain, mirrored subjects too."""
    template = load_template().pooled()
    mask = template.data[:, 4:5]
    cycles = draw(CohortCycles(template, seed=4, n_subjects=4, batch_size=12), 0)
    for placed in (cycles.s, cycles.t, cycles.bridge):
        found = sample(mask, placed.coordinates)
        for item, brain in zip(found, placed.brain, strict=True):
            assert (item[brain > 0.9] > 0.5).float().mean() > 0.9


def test_coordinates_tell_left_from_right():
    """The images of one subject in two poses, one of them mirrored, meet through coordinates."""
    template = load_template().pooled()
    cycles = draw(CohortCycles(template, seed=4, n_subjects=4, batch_size=24), 0)
    leftwards = [
        placed.coordinates[item, 0, 0].mean() > placed.coordinates[item, 0, -1].mean()
        for placed in (cycles.s, cycles.t)
        for item in range(24)
    ]
    assert not any(leftwards)


def test_bridge_is_often_that_of_use():
    """The app's bridge, the template, in its share of the cycles and in both directions."""
    template = load_template().pooled()
    n_cycles = 120
    cycles = draw(CohortCycles(template, seed=6, n_subjects=4, batch_size=n_cycles), 0)
    known = {
        "pet": template_bridge(template, "pet"),
        "fa": template_bridge(template, "fa"),
        "amyloid": template_bridge(template, "pet", pet_weights=WHITE_MATTER_WEIGHTS),
    }
    found = [
        (contrast, step)
        for bridge in zip(cycles.pairs.bridge_s, cycles.pairs.bridge_t, strict=True)
        for contrast, images in known.items()
        for step in (1, -1)
        if all(
            torch.allclose(a, b[0], atol=1e-3) for a, b in zip(bridge, images[::step], strict=True)
        )
    ]
    assert abs(len(found) / n_cycles - TEMPLATE_BRIDGE_SHARE) < 0.15
    assert len(set(found)) == 6


def test_supervised_loss_is_zero_for_the_same_pose():
    template = load_template().pooled()
    cycles = draw(CohortCycles(template, seed=5, n_subjects=4, batch_size=2), 0)
    size = template.size
    axis = torch.linspace(0, 1, size)
    identity = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]
    identity = identity.expand(2, -1, -1, -1, -1)
    loss = supervised_loss(identity, cycles.s, cycles.s, extent_mm=template.extent_mm)
    assert loss == pytest.approx(0.01, abs=1e-3)  # the square root's guard


def test_supervised_loss_is_the_mean_over_the_batch():
    template = load_template().pooled()
    cycles = draw(CohortCycles(template, seed=5, n_subjects=4, batch_size=2), 0)
    phi = torch.rand(2, 3, *[template.size] * 3)
    loss = supervised_loss(phi, cycles.s, cycles.t, extent_mm=template.extent_mm)
    single = [
        supervised_loss(
            phi[own],
            type(cycles.s)(*(value[own] for value in cycles.s)),
            type(cycles.t)(*(value[own] for value in cycles.t)),
            extent_mm=template.extent_mm,
        )
        for own in (slice(0, 1), slice(1, 2))
    ]
    assert loss.item() == pytest.approx(torch.stack(single).mean().item(), rel=1e-5)


def test_two_stages_resume_and_give_weights(tmp_path):
    sizes = ["--coarse-iterations", "2", "--fine-iterations", "1", "--threads", "1"]
    sizes += ["--coarse-batch", "1", "--fine-batch", "1"]
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
