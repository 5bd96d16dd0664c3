from pathlib import Path

import pytest

from m2m_bids.bids.naming import parse_name
from m2m_bids.bids.sessions import T1wImage, choose_t1w, months, nearest_session


def images(*names):
    return [T1wImage(Path(name), parse_name(name).entities) for name in names]


@pytest.mark.parametrize(
    ("label", "expected"),
    [("M000", 0), ("M00", 0), ("M6", 6), ("m12", 12), ("bl", 0), ("month120", 120), ("01", None)],
)
def test_months(label, expected):
    assert months(label) == expected


@pytest.mark.parametrize(
    ("session", "candidates", "expected"),
    [
        ("M012", ["M000", "M018"], "M018"),  # 6 months are nearer than 12
        ("M012", ["M018", "M006"], "M006"),  # equally near: the earlier one
        ("M006", ["M100", "M012"], "M012"),  # months, not alphabet
        ("M9", ["M10", "M1"], "M10"),  # alphabetically M1 < M10 < M9
        ("M06", ["bl", "M24"], "bl"),
        ("c", ["a", "b", "d"], "b"),  # no months: the last one before
        ("a", ["c", "b"], "b"),  # none before: the first one after
        ("visit2", ["M000", "visit1", "visit9"], "visit1"),  # mixed labels: alphabet
    ],
)
def test_nearest_session(session, candidates, expected):
    assert nearest_session(session, candidates) == expected
    assert nearest_session(session, candidates[::-1]) == expected


@pytest.mark.parametrize(
    ("session", "names", "chosen", "rule"),
    [
        ("A", ["sub-1_ses-A_T1w.nii", "sub-1_ses-B_T1w.nii"], 0, "same session"),
        ("B", ["sub-1_ses-A_T1w.nii"], 0, "nearest session (ses-A)"),
        (None, ["sub-1_T1w.nii"], 0, "no sessions"),
        ("A", ["sub-1_T1w.nii"], 0, "T1w outside any session"),
        ("A", ["sub-1_T1w.nii", "sub-1_ses-B_T1w.nii"], 1, "nearest session (ses-B)"),
        (None, ["sub-1_ses-M12_T1w.nii", "sub-1_ses-M6_T1w.nii"], 1,
         "first session (ses-M6), the scan has none"),
        ("A", ["sub-1_ses-A_run-2_T1w.nii", "sub-1_ses-A_run-1_T1w.nii"], 1,
         "same session, first of 2 images"),
        ("A", ["sub-1_ses-A_run-10_T1w.nii", "sub-1_ses-A_run-9_T1w.nii"], 1,
         "same session, first of 2 images"),
        ("A", ["sub-1_ses-A_acq-x_T1w.nii", "sub-1_ses-A_run-2_T1w.nii", "sub-1_ses-A_T1w.nii"],
         2, "same session, first of 3 images"),
        ("A", ["sub-1_ses-A_acq-y_T1w.nii", "sub-1_ses-A_acq-x_T1w.nii"], 1,
         "same session, first of 2 images"),
        ("A", ["sub-1_ses-A_T1w.nii", "sub-1_ses-A_T1w.nii.gz"], 1,
         "same session, first of 2 images"),
    ],
)  # fmt: skip
def test_choose_t1w(session, names, chosen, rule):
    candidates = images(*names)
    for order in (candidates, candidates[::-1]):
        choice = choose_t1w(session, order)
        assert (choice.image.file.name, choice.rule) == (names[chosen], rule)


def test_no_t1w():
    assert choose_t1w("A", []) is None
