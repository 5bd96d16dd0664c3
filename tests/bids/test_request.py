import json

import pytest

from m2m_bids.bids.request import MADE_FROM_FIELD, differences, made_from


@pytest.mark.parametrize(
    ("used", "wanted", "found"),
    [
        ({"Target": "T1w"}, {"Target": "T1w"}, []),
        ({"Target": "T1w"}, {"Target": "MNI"}, ["Target"]),
        ({"Target": "T1w", "Weights": "a"}, {"Target": "T1w"}, ["Weights"]),
        ({}, {"Target": "T1w"}, ["Target"]),
        ({"A": {"b": 1, "a": [2]}}, {"A": {"a": (2,), "b": 1}}, []),
        # A number that is not one is the same again.
        ({"Metadata": {"x": float("nan")}}, {"Metadata": {"x": float("nan")}}, []),
        # How frames are used matters to what has frames, whose sidecars say so.
        ({"Target": "T1w"}, {"Target": "T1w", "Frames": {"Reference": "sum"}}, []),
        ({"Frames": {"Reference": "twa"}}, {"Frames": {"Reference": "sum"}}, ["Frames"]),
    ],
)
def test_differences(used, wanted, found):
    assert differences(json.loads(json.dumps(used)), wanted) == found


@pytest.mark.parametrize(
    "content",
    [
        *("", "no JSON", "[1]", "{}", f'{{"{MADE_FROM_FIELD}": 3}}'),
        pytest.param("[" * 20000, id="deep"),
    ],
)
def test_what_is_not_known_is_empty(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert made_from(tmp_path / "a.json") == {}
    assert made_from(tmp_path / "absent.json") == {}
