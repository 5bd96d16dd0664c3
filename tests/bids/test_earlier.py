import json
from pathlib import Path

import pytest

from m2m_bids.bids.earlier import as_made, registered_sidecar
from m2m_bids.bids.naming import expected_outputs, expected_space_outputs, quantification_outputs
from m2m_bids.bids.query import Scan
from m2m_bids.bids.request import MADE_FROM_FIELD, Request
from m2m_bids.bids.spaces import parse_space

SCAN = Scan(
    "fa",
    Path("/data/sub-01/dwi/sub-01_FA.nii.gz"),
    {"sub": "01"},
    Path("/data/sub-01/anat/sub-01_T1w.nii.gz"),
    {"sub": "01"},
)
MADE = {"Target": "T1w", "Transform": "rigid", "RandomSeed": 0}
TISSUES, LABELS = ({"Segmentation": name} for name in ("tissues", "aparcaseg"))
SPACE = parse_space("MNI152NLin2009aSym:res-2")


def write(file, made_from, **fields):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({MADE_FROM_FIELD: made_from, **fields}))


@pytest.fixture
def out_dir(tmp_path):
    write(expected_outputs(SCAN, tmp_path, "rigid")["preproc_json"], MADE, Device="cpu")
    write(quantification_outputs(SCAN, tmp_path, "aparcaseg")["stat_json"], LABELS)
    (tmp_path / "sub-01/dwi/my-notes_on_this_stat.json").touch()
    (tmp_path / "sub-01/dwi/my_space-notes_desc-preproc_dwimap.json").touch()
    return tmp_path


def test_what_is_asked_for_does_not_change_what_was_made(out_dir):
    wanted = {**MADE, "Transform": "m2m"}
    asked = Request("m2m", wanted, TISSUES, {SPACE: wanted})
    made, changed = as_made(SCAN, out_dir, asked)
    assert made == Request("rigid", MADE, LABELS, {})
    assert changed == ["Transform", f"output space {SPACE}", "Segmentation"]
    assert as_made(SCAN, out_dir, made) == (made, [])


def test_spaces_count_where_they_are(out_dir):
    file = expected_space_outputs(SCAN, out_dir, SPACE, "rigid")["image_json"]
    given = {**MADE, "TemplateTransforms": {"a": "1"}}
    write(file, given)
    for wanted, told in ((MADE, [f"output space {SPACE}"]), (given, [])):
        made, changed = as_made(SCAN, out_dir, Request("rigid", MADE, LABELS, {SPACE: wanted}))
        assert made.spaces == {SPACE: given}
        assert changed == told


def test_another_registration_is_told_once_and_not_for_each_space(out_dir):
    file = expected_space_outputs(SCAN, out_dir, SPACE, "rigid")["image_json"]
    write(file, MADE)
    wanted = {**MADE, "RandomSeed": 1}
    asked = Request("rigid", wanted, LABELS, {SPACE: wanted})
    assert as_made(SCAN, out_dir, asked).changed == ["RandomSeed"]
    # But an image there that is of another registration than that in the T1w's space.
    write(file, {**MADE, "RandomSeed": 2})
    assert as_made(SCAN, out_dir, asked).changed == ["RandomSeed", f"output space {SPACE}"]


def test_nothing_made_is_what_is_asked_for(tmp_path):
    asked = Request("m2m", MADE, TISSUES, {SPACE: {}})
    assert as_made(SCAN, tmp_path, asked) == (asked, [])


def test_the_sidecar_is_that_on_the_grid_of_the_target(out_dir):
    """Not those of other spaces, of diffusivities, of other scans."""
    folder = out_dir / "sub-01/dwi"
    for stem in ("space-T1w_param-MD", "space-MNI152_param-FA", "run-2_space-T1w_param-FA"):
        write(folder / f"sub-01_{stem}_desc-preproc_dwimap.json", {"Target": "T1w"}, Device="no")
    assert registered_sidecar(SCAN.name, out_dir)["Device"] == "cpu"


@pytest.mark.parametrize("name", ["sub-O'Neil<b>_pet", "sub-01_ses-B", "sub-02_pet", "", "x"])
def test_there_may_be_no_sidecar(out_dir, name):
    assert registered_sidecar(name, out_dir) == {}
