import json
from dataclasses import replace
from pathlib import Path

import pytest

from m2m_bids.bids.naming import expected_anat_outputs, expected_outputs, quantification_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.cli.outcome import read_sidecar, status_of

MADE_WITH = {"WeightsSHA256": "abc", "RefinementSteps": 60}
QUANTIFIED = {"Segmentation": "tissues"}
ASKED = Request("m2m", MADE_WITH, QUANTIFIED, {})
SCAN = Scan(
    "pet",
    Path("/data/sub-01/pet/sub-01_trc-FDG_pet.nii.gz"),
    {"sub": "01", "trc": "FDG"},
    Path("/data/sub-01/anat/sub-01_T1w.nii.gz"),
    {"sub": "01"},
    t1w_choice="same session",
)


@pytest.fixture
def finish(fill):
    """Write what a finished scan consists of."""

    def write(settings, scan=SCAN, transform="m2m", statistics=(), **fields):
        outputs = expected_outputs(scan, settings.output_dir, transform)
        anatomical = {}
        if scan.t1w:
            anatomical = expected_anat_outputs(scan.t1w_entities, settings.output_dir)
        fill(*outputs.values(), *anatomical.values())
        content = {"Transform": transform, MADE_FROM_FIELD: MADE_WITH, **MADE_WITH, **fields}
        outputs["preproc_json"].write_text(json.dumps(content))
        measured = quantification_outputs(scan, settings.output_dir, "tissues")
        fill(measured["stat"], measured["tacs"])
        content = {MADE_FROM_FIELD: QUANTIFIED, **dict(statistics)}
        measured["stat_json"].write_text(json.dumps(content))

    return write


def test_unfinished_scan_has_no_sidecar(settings):
    assert read_sidecar(SCAN, settings()) == {}


def test_status_of_a_finished_scan(settings, finish):
    finish(settings())
    row = status_of(SCAN, settings(), ASKED, seconds=12.34)
    assert (row.status, row.reason, row.seconds) == ("done", "n/a", "12.3")


def test_status_of_a_rejected_step(settings, finish):
    finish(settings(), transform="rigid", TransformFallbackReason="the map folds")
    row = status_of(SCAN, settings(), ASKED)
    assert (row.status, row.reason) == ("rigid only", "the map folds")


def test_rigid_run_is_done(settings, finish):
    finish(settings(), transform="rigid")
    asked = ASKED._replace(transform="rigid")
    assert status_of(SCAN, settings(transform="rigid"), asked).status == "done"


def test_what_labels_did_not_give_is_told(settings, finish):
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
def test_a_correction_that_could_not_be_is_told(settings, statistics, note, finish):
    said = {"PartialVolumeCorrectionNotComputed": "no label is in the field of view"}
    if statistics:
        said["StatisticsNotComputed"] = statistics
    finish(settings(), statistics=said)
    row = status_of(SCAN, settings(), ASKED)
    assert (row.status, row.reason) == ("done", note)


def test_template_in_place_of_a_t1w_is_told(settings, finish):
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


def test_failure_wins_over_older_outputs(settings, finish):
    """A scan whose outputs could not be replaced has failed, although there are files."""
    finish(settings())
    assert status_of(SCAN, settings(), ASKED, failure="it broke").status == "failed"


def test_outputs_of_other_weights_do_not_count(settings, finish):
    finish(settings(), **{MADE_FROM_FIELD: {**MADE_WITH, "WeightsSHA256": "other"}})
    assert status_of(SCAN, settings(), ASKED).status == "failed"


def test_scan_that_is_left_out(settings):
    row = status_of(replace(SCAN, t1w=None, reason="no T1w image"), settings(), ASKED)
    assert (row.status, row.reason, row.t1w) == ("skipped", "no T1w image", "n/a")


def test_earlier_reason_and_time_are_kept(settings):
    failed = status_of(SCAN, settings(), ASKED, failure="it broke", seconds=3.0)
    untimed = replace(failed, seconds="n/a")
    for earlier in (failed, untimed):
        assert status_of(SCAN, settings(), ASKED, earlier=earlier) == earlier
    # Not where something was run, nor of another state, nor without an earlier run.
    now = status_of(SCAN, settings(), ASKED)
    assert now.reason == "sub-01_trc-FDG_space-T1w_desc-preproc_pet.nii.gz was not written"
    assert status_of(SCAN, settings(), ASKED, earlier=failed, seconds=1.0).reason == now.reason
    assert status_of(SCAN, settings(), ASKED, earlier=replace(failed, status="done")) == now


def test_a_finished_scan_keeps_its_time_and_no_stale_reason(settings, finish):
    finish(settings())
    done = status_of(SCAN, settings(), ASKED, seconds=12.34)
    noted = replace(done, reason="made with other options: RefinementSteps")
    assert status_of(SCAN, settings(), ASKED, earlier=noted) == done


@pytest.mark.parametrize("reports_only", [True, False])
def test_other_options_are_no_failure_where_nothing_is_run(settings, reports_only, finish):
    run = settings(reports_only=reports_only)
    finish(run)
    other = ASKED._replace(registration={**MADE_WITH, "RefinementSteps": 10})
    row = status_of(SCAN, run, other)
    if reports_only:
        assert (row.status, row.reason) == ("done", "made with other options: RefinementSteps")
    else:
        assert row.status == "failed"
        assert row.reason.endswith(
            "_desc-preproc_pet.nii.gz was not made anew; other options now: RefinementSteps"
        )


def test_what_failed_with_these_options_has_not_succeeded_with_others(settings, finish):
    """There are whole outputs, of the options of a run before that."""
    run = settings(reports_only=True)
    finish(run)
    other = ASKED._replace(registration={**MADE_WITH, "RefinementSteps": 10})
    failed = status_of(SCAN, run, other, failure="it broke", seconds=3.0)
    assert status_of(SCAN, run, other, earlier=failed) == failed
    assert status_of(SCAN, run, ASKED, earlier=failed).status == "done"


def test_rejection_is_told_whatever_is_asked_for(settings, finish):
    run = settings(transform="rigid", reports_only=True)
    finish(run, transform="rigid", TransformFallbackReason="it folds")
    content = {"Transform": "m2m", **MADE_WITH}
    sidecar = expected_outputs(SCAN, run.output_dir, "m2m")["preproc_json"]
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), MADE_FROM_FIELD: content}))
    row = status_of(SCAN, run, ASKED._replace(transform="rigid", registration={}))
    assert row.status == "rigid only"
    assert row.reason.startswith("it folds; made with other options: ")
