"""What reports say of a scan, from files with names and values that try to be code."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from m2m_bids.bids.naming import (
    expected_anat_outputs,
    expected_outputs,
    expected_space_outputs,
    figures_of_scan,
    qc_file,
    quantification_outputs,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.spaces import parse_space
from m2m_bids.bids.status import status_row
from m2m_bids.cli.scan_facts import write_scan_fragments, write_t1w_fragment
from m2m_bids.settings import Settings

EVIL = "<script>alert('x')</script>\"'"
SCAN = Scan(
    "pet",
    Path(f"/data/{EVIL}/sub-01_trc-FDG_pet.nii.gz"),
    {"sub": "01", "trc": "FDG"},
    Path("/data/sub-01/anat/sub-01_T1w.nii.gz"),
    {"sub": "01"},
    sidecar={"TracerName": EVIL, "TracerRadionuclide": "F18"},
    t1w_choice="same session",
)
DONE = {
    **{"Transform": "m2m", "LinearScore": 0.6123, "LinearStart": "headers"},
    "StaticReference": EVIL,
}
HEAD = "region\tindex\tmean\tmedian\tsd\tvolume_mm3\tn_voxels\tcoverage\n"


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "bids").mkdir()
    return Settings(
        bids_dir=tmp_path / "bids",
        output_dir=tmp_path / "out",
        work_dir=tmp_path / "work",
        output_spaces=("T1w", "MNI152NLin2009aSym:res-2"),
    )


@pytest.fixture
def told(settings):
    """Write the pieces of a scan; return summary and regions, None where there is no file."""

    def run(status="done", reason="", sidecar=DONE, scan=SCAN):
        write_scan_fragments(scan, status_row(scan, status, reason), sidecar, settings)
        names = figures_of_scan(scan, settings.output_dir)
        folder = Path(names["figures_dir"])
        found = []
        for desc in ("summary", "regions"):
            file = folder / f"{names['stem']}_desc-{desc}_{names['suffix']}.html"
            found.append(file.read_text() if file.is_file() else None)
        return found

    return run


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def quantified(settings):
    """Tables with and without correction, SUVR and the reason for no SUV."""
    outputs = quantification_outputs(SCAN, settings.output_dir, "aparcaseg")
    write(outputs["stat"], f"{HEAD}{EVIL}\t8\t1234.5678\tn/a\t0\t20\t-3\t0.5\n")
    write(outputs["tacs"], "frame_start\tframe_end\n")
    said = {
        "Segmentation": "aparcaseg",
        "LabelFile": f"bids:freesurfer:{EVIL}",
        "SUVNotComputed": f"no weight in {EVIL}",
    }
    write(outputs["stat_json"], said)
    reference = {"ReferenceRegion": EVIL, "ReferenceRegionMean": [2000.0]}
    write(outputs["preprocSUVR_json"], reference)
    corrected = quantification_outputs(SCAN, settings.output_dir, "aparcaseg", pvc="rbv")
    write(corrected["stat"], f"{HEAD}pons\t16\t2\t2\t0\t20\t3\t1\n")
    write(corrected["stat_json"], said)


@pytest.mark.parametrize(
    ("status", "reason", "sidecar", "words"),
    [
        ("done", "", DONE, "alert-success\">The deformable step passed"),
        ("done", "", {**DONE, "Transform": "rigid"}, "alert-info\">Aligned rigidly"),
        ("rigid only", "it <folds>", {"Transform": "rigid"}, "result is rigid: it &lt;folds&gt;."),
        ("failed", EVIL, {}, "alert-danger\">Failed: &lt;script&gt;"),
    ],
)  # fmt: skip
def test_decision(told, status, reason, sidecar, words):
    summary, regions = told(status, reason, sidecar)
    assert words in summary
    assert regions is None


def test_nothing_is_code(told, quantified):
    summary, regions = told()
    for text in (summary, regions):
        assert "<script" not in text
        assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text
    assert "F18" in summary


def test_spaces_are_those_that_are_there(told, settings):
    assert "Output spaces" not in told()[0]
    on_t1w = expected_outputs(SCAN, settings.output_dir, "rigid")
    write(on_t1w["preproc"], "")
    write(on_t1w["rigid"], "")
    summary, _ = told()
    assert "T1w: sub-01/pet/sub-01_trc-FDG_space-T1w_desc-preproc_pet.nii.gz" in summary
    assert "T1w, rigid: sub-01/pet/sub-01_trc-FDG_space-T1w_desc-rigid_pet.nii.gz" in summary
    assert "MNI152NLin2009aSym" not in summary
    (space,) = settings.further_spaces
    write(expected_space_outputs(SCAN, settings.output_dir, space, "rigid")["image"], "")
    assert "MNI152NLin2009aSym:res-2: sub-01/pet/" in told()[0]
    # What another run wrote is there too; what belongs to another scan is not of this one.
    other = replace(SCAN, entities={**SCAN.entities, "run": "2"})
    for scan, name in ((SCAN, "T1w:res-native"), (other, "MNI152NLin2009cAsym:res-1")):
        space = parse_space(name)
        write(expected_space_outputs(scan, settings.output_dir, space, "rigid")["image"], "")
    summary = told()[0]
    assert "T1w:res-native: sub-01/pet/" in summary
    assert "2009cAsym" not in summary


def test_quantification_is_told(told, quantified):
    summary, regions = told()
    assert "no weight in" in summary
    assert "whose mean is 2000" in summary
    assert ">rbv<" in summary
    assert "mutual information 0.612 nats; best start: headers" in summary
    for name in ("_stat.tsv", "_tacs.tsv", "_pvc-rbv_desc-preproc_stat.tsv"):
        assert name in summary
    assert regions.count("<table") == 2
    corrected = regions.index("Corrected for partial volume effects (rbv)")
    assert regions.index("As measured") < regions.index("<table") < corrected
    assert corrected < regions.rindex("<table")
    assert regions.index("1235") < regions.index("pons")
    assert '<td class="m2m-value">-3</td>' in regions
    assert "&ndash;" in regions  # n/a
    assert 'aria-label="sub-01_trc-FDG_seg-aparcaseg_pvc-rbv_desc-preproc_stat"' in regions


def test_tables_of_regions_have_units_and_what_is_relative(told, quantified, settings):
    """SUV and SUVR are of static scans; the frames of dynamic ones have each their own."""
    outputs = quantification_outputs(SCAN, settings.output_dir, "aparcaseg")
    rows = "GM\t1\t8000\t8100\t1700\t1060695\t181875\t1\nWM\t2\tn/a\t1\t1\t747703.2\t9\t1\n"
    write(outputs["stat"], HEAD + rows)
    write(outputs["stat_json"], {"Units": "Bq/mL"})
    write(outputs["preprocSUV_json"], {"SUVScaleFactor": [0.0005]})
    first = told()[1].split("Corrected for")[0]
    heads = re.findall(r"<th [^>]*>([^<]+)</th>", first)
    assert heads == [
        *("region", "index", "mean (Bq/mL)", "median (Bq/mL)", "sd (Bq/mL)", "volume (mm³)"),
        *("voxels", "coverage", "mean SUV", "mean SUVR"),
    ]
    grey, white = (re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in first.split("<tr>")[2:])
    assert grey == ["GM", "1", "8000", "8100", "1700", "1060695", "181875", "1", "4", "4"]
    assert white[5] == "747703"
    assert white[-2:] == ["&ndash;"] * 2
    write(outputs["preprocSUVR_json"], {"ReferenceRegionMean": [2000.0, 1000.0]})
    assert "mean SUVR" not in told()[1].split("Corrected for")[0]
    # Those of another scan, and of corrected images, are no factors of these.
    assert "mean SUV" not in told()[1].split("Corrected for")[1]


def test_the_linear_step_is_named_for_what_it_is(told):
    assert ">Rigid alignment</th>" in told()[0]
    at_template = replace(SCAN, t1w=None, t1w_entities={}, template="MNI152NLin2009aSym")
    summary = told(scan=at_template)[0]
    assert ">Affine alignment</th>" in summary
    assert "igid" not in summary


def test_a_correction_that_could_not_be_is_told(told, quantified, settings):
    file = quantification_outputs(SCAN, settings.output_dir, "aparcaseg")["stat_json"]
    write(file, {"PartialVolumeCorrectionNotComputed": "no <label>"})
    assert "correction</th><td>not computed: no &lt;label&gt;<" in told()[0]


def test_numbers_for_quality_control_are_explained(told, settings):
    numbers = {"decision": "m2m", "brain_dice": 0.8, "brain_dice_initial": 0.25, "nmi": None}
    numbers |= {"side_gap": -0.06, "noise_percent": 7.0, "cycle_error_mm": 0.5}
    file = qc_file(SCAN.name, settings.output_dir)
    write(file, {**numbers, "warnings": ["brain overlap is 0.5 <b>"]})
    summary, _ = told()
    assert "alert-warning" in summary
    assert "was used. To be looked at: brain overlap is 0.5 &lt;b&gt;.</p>" in summary
    (table,) = (settings.output_dir / "sub-01/figures").glob("*_desc-quality_pet.html")
    text = table.read_text()
    dash = "<td>&ndash;</td>"
    cells = f"<td>brain overlap</td><td>0.25</td>{2 * dash}<td>0.8</td>"
    assert cells in text
    # In the column of what was measured; beyond its limit first.
    sides = f"<td>left-right evidence</td>{dash}<td>-0.06</td>{2 * dash}"
    assert text.index(sides) < text.index(cells)
    assert f"<td>noise</td><td>7 %</td>{3 * dash}" in text
    assert f"<td>cycle error</td>{2 * dash}<td>0.5 mm</td>{dash}" in text
    assert 'aria-label="Numbers for quality control, sub-01_trc-FDG_pet"' in text
    assert "the wrong organ" in text
    assert "mutual information" not in text
    file.unlink()
    told()
    assert not table.exists()


def test_t1w_tells_its_sources(settings):
    outputs = expected_anat_outputs(SCAN.t1w_entities, settings.output_dir)
    write(outputs["preproc_json"], "{damaged")
    write(outputs["mask_json"], {"Sources": [f"bids:fmriprep:{EVIL}"]})
    write(outputs["dseg_json"], {"Description": "1 grey matter", "Sources": ["bids:raw:a"]})
    write_t1w_fragment(SCAN, settings)
    file = settings.output_dir / "sub-01/figures/sub-01_desc-summary_T1w.html"
    text = file.read_text()
    assert "/data/sub-01/anat/sub-01_T1w.nii.gz" in text
    assert "1 grey matter<br />bids:raw:a" in text
    assert "bids:fmriprep:&lt;script&gt;" in text
    assert "<script" not in text


def test_tables_of_others_are_not_taken(told, quantified, settings):
    other = replace(SCAN, entities={"sub": "01", "trc": "FDG", "run": "1"})
    assert told(scan=other)[1] is None
    fa = replace(SCAN, modality="fa", entities={"sub": "01"}, sidecar={})
    assert told(scan=fa)[1] is None


def test_tables_that_are_gone_are_not_shown(told, quantified, settings):
    assert told()[1]
    for file in (settings.output_dir / "sub-01" / "pet").iterdir():
        file.unlink()
    summary, regions = told()
    assert regions is None
    assert "Tables of regions" not in summary


def test_units_are_told_and_an_affine_step_is_not_called_rigid(told):
    scan = replace(SCAN, template="MNI152NLin2009aSym", t1w=None, sidecar={"Units": "Bq/mL"})
    summary, _ = told(scan=scan, sidecar={**DONE, "Transform": "affine"})
    assert "<td>Bq/mL</td>" in summary
    assert "Affine alignment" in summary
    assert "rigid" not in summary.lower()
