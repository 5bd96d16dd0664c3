"""Cohorts: which subjects are where, what a cycle shows, training from images to weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from m2m_bids.cohort import (
    CohortValidation,
    TrainingOptions,
    find_training_scans,
    record_splits,
    split_subjects,
    train_network,
    write_training_arrays,
)
from m2m_bids.registration.presets import OBJECTIVES, PRESETS, preset
from m2m_bids.registration.sampling import (
    CohortError,
    CycleSampler,
    SamplingConfig,
    TrainingScan,
    choose_pre_aligned,
)
from m2m_bids.registration.training import (
    CHECKPOINT_NAME,
    Processes,
    Share,
    TrainingError,
    read_log,
)
from m2m_bids.registration.weights import load_weights, read_card

SIZE = 16
CPU = torch.device("cpu")


@pytest.fixture
def make_scans(tmp_path):
    """Write scans whose voxels say who they are: PET 1, 2, ... twentieths, T1w a half more."""

    def make(n_subjects, modality="pet", *, has_labels=True):
        names = []
        for number in range(n_subjects):
            shape = (SIZE, SIZE, SIZE)
            value = (number + 1) / 20
            arrays = {
                "functional": np.full(shape, value, np.float16),
                "t1w": np.full(shape, value + 0.025, np.float16),
            }
            if has_labels:
                arrays["labels"] = np.ones(shape, np.uint8)
                arrays["labels"][:, : SIZE // 2] = 2
            name = f"sub-{number:02d}_{modality}"
            description = {"name": name, "subject": f"{number:02d}", "modality": modality}
            write_training_arrays(tmp_path / "images" / name, description, arrays)
            names.append(name)
        return find_training_scans(tmp_path / "images", names)

    return make


def who(image):
    """Subject and kind of each image of a batch, from the value at its centre."""
    values = image[:, 0, SIZE // 2, SIZE // 2, SIZE // 2]
    numbers = torch.round(values * 40).int() - 2
    return [(int(number) // 2, "t1w" if number % 2 else "pet") for number in numbers]


def draw(sampler, iteration, rank=0, n_ranks=1):
    return sampler(Share(iteration, rank, n_ranks, CPU))


@pytest.mark.parametrize("pre_aligned", ["0", "2", "100%"])
def test_images_of_a_cycle_are_of_different_subjects(make_scans, pre_aligned):
    scans = make_scans(7)
    chosen = choose_pre_aligned([scan.subject for scan in scans], pre_aligned, seed=0)
    config = SamplingConfig(batch_size=3, seed=1, pre_aligned=chosen, pose_sd=0.0)
    sampler = CycleSampler(scans, config)
    directions, bridges = set(), set()
    for iteration in range(20):
        pairs = draw(sampler, iteration)
        assert pairs.is_aligned == (pre_aligned != "0")
        for s, t, bridge_s, bridge_t in zip(*map(who, pairs[:4]), strict=True):
            assert s[1] == bridge_s[1] != t[1] == bridge_t[1]
            subjects = [s[0], t[0], bridge_s[0], bridge_t[0]]
            if pairs.is_aligned:
                assert f"{bridge_s[0]:02d}" in chosen
                assert bridge_s[0] == bridge_t[0]
                bridges.add(bridge_s[0])
            assert len(set(subjects)) == (3 if pairs.is_aligned else 4)
            directions.add(s[1])
    assert directions == {"pet", "t1w"}
    assert len(bridges) == len(chosen)


def test_aligned_and_unaligned_bridges_are_mixed(make_scans):
    scans = make_scans(6)
    config = SamplingConfig(pre_aligned=frozenset({"00", "01"}), aligned_share=0.5)
    sampler = CycleSampler(scans, config)
    share = np.mean([draw(sampler, iteration).is_aligned for iteration in range(100)])
    assert 0.35 < share < 0.65


def test_a_conventional_objective_has_no_bridge(make_scans):
    pairs = draw(CycleSampler(make_scans(2), SamplingConfig(has_bridge=False)), 0)
    assert pairs.bridge_s is None
    assert {kind for _, kind in who(pairs.s) + who(pairs.t)} == {"pet", "t1w"}


def test_draws_depend_on_their_number_alone(make_scans):
    scans = make_scans(6)
    one = CycleSampler(scans, SamplingConfig(batch_size=4, seed=3))
    half = CycleSampler(list(reversed(scans)), SamplingConfig(batch_size=2, seed=3))
    draw(half, 0)
    whole = draw(one, 5)
    parts = [draw(half, 5, rank, 2) for rank in (0, 1)]
    for name in ("s", "t", "bridge_s", "bridge_t"):
        both = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), both)
    other = draw(CycleSampler(scans, SamplingConfig(batch_size=4, seed=4)), 5)
    assert not torch.equal(other.s, whole.s)


def test_augmentation_flips_moves_and_keeps_an_aligned_pair_together(tmp_path):
    # A ramp along each axis tells where a voxel came from.
    ramp = np.broadcast_to(np.linspace(0, 1, SIZE)[:, None, None], (SIZE, SIZE, SIZE))
    for number in range(3):
        description = {"name": f"s{number}", "subject": str(number), "modality": "fa"}
        arrays = {"functional": ramp.astype(np.float16), "t1w": ramp.astype(np.float16)}
        write_training_arrays(tmp_path / f"s{number}", description, arrays)
    scans = find_training_scans(tmp_path, ["s0", "s1", "s2"])
    config = SamplingConfig(batch_size=8, pre_aligned=frozenset("012"), pose_sd=0.05)
    pairs = draw(CycleSampler(scans, config), 0)
    assert torch.equal(pairs.bridge_s, pairs.bridge_t)
    assert not torch.equal(pairs.s, pairs.t)
    half = SIZE // 2
    slopes = pairs.s[:, 0, half + 2, half, half] - pairs.s[:, 0, half - 2, half, half]
    assert {bool(slope > 0) for slope in slopes} == {True, False}
    # Matrix entries of 1 +- 0.05 along the axis itself.
    assert slopes.abs().std() / slopes.abs().mean() == pytest.approx(0.05, rel=0.8)
    still = CycleSampler(
        scans, SamplingConfig(batch_size=4, pre_aligned=frozenset("012"), pose_sd=0)
    )
    for image in draw(still, 0).s:
        straight = min((image[0] - torch.from_numpy(ramp.copy())).abs().max(),
                       (image[0].flip(0) - torch.from_numpy(ramp.copy())).abs().max())  # fmt: skip
        assert straight < 1e-3  # half precision


@pytest.mark.parametrize(
    ("n_subjects", "pre_aligned", "needed"), [(3, "0", 4), (2, "1", 3), (1, "0", 4), (0, "0", 4)]
)
def test_too_few_subjects_are_told(make_scans, n_subjects, pre_aligned, needed):
    scans = make_scans(n_subjects)
    chosen = frozenset({"00"}) if pre_aligned == "1" else frozenset()
    with pytest.raises(CohortError, match=f"needs {needed} different subjects"):
        CycleSampler(scans, SamplingConfig(pre_aligned=chosen))


@pytest.mark.parametrize("amount", ["4", "-1", "101%", "some", "%"])
def test_amount_of_pre_aligned_pairs_is_checked(amount):
    with pytest.raises(CohortError, match="pre-aligned pairs: expected"):
        choose_pre_aligned(["a", "b", "c"], amount, seed=0)


def test_pre_aligned_subjects_are_nested_and_seeded():
    subjects = [f"{number:03d}" for number in range(50)]
    few = choose_pre_aligned(subjects, "10%", seed=1)
    many = choose_pre_aligned(reversed(subjects), "50%", seed=1)
    assert len(few) == 5
    assert few < many
    assert few != choose_pre_aligned(subjects, "10%", seed=2)


def test_broken_array_is_named(make_scans):
    scan = make_scans(1)[0]
    (scan.folder / "t1w.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(CohortError, match=r"t1w\.npy: cannot be read"):
        scan.read("t1w")
    np.save(scan.folder / "functional.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CohortError, match=r"functional\.npy: cannot be read"):
        scan.read("functional")


def test_splits_are_recorded_and_kept(tmp_path):
    file = tmp_path / "run" / "splits.tsv"
    subjects = [f"{number:02d}" for number in range(30)]
    splits = split_subjects(subjects, file, seed=3)
    assert not file.exists()
    record_splits(splits, file)
    counts = {name: list(splits.values()).count(name) for name in ("train", "validation", "test")}
    assert counts == {"train": 24, "validation": 3, "test": 3}
    assert file.read_text().splitlines()[0] == "participant_id\tsplit"
    assert len(file.read_text().splitlines()) == 31
    # Another seed changes nothing that is written down, and new subjects are trained on.
    again = split_subjects([*subjects, "new"], file, seed=4)
    assert again == {**splits, "new": "train"}
    assert set(split_subjects(["a", "b", "c"], tmp_path / "few.tsv").values()) == {"train"}


@pytest.mark.parametrize(
    "text", ["x\ty\nsub-1\ttrain\n", "participant_id\tsplit\nsub-1\tdev\n",
             "participant_id\tsplit\nsub-1\ttrain\nsub-1\ttest\n"],
)  # fmt: skip
def test_bad_splits_are_told(tmp_path, text):
    file = tmp_path / "splits.tsv"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"splits\.tsv, line"):
        split_subjects(["1", "2"], file)


def test_validation_measures_what_is_known(make_scans):
    validation = CohortValidation(make_scans(3))
    assert len(validation) == 6

    def shift(moving, fixed):
        disp = torch.zeros(1, 3, SIZE, SIZE, SIZE)
        disp[:, 1] = -0.25
        return disp

    still = validation(lambda a, b: torch.zeros(1, 3, SIZE, SIZE, SIZE), 0, CPU)
    moved = validation(shift, 0, CPU)
    assert still["dsc"] == still["dsc_before"] == moved["dsc_before"] == 1
    # Label 2 grows from 8 to 12 of 16 planes (0.25 of 15 steps, rounded), label 1 shrinks to 4.
    assert moved["dsc"] == pytest.approx((2 * 8 / 20 + 2 * 4 / 12) / 2, abs=0.05)
    assert still["folding_percent"] == 0

    def fold(moving, fixed):
        disp = torch.zeros(1, 3, SIZE, SIZE, SIZE)
        disp[:, 0] = -2 * torch.linspace(0, 1, SIZE)[:, None, None]
        return disp

    assert validation(fold, 0, CPU)["folding_percent"] == 100
    unlabelled = CohortValidation(make_scans(2, "fa", has_labels=False))
    assert np.isnan(unlabelled(shift, 0, CPU)["dsc"])


def test_presets_are_those_of_table_1():
    assert len(PRESETS) == 10
    gradicon = preset("gradicon", "m2m+gcc").objective
    assert (gradicon.regularity_weight, gradicon.gradcycon_weight) == (0.5, 0.1)
    assert preset("gradicon", "lncc2").objective.regularity_weight == 1.5
    corrmlp = preset("corrmlp", "m2m+gcc", spacing_mm=3.0).objective
    assert (corrmlp.regularizer, corrmlp.gradcycon_weight) == ("diffusion", 1.0)
    assert corrmlp.lncc_sigma_voxels == 2.5
    assert not preset("transmorph", "mi").objective.is_m2m
    assert all(preset("gradicon", name) for name in OBJECTIVES)
    with pytest.raises(ValueError, match="known are"):
        preset("gradicon", "ssd")


@pytest.fixture
def real_scans(tmp_path):
    """Ten subjects with blobs at their own places, 33 voxels: enough for every network."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 33)] * 3, indexing="ij"))
    generator = np.random.default_rng(0)
    names = []
    for number in range(10):
        centre = generator.uniform(0.4, 0.6, 3)[:, None, None, None]
        blob = np.exp(-0.5 * ((grid - centre) / 0.15) ** 2).prod(0)
        arrays = {
            "functional": blob.astype(np.float16),
            "t1w": (blob * (1 - blob) * 4).astype(np.float16),
            "labels": (blob > 0.5).astype(np.uint8) + (blob > 0.8).astype(np.uint8),
        }
        names.append(f"sub-{number}_pet")
        description = {"name": names[-1], "subject": str(number), "modality": "pet"}
        write_training_arrays(tmp_path / "real" / names[-1], description, arrays)
    return find_training_scans(tmp_path / "real", names)


@pytest.mark.parametrize(
    ("network", "objective"),
    [
        ("gradicon", "lncc"),
        ("gradicon", "m2m+gcc"),
        ("transmorph", "m2m+gcc"),
        ("corrmlp", "lncc"),
        pytest.param("transmorph", "lncc", marks=pytest.mark.slow),
        pytest.param("corrmlp", "m2m+gcc", marks=pytest.mark.slow),
    ],
)
def test_training_gives_weights(real_scans, tmp_path, network, objective):
    options = TrainingOptions(
        network=network,
        objective=objective,
        n_iterations=2,
        batch_size=1,
        validate_every=1,
        pre_aligned="10%" if objective == "lncc" else "0",
    )
    weights_dir = train_network(
        real_scans, options, tmp_path / "run", processes=Processes("cpu"), training_command="x"
    )
    trained, card = load_weights(weights_dir)
    assert card.network == network
    assert (card.grid_size, card.spacing_mm, card.modalities) == (64, 3.0, ("pet",))
    assert "8 scans of 8 participants" in card.training_data
    rows = read_log(tmp_path / "run" / "validation.csv")
    assert [row["iteration"] for row in rows] == [1, 2]
    assert 0 < rows[0]["dsc_before"] < 1
    assert json.loads((weights_dir / "card.json").read_text())["training_command"] == "x"
    assert trained(torch.rand(1, 1, 33, 33, 33), torch.rand(1, 1, 33, 33, 33)).isfinite().all()


def test_training_goes_on_from_weights_and_from_its_checkpoint(real_scans, tmp_path):
    options = TrainingOptions(n_iterations=2, batch_size=1, pre_aligned="3")
    first = train_network(real_scans, options, tmp_path / "one", processes=Processes("cpu"))
    assert (tmp_path / "one" / CHECKPOINT_NAME).is_file()
    tuned = TrainingOptions(n_iterations=1, batch_size=1, start_from=first, pre_aligned="3")
    second = train_network(real_scans, tuned, tmp_path / "two", processes=Processes("cpu"))
    assert read_card(second).details["start_from"] == str(first)
    assert read_card(second).sha256 != read_card(first).sha256
    again = train_network(real_scans, options, tmp_path / "one", processes=Processes("cpu"))
    assert read_card(again).sha256 == read_card(first).sha256
    for changed, said in (
        ({"batch_size": 2}, "batch_size was 1, is 2"),
        ({"seed": 1}, "seed was"),
    ):
        other = replace(options, **changed)
        with pytest.raises(TrainingError, match=said):
            train_network(real_scans, other, tmp_path / "one", processes=Processes("cpu"))


def test_scan_without_a_folder_is_left_out(tmp_path, make_scans):
    make_scans(2)
    found = find_training_scans(tmp_path / "images", ["sub-00_pet", "sub-09_pet"])
    assert found == [TrainingScan("sub-00_pet", "00", "pet", tmp_path / "images/sub-00_pet")]
