"""What input could do beside being read."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

import m2m_bids
import m2m_bids.workflows
from m2m_bids.bids.naming import expected_anat_outputs, expected_outputs, parse_name
from m2m_bids.bids.query import QueryError, query
from m2m_bids.bids.status import status_row
from m2m_bids.cli import run as cli
from m2m_bids.cli.reporting import write_reports
from m2m_bids.settings import Settings

SOURCES = [
    *Path(m2m_bids.__file__).parent.rglob("*.py"),
    *Path(m2m_bids.__file__).parents[1].joinpath("workflows").glob("*.py"),
]
EVIL = "<script>alert(1)</script>"


def image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    nb.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)).to_filename(file)


@pytest.fixture
def bids_dir(tmp_path):
    root = tmp_path / "bids"
    image(root / "sub-1/anat/sub-1_T1w.nii.gz")
    image(root / "sub-1/pet/sub-1_trc-FDG_pet.nii.gz")
    return root


@pytest.mark.parametrize(
    "pattern",
    [
        r"shell\s*=\s*True", r"os\.system", r"(?<!\.)\beval\(", r"\bexec\(", r"yaml\.load\(",
        r"pickle\.loads?\(", r"allow_pickle=True", r"weights_only=False", r"tempfile\.mktemp\(",
        r"urllib\.request", r"import requests", r"http\.client",
    ],
)  # fmt: skip
def test_code_has_none_of_these(pattern):
    found = [str(file) for file in SOURCES if re.search(pattern, file.read_text())]
    assert not found


@pytest.mark.parametrize(
    "name",
    [
        "sub-../../x_pet.nii.gz", "sub-1_trc-..%2f_pet.nii.gz", "sub-1_trc-a b_pet.nii.gz",
        "sub-1_trc-$(id)_pet.nii.gz", "sub-1_trc-`id`_pet.nii.gz", "sub-1_trc-;x_pet.nii.gz",
        "sub-1_trc-\n_pet.nii.gz", "sub-1_trc-<b>_pet.nii.gz", "sub-1_trc-_pet.nii.gz",
    ],
)  # fmt: skip
def test_labels_are_letters_and_digits(name):
    with pytest.raises(ValueError, match="is not a BIDS"):
        parse_name(name)


def test_outputs_stay_in_the_output_folder(bids_dir, tmp_path):
    """Whatever sidecars and tables say."""
    evil = {"TracerName": "../../../x", "Units": "/etc/passwd", "Manufacturer": EVIL}
    (bids_dir / "sub-1/pet/sub-1_trc-FDG_pet.json").write_text(json.dumps(evil))
    (bids_dir / "participants.tsv").write_text("participant_id\tweight\n../../sub-1\t../x\n")
    (bids_dir / "sub-1/sub-1_sessions.tsv").write_text("session_id\n../../..\n")
    (scan,) = query(bids_dir)
    out = tmp_path / "out"
    files = [*expected_outputs(scan, out, "m2m").values()]
    files += expected_anat_outputs(scan.t1w_entities, out).values()
    assert all(out in file.resolve().parents for file in files)


@pytest.mark.parametrize(
    "row", ["../../etc\tM0", "sub-../x\tses-M0", "1\t../..", "/etc\t/etc", "1\tses-../../pet"]
)
def test_tables_of_sessions_name_sessions_of_the_dataset(bids_dir, tmp_path, row):
    file = tmp_path / "wanted.tsv"
    file.write_text(f"participant_id\tsession_id\n{row}\n")
    with pytest.raises(QueryError, match=str(file)):
        query(bids_dir, subjects_sessions_tsv=file)


def test_participant_labels_are_those_of_the_dataset(bids_dir):
    (bids_dir.parent / "sub-2").mkdir()
    with pytest.raises(QueryError, match="no participant"):
        query(bids_dir, participant_labels=["../sub-2"])


def test_links_out_of_the_dataset_are_read_and_no_more(bids_dir, tmp_path):
    """As DataLad's; a link to something that is no image is told when it is read."""
    secret = tmp_path / "secret"
    secret.write_text("not an image")
    pet = bids_dir / "sub-1/pet/sub-1_trc-FDG_pet.nii.gz"
    pet.unlink()
    pet.symlink_to(secret)
    (scan,) = query(bids_dir)
    assert scan.file == pet
    assert secret.read_text() == "not an image"


def test_reports_show_text_as_text(bids_dir, tmp_path):
    """Reasons, file names and commands may hold what input said."""
    settings = Settings(bids_dir=bids_dir, output_dir=tmp_path / "out", transform="rigid")
    (scan,) = query(bids_dir)
    row = status_row(scan, "failed", f"x.json: {EVIL} \"'>")
    (report,) = write_reports(settings, [scan], [row])
    text = report.read_text()
    assert "alert(1)" in text
    assert EVIL not in text


# What bandit finds, by test and file; SECURITY.md says why each stays.
EXPLAINED = {
    ("B404", "baselines/run.py"),
    ("B603", "baselines/run.py"),
    ("B404", "cli/environment.py"),
    ("B603", "cli/environment.py"),
    ("B404", "cli/graph.py"),
    ("B603", "cli/graph.py"),
    ("B404", "cli/run.py"),
    ("B603", "cli/run.py"),
    ("B404", "cli/slurm.py"),
    ("B603", "cli/slurm.py"),
    ("B403", "preprocessing/synthstrip.py"),
    ("B403", "registration/conversion.py"),
    ("B405", "reports/charts.py"),
    ("B314", "reports/charts.py"),
}


@pytest.mark.slow
def test_bandit_finds_what_is_explained():
    folder = Path(m2m_bids.__file__).parent
    # In a checkout they are beside the package.
    folders = {str(folder), str(Path(m2m_bids.workflows.__file__).parent)}
    command = [sys.executable, "-m", "bandit", "-q", "-f", "json", "-r", *folders]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {
        (result["test_id"], result["filename"].removeprefix(f"{folder}/"))
        for result in json.loads(answer.stdout)["results"]
    }
    assert found == EXPLAINED


def test_nothing_connects(bids_dir, tmp_path, monkeypatch, capsys):
    """A dry run in a process whose sockets fail; test_faults runs without a network at all."""

    def refuse(*arguments, **options):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    arguments = [bids_dir, tmp_path / "out", "participant", "--dry-run", "--device", "cpu"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert "would register 1 of 1 scans" in capsys.readouterr().out
