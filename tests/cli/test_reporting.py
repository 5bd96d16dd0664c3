import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from m2m_bids.bids.naming import expected_anat_outputs, expected_outputs, quantification_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.bids.status import read_status
from m2m_bids.cli.reporting import (
    as_before,
    read_sidecar,
    status_of,
    write_citation,
    write_reports,
)
from m2m_bids.settings import Settings

MADE_WITH = {"WeightsSHA256": "abc", "RefinementSteps": 60}
QUANTIFIED = {"Segmentation": "tissues"}
ASKED = Request("m2m", MADE_WITH, QUANTIFIED, {})
QUALITY = {"folding_percent": 0.0, "disagreement_mm": 0.71, "similarity_gain": 0.23}
SCAN = Scan(
    "pet",
    Path("/data/sub-01/pet/sub-01_trc-FDG_pet.nii.gz"),
    {"sub": "01", "trc": "FDG"},
    Path("/data/sub-01/anat/sub-01_T1w.nii.gz"),
    {"sub": "01"},
    t1w_choice="same session",
)


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "bids").mkdir()

    def make(**options):
        return Settings(
            bids_dir=tmp_path / "bids",
            output_dir=tmp_path / "out",
            work_dir=tmp_path / "work",
            **options,
        )

    return make


def finish(settings, scan=SCAN, transform="m2m", statistics=(), **fields):
    """Write what a finished scan consists of."""
    outputs = expected_outputs(scan, settings.output_dir, transform)
    anatomical = {}
    if scan.t1w:
        anatomical = expected_anat_outputs(scan.t1w_entities, settings.output_dir)
    for file in (*outputs.values(), *anatomical.values()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    content = {"Transform": transform, MADE_FROM_FIELD: MADE_WITH, **MADE_WITH, **fields}
    outputs["preproc_json"].write_text(json.dumps(content))
    measured = quantification_outputs(scan, settings.output_dir, "tissues")
    for key in ("stat", "tacs"):
        measured[key].touch()
    content = {MADE_FROM_FIELD: QUANTIFIED, **dict(statistics)}
    measured["stat_json"].write_text(json.dumps(content))


def test_citation(settings):
    file = write_citation(settings(), "#### Registration\n\nAligned with care [@choo2025].")
    text = file.read_text()
    assert "Aligned with care (Choo et al., 2025)." in text
    assert "<p>Aligned with care (Choo et al., 2025).</p>" in (
        file.with_suffix(".html").read_text()
    )
    assert "@inproceedings{choo2025," in file.with_suffix(".bib").read_text()
    assert "antspyx" in text
    assert "{" not in text.replace("{{", "")


def test_unfinished_scan_has_no_sidecar(settings):
    assert read_sidecar(SCAN, settings()) == {}


def test_status_of_a_finished_scan(settings):
    finish(settings())
    row = status_of(SCAN, settings(), ASKED, seconds=12.34)
    assert (row.status, row.reason, row.seconds) == ("done", "n/a", "12.3")


def test_status_of_a_rejected_step(settings):
    finish(settings(), transform="rigid", TransformFallbackReason="the map folds")
    row = status_of(SCAN, settings(), ASKED)
    assert (row.status, row.reason) == ("rigid only", "the map folds")


def test_rigid_run_is_done(settings):
    finish(settings(), transform="rigid")
    asked = ASKED._replace(transform="rigid")
    assert status_of(SCAN, settings(transform="rigid"), asked).status == "done"


def test_what_labels_did_not_give_is_told(settings):
    finish(settings(), statistics={"StatisticsNotComputed": "aseg.mgz: torn"})
    row = status_of(SCAN, settings(), ASKED)
    assert (row.status, row.reason) == ("done", "no values of regions: aseg.mgz: torn")


@pytest.mark.parametrize(
    ("statistics", "note"),
    [
        ("", "no partial volume correction: no label is in the field of view"),
        # One reason for both is said once.
        (
            "no label is in the field of view",
            "no values of regions: no label is in the field of view",
        ),
    ],
)
def test_a_correction_that_could_not_be_is_told(settings, statistics, note):
    said = {"PartialVolumeCorrectionNotComputed": "no label is in the field of view"}
    if statistics:
        said["StatisticsNotComputed"] = statistics
    finish(settings(), statistics=said)
    row = status_of(SCAN, settings(), ASKED)
    assert (row.status, row.reason) == ("done", note)


def test_template_in_place_of_a_t1w_is_told(settings):
    """Also the spaces that it cannot be brought to, and that the deformable step was rejected."""
    scan = replace(SCAN, t1w=None, t1w_entities={}, template="MNI", t1w_choice="no T1w image")
    run = settings(output_spaces=("MNI:res-2", "T1w:res-2"))
    finish(run, scan, transform="rigid", Transform="affine", TransformFallbackReason="it folds")
    row = status_of(scan, run, ASKED)
    assert (row.status, row.t1w) == ("rigid only", "n/a")
    assert row.reason == (
        "it folds; no T1w image; registered to the template MNI instead, and not in T1w:res-2, "
        "which takes a T1w"
    )


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("a.nii: truncated", "a.nii: truncated"), ("", "sub-01_trc-FDG_space-T1w_desc-preproc_pet")],
)
def test_status_of_a_failed_scan(settings, failure, reason):
    row = status_of(SCAN, settings(), ASKED, failure=failure)
    assert row.status == "failed"
    assert reason in row.reason


def test_failure_wins_over_older_outputs(settings):
    """A scan whose outputs could not be replaced has failed, although there are files."""
    finish(settings())
    assert status_of(SCAN, settings(), ASKED, failure="it broke").status == "failed"


def test_outputs_of_other_weights_do_not_count(settings):
    finish(settings(), **{MADE_FROM_FIELD: {**MADE_WITH, "WeightsSHA256": "other"}})
    assert status_of(SCAN, settings(), ASKED).status == "failed"


def test_scan_that_is_left_out(settings):
    row = status_of(replace(SCAN, t1w=None, reason="no T1w image"), settings(), ASKED)
    assert (row.status, row.reason, row.t1w) == ("skipped", "no T1w image", "n/a")


def test_earlier_reason_and_time_are_kept(settings):
    failed = status_of(SCAN, settings(), ASKED, failure="it broke", seconds=3.0)
    now = status_of(SCAN, settings(), ASKED)
    assert as_before(now, [failed]) == failed
    # Not those of another scan, of another state, or of none.
    assert as_before(now, [replace(failed, scan="sub-01_trc-AV45_pet")]) == now
    assert as_before(now, [replace(failed, status="done")]) == now
    assert as_before(now, []) == now


def test_reports_and_table(settings, tmp_path):
    other = replace(SCAN, entities={"sub": "02"}, t1w=None, reason="no <T1w> image")
    run = settings()
    fields = {"LinearScore": 0.61, "DeformableQuality": QUALITY, "Device": "cpu"}
    finish(run, **fields)
    scans = [SCAN, other]
    rows = [status_of(scan, run, ASKED) for scan in scans]
    reports = write_reports(run, scans, rows)
    assert [file.name for file in reports] == ["sub-01.html", "sub-02.html"]
    assert [(row.scan, row.status) for row in read_status(run.output_dir)] == [
        ("sub-01_trc-FDG_pet", "done"),
        ("sub-02_pet", "skipped"),
    ]
    page = reports[0].read_text()
    for word in ("sub-01_trc-FDG_pet", "same session", "abc", "0.61", "0.71", "0.23", "cpu"):
        assert word in page
    assert "The deformable step passed the check" in page
    assert "simulated subjects" in page  # the card of the default weights
    assert "no &lt;T1w&gt; image" in reports[1].read_text()
    assert 'id="PET"' not in reports[1].read_text()


def test_failed_scan_has_a_section_without_figures(settings):
    run = settings(transform="rigid")
    scan = replace(SCAN, sidecar={"TracerName": "<script>alert(1)</script>"})
    row = status_of(scan, run, ASKED, failure="it <broke>")
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
