"""Texts to cite are of what made the images that are there, whichever runs that was in."""

import json
from pathlib import Path

import pytest

from m2m_bids.bids.methods import METHODS_FIELD
from m2m_bids.bids.naming import qc_file
from m2m_bids.bids.request import MADE_FROM_FIELD
from m2m_bids.bids.status import StatusRow, update_status
from m2m_bids.cli.citations import citation_of, versions_of, write_citation, write_level_citation

PET, FA, OTHER = "sub-01_trc-FDG_pet", "sub-01_param-FA_dwimap", "sub-02_trc-FDG_pet"


@pytest.fixture
def made(tmp_path):
    """Write the sidecar of a registered image; return its row of the status table."""

    def make(name, target="T1w", *, status="done", **fields):
        modality = "pet" if name.endswith("_pet") else "fa"
        stem, _, suffix = name.rpartition("_")
        first, _, parameter = stem.partition("_param-")
        placed = f"{first}_space-{target}" + (f"_param-{parameter}" if parameter else "")
        folder = qc_file(name, tmp_path).parent
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            MADE_FROM_FIELD: {"Target": target},
            METHODS_FIELD: {"Anatomical reference": ["Bones."], modality.upper(): [f"{name}."]},
            "SoftwareVersions": {"m2m-bids": "0.1.0", "torch": "2.1"},
            **fields,
        }
        (folder / f"{placed}_desc-preproc_{suffix}.json").write_text(json.dumps(content))
        participant = name.split("_")[0]
        row = StatusRow(participant, "n/a", modality, name, "sub-01_T1w.nii.gz", status)
        update_status(tmp_path, [row])
        return row

    return make


def test_earlier_scans_stay_in_the_text(made, tmp_path):
    """Another modality, another participant, in another run."""
    made(FA)
    assert f"{FA}." in write_citation(tmp_path).read_text()
    made(PET)
    made(OTHER)
    made("sub-03_pet", status="failed")
    file = write_citation(tmp_path)
    text = file.read_text()
    assert file == tmp_path / "logs/CITATION.md"
    for name in (FA, PET, OTHER):
        assert text.count(f"{name}.") == 1
    assert "sub-03" not in text
    assert text.count("Bones.") == 1
    assert f"<p>{OTHER}.</p>" in file.with_suffix(".html").read_text()
    assert "@article{gorgolewski2011," in file.with_suffix(".bib").read_text()


def test_a_participant_has_the_text_of_their_own_scans(made, tmp_path):
    rows = [made(PET), made(FA)]
    made(OTHER)
    text = citation_of(rows, tmp_path).markdown
    assert f"{PET}." in text
    assert OTHER not in text


def test_the_target_is_named(made, tmp_path):
    template = "the template MNI152NLin2009aSym"
    own = "the T1-weighted image of the same participant"
    rows = [made(PET, "MNI152NLin2009aSym"), made(FA)]
    for which, words in ((rows[:1], template), (rows[1:], own)):
        assert f"registered to {words} with" in citation_of(which, tmp_path).markdown
    both = f"registered to {own} or, for lack of one, to {template} with"
    assert both in citation_of(rows, tmp_path).markdown


def test_what_is_not_known_is_said(made, tmp_path):
    rows = [made(PET), made(FA, **{METHODS_FIELD: None})]
    text = citation_of(rows, tmp_path).markdown
    assert f"does not tell how these were made, by a version that did not keep it: {FA}." in text
    assert "does not tell" not in citation_of(rows[:1], tmp_path).markdown


def test_images_in_other_spaces_do_not_count(made, tmp_path):
    """They lie beside the others, with names that differ by the space alone."""
    row = made(PET)
    made(PET, "MNI152NLin2009cAsym", **{MADE_FROM_FIELD: {}, METHODS_FIELD: {"PET": ["No."]}})
    text = citation_of([row], tmp_path).markdown
    assert f"{PET}." in text
    assert "No." not in text


def test_versions_are_those_of_the_images():
    sidecars = [{"SoftwareVersions": {"m2m-bids": "0.1", "torch": t}} for t in ("2.1", "2.2")]
    sidecars += [{"SoftwareVersions": 3}, {}]
    assert versions_of(sidecars) == {"m2m-bids": "0.1", "torch": "2.1 and 2.2"}


def test_nothing_registered_is_nothing_to_cite(tmp_path):
    assert write_citation(tmp_path) is None
    odd = StatusRow("sub-O'N", "n/a", "pet", "sub-O'N_pet", "a", "done")
    assert citation_of([odd], tmp_path) is None
    assert not list(Path(tmp_path).glob("logs/CITATION*"))


def test_a_cohort_level_has_its_own_text(made, tmp_path):
    made(PET)
    before = write_citation(tmp_path).read_text()
    file = write_level_citation(tmp_path / "evaluation", "#### PET\n\nAveraged.\n")
    assert "Averaged." in file.read_text()
    assert file.parent == tmp_path / "evaluation"
    assert (tmp_path / "logs/CITATION.md").read_text() == before
