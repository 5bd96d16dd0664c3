"""Pairs of a cohort: balance of a sample, and what a table of pairs may hold."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from m2m_bids.bids.query import Scan
from m2m_bids.evaluation.pairs import (
    Pair,
    PairsError,
    Reference,
    read_pairs,
    sample_own_pairs,
    sample_pairs,
)
from m2m_bids.spatial.itk import write_composite


def scan(subject, modality="pet", session=None, tracer="FDG", t1w_session=None):
    """Make a scan, and name its T1w of a session of choice."""
    entities = {"sub": subject}
    if session:
        entities["ses"] = session
    t1w = {**entities, **({"ses": t1w_session} if t1w_session else {})}
    stem = "_".join(f"{key}-{value}" for key, value in t1w.items())
    if modality == "pet":
        entities["trc"] = tracer
    return Scan(
        modality=modality,
        file=Path("scan.nii.gz"),
        entities=entities,
        t1w=Path("anat") / f"{stem}_T1w.nii.gz",
        t1w_entities=t1w,
    )


def cohort(n_subjects):
    return [scan(f"{number:02d}") for number in range(n_subjects)]


def uses(pairs, role):
    """How often each participant has a role, those who never have it left out."""
    return Counter(getattr(pair, role).subject for pair in pairs)


# --- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_subjects", "n_pairs"), [(7, 20), (7, 7), (20, 20), (30, 8), (3, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sample_is_balanced(n_subjects, n_pairs, seed):
    pairs = sample_pairs(cohort(n_subjects), n_pairs, seed=seed)
    assert len({pair.name for pair in pairs}) == len(pairs) == n_pairs
    assert all(pair.kind == "between" for pair in pairs)
    for role in ("moving", "fixed"):
        counts = [uses(pairs, role)[scan.subject] for scan in cohort(n_subjects)]
        assert max(counts) - min(counts) <= 1


def test_all_pairs_where_they_are_few():
    pairs = sample_pairs(cohort(4), 50)
    found = {(pair.moving.subject, pair.fixed.subject) for pair in pairs}
    subjects = [scan.subject for scan in cohort(4)]
    assert found == {(one, other) for one in subjects for other in subjects if one != other}
    assert len(pairs) == 12


@pytest.mark.parametrize("n_subjects", [0, 1])
def test_one_participant_makes_no_pair(n_subjects):
    assert sample_pairs(cohort(n_subjects), 5) == []


def test_fixed_images_of_others():
    others = [scan(name, "fa") for name in ("00", "x", "y")]
    pairs = sample_pairs(cohort(1), 9, fixed_scans=[*cohort(1), *others])
    assert {pair.moving.name for pair in pairs} == {"sub-00_trc-FDG_pet"}
    assert sorted(pair.fixed.subject for pair in pairs) == ["x", "y"]


def test_a_seed_gives_one_sample_and_a_larger_one_holds_it():
    scans = cohort(9)
    small, large = (sample_pairs(scans, n, seed=4) for n in (10, 30))
    assert large[:10] == small == sample_pairs(scans[::-1], 10, seed=4)
    assert sample_pairs(scans, 10, seed=5) != small


def test_scans_and_t1w_images_of_a_participant_take_turns():
    several = [
        scan("a", session="1"),
        scan("a", session="2"),
        scan("a", session="2", tracer="AV45"),
    ]
    others = [scan(name, session="1") for name in "bcdefg"]
    pairs = sample_pairs([*several, *others], 42)
    moving = Counter(pair.moving.name for pair in pairs if pair.moving.subject == "a")
    fixed = Counter(pair.fixed_name for pair in pairs if pair.fixed.subject == "a")
    assert moving == {scan.name: 2 for scan in several}
    assert fixed == {"sub-a_ses-1_T1w": 3, "sub-a_ses-2_T1w": 3}


def test_own_pairs_are_those_with_a_known_truth():
    scans = cohort(5)
    truth = {each.name: Reference(landmarks=Path(f"{each.name}.tsv")) for each in scans[1:]}
    pairs = sample_own_pairs(scans, truth, 10, seed=1)
    assert {pair.moving.name for pair in pairs} == set(truth)
    assert all(pair.kind == "within" for pair in pairs)
    assert all(pair.reference == truth[pair.moving.name] for pair in pairs)
    assert sample_own_pairs(scans, truth, 2, seed=1) == pairs[:2]


POINTS = "t1w_x\tt1w_y\tt1w_z\tscan_x\tscan_y\tscan_z\n1\t2\t3\t4\t5\t6\n"


# --- tables ----------------------------------------------------------------------------------

SCANS = [
    scan("01", session="M000"),
    scan("01", "fa", session="M000"),
    scan("02", session="M000"),
    scan("02", session="M012", t1w_session="M000"),
    scan("03"),
    scan("04", session="M000"),
    scan("04", session="M012"),
]
PET = [each.name for each in SCANS]


@pytest.fixture
def table(tmp_path):
    """Write a table of pairs; spaces stand for tabs."""

    def write(*lines):
        file = tmp_path / "pairs.tsv"
        file.write_text("\n".join(line.replace(" ", "\t") for line in lines) + "\n")
        return file

    return write


@pytest.mark.parametrize(
    ("moving", "fixed", "expected"),
    [
        (PET[0], PET[2], (0, "sub-02_ses-M000_T1w")),
        ("sub-02_ses-M012_trc-FDG_pet", "sub-03", (3, "sub-03_T1w")),
        ("sub-03", "sub-02/ses-M000", (4, "sub-02_ses-M000_T1w")),
        ("03", "04/M012", (4, "sub-04_ses-M012_T1w")),
        ("sub-04_ses-M012", "sub-02_ses-M000_T1w", (6, "sub-02_ses-M000_T1w")),
        # Both PET scans of the participant have the same T1w.
        ("sub-03", "sub-02", (4, "sub-02_ses-M000_T1w")),
    ],
)
def test_names(table, moving, fixed, expected):
    (pair,) = read_pairs(table("moving fixed", f"{moving} {fixed}"), SCANS)
    assert (SCANS.index(pair.moving), pair.fixed_name) == expected
    assert pair.name == f"{pair.moving.name}_to_{pair.fixed_name}"


def test_modality_chooses_the_scan(table):
    file = table("modality moving fixed", "fa 01/M000 03", "pet 01 03")
    assert [SCANS.index(pair.moving) for pair in read_pairs(file, SCANS)] == [1, 0]


def test_the_moving_scans_kind_is_preferred_for_the_fixed(table):
    (pair,) = read_pairs(table("moving fixed", "03 01"), SCANS)
    assert pair.fixed.modality == "pet"


def test_truth_is_read_beside_the_table(table, tmp_path):
    (tmp_path / "points.tsv").write_text(POINTS)
    write_composite(np.eye(4), tmp_path / "true.h5")
    file = table(
        "moving fixed landmarks reference_xfm",
        "03 03 points.tsv n/a",
        f"03 02/M000 n/a {tmp_path}/true.h5",
        "02/M000 03 n/a n/a",
    )
    within, between, plain = read_pairs(file, SCANS)
    assert (within.kind, within.reference) == ("within", Reference(tmp_path / "points.tsv"))
    assert between.reference == Reference(None, tmp_path / "true.h5")
    assert plain.reference == Reference()


def test_truth_of_the_cohort_is_taken_for_a_scan_and_its_own_t1w(table):
    truth = {PET[0]: Reference(Path("a.tsv")), PET[5]: Reference(Path("b.tsv"))}
    file = table("moving fixed", f"{PET[0]} 01/M000", f"{PET[5]} 03")
    own, other = read_pairs(file, SCANS, references=truth)
    assert own == Pair(SCANS[0], SCANS[0], truth[PET[0]])
    assert other.reference == Reference()
    with pytest.raises(PairsError, match="same participant 04"):
        read_pairs(table("moving fixed", f"{PET[5]} 04/M012"), SCANS, references=truth)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "line 1: the columns are none; expected"),
        (("moving",), "line 1: the columns are moving; expected"),
        (("moving fixed fixed",), "line 1: the columns"),
        (("moving fixed landmark",), "line 1: the columns are moving, fixed, landmark"),
        (("moving fixed",), "holds no pair"),
        (("moving fixed", "", "03"), "line 3: 1 values for 2 columns"),
        (("moving fixed", "n/a 03"), "line 2: moving is empty"),
        (("moving fixed", "03 02", "05 02"), "line 3: moving '05' is no scan"),
        (("moving fixed", "sub-03_trc-FDG_pte 02"), "did you mean sub-03_trc-FDG_pet?"),
        (("moving fixed", "03 02/M012"), "line 2: fixed '02/M012' is no scan"),
        (("moving fixed", "01 03"), "line 2: moving '01' may be sub-01_ses-M000_param-FA_dwimap"),
        (("moving fixed", "03 04"), "may be any of sub-04_ses-M000_T1w, sub-04_ses-M012_T1w"),
        (("moving fixed", "03 03"), "line 2: moving and fixed are of the same participant 03"),
        (("moving fixed", "03 02", "03 01", f"{PET[4]} {PET[2]}"), "line 4: .* as in line 2"),
        (("moving fixed modality", "03 02 mr"), "line 2: modality 'mr' is unknown"),
        (("moving fixed modality", "03 02 fa"), "line 2: moving '03' is pet, not fa"),
        (("moving fixed landmarks", "03 03 none.tsv"), "line 2: landmarks: .*none.tsv is not a"),
        (("moving fixed landmarks", "03 03 pairs.tsv"), "line 2: .*not a table of landmarks"),
        (("moving fixed reference_xfm", "03 02 pairs.tsv"), "line 2: reference_xfm: .*ITK"),
        (("moving fixed reference_xfm", "03 02 empty.h5"), "line 2: .*empty.h5: not a readable"),
    ],
)
def test_errors_name_the_line(table, tmp_path, lines, message):
    (tmp_path / "empty.h5").touch()
    file = table(*lines)
    with pytest.raises(PairsError, match=message) as error:
        read_pairs(file, SCANS)
    assert str(error.value).startswith(f"{file}: ")


def test_all_errors_are_told_at_once(table):
    file = table("moving fixed", "05 02", "03 03", "03 02", "06 02", "07 02", "08 02")
    with pytest.raises(PairsError) as error:
        read_pairs(file, SCANS)
    for text in ("line 2:", "line 3:", "line 5:", "and 2 more lines"):
        assert text in str(error.value)
    assert "line 4:" not in str(error.value)


def test_what_cannot_be_evaluated_is_told(table):
    file = table("moving fixed", "03 02", "02/M000 03")
    with pytest.raises(PairsError, match=r"line 2: moving sub-03_trc-FDG_pet: no labels; line 3"):
        read_pairs(file, SCANS, objection=lambda s: "no labels" if s.subject == "03" else "")


def test_a_table_that_is_no_text(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PairsError, match="cannot be read as a table"):
        read_pairs(file, SCANS)
    with pytest.raises(PairsError, match="cannot be read as a table"):
        read_pairs(tmp_path / "none.tsv", SCANS)
