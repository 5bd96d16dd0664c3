"""Training in slices gives what one run gives; a bad loss stops it and harms no checkpoint."""

import csv

import pytest
import torch

from m2m_bids.registration import training
from m2m_bids.registration.m2m import CyclePairs, ObjectiveConfig, m2m_loss
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.training import (
    CHECKPOINT_NAME,
    LOG_NAME,
    Trainer,
    TrainingConfig,
    has_fast_bfloat16,
)

SIZE = 9
OBJECTIVE = ObjectiveConfig(lncc_sigma_voxels=1.0)


def tiny_network(normalization="batch", seed=0):
    torch.manual_seed(seed)
    return GradICON(
        GradICONConfig(
            down_widths=(4, 4), up_widths=(4, 4), n_scales=2, normalization=normalization
        )
    )


def batches(iteration):
    generator = torch.Generator().manual_seed(iteration)
    return CyclePairs(
        *torch.rand((4, 2, 1, SIZE, SIZE, SIZE), generator=generator), is_aligned=True
    )


def objective(network, pairs):
    return m2m_loss(network, pairs, OBJECTIVE)[0]


def make_trainer(run_dir, *, network=None, get_batch=batches, **options):
    config = TrainingConfig(**{"n_iterations": 6, "use_bfloat16": False, **options})
    return Trainer(network or tiny_network(), objective, get_batch, config, run_dir)


def states(trainer):
    return {
        **{f"network.{name}": tensor for name, tensor in trainer.network.state_dict().items()},
        **{f"average.{name}": tensor for name, tensor in trainer.average.state_dict().items()},
    }


@pytest.mark.parametrize("use_bfloat16", [False, True])
@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_resumed_training_is_bitwise_that_of_one_run(tmp_path, normalization, use_bfloat16):
    whole = make_trainer(
        tmp_path / "whole", network=tiny_network(normalization), use_bfloat16=use_bfloat16
    )
    assert whole.run()
    n_slices, is_done = 0, False
    while not is_done:
        # Each slice is one iteration of a new trainer; all but the first start from other weights.
        sliced = make_trainer(
            tmp_path / "sliced",
            network=tiny_network(normalization, seed=n_slices),
            use_bfloat16=use_bfloat16,
        )
        is_done = sliced.run(max_minutes=0)
        n_slices += 1
    assert n_slices == 6
    for (name, ours), theirs in zip(states(sliced).items(), states(whole).values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_precision_is_that_of_the_machine_and_may_change_with_it(tmp_path, monkeypatch):
    assert isinstance(has_fast_bfloat16(torch.device("cpu")), bool)
    seen = []
    for is_fast in (True, False):
        monkeypatch.setattr(training, "has_fast_bfloat16", lambda _, is_fast=is_fast: is_fast)
        trainer = make_trainer(tmp_path, use_bfloat16=None)
        trainer.network.unets[0].last_conv.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output.dtype)
        )
        trainer.run(max_minutes=0)
        assert seen[-1] is (torch.bfloat16 if is_fast else torch.float32)
    assert trainer.iteration == 2  # the second went on from the first's checkpoint


def test_training_moves_the_weights_and_averages_them(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.run()
    name = "unets.0.last_conv.weight"
    current, average = trainer.network.state_dict()[name], trainer.average.state_dict()[name]
    assert not torch.equal(current, before[name])
    assert not torch.equal(current, average)
    assert average.abs().max() > 0
    assert not trainer.average.training
    assert trainer.average.state_dict()["unets.0.norms.0.num_batches_tracked"] > 0


def test_training_lowers_the_loss(tmp_path):
    # One batch over and over: noise onto the same noise, moved by a voxel.
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, 1, SIZE, SIZE, SIZE), generator=generator)
    pairs = CyclePairs(image, image, image.roll(1, 2), image.roll(1, 2), is_aligned=True)
    terms = []

    def recorded(network, batch):
        losses = objective(network, batch)
        terms.append(sum(loss.item() for loss in losses.values()))
        return losses

    config = TrainingConfig(n_iterations=80, learning_rate=0.1, use_bfloat16=False)
    Trainer(tiny_network("group"), recorded, lambda _: pairs, config, tmp_path).run()
    assert sum(terms[-10:]) / 10 < 0.9 * terms[0]


def test_iteration_numbers_draw_the_batches(tmp_path):
    drawn = []

    def recorded(iteration):
        drawn.append(iteration)
        return batches(iteration)

    make_trainer(tmp_path, get_batch=recorded).run(max_minutes=0)
    make_trainer(tmp_path, get_batch=recorded).run()
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert make_trainer(tmp_path, get_batch=recorded).run()  # nothing left to do
    assert drawn == [0, 1, 2, 3, 4, 5]


def bad_from(first_bad):
    def get_batch(iteration):
        pairs = batches(iteration)
        return pairs._replace(s=pairs.s * float("nan")) if iteration >= first_bad else pairs

    return get_batch


def test_loss_that_is_not_finite_leaves_the_checkpoint(tmp_path):
    for _ in range(3):
        make_trainer(tmp_path, get_batch=bad_from(3)).run(max_minutes=0)
    checkpoint = (tmp_path / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(FloatingPointError, match=r"iteration 3: the loss is not finite.*m2m"):
        make_trainer(tmp_path, get_batch=bad_from(3)).run()
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == checkpoint
    # The data are mended: it goes on from there, to what it would have been.
    mended = make_trainer(tmp_path)
    assert mended.iteration == 3
    mended.run()
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    for (name, ours), theirs in zip(states(mended).items(), states(whole).values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_loss_that_is_not_finite_at_the_start_writes_no_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="iteration 0"):
        make_trainer(tmp_path, get_batch=bad_from(0)).run()
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_learning_rate_warms_up_and_falls(tmp_path):
    trainer = make_trainer(tmp_path, n_iterations=1000, learning_rate=1e-3)
    rates = []
    for iteration in (0, 99, 199, 500, 1000):
        trainer.iteration = iteration
        rates.append(trainer.learning_rate())
    assert rates[0] == pytest.approx(1e-3 / 200)
    assert rates[1] == pytest.approx(1e-3 / 2, rel=0.05)
    assert rates[2] == pytest.approx(1e-3, rel=0.1)
    assert rates[3] == pytest.approx(1e-3 * 0.505)
    assert rates[4] == pytest.approx(1e-5)


def test_log_has_a_row_per_hundred_iterations(tmp_path):
    config = TrainingConfig(n_iterations=200, use_bfloat16=False)

    def cheap(network, batch):
        weight = network.__self__.network.weight
        return {"first": weight.square().sum(), "second": weight.abs().sum()}

    for _ in range(2):  # the second run has nothing to do and adds nothing
        Trainer(torch.nn.Linear(2, 2), cheap, lambda iteration: None, config, tmp_path).run()
    with (tmp_path / LOG_NAME).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["iteration"]) for row in rows] == [100, 200]
    assert float(rows[1]["first"]) < float(rows[0]["first"])
    assert set(rows[0]) == {"iteration", "seconds", "lr", "first", "second"}
