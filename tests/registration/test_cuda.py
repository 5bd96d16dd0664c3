"""On a GPU: what the package computes there is what it computes on the CPU."""

import copy
from functools import partial

import pytest
import torch

from m2m_bids.registration.edges import InPrecision
from m2m_bids.registration.grids import identity_map, sample
from m2m_bids.registration.m2m import CyclePairs, ObjectiveConfig, objective_losses
from m2m_bids.registration.maps import integrate_velocity
from m2m_bids.registration.networks import NETWORKS
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.refinement import RefinementConfig, register_pair
from m2m_bids.registration.similarity import SIMILARITIES, similarity_loss, smooth
from m2m_bids.registration.training import (
    TRAINING_LOG,
    Processes,
    Replay,
    TrainingConfig,
    TrainingTask,
    fit,
    read_log,
)

pytestmark = pytest.mark.gpu
SIZE = 40


@pytest.fixture(autouse=True)
def exact_float32():
    """Convolutions in float32, not in TF32, whose products have ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def blobs(seed, n=1, size=SIZE):
    """Smooth images in [0, 1] with a dark rim."""
    generator = torch.Generator().manual_seed(seed)
    images = smooth(torch.rand((n, 1, size, size, size), generator=generator), 2.0)
    images = (images - images.amin()) / (images.amax() - images.amin())
    centre = (identity_map(size) - 0.5).norm(dim=1, keepdim=True)
    return images * (centre < 0.45)


def make_pairs(device, *, is_aligned, n=1):
    images = (blobs(seed, n).to(device) for seed in range(4))
    return CyclePairs(*images, is_aligned=is_aligned)


def randomized(name, dtype=torch.float32):
    """A compact network that deforms."""
    torch.manual_seed(0)
    family = NETWORKS[name]
    network = family.network(family.compact)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.01)
    return network.to(dtype).eval()


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_objective_and_gradients_are_those_of_the_cpu(name, is_aligned):
    config = ObjectiveConfig(lncc_sigma_voxels=2.0)
    values, gradients = [], []
    for device in ("cpu", "cuda"):
        network = randomized(name).to(device)
        losses, _ = objective_losses(network, make_pairs(device, is_aligned=is_aligned), config)
        torch.stack(list(losses.values())).sum().backward()
        values.append(torch.stack(list(losses.values())).detach().cpu())
        gradients.append(
            torch.cat(
                [own.grad.flatten().cpu() for own in network.parameters() if own.grad is not None]
            )
        )
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-6)
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


def test_batch_normalised_network_is_that_of_the_cpu():
    torch.manual_seed(0)
    network = GradICON(GradICONConfig(down_widths=(16, 32), up_widths=(16, 32), n_scales=2))
    for unet in network.unets:
        torch.nn.init.normal_(unet.last_conv.weight, std=0.01)
    disps, gradients = [], []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(network).to(device).train()
        disp = own(blobs(0, 2).to(device), blobs(1, 2).to(device))
        disp.square().sum().backward()
        disps.append(disp.detach().cpu())
        gradients.append(torch.cat([some.grad.flatten().cpu() for some in own.parameters()]))
        assert own.unets[1].norms[0].num_batches_tracked == 1
    assert (disps[1] - disps[0]).abs().max() < 1e-4 * disps[0].abs().max()
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("name", sorted(SIMILARITIES))
def test_similarities_are_those_of_the_cpu(name):
    values, gradients = [], []
    for device in ("cpu", "cuda"):
        moving = blobs(0, 2).to(device).requires_grad_()
        value = similarity_loss(name, moving, blobs(1, 2).to(device), lncc_sigma_voxels=2.0)
        value.backward()
        values.append(value.item())
        gradients.append(moving.grad.cpu())
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()


def test_refinement_is_that_of_the_cpu():
    generator = torch.Generator().manual_seed(1)
    velocity = smooth(torch.randn((1, 3, SIZE, SIZE, SIZE), generator=generator), 5.0)
    disp = integrate_velocity(0.03 * velocity / velocity.abs().max())
    fixed = blobs(0)
    moving = sample(fixed, identity_map(SIZE) + disp)
    pairs = CyclePairs(moving, fixed, fixed, fixed, is_aligned=True)
    config = RefinementConfig(n_steps=6, velocity_size=16)
    found = []
    for device in ("cpu", "cuda"):
        own = CyclePairs(*(image.to(device) for image in pairs[:4]), is_aligned=True)
        found.append(register_pair(None, own, config, likeness=fixed.to(device)))
    assert found[1].similarity == pytest.approx(found[0].similarity, abs=1e-3)
    assert found[1].likeness == pytest.approx(found[0].likeness, abs=1e-3)
    distance = (found[1].forward.cpu() - found[0].forward).norm(dim=1) * (SIZE - 1)
    assert distance.mean() < 0.02  # voxels


def objective(predict, pairs):
    return objective_losses(predict, pairs, ObjectiveConfig(lncc_sigma_voxels=2.0))[0]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_training_in_bfloat16_starts_at_the_loss_of_float32(name, tmp_path):
    network = randomized(name)
    pairs = make_pairs("cuda", is_aligned=True, n=2)
    with torch.no_grad():
        exact = objective(copy.deepcopy(network).cuda(), pairs)
    config = TrainingConfig(3, learning_rate=1e-5, log_every=1, average_decay=0.5)
    task = TrainingTask(network, objective, lambda _: pairs)
    _, is_done = fit(task, config, tmp_path, processes=Processes("cuda"))
    rows = read_log(tmp_path / TRAINING_LOG)
    assert is_done
    assert len(rows) == 3
    for name, loss in exact.items():
        assert rows[0][name] == pytest.approx(loss.item(), rel=0.02)


def test_a_run_goes_on_on_the_other_device(tmp_path):
    task = TrainingTask(
        randomized("gradicon"), objective, lambda share: make_pairs(share.device, is_aligned=True)
    )
    config = TrainingConfig(2, learning_rate=1e-4)
    for device, minutes in (("cuda", 0.0), ("cpu", 1.0)):
        _, is_done = fit(task, config, tmp_path, processes=Processes(device), max_minutes=minutes)
    assert is_done


def test_replayed_objective_is_the_objective():
    """Losses and gradients of other images than those that the graphs were made with."""
    network = randomized("gradicon").cuda().train()
    first, second = make_pairs("cuda", is_aligned=True), make_pairs("cuda", is_aligned=True)
    second = CyclePairs(*(image.flip(3) for image in second[:4]), is_aligned=True)
    replay = Replay(InPrecision(network, use_bfloat16=False), objective, first)
    for pairs in (second, first):
        found = []
        for evaluate in (partial(objective, network), replay):
            network.zero_grad(set_to_none=True)
            losses = evaluate(pairs)
            torch.stack(list(losses.values())).sum().backward()
            found.append(
                [
                    torch.stack(list(losses.values())).detach().clone(),
                    torch.cat([own.grad.flatten() for own in network.parameters()]),
                ]
            )
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
        assert (found[1][1] - found[0][1]).norm() < 1e-2 * found[0][1].norm()


@pytest.mark.parametrize("is_replayable", [False, True])
def test_training_resumes_on_a_gpu(is_replayable, tmp_path):
    def train(folder, slices):
        network = randomized("gradicon")
        task = TrainingTask(
            network,
            objective,
            lambda share: make_pairs(share.device, is_aligned=True, n=1),
            is_replayable=is_replayable,
        )
        config = TrainingConfig(4, learning_rate=1e-3, log_every=1, use_bfloat16=False)
        for minutes in slices:
            trained, _ = fit(
                task, config, folder, processes=Processes("cuda"), max_minutes=minutes
            )
        return trained

    whole = train(tmp_path / "whole", [1.0])
    parts = train(tmp_path / "parts", [0.0, 1.0])
    # Sums on a GPU are in no order, and Adam divides small gradients by their own size.
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (ours - theirs).abs().mean() < 2e-4
    rows = [read_log(tmp_path / folder / TRAINING_LOG) for folder in ("whole", "parts")]
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert [row["iteration"] for row in read_log(tmp_path / "parts" / TRAINING_LOG)] == [
        1,
        2,
        3,
        4,
    ]
