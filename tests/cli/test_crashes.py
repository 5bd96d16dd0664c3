import pytest

from m2m_bids.bids.status import StatusRow
from m2m_bids.cli.crashes import crash_files

RUN = "20260103-000000_c"


@pytest.fixture
def crash(tmp_path):
    def make(run, node, name="crash-1.txt"):
        file = tmp_path / "sub-1/log" / run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Node: m2m_bids_wf.sub_1_wf.{node}\n\nValueError: torn\n")
        return file

    return make


def row(scan, status="failed", t1w="sub-1_T1w.nii.gz"):
    return StatusRow("sub-1", "n/a", "pet", scan, t1w, status, "torn")


def test_those_of_this_run_and_the_newest_of_what_has_failed(crash, tmp_path):
    now = crash(RUN, "sub_1_trc_B_pet_wf.reference_wf.average")
    crash("20260101-000000_a", "sub_1_trc_A_pet_wf.reference_wf.average")
    newest = crash("20260102-000000_b", "sub_1_trc_A_pet_wf.reference_wf.average")
    crash("20260102-000000_b", "sub_1_trc_C_pet_wf.reference_wf.average", "crash-2.txt")
    rows = [row("sub-1_trc-A_pet"), row("sub-1_trc-B_pet", "done"), row("sub-1_trc-C_pet", "done")]
    assert crash_files(rows, tmp_path, RUN) == [now, newest]
    assert crash_files(rows[1:], tmp_path, RUN) == [now]


@pytest.mark.parametrize(
    ("t1w", "node"),
    [
        ("sub-1_T1w.nii.gz", "sub_1_T1w_wf.conform_t1w"),
        ("sub-1_T1w.nii.gz", "sub_1_T1w_MNI152NLin2009aSym_wf.normalize_t1w"),
        ("n/a", "target_MNI152NLin2009aSym_wf.take_template"),
    ],
)
def test_a_failed_target_fails_its_scans(crash, tmp_path, t1w, node):
    file = crash("20260101-000000_a", node)
    assert crash_files([row("sub-1_pet", t1w=t1w)], tmp_path, RUN) == [file]
    other = {"n/a": "sub-1_T1w.nii.gz"}.get(t1w, "sub-1_ses-2_T1w.nii.gz")
    assert crash_files([row("sub-1_pet", t1w=other)], tmp_path, RUN) == []


def test_there_may_be_none(tmp_path):
    assert crash_files([row("sub-1_pet")], tmp_path, RUN) == []
