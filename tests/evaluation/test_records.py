"""Records of an evaluation: measures of labels, summaries, tests and tables."""

import csv
import json
import math

import numpy as np
import pytest
from nibabel.affines import from_matvec

from m2m_bids.evaluation.records import known_number, label_measures, summarize, write_records
from m2m_bids.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_p_value,
    shared_bootstrap_interval,
)

AFFINE = from_matvec(np.diag([2.0, 1.0, 1.5]), (1, 2, 3))


def record(pair, method, dsc=None, **fields):
    return {
        "pair": pair,
        "moving": f"sub-{pair}_pet",
        "fixed": "sub-9_T1w",
        "moving_subject": pair,
        "fixed_subject": f"{pair}x",
        "modality": "pet",
        "kind": "between",
        "method": method,
        "title": method.upper(),
        "status": "done",
        "reason": "n/a",
        **({} if dsc is None else {"dsc": dsc}),
        **fields,
    }


def evaluation(rng, n_pairs=12):
    """Records of four methods, the last of which is the best and M2M-Reg."""
    anatomy = rng.normal(0, 0.1, n_pairs)
    gains = {"rigid": 0.5, "syn-mi": 0.55, "fireants-mi": 0.52, "m2m:default": 0.7}
    return [
        record(f"{i:02d}", method, gain + anatomy[i] + rng.normal(0, 0.02), seconds=i + 1.0)
        for i in range(n_pairs)
        for method, gain in gains.items()
    ]


def dsc_of(records, method):
    return [row["dsc"] for row in records if row["method"] == method]


# --- measures of labels ----------------------------------------------------------------------


def test_label_measures():
    moved, fixed = np.zeros((2, 12, 12, 12), dtype=np.uint8)
    # A slab of six planes of 2 mm that is two planes off, and one that fits.
    moved[0:6, :6], fixed[2:8, :6] = 2, 2
    moved[:, 8:], fixed[:, 8:] = 10, 10
    fixed[0, 7] = 5
    found = label_measures(moved, fixed, AFFINE)
    assert found["dsc_cerebral_cortex"] == pytest.approx(8 / 12)
    assert found["dsc_hippocampus"] == 1
    assert found["dsc_cerebellar_cortex"] == 0
    assert found["dsc"] == pytest.approx((8 / 12 + 1 + 0) / 3)
    # The far plane, a quarter of either surface, is two planes away from the other slab.
    assert found["hd95_mm_cerebral_cortex"] == pytest.approx(4)
    assert found["hd95_mm_hippocampus"] == 0
    assert found["hd95_mm_cerebellar_cortex"] == "n/a"
    assert found["hd95_mm"] == pytest.approx((4 + 0) / 2)
    assert found["dsc_thalamus"] == found["hd95_mm_thalamus"] == "n/a"
    assert len(found) == 2 * (1 + 11)


def test_label_measures_of_tissues_have_names_of_their_own():
    labels = np.full((4, 4, 4), 21, dtype=np.uint8)
    labels[2:] = 23
    found = label_measures(labels, labels, AFFINE)
    assert found["dsc"] == found["dsc_grey_matter"] == found["dsc_csf"] == 1
    assert found["dsc_white_matter"] == "n/a"
    assert set(found) == {
        f"{number}{name}"
        for number in ("dsc", "hd95_mm")
        for name in ("", "_grey_matter", "_white_matter", "_csf")
    }


def test_label_measures_of_nothing_in_view():
    fixed = np.ones((4, 4, 4), dtype=np.uint8)
    found = label_measures(0 * fixed, fixed, AFFINE)
    assert (found["dsc"], found["hd95_mm"]) == (0, "n/a")
    found = label_measures(0 * fixed, 0 * fixed, AFFINE)
    assert (found["dsc"], found["hd95_mm"]) == ("n/a", "n/a")


def test_label_measures_need_one_scheme():
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="different kinds"):
        label_measures(labels, 21 * labels, AFFINE)


# --- summaries -------------------------------------------------------------------------------


def test_summary_of_numbers(rng):
    records = evaluation(rng)
    rows = summarize(records)
    assert [row["method"] for row in rows] == ["rigid", "syn-mi", "fireants-mi", "m2m:default"]
    for row in rows:
        values = dsc_of(records, row["method"])
        assert (row["n"], row["n_failed"], row["n_missing"], row["dsc_n"]) == (12, 0, 0, 12)
        assert row["title"] == row["method"].upper()
        assert row["dsc_mean"] == pytest.approx(sum(values) / 12)
        deviation = math.sqrt(sum((value - row["dsc_mean"]) ** 2 for value in values) / 11)
        assert row["dsc_sd"] == pytest.approx(deviation)
        assert (row["dsc_ci_low"], row["dsc_ci_high"]) == bootstrap_interval(values)
        assert row["seconds_mean"] == pytest.approx(6.5)
        assert row["landmark_error_mm_mean"] == row["landmark_error_mm_ci_low"] == "n/a"
        assert row["landmark_error_mm_n"] == 0


def test_intervals_are_of_participants(rng):
    values = rng.normal(0.6, 0.1, 6)
    people = [(a, b) for a in ("01", "02", "03") for b in ("01", "02", "03") if a != b]
    records = [
        record("_to_".join(pair), "rigid", value, moving_subject=pair[0], fixed_subject=pair[1])
        for pair, value in zip(people, values, strict=True)
    ]
    (row,) = summarize(records)
    expected = shared_bootstrap_interval(values, people)
    assert (row["dsc_ci_low"], row["dsc_ci_high"]) == expected


def test_tests_are_against_the_best_baseline_and_adjusted(rng):
    records = evaluation(rng)
    rows = {row["method"]: row for row in summarize(records)}
    assert {row["dsc_baseline"] for row in rows.values()} == {"syn-mi"}
    assert rows["syn-mi"]["dsc_p"] == "n/a"
    tested = ["rigid", "fireants-mi", "m2m:default"]
    raw = [paired_p_value(dsc_of(records, m), dsc_of(records, "syn-mi")) for m in tested]
    assert [rows[method]["dsc_p"] for method in tested] == pytest.approx(holm(raw))
    # M2M-Reg is better in each of the 12 pairs; of three tests the smallest counts three times.
    assert rows["m2m:default"]["dsc_p"] == pytest.approx(3 * 2 / 2**12)


def test_tests_pair_by_name_whatever_the_order(rng):
    records = evaluation(rng)
    shuffled = [records[i] for i in rng.permutation(len(records))]
    expected = {row["method"]: row["dsc_p"] for row in summarize(records)}
    assert {row["method"]: row["dsc_p"] for row in summarize(shuffled)} == expected


def test_failed_and_missing_pairs_count_and_give_no_numbers(rng):
    records = evaluation(rng)
    for row in records:
        if row["method"] == "m2m:default" and row["pair"] in ("00", "01"):
            row |= {"status": "failed", "reason": "no memory", "dsc": "n/a"}
        if row["method"] == "syn-mi":
            row |= {"status": "missing", "reason": "not installed", "dsc": None, "seconds": None}
    rows = {row["method"]: row for row in summarize(records)}
    assert rows["syn-mi"]["n"] == 0
    assert rows["syn-mi"]["n_missing"] == 12
    assert rows["syn-mi"]["dsc_mean"] == rows["syn-mi"]["dsc_p"] == "n/a"
    own = rows["m2m:default"]
    assert (own["n"], own["n_failed"], own["dsc_n"], own["seconds_n"]) == (10, 2, 10, 10)
    assert own["dsc_baseline"] == "fireants-mi"
    # Ten pairs are left to compare, and two tests.
    assert own["dsc_p"] == pytest.approx(2 * 2 / 2**10)


def test_numbers_of_failed_pairs_do_not_count():
    rows = summarize([record("1", "rigid", 0.5), record("2", "rigid", 0.9, status="failed")])
    assert rows[0]["dsc_mean"] == 0.5
    assert rows[0]["dsc_sd"] == rows[0]["dsc_ci_low"] == rows[0]["dsc_ci_high"] == "n/a"


@pytest.mark.parametrize("value", ["n/a", None, "", float("nan"), np.nan])
def test_what_is_not_known_is_left_out(value):
    rows = summarize(
        [record("1", "rigid", 0.5, hd95_mm=value), record("2", "rigid", 0.7, hd95_mm=4.0)]
    )
    assert (rows[0]["n"], rows[0]["hd95_mm_n"], rows[0]["hd95_mm_mean"]) == (2, 1, 4.0)


def test_modalities_and_kinds_stand_apart():
    records = [
        record("1", "rigid", 0.1, modality="fa", kind="within"),
        record("2", "rigid", 0.2, modality="fa"),
        record("3", "rigid", 0.3, kind="within"),
        record("4", "rigid", 0.4),
        record("4", "syn-mi", 0.3),
        record("3", "syn-mi", 0.6, kind="within"),
    ]
    rows = summarize(records)
    found = [(row["modality"], row["kind"], row["method"], row["dsc_mean"]) for row in rows]
    assert found == [
        ("pet", "between", "rigid", 0.4),
        ("pet", "between", "syn-mi", 0.3),
        ("pet", "within", "rigid", 0.3),
        ("pet", "within", "syn-mi", 0.6),
        ("fa", "between", "rigid", 0.2),
        ("fa", "within", "rigid", 0.1),
    ]
    assert [row["dsc_baseline"] for row in rows[:4]] == ["rigid"] * 2 + ["syn-mi"] * 2


def test_m2m_reg_is_no_baseline():
    rows = summarize([record("1", "m2m:a", 0.5), record("1", "m2m:b", 0.6)])
    assert {row["dsc_baseline"] for row in rows} == {row["dsc_p"] for row in rows} == {"n/a"}


def test_without_labels_there_is_no_test():
    rows = summarize([record("1", "rigid"), record("1", "m2m:a")])
    assert {row["dsc_baseline"] for row in rows} == {"n/a"}
    assert summarize([]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": "n/a"}, "pair is missing"),
        ({"kind": None}, "kind is missing"),
        ({"status": "skipped"}, "'skipped' of rigid; expected one of done, missing, failed"),
        ({"dcs": 0.5}, "unknown fields dcs"),
        ({"dsc_cortex": 0.5}, "unknown fields dsc_cortex"),
        ({"seconds": "fast"}, "seconds of the pair 1 by rigid is 'fast'"),
    ],
)
def test_records_that_cannot_be_summarised(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_records([record("1", "rigid", 0.5) | changes], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pair_has_one_record_of_a_method():
    with pytest.raises(ValueError, match="pair 1 has two records of rigid"):
        summarize([record("1", "rigid", 0.5), record("1", "rigid", 0.6)])


def test_known_number():
    assert known_number(3) == 3
    assert known_number("1e-3") == 0.001
    assert known_number(np.float32(0.5)) == 0.5
    assert known_number(math.inf) is None


# --- tables ----------------------------------------------------------------------------------


def read_table(file):
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_tables_hold_the_records(rng, tmp_path):
    records = evaluation(rng)
    records[0] |= {"dsc_hippocampus": 0.123456789, "hd95_mm_thalamus": 2, "dsc_grey_matter": 0.5}
    records[1] |= {"status": "failed", "reason": 'no\tmemory,\n"really"', "dsc": "n/a"}
    records[2] |= {"title": "SyN (MI), ñ", "peak_memory_gb": float("nan"), "seconds": None}
    summaries = write_records(records, tmp_path / "new")
    rows = read_table(tmp_path / "new" / "evaluation.tsv")
    assert len(rows) == len(records)
    for name in ("pair", "method", "status", "moving_subject", "title"):
        assert [row[name] for row in rows] == [row[name] for row in records]
    # Numbers have six digits.
    known = [known_number(row["dsc"]) for row in rows]
    assert known.pop(1) is None
    expected = [row["dsc"] for row in records if row["dsc"] != "n/a"]
    np.testing.assert_allclose(known, expected, rtol=1e-5)
    assert rows[0]["dsc_hippocampus"] == "0.123457"
    assert rows[0]["hd95_mm_thalamus"] == "2"
    assert rows[1]["reason"] == 'no memory, "really"'
    assert rows[1]["dsc_hippocampus"] == rows[1]["landmark_error_mm"] == "n/a"
    assert rows[2]["peak_memory_gb"] == rows[2]["seconds"] == "n/a"
    # Columns stand in one order, whatever the order of the records' fields.
    columns = list(rows[0])
    assert columns[:3] == ["pair", "moving", "fixed"]
    assert columns[11:16] == [
        "dsc",
        "dsc_hippocampus",
        "dsc_grey_matter",
        "hd95_mm",
        "hd95_mm_thalamus",
    ]
    assert [row["method"] for row in read_table(tmp_path / "new" / "summary.tsv")] == [
        row["method"] for row in summaries
    ]
    assert summaries == summarize(records)


def test_tables_can_be_summarised_again(rng, tmp_path):
    write_records(evaluation(rng), tmp_path)
    found = summarize(read_table(tmp_path / "evaluation.tsv"))
    for row, again in zip(read_table(tmp_path / "summary.tsv"), found, strict=True):
        assert set(again) == set(row)
        assert again["dsc_baseline"] == row["dsc_baseline"] == "syn-mi"
        tested = ["dsc_p"] if row["method"] != "syn-mi" else []
        for name in ("n", "dsc_n", "dsc_mean", "dsc_sd", "seconds_mean", *tested):
            assert known_number(row[name]) == pytest.approx(known_number(again[name]), rel=1e-4)
        assert again["hd95_mm_mean"] == row["hd95_mm_mean"] == "n/a"


def test_every_column_is_described(rng, tmp_path):
    records = evaluation(rng)
    records[0] |= {"dsc_csf": 0.5, "hd95_mm_csf": 1.0}
    write_records(records, tmp_path)
    for name in ("evaluation", "summary"):
        columns = list(read_table(tmp_path / f"{name}.tsv")[0])
        described = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(described) == columns
        assert all(len(column["Description"]) > 10 for column in described.values())
        for column, of_column in described.items():
            is_in_mm = "_mm" in column and not column.endswith("_n")
            assert (of_column.get("Units") == "mm") is is_in_mm
    assert described["dsc_csf_mean"]["Description"].endswith(": dsc_csf of evaluation.tsv.")


def test_tables_are_replaced(rng, tmp_path):
    write_records(evaluation(rng, 12), tmp_path)
    write_records(evaluation(rng, 3), tmp_path)
    assert len(read_table(tmp_path / "evaluation.tsv")) == 12
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "evaluation.json",
        "evaluation.tsv",
        "summary.json",
        "summary.tsv",
    ]
