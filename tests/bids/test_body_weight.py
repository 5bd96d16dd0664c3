"""Body weights: the nearest one counts, its unit is never assumed."""

import json

import pytest

from m2m_bids.bids.body_weight import find_body_weight

ENTITIES = {"sub": "01", "ses": "M12", "trc": "FDG"}


@pytest.fixture
def tables(tmp_path):
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tweight\nsub-01\t70\t64\nsub-02\t71\tn/a\n"
    )
    (tmp_path / "participants.json").write_text(json.dumps({"weight": {"Units": "kg"}}))
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text(
        "session_id\tweight\nses-M00\t66\nses-M12\t61.5\nses-M24\tn/a\n"
    )
    (tmp_path / "sub-01/sub-01_sessions.json").write_text(
        json.dumps({"weight": {"Units": "kilogram"}})
    )
    return tmp_path


def test_what_is_nearest_to_the_scan_counts(tables):
    found = find_body_weight(tables, ENTITIES, {"PatientWeight": 62})
    assert found == (62, "kg", "PatientWeight in the PET sidecar")
    found = find_body_weight(tables, ENTITIES, {})
    assert found == ("61.5", "kilogram", "weight in sub-01_sessions.tsv")
    for session in ("M24", "M36"):
        found = find_body_weight(tables, {**ENTITIES, "ses": session}, {})
        assert found == ("64", "kg", "weight in participants.tsv")
    assert find_body_weight(tables, {"sub": "01"}, {}).value == "64"


def test_labels_in_tables_need_no_prefix(tables):
    (tables / "participants.tsv").write_text("participant_id\tweight\n01 \t64\n")
    table = tables / "sub-01/sub-01_sessions.tsv"
    table.write_text("session_id\tweight\nM00\t66\nM12\t61.5\n")
    assert find_body_weight(tables, ENTITIES, {}).value == "61.5"
    assert find_body_weight(tables, {"sub": "01"}, {}).value == "64"


def test_units_are_not_assumed(tables):
    (tables / "participants.json").unlink()
    assert find_body_weight(tables, {"sub": "01"}, {}).units is None
    found = find_body_weight(tables, {"sub": "01"}, {"BodyWeight": 350})
    assert (found.value, found.units) == (350, None)
    found = find_body_weight(tables, {"sub": "01"}, {"BodyWeight": 350, "BodyWeightUnits": "g"})
    assert (found.value, found.units) == (350, "g")


def test_nothing_is_found(tables):
    for entities in ({"sub": "02"}, {"sub": "03"}):
        found = find_body_weight(tables, entities, {"PatientWeight": None})
        assert found.value is None
        assert "no body weight" in found.source
    (tables / "participants.tsv").write_bytes(b"\xff\xfe\x00")
    assert find_body_weight(tables, {"sub": "01"}, {}).value is None


def test_contradictions_are_told(tables):
    (tables / "sub-01/sub-01_sessions.json").write_text(json.dumps({"weight": {"Units": "kg"}}))
    found = find_body_weight(tables, ENTITIES, {"PatientWeight": 80})
    assert found.value is None
    assert "contradictory body weights: 80 (PatientWeight" in found.source
    # Weights change over the years: the table of participants is of no session.
    assert find_body_weight(tables, {"sub": "01"}, {"PatientWeight": 80}).value == 80
