from pathlib import Path

import pytest

from m2m_bids.api import Quality, quality_limits
from m2m_bids.quality.cohort import outliers
from m2m_bids.quality.limits import column_names, definitions, warnings_of

DOCS = Path(__file__).parents[2] / "docs" / "quality.md"


def table():
    """Write the table of docs/quality.md from data/qc.json."""
    lines = ["| number | what it is | good | when to worry |", "|---|---|---|---|"]
    for name, definition in definitions().items():
        unit = f" ({definition.unit})" if definition.unit else ""
        columns = [column for column, own in column_names().items() if own == name]
        names = ", ".join(f"`{column}`" for column in columns)
        text = f"| {definition.title}{unit}: {names} | {definition.meaning}"
        lines.append(f"{text} | {definition.good} | {definition.worry} |")
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
    assert "nmi_initial" in column_names()
    assert "nmi_initial" not in column_names(are_final=True)
    assert column_names()["brain_dice_rigid"] == "brain_dice"


def test_limits_on_both_sides():
    found = warnings_of({"likeness_gain": 0.3, "brain_dice": 0.5, "noise_percent": None, "nmi": 1})
    assert found == {
        "brain_dice": "brain overlap is 0.5 (worry below 0.7)",
        "likeness_gain": "gain in likeness is 0.3 (worry above 0.2)",
    }


def test_scans_far_from_the_others():
    scans = [{"nmi": 1.1 + 0.01 * (number % 5), "header_shift_mm": 10.0} for number in range(12)]
    scans[3]["nmi"] = 1.0
    # Better than the others is no reason to look.
    scans[4]["nmi"] = 1.3
    # Half of the scans have one value: nothing can be said.
    scans[5]["header_shift_mm"] = 80.0
    found = outliers(scans)
    assert [number for number, flags in enumerate(found) if flags] == [3]
    assert list(found[3]) == ["nmi"]
    # 0.11 from the median, 1.11, by 1.4826 times the median distance from it, 0.01.
    assert found[3]["nmi"].endswith("low in this cohort (median 1.11, 7.4 robust SD away)")
    assert outliers(scans[:7]) == [{}] * 7


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
    numbers = {"mean_displacement_mm": 4.8, "likeness_gain": 0.25, "max_displacement_mm": 30.0}
    assert set(warnings_of(numbers)) == set(numbers)
    assert set(warnings_of(numbers, is_same_person=False)) == {"max_displacement_mm"}
