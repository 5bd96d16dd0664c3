"""What is planned for a cohort as Clinica converts ADNI, with its oddities, line by line."""

import pytest

from m2m_bids.cli.run import main

NO_WEIGHT = (
    "no body weight: neither PatientWeight in the PET sidecar nor a column weight in sessions.tsv"
    " or participants.tsv"
)
SUVR = "none: there are no FreeSurfer labels of the T1w to find a region in"
ONE, TWO, NONE = "sub-ADNI011S0002", "sub-ADNI022S0001", "sub-ADNI033S0003"
FILES = {
    f"{ONE}/ses-M000": [
        "anat/{}_T1w.nii.gz",
        "anat/{}_run-02_T1w.nii.gz",
        "pet/{}_trc-18FFDG_rec-coregavg_pet.nii.gz",
        "pet/{}_trc-18FFDG_rec-coregiso_pet.nii.gz",
        "pet/{}_trc-18FAV45_run-01_pet.nii.gz",
        "pet/{}_trc-18FAV45_run-02_pet.nii.gz",
        "dwi/{}_FA.nii.gz",
    ],
    f"{ONE}/ses-M012": ["pet/{}_trc-18FAV1451_pet.nii.gz"],
    f"{ONE}/ses-M018": ["anat/{}_T1w.nii.gz"],
    f"{TWO}/ses-M00": ["anat/{}_T1w.nii.gz", "pet/{}_task-rest_acq-fdg_pet.nii.gz"],
    f"{NONE}/ses-M000": ["pet/{}_trc-11CPIB_pet.nii.gz"],
}


@pytest.fixture
def plan(tmp_path, capsys):
    """Run ``--dry-run`` on the cohort; return its lines."""
    root = tmp_path / "bids"
    for folder, names in FILES.items():
        stem = folder.replace("/", "_")
        for name in names:
            file = root / folder / name.format(stem)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("image")
        rows = "".join(f"{name.format(stem)}\tI123\t3\n" for name in names)
        (root / folder / f"{stem}_scans.tsv").write_text(f"filename\tscan_id\tmri_field\n{rows}")
    # The visit called M012 was, in fact, 13 months before that called M018.
    dates = "ses-M000\t2010-01-04\nses-M012\t2010-04-20\nses-M018\t2011-05-20\n"
    table = f"session_id\texamination_date\n{dates}"
    (root / ONE / f"{ONE}_sessions.tsv").write_text(table)
    (root / TWO / f"{TWO}_sessions.tsv").write_text("session_id\tage\nses-M00\t71\n")

    def run(*options):
        given = [str(root), str(tmp_path / "out"), "participant", "--dry-run"]
        assert main([*given, "--transform", "rigid", *options]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def scan(subject, session, end, t1w, rule, datatype="pet", name=None):
    """Lines of a scan that would be registered."""
    folder, stem = f"{subject}/ses-{session}", f"{subject}_ses-{session}"
    t1w_folder = f"{subject}/ses-{t1w[0]}/anat/{subject}_ses-{t1w[0]}"
    kind = "fa" if datatype == "dwi" else "pet"
    image = "FA map" if kind == "fa" else "PET image"
    return [
        "",
        f"{stem}_{name or end}",
        f"  {kind:8s}{folder}/{datatype}/{stem}_{end}.nii.gz",
        f"  T1w     {t1w_folder}_{t1w[1]}.nii.gz ({rule})",
        f"  from    {image} of the BIDS dataset",
        "  spaces  T1w",
        "  regions tissues of the T1w (seg-tissues)",
        *([] if kind == "fa" else [f"  SUV     none: {NO_WEIGHT}", f"  SUVR    {SUVR}"]),
        "  weights none (rigid only)",
    ]


FIRST = "same session, first of 2 images"
OWN = ("M000", "T1w")
TAU = scan(
    ONE,
    "M012",
    "trc-18FAV1451_pet",
    OWN,
    "nearest session by examination_date (ses-M000), first of 2 images",
)
LEGACY = scan(TWO, "M00", "task-rest_acq-fdg_pet", ("M00", "T1w"), "same session")


def test_every_line(plan, tmp_path):
    no_t1w = f"no T1w image (anat/*_T1w.nii[.gz]) of its subject in {tmp_path / 'bids'}"
    assert plan() == [
        "m2m-bids would register 7 of 8 scans.",
        *scan(ONE, "M000", "FA", OWN, FIRST, "dwi", "param-FA_dwimap"),
        *scan(ONE, "M000", "trc-18FAV45_run-01_pet", OWN, FIRST),
        *scan(ONE, "M000", "trc-18FAV45_run-02_pet", OWN, FIRST),
        *scan(ONE, "M000", "trc-18FFDG_rec-coregavg_pet", OWN, FIRST),
        *scan(ONE, "M000", "trc-18FFDG_rec-coregiso_pet", OWN, FIRST),
        *TAU,
        *LEGACY,
        "",
        "Left out: 1",
        f"  {NONE}_ses-M000_trc-11CPIB_pet: {no_t1w}",
        HINT,
    ]


PET = ["--modalities", "pet"]
HINT = (
    "  Without a T1w image there is --no-t1w register-to-template (level participant), or a T1w "
    "of another session with --subject-anatomical-reference nearest."
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--rec-label", "coregiso", *PET],
            scan(ONE, "M000", "trc-18FFDG_rec-coregiso_pet", OWN, FIRST),
        ),
        (["--run-label", "1"], scan(ONE, "M000", "trc-18FAV45_run-01_pet", OWN, FIRST)),
        (["--session-label", "M00"], LEGACY),
        (["--tracer-label", "AV1451", *PET], TAU),
        (
            ["-tsv", "pairs.tsv", "--subject-anatomical-reference", "first-lex"],
            [*TAU[:3], TAU[3].replace("nearest session by examination_date", "first session"),
             *TAU[4:]],
        ),
        (["-tsv", "pairs.tsv"], TAU),
    ],
)  # fmt: skip
def test_selections(plan, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    table = f"participant_id\tsession_id\n{ONE}\tses-M012\n"
    (tmp_path / "pairs.tsv").write_text(table)
    lines = plan(*options, "--bids-database-dir", str(tmp_path / "database"))
    end = next((i for i, line in enumerate(lines) if line.startswith("Participants")), None)
    assert lines[: end - 1 if end else None] == [
        "m2m-bids would register 1 of 1 scans.",
        *expected,
    ]


def test_sessionwise(plan):
    lines = plan("--subject-anatomical-reference", "sessionwise", "--participant-label", ONE)
    assert lines[0] == "m2m-bids would register 5 of 6 scans."
    assert lines[-3] == "Left out: 1"
    others = [f"{ONE}_ses-{end}_T1w.nii.gz" for end in ("M000", "M000_run-02", "M018")]
    start = f"  {ONE}_ses-M012_trc-18FAV1451_pet: no T1w image in its session ses-M012, and "
    assert lines[-2].startswith(start)
    assert all(other in lines[-2] for other in others)
    assert lines[-1] == HINT


@pytest.mark.parametrize(
    ("dataset", "n_planned", "n_scans"),
    [
        ("pet001", 1, 1),
        ("pet002", 4, 4),
        ("pet003", 1, 1),
        ("pet004", 0, 1),
        ("pet005", 2, 2),
        ("pet006", 0, 1),
    ],
)
def test_public_examples(shared_data, tmp_path, capsys, dataset, n_planned, n_scans):
    root = shared_data / "bids-examples" / dataset
    given = [str(root), str(tmp_path / "out"), "participant", "--dry-run", "--transform", "rigid"]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"m2m-bids would register {n_planned} of {n_scans} scans."
    left_out = [line for line in lines if "no T1w image (anat/*_T1w.nii[.gz]) of its su" in line]
    assert len(left_out) == n_scans - n_planned
    assert not (tmp_path / "out").exists()
