"""Training in slices gives what one run gives; a bad loss stops it and harms no checkpoint."""

import csv
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from m2m_bids.registration import training
from m2m_bids.registration.m2m import CyclePairs, ObjectiveConfig, objective_losses
from m2m_bids.registration.networks.gradicon import GradICON, GradICONConfig
from m2m_bids.registration.training import (
    CHECKPOINT_NAME,
    TRAINING_LOG,
    VALIDATION_LOG,
    Processes,
    Share,
    TrainingConfig,
    TrainingError,
    TrainingTask,
    fit,
    has_fast_bfloat16,
    read_log,
)

SIZE = 9
OBJECTIVE = ObjectiveConfig(lncc_sigma_voxels=1.0)
CPU = Processes("cpu")


def tiny_network(normalization="batch", seed=0):
    torch.manual_seed(seed)
    return GradICON(
        GradICONConfig(
            down_widths=(4, 4), up_widths=(4, 4), n_scales=2, normalization=normalization
        )
    )


def cycle(number):
    generator = torch.Generator().manual_seed(number)
    return torch.rand((4, 1, SIZE, SIZE, SIZE), generator=generator)


def batches(share, batch_size=2):
    images = torch.stack([cycle(number) for number in share.numbers(batch_size)], dim=1)
    return CyclePairs(*images, is_aligned=True)


def objective(network, pairs):
    return objective_losses(network, pairs, OBJECTIVE)[0]


def run(run_dir, *, network=None, get_batch=batches, max_minutes=math.inf, **options):
    """Train a tiny network; return what was trained, and its average."""
    network = network or tiny_network()
    validation = options.pop("validation", None)
    config = TrainingConfig(
        **{
            "n_iterations": 6,
            "use_bfloat16": False,
            "schedule": "cosine",
            "average_decay": 0.999,
            "learning_rate": 1e-3,
            **options,
        }
    )
    task = TrainingTask(network, objective, get_batch, validation, identity={"network": "tiny"})
    average, is_done = fit(task, config, run_dir, processes=CPU, max_minutes=max_minutes)
    return network, average, is_done


def assert_same(one, other):
    for (name, ours), theirs in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("use_bfloat16", [False, True])
@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_resumed_training_is_bitwise_that_of_one_run(tmp_path, normalization, use_bfloat16):
    options = {"use_bfloat16": use_bfloat16}
    whole = run(tmp_path / "whole", network=tiny_network(normalization), **options)
    assert whole[-1]
    n_slices, is_done = 0, False
    while not is_done:
        # Each slice is one iteration of a new run; all but the first start from other weights.
        *sliced, is_done = run(
            tmp_path / "sliced",
            network=tiny_network(normalization, seed=n_slices),
            max_minutes=0,
            **options,
        )
        n_slices += 1
    assert n_slices == 6
    for ours, theirs in zip(sliced, whole[:2], strict=True):
        assert_same(ours, theirs)


def test_precision_is_that_of_the_machine_and_may_change_with_it(tmp_path, monkeypatch):
    assert isinstance(has_fast_bfloat16(torch.device("cpu")), bool)
    seen = []
    for is_fast in (True, False):
        monkeypatch.setattr(training, "has_fast_bfloat16", lambda _, is_fast=is_fast: is_fast)
        network = tiny_network()
        network.unets[0].register_forward_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
        run(tmp_path, network=network, use_bfloat16=None, max_minutes=0)
        assert seen[-1] is is_fast
    assert len(seen) == 2 * 4  # edges of one iteration each


def test_training_moves_the_weights_and_averages_them(tmp_path):
    network, average, _ = run(tmp_path)
    name = "unets.0.last_conv.weight"
    current, averaged = network.state_dict()[name], average.state_dict()[name]
    assert not torch.equal(current, tiny_network().state_dict()[name])
    assert not torch.equal(current, averaged)
    assert averaged.abs().max() > 0
    assert not average.training
    assert average.state_dict()["unets.0.norms.0.num_batches_tracked"] > 0


def test_without_an_average_training_gives_the_network(tmp_path):
    network, result, _ = run(tmp_path, average_decay=0.0, n_iterations=2)
    assert result is network
    assert not result.training


def test_training_lowers_the_loss(tmp_path):
    # One batch over and over: noise onto the same noise, moved by a voxel.
    image = cycle(0)[:1]
    pairs = CyclePairs(image, image, image.roll(1, 2), image.roll(1, 2), is_aligned=True)
    terms = []

    def recorded(network, batch):
        losses = objective(network, batch)
        terms.append(sum(loss.item() for loss in losses.values()))
        return losses

    config = TrainingConfig(
        n_iterations=80, learning_rate=0.1, schedule="cosine", use_bfloat16=False
    )
    fit(TrainingTask(tiny_network("group"), recorded, lambda _: pairs), config, tmp_path)
    assert sum(terms[-10:]) / 10 < 0.9 * terms[0]


def test_iteration_numbers_draw_the_batches(tmp_path):
    drawn = []

    def recorded(share):
        drawn.append(share.iteration)
        return batches(share)

    run(tmp_path, get_batch=recorded, max_minutes=0)
    run(tmp_path, get_batch=recorded)
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert run(tmp_path, get_batch=recorded)[-1]  # nothing left to do
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_shares_of_two_processes_are_the_batch_of_one():
    device = torch.device("cpu")
    one = Share(7, 0, 1, device).numbers(4)
    two = [number for rank in (0, 1) for number in Share(7, rank, 2, device).numbers(2)]
    assert list(one) == two


def bad_from(first_bad):
    def get_batch(share):
        pairs = batches(share)
        return pairs._replace(s=pairs.s * math.nan) if share.iteration >= first_bad else pairs

    return get_batch


def test_loss_that_is_not_finite_leaves_the_checkpoint(tmp_path):
    for _ in range(3):
        run(tmp_path, get_batch=bad_from(3), max_minutes=0)
    checkpoint = (tmp_path / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(TrainingError, match=r"iteration 3: the loss is not finite.*similarity"):
        run(tmp_path, get_batch=bad_from(3))
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == checkpoint
    # The data are mended: it goes on from there, to what it would have been.
    mended, whole = run(tmp_path), run(tmp_path / "whole")
    assert_same(mended[0], whole[0])
    assert_same(mended[1], whole[1])


def test_loss_that_is_not_finite_at_the_start_writes_no_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="iteration 0"):
        run(tmp_path, get_batch=bad_from(0))
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path):
    run(tmp_path, max_minutes=0)
    before = signal.getsignal(signal.SIGINT)

    def interrupted(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, get_batch=interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(run(tmp_path)[0], run(tmp_path / "whole")[0])


def test_checkpoint_of_another_training_is_refused(tmp_path):
    run(tmp_path, max_minutes=0)
    with pytest.raises(TrainingError, match=r"learning_rate was 0.001, is 0.1"):
        run(tmp_path, learning_rate=0.1)
    assert run(tmp_path, checkpoint_minutes=1.0, log_every=1)[-1]  # without influence


def test_broken_checkpoint_is_named_and_kept(tmp_path):
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match=f"{CHECKPOINT_NAME}: not a checkpoint"):
        run(tmp_path)
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == b"no checkpoint"


def test_full_disk_is_told_and_leaves_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, max_minutes=0)
    checkpoint = (tmp_path / CHECKPOINT_NAME).read_bytes()

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(TrainingError, match=r"could not be written.*No space left"):
        run(tmp_path)
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == checkpoint
    assert not list(tmp_path.glob(".*.partial"))


def test_learning_rate_warms_up_and_falls():
    config = TrainingConfig(n_iterations=4000, schedule="cosine")
    rates = [config.rate(iteration) for iteration in (0, 99, 199, 2000, 4000)]
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[1] == pytest.approx(1 / 2, rel=0.05)
    assert rates[2] == pytest.approx(1, rel=0.1)
    assert rates[3] == pytest.approx(0.505)
    assert rates[4] == pytest.approx(0.01)
    assert TrainingConfig(n_iterations=100, schedule="cosine").rate(9) > 0.9
    assert TrainingConfig(n_iterations=10).rate(7) == 1


class Distances:
    """A validation whose measures are known."""

    def __len__(self):
        return 3

    def __call__(self, predict, index, device):
        disp = predict(*cycle(index)[:2, None])
        assert not torch.is_grad_enabled()
        return {"disp": disp.abs().mean().item(), "index": float(index), "never": math.nan}


def test_logs_have_means_and_validation_and_survive_a_kill(tmp_path):
    options = {"log_every": 2, "validate_every": 3, "validation": Distances()}
    run(tmp_path / "whole", **options)
    with (tmp_path / "whole" / TRAINING_LOG).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["iteration"]) for row in rows] == [2, 4, 6]
    names = {"iteration", "seconds", "lr", "loss", "similarity", "regularity", "gradcycon"}
    assert set(rows[0]) == names
    assert float(rows[0]["loss"]) == pytest.approx(
        sum(float(rows[0][name]) for name in ("similarity", "regularity", "gradcycon")), rel=1e-4
    )
    measures = read_log(tmp_path / "whole" / VALIDATION_LOG)
    assert [row["iteration"] for row in measures] == [3, 6]
    assert set(measures[0]) == {"iteration", "disp", "index"}
    assert measures[1]["index"] == 1
    assert list((tmp_path / "whole" / "logs").glob("events.out.tfevents*"))

    # Rows beyond the checkpoint, of a run that was killed, are done again and appear once.
    for _ in range(3):
        run(tmp_path / "killed", max_minutes=0, **options)
    with (tmp_path / "killed" / TRAINING_LOG).open("a") as stream:
        stream.write("4,1.0,1.0,1.0,1.0,1.0,1.0\n")
    run(tmp_path / "killed", **options)
    for name in (TRAINING_LOG, VALIDATION_LOG):
        ours, theirs = (read_log(tmp_path / run_dir / name) for run_dir in ("killed", "whole"))
        for one, other in zip(ours, theirs, strict=True):
            one.pop("seconds", None), other.pop("seconds", None)
            assert one == other


PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_training import *

def slow(share):
    time.sleep(float(sys.argv[3]))
    return batches(share, batch_size=int(sys.argv[4]))

config = TrainingConfig(n_iterations=int(sys.argv[5]), use_bfloat16=False, learning_rate=1e-3,
    average_decay=0.9, checkpoint_minutes=0.001, log_every=1)
task = TrainingTask(tiny_network("group"), objective, slow)
network, _ = fit(task, config, Path(sys.argv[2]), processes=Processes.from_environment("cpu"))
torch.save(network.state_dict(), Path(sys.argv[2]) / "network.pt")
"""


def program(run_dir, *, pause_s=0.0, batch_size=2, n_iterations=6):
    here = os.path.dirname(__file__)
    values = (here, run_dir, pause_s, batch_size, n_iterations)
    return ["-c", PROGRAM, *map(str, values)]


def trained(run_dir):
    return torch.load(run_dir / "network.pt", weights_only=True)


def test_killed_training_ends_as_the_undisturbed_one(tmp_path):
    run_dir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *program(run_dir, pause_s=0.3)])
    end = time.monotonic() + 120
    while len(read_log(run_dir / TRAINING_LOG)) < 3 and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run_dir / CHECKPOINT_NAME).is_file()
    assert not (run_dir / "network.pt").exists()
    for folder in (run_dir, tmp_path / "whole"):
        subprocess.run([sys.executable, *program(folder)], check=True)
    ours, theirs = trained(run_dir), trained(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    iterations = [row["iteration"] for row in read_log(run_dir / TRAINING_LOG)]
    assert iterations == [1, 2, 3, 4, 5, 6]


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    # On a free port, chosen by the launcher.
    launcher = [*torchrun, "--standalone", "--no-python", sys.executable]
    subprocess.run(
        [*launcher, *program(tmp_path / "two", batch_size=1)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    subprocess.run([sys.executable, *program(tmp_path / "one", batch_size=2)], check=True)
    losses = [
        [row["loss"] for row in read_log(tmp_path / name / TRAINING_LOG)]
        for name in ("two", "one")
    ]
    assert len(losses[0]) == 6
    # Rounding grows from step to step.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    disps = []
    for name in ("two", "one"):
        network = tiny_network("group")
        network.load_state_dict(trained(tmp_path / name))
        disps.append(network.eval()(*cycle(0)[:2, None]))
    torch.testing.assert_close(*disps, rtol=1e-3, atol=1e-5)
