from pathlib import Path

import numpy as np
import pytest

from m2m_bids.api import Quality, quality_limits
from m2m_bids.quality.cohort import outliers
from m2m_bids.quality.limits import OWN_ERROR_MM, column_names, definitions, warnings_of

DOCS = Path(__file__).parents[2] / "docs" / "quality.md"


def table():
    """Write the table of docs/quality.md from data/qc.json."""
    lines = [
        "| number | what it is | good | when to worry | flagged |",
        "|---|---|---|---|---|",
    ]
    for name, definition in definitions().items():
        unit = f" ({definition.unit})" if definition.unit else ""
        columns = [column for column, own in column_names().items() if own == name]
        names = ", ".join(f"`{column}`" for column in columns)
        text = f"| {definition.title}{unit}: {names} | {definition.meaning}"
        lines.append(f"{text} | {definition.good} | {definition.worry} | {definition.flagged} |")
    return "\n".join(lines)


def test_documentation_has_every_number():
    if not DOCS.exists():
        pytest.skip("the documentation is not beside the tests")
    assert table() in DOCS.read_text()


def test_definitions_are_whole():
    for name, definition in definitions().items():
        assert definition.meaning.endswith("."), name
        assert definition.worse in ("low", "high", "both")
        assert set(definition.limits) <= {"low", "high"}
        assert len(definition.between) in (0, 2)
        assert definition.min_spread > 0
        assert definition.scale in ("linear", "log")
    assert "nmi_initial" in column_names()
    assert "nmi_initial" not in column_names(are_final=True)
    assert column_names()["brain_dice_rigid"] == "brain_dice"


def test_limits_on_both_sides():
    found = warnings_of({"likeness_gain": 0.3, "brain_dice": 0.5, "noise_percent": None, "nmi": 1})
    assert found == {
        "brain_dice": "brain overlap is 0.5 (worry below 0.7)",
        "likeness_gain": "gain in likeness is 0.3 (worry above 0.2)",
    }


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("edge_agreement", 0.35, 0.5),
        ("side_gap", 0.001, 0.0158),
        ("fov_cut_percent", 4.5, 2.0),
        ("cycle_error_mm", 1.6, 0.87),
        ("folding_percent", 0.001, 0.0),
        ("similarity", 0.3, 0.88),
        ("decision_margin", 0.02, 0.48),
        ("decision_margin", -0.29, -2.0),
    ],
)
def test_what_is_documented_as_a_worry_is_flagged(name, bad, good):
    assert list(warnings_of({name: bad})) == [name]
    assert warnings_of({name: good}) == {}


def test_limits_of_the_check_are_the_same():
    check = {name: entry["limit"] for name, entry in quality_limits().items()}
    assert definitions()["folding_percent"].limits == {"high": check["folding_percent"]}
    assert definitions()["cycle_error_mm"].limits == {"high": check["disagreement_mm"]}
    assert definitions()["similarity"].limits == {"low": check["similarity"]}
    assert check["mean_displacement_mm"] == OWN_ERROR_MM


def test_a_step_within_its_own_error_is_no_close_decision():
    numbers = {"decision_margin": -0.1, "mean_displacement_mm": 0.9}
    assert warnings_of(numbers) == {}
    assert list(warnings_of({**numbers, "mean_displacement_mm": 1.2})) == ["decision_margin"]


def test_scans_far_from_the_others():
    scans = [{"nmi": 1.1 + 0.01 * (number % 5), "header_shift_mm": 10.0} for number in range(12)]
    scans[3]["nmi"] = 1.0
    # Better than the others is no reason to look.
    scans[4]["nmi"] = 1.3
    # All others have one value: then the least spread that matters is the measure, 2 mm.
    scans[5]["header_shift_mm"] = 80.0
    scans[6]["header_shift_mm"] = 15.0
    found = outliers(scans)
    assert [number for number, flags in enumerate(found) if flags] == [3, 5]
    assert found[5]["header_shift_mm"].endswith("(median 10, 35.0 robust SD away)")
    assert list(found[3]) == ["nmi"]
    # 0.11 from the median, 1.11, by 1.4826 times the median distance from it, 0.01.
    assert found[3]["nmi"].endswith("low in this cohort (median 1.11, 7.4 robust SD away)")
    assert outliers(scans[:7]) == [{}] * 7


def test_differences_that_do_not_matter_are_not_flagged():
    cuts = [0, 0, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.05]
    assert not any(outliers([{"fov_cut_percent": value} for value in cuts]))
    assert outliers([{"fov_cut_percent": value} for value in [*cuts, 2.9]])[-1]
    # On a logarithmic scale: where nothing or more moved, and folds, whose Jacobian has none.
    jacobians = [0.7 + 0.01 * number for number in range(12)]
    found = outliers([{"min_jacobian": value} for value in [*jacobians, 0.0, -1.0, None]])
    assert [bool(flags) for flags in found] == [False] * 12 + [True, True, False]


@pytest.mark.parametrize(
    ("n_scans", "n_cohorts", "percent"), [(8, 40, 8), (20, 15, 5), (500, 1, 2)]
)
def test_few_good_scans_are_flagged(n_scans, n_cohorts, percent):
    random = np.random.default_rng(0)
    n_flagged = 0
    for _ in range(n_cohorts):
        columns = {}
        for column, name in column_names(are_final=True).items():
            definition = definitions()[name]
            if definition.scale == "log":
                factors = random.lognormal(0, 0.5, n_scans)
            else:
                factors = random.normal(10, 0.3, n_scans)
            columns[column] = 10 * definition.min_spread * factors
        rows = [dict(zip(columns, row, strict=True)) for row in np.transpose([*columns.values()])]
        n_flagged += sum(map(bool, outliers(rows)))
    assert 100 * n_flagged / (n_scans * n_cohorts) < percent


def quality(**changed):
    typical = {
        name: entry["typical"] for name, entry in quality_limits().items() if "typical" in entry
    }
    rest = {"max_displacement_mm": 5.0, "min_jacobian": 0.5, "max_jacobian": 2.0}
    return Quality(**{"folding_percent": 0.0, **typical, **rest, **changed})


def test_margin_is_that_of_the_nearest_limit():
    assert quality().margin == pytest.approx(1)
    assert quality(disagreement_mm=1.5).margin == pytest.approx(0, abs=1e-12)
    assert quality(similarity=0.81).margin == pytest.approx(0.5)
    assert quality(likeness_gain=None).margin == pytest.approx(1)
    assert quality(folding_percent=0.01).margin == float("-inf")
    for changed in ({"similarity": 0.9}, {"similarity": 0.5}, {"mean_displacement_mm": 0.9}):
        assert (quality(**changed).margin >= 0) == (quality(**changed).objections() == [])


def test_what_tells_two_people_apart_is_no_warning_at_a_template():
    # The template may be its own mirror image: left and right are then as good.
    numbers = {
        "mean_displacement_mm": 4.8,
        "likeness_gain": 0.25,
        "side_gap": -0.001,
        "max_displacement_mm": 30.0,
    }
    assert set(warnings_of(numbers)) == set(numbers)
    assert set(warnings_of(numbers, is_same_person=False)) == {"max_displacement_mm"}
