import json
import re
from dataclasses import replace
from pathlib import Path

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.bids.methods import METHODS_FIELD
from m2m_bids.bids.naming import expected_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD
from m2m_bids.bids.status import read_status, status_row
from m2m_bids.cli.reporting import write_reports
from m2m_bids.registration.weights import read_card

WEIGHTS = read_card(DEFAULT_WEIGHTS).sha256
QUALITY = {"folding_percent": 0.0, "disagreement_mm": 0.71, "similarity_gain": 0.23}
SCAN = Scan(
    "pet",
    Path("/data/sub-01/pet/sub-01_trc-FDG_pet.nii.gz"),
    {"sub": "01", "trc": "FDG"},
    Path("/data/sub-01/anat/sub-01_T1w.nii.gz"),
    {"sub": "01"},
    t1w_choice="same session",
)


def finish(settings, scan=SCAN, **fields):
    """Write the sidecar of a registered image."""
    file = expected_outputs(scan, settings.output_dir, "m2m")["preproc_json"]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "Transform": "m2m",
        "TransformRequested": "m2m",
        "WeightsSHA256": WEIGHTS,
        MADE_FROM_FIELD: {"Target": scan.space},
        METHODS_FIELD: {"Registration": ["Aligned with care [@choo2025]."]},
        "SoftwareVersions": {"m2m-bids": "0.0.7", "torch": "2.1"},
        **fields,
    }
    file.write_text(json.dumps(content))


def test_reports_and_table(settings):
    other = replace(SCAN, entities={"sub": "02"}, t1w=None, reason="no <T1w> image")
    run = settings()
    finish(run, LinearScore=0.61, DeformableQuality=QUALITY, Device="cpu")
    rows = [status_row(SCAN, "done"), status_row(other, "skipped")]
    reports = write_reports(run, [SCAN, other], rows)
    assert [file.name for file in reports] == ["sub-01.html", "sub-02.html"]
    assert [(row.scan, row.status) for row in read_status(run.output_dir)] == [
        ("sub-01_trc-FDG_pet", "done"),
        ("sub-02_pet", "skipped"),
    ]
    page = reports[0].read_text()
    for word in ("sub-01_trc-FDG_pet", "same session", "0.61", "0.71", "0.23", "cpu", WEIGHTS):
        assert word in page
    assert "The deformable step passed the check" in page
    # Of what nothing is known, nothing is said.
    assert "SHA-256 of the weights" in page
    assert "SHA-256 of the weights" not in reports[1].read_text()
    assert "simulated subjects" in page  # the card of the default weights
    assert "Aligned with care (Choo et al., 2025)." in page
    assert "an earlier one" not in page
    assert "no &lt;T1w&gt; image" in reports[1].read_text()
    assert 'id="PET"' not in reports[1].read_text()
    assert "No scan of this participant is registered." in reports[1].read_text()


def test_failed_scan_has_a_section_without_figures(settings):
    run = settings(transform="rigid")
    scan = replace(SCAN, sidecar={"TracerName": "<script>alert(1)</script>"})
    row = status_row(scan, "failed", "it <broke>")
    (report,) = write_reports(run, [scan], [row])
    page = report.read_text()
    assert re.findall(r'class="sub-report-group">([^<]+)', page) == [
        "Anatomical",
        "trc-FDG",
    ]
    assert 'alert-danger">Failed: it &lt;broke&gt;.' in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page
    assert "Weights of the network" not in page
    assert "No errors to report" not in page


def test_a_report_says_what_made_the_images_not_what_runs_now(settings):
    """Versions, weights and text of a run of one scan are those of each scan's own sidecar."""
    run = settings()
    pet = replace(SCAN, entities={"sub": "01", "trc": "AV45"})
    finish(run, pet, WeightsSHA256="abc", RefinementSteps=10)
    write_reports(run, [pet], [status_row(pet, "done")])
    finish(run, Device="cuda:1", SoftwareVersions={"m2m-bids": "0.0.7", "torch": "2.2"})
    (report,) = write_reports(run, [SCAN], [status_row(SCAN, "done")])
    about = (run.output_dir / "sub-01/figures/sub-01_desc-about_report.html").read_text()
    assert ">2.1 and 2.2<" in about
    assert ">0.0.7<" in about
    # The card of these weights is not at hand.
    assert "simulated subjects" not in about
    facts = (run.output_dir / "sub-01/figures/sub-01_desc-summary_report.html").read_text()
    assert f">{WEIGHTS}<br />abc<" in facts or f">abc<br />{WEIGHTS}<" in facts
    assert ">cuda:1<" in facts
    assert "torch 2.1 and 2.2" in report.read_text()


def test_the_command_is_one_that_can_be_given_again(settings, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/__main__.py", "a folder", "it's", "participant"])
    finish(settings())
    (report,) = write_reports(settings(), [SCAN], [status_row(SCAN, "done")])
    assert "m2m-bids &#x27;a folder&#x27; &#x27;it&#x27;&quot;&#x27;&quot;&#x27;s&#x27; parti" in (
        report.read_text()
    )
