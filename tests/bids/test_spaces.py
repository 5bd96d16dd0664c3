"""Names of output spaces."""

from pathlib import Path

import pytest

from m2m_bids.bids.naming import (
    expected_space_outputs,
    expected_template_outputs,
    static_outputs,
)
from m2m_bids.bids.query import Scan
from m2m_bids.bids.spaces import OutputSpace, parse_space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("T1w", ("T1w", None, None)),
        ("T1w:res-native", ("T1w", None, "native")),
        ("T1w:res-2", ("T1w", None, "2")),
        ("MNI152NLin2009cAsym", ("MNI152NLin2009cAsym", None, None)),
        ("MNI152NLin2009cAsym:res-02", ("MNI152NLin2009cAsym", None, "2")),
        ("MNIPediatricAsym:cohort-1:res-native", ("MNIPediatricAsym", "1", "native")),
        ("MNIPediatricAsym:res-1:cohort-2", ("MNIPediatricAsym", "2", "1")),
    ],
)
def test_spaces_are_read(text, expected):
    assert parse_space(text) == OutputSpace(*expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no space"),
        ("../evil", "is no space"),
        ("T1w:res-", "res-LABEL"),
        ("T1w:res-1:res-2", "once each"),
        ("T1w:2mm", "res-LABEL"),
        ("T1w:res-0", "'native' or 1 to 9"),
        ("T1w:res-1x", "'native' or 1 to 9"),
        ("T1w:cohort-1", "only templates"),
    ],
)
def test_what_is_no_space(text, message):
    with pytest.raises(ValueError, match=message):
        parse_space(text)


def test_a_space_is_spelt_as_given():
    assert str(parse_space("MNIPediatricAsym:cohort-1:res-2")) == "MNIPediatricAsym:cohort-1:res-2"


def test_names_of_outputs():
    scan = Scan("pet", Path("a_pet.nii.gz"), {"sub": "01", "ses": "1", "trc": "FDG"})
    space = parse_space("MNIPediatricAsym:cohort-1:res-2")
    outputs = expected_space_outputs(scan, Path("out"), space, "rigid")
    names = {key: file.name for key, file in outputs.items()}
    start = "sub-01_ses-1_trc-FDG"
    image = "sub-01_ses-1_cohort-1_trc-FDG_space-MNIPediatricAsym_res-2_desc-preproc_pet"
    assert names == {
        "image": f"{image}.nii.gz",
        "image_json": f"{image}.json",
        "xfm": f"{start}_from-petref_to-MNIPediatricAsym+1_mode-image_desc-rigid_xfm.h5",
        "inverse_xfm": f"{start}_from-MNIPediatricAsym+1_to-petref_mode-image_desc-rigid_xfm.h5",
    }
    assert {file.parent for file in outputs.values()} == {Path("out/sub-01/ses-1/pet")}
    outputs = expected_space_outputs(scan, Path("out"), parse_space("T1w:res-native"), "m2m")
    assert [file.name for file in outputs.values()] == [
        f"{start}_space-T1w_res-native_desc-preproc_pet{end}" for end in (".nii.gz", ".json")
    ]
    # Beside the frames, as in the T1w's space: `cli.cohort_images` finds it by that.
    static = static_outputs(scan, Path("out"), space)
    assert [file.name for file in static.values()] == [
        f"{image.removesuffix('_desc-preproc_pet')}_petref{end}" for end in (".nii.gz", ".json")
    ]
    assert {file.parent for file in static.values()} == {Path("out/sub-01/ses-1/pet")}
    outputs = expected_template_outputs({"sub": "01"}, Path("out"), space)
    assert [file.name for file in outputs.values()] == [
        "sub-01_cohort-1_space-MNIPediatricAsym_desc-preproc_T1w.nii.gz",
        "sub-01_cohort-1_space-MNIPediatricAsym_desc-preproc_T1w.json",
        "sub-01_from-T1w_to-MNIPediatricAsym+1_mode-image_xfm.h5",
        "sub-01_from-MNIPediatricAsym+1_to-T1w_mode-image_xfm.h5",
    ]
