from pathlib import Path

import pytest

from m2m_bids.bids import naming
from m2m_bids.bids.query import Scan

OUT = Path("out")
PET = {"sub": "X", "ses": "Y", "trc": "18FFDG", "rec": "coregavg"}


def relative(outputs):
    return {key: path.relative_to(OUT).as_posix() for key, path in outputs.items()}


def test_outputs_of_a_pet_scan():
    scan = Scan("pet", Path("x_pet.nii.gz"), PET, t1w_entities={"sub": "X", "ses": "Z"})
    stem = "sub-X/ses-Y/pet/sub-X_ses-Y_trc-18FFDG_rec-coregavg"
    there, back = "from-petref_to-T1w_mode-image", "from-T1w_to-petref_mode-image"
    rigid = {
        "preproc": f"{stem}_space-T1w_desc-preproc_pet.nii.gz",
        "preproc_json": f"{stem}_space-T1w_desc-preproc_pet.json",
        "rigid": f"{stem}_space-T1w_desc-rigid_pet.nii.gz",
        "rigid_json": f"{stem}_space-T1w_desc-rigid_pet.json",
        "rigid_xfm": f"{stem}_{there}_desc-rigid_xfm.txt",
        "rigid_inverse_xfm": f"{stem}_{back}_desc-rigid_xfm.txt",
        "qc_json": f"{stem}_desc-preproc_qc.json",
    }
    m2m = {
        "m2m_xfm": f"{stem}_{there}_desc-m2m_xfm.h5",
        "m2m_inverse_xfm": f"{stem}_{back}_desc-m2m_xfm.h5",
    }
    assert relative(naming.expected_outputs(scan, OUT, "rigid")) == rigid
    assert relative(naming.expected_outputs(scan, OUT, "m2m")) == rigid | m2m


@pytest.mark.parametrize(
    "entities",
    [
        {"sub": "X", "ses": "M012", "param": "FA"},
        {"sub": "X", "ses": "M012", "space": "ACPC", "param": "fa", "desc": "preproc"},
        {"sub": "X", "ses": "M012"},
    ],
)
def test_outputs_of_an_fa_map_stay_in_its_session(entities):
    scan = Scan("fa", Path("x.nii.gz"), entities, t1w_entities={"sub": "X", "ses": "M000"})
    outputs = relative(naming.expected_outputs(scan, OUT, "m2m"))
    stem = "sub-X/ses-M012/dwi/sub-X_ses-M012"
    assert outputs["preproc"] == f"{stem}_space-T1w_param-FA_desc-preproc_dwimap.nii.gz"
    assert outputs["rigid"] == f"{stem}_space-T1w_param-FA_desc-rigid_dwimap.nii.gz"
    assert outputs["rigid_xfm"] == f"{stem}_from-FA_to-T1w_mode-image_desc-rigid_xfm.txt"
    assert outputs["m2m_inverse_xfm"] == f"{stem}_from-T1w_to-FA_mode-image_desc-m2m_xfm.h5"


def test_models_are_told_apart():
    names = [
        naming.scan_name("fa", {"sub": "1", "model": model, "param": "fa"})
        for model in ("tensor", "dki")
    ]
    assert names == ["sub-1_model-tensor_param-FA_dwimap", "sub-1_model-dki_param-FA_dwimap"]


def test_anatomical_outputs():
    outputs = relative(naming.expected_anat_outputs({"sub": "X", "run": "01", "acq": "a"}, OUT))
    stem = "sub-X/anat/sub-X_acq-a_run-01"
    assert outputs["preproc"] == f"{stem}_desc-preproc_T1w.nii.gz"
    assert outputs["mask_json"] == f"{stem}_desc-brain_mask.json"
    assert outputs["dseg"] == f"{stem}_dseg.nii.gz"
    assert outputs["CSF"] == f"{stem}_label-CSF_probseg.nii.gz"
    assert outputs["GM_json"] == f"{stem}_label-GM_probseg.json"


def test_entities_come_in_bids_order():
    expected = (
        "sub-1_ses-1_task-1_acq-1_ce-1_trc-1_rec-1_run-1_space-1_seg-1_from-1_to-1_mode-1_"
        "param-1_desc-1_pet"
    )
    entities = dict(reversed(naming.parse_name(expected).entities.items()))
    assert naming.build_stem(entities, "pet") == expected


def test_order_agrees_with_the_bids_schema():
    schema = pytest.importorskip("bidsschematools.schema").load_schema()
    official = [schema.objects.entities[name]["name"] for name in schema.rules.entities]
    ours = [key for key in naming.ENTITIES if key in official]
    assert ours == [key for key in official if key in ours]


def test_figures_are_at_the_level_of_the_subject():
    path = naming.output_path(OUT, PET, datatype="figures", suffix="pet", extension=".svg")
    assert path.parent == OUT / "sub-X/figures"
    assert path.name == "sub-X_ses-Y_trc-18FFDG_rec-coregavg_pet.svg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entities": {"sub": "../../etc"}}, "is not a BIDS label"),
        ({"entities": {"sub": "01", "ses": ".."}}, "is not a BIDS label"),
        ({"entities": {"sub": "01", "trc": "a/b"}}, "is not a BIDS label"),
        ({"entities": {"sub": ""}}, "is not a BIDS label"),
        ({"entities": {"ses": "01"}}, "needs the entity 'sub'"),
        ({"entities": {"sub": "01", "foo": "1"}}, "unknown entities"),
        ({"datatype": ".."}, "datatype"),
        ({"suffix": "../pet"}, "is not a BIDS label"),
        ({"extension": "/../x"}, "extension"),
    ],
)
def test_no_path_leaves_the_output_folder(change, message):
    arguments = {
        "entities": {"sub": "01"}, "datatype": "pet", "suffix": "pet", "extension": ".nii",
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        naming.output_path(OUT, **arguments)


def test_more_entities_replace_and_remove():
    path = naming.output_path(
        OUT,
        PET,
        datatype="pet",
        suffix="xfm",
        extension=".txt",
        rec=None,
        from_="T1w",
        to="petref",
    )
    assert path.name == "sub-X_ses-Y_trc-18FFDG_from-T1w_to-petref_xfm.txt"


@pytest.mark.parametrize("name", ["sub-01.nii", "sub-01_foo_pet.nii", "sub-1_sub-2_pet.nii"])
def test_names_that_are_not_bids(name):
    with pytest.raises(ValueError, match="is not a BIDS"):
        naming.parse_name(name)
