import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.interfaces.bids import DerivativesDataSink

PET = "/data/sub-01/ses-M000/pet/sub-01_ses-M000_trc-18FFDG_rec-coregiso_run-02_pet.nii.gz"
PET_STEM = "sub-01_ses-M000_trc-18FFDG_rec-coregiso_run-02"
FA = "/deriv/sub-01/ses-M012/dwi/sub-01_ses-M012_dir-AP_model-tensor_param-fa_dwimap.nii.gz"
FA_STEM = "sub-01/ses-M012/dwi/sub-01_ses-M012_dir-AP_model-tensor_param-fa"
RAW_FA = "/data/sub-01/ses-M012/dwi/sub-01_ses-M012_run-1_FA.nii.gz"
T1W = "/data/sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz"
T1W_STEM = "sub-01/ses-M000/anat/sub-01_ses-M000"
XFM = {"from": "petref", "to": "T1w", "mode": "image", "suffix": "xfm"}
FIGURE = {"datatype": "figures"}


@pytest.fixture
def in_file(tmp_path):
    """Make a small file of the wanted kind."""

    def make(extension):
        file = tmp_path / f"input{extension}"
        if extension == ".nii.gz":
            nb.Nifti1Image(np.ones((3, 4, 5), np.float32), np.eye(4)).to_filename(file)
        else:
            file.write_text("content")
        return str(file)

    return make


def sink(tmp_path, file, source, **keywords):
    return DerivativesDataSink(
        base_directory=str(tmp_path / "out"), in_file=file, source_file=source, **keywords
    ).run()


@pytest.mark.parametrize(
    ("source", "extension", "keywords", "expected"),
    [
        (
            PET,
            ".nii.gz",
            {"space": "T1w", "desc": "preproc"},
            f"sub-01/ses-M000/pet/{PET_STEM}_space-T1w_desc-preproc_pet.nii.gz",
        ),
        *(
            (
                PET,
                extension,
                {**XFM, "desc": "m2m"},
                f"sub-01/ses-M000/pet/{PET_STEM}_from-petref_to-T1w_mode-image_desc-m2m_xfm{extension}",
            )
            for extension in (".txt", ".h5", ".nii.gz")
        ),
        (
            FA,
            ".nii.gz",
            {"space": "T1w", "desc": "preproc"},
            f"{FA_STEM.replace('_model', '_space-T1w_model')}_desc-preproc_dwimap.nii.gz",
        ),
        (
            FA,
            ".h5",
            {**XFM, "from": "FA", "desc": "m2m"},
            f"{FA_STEM}_from-FA_to-T1w_mode-image_desc-m2m_xfm.h5",
        ),
        (
            T1W.replace("_T1w", "_part-mag_chunk-2_T1w"),
            ".nii.gz",
            {"space": "T1w", "desc": "preproc"},
            f"{T1W_STEM}_part-mag_space-T1w_chunk-2_desc-preproc_T1w.nii.gz",
        ),
        (
            T1W.replace("_T1w", "_chunk-2_T1w"),
            ".txt",
            {**XFM, "desc": "affine"},
            f"{T1W_STEM}_chunk-2_from-petref_to-T1w_mode-image_desc-affine_xfm.txt",
        ),
        (
            RAW_FA,
            ".nii.gz",
            {"space": "T1w", "param": "FA", "desc": "rigid", "suffix": "dwimap"},
            "sub-01/ses-M012/dwi/sub-01_ses-M012_run-1_space-T1w_param-FA_desc-rigid_dwimap.nii.gz",
        ),
        (
            T1W,
            ".nii.gz",
            {"desc": "brain", "suffix": "mask"},
            "sub-01/ses-M000/anat/sub-01_ses-M000_desc-brain_mask.nii.gz",
        ),
        (
            T1W,
            ".nii.gz",
            {"segmentation": "AAL", "suffix": "dseg"},
            "sub-01/ses-M000/anat/sub-01_ses-M000_seg-AAL_dseg.nii.gz",
        ),
        (PET, ".svg", {**FIGURE, "desc": "m2m"}, f"sub-01/figures/{PET_STEM}_desc-m2m_pet.svg"),
        (
            PET,
            ".html",
            {**FIGURE, "desc": "summary"},
            f"sub-01/figures/{PET_STEM}_desc-summary_pet.html",
        ),
        (
            FA,
            ".svg",
            {**FIGURE, "desc": "initial"},
            "sub-01/figures/sub-01_ses-M012_dir-AP_model-tensor_param-fa_desc-initial_dwimap.svg",
        ),
        (
            T1W,
            ".svg",
            {**FIGURE, "desc": "anatomical"},
            "sub-01/figures/sub-01_ses-M000_desc-anatomical_T1w.svg",
        ),
    ],
)
def test_name_is_what_was_asked_for(tmp_path, in_file, source, extension, keywords, expected):
    result = sink(tmp_path, in_file(extension), source, **keywords)
    out = tmp_path / "out"
    assert result.outputs.out_file == str(out / expected)
    assert [str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()] == [expected]


@pytest.mark.parametrize("keywords", [{"foo": 1}, {"SkullStripped": True}, {"seg": "AAL"}])
def test_unknown_keyword_raises(tmp_path, in_file, keywords):
    with pytest.raises(TypeError, match=f"{next(iter(keywords))}.*meta_dict"):
        sink(tmp_path, in_file(".nii.gz"), PET, **keywords)


def test_unknown_input_set_later_raises(tmp_path, in_file):
    node = DerivativesDataSink(
        base_directory=str(tmp_path / "out"), in_file=in_file(".nii.gz"), source_file=PET
    )
    node.inputs.foo = "bar"
    with pytest.raises(TypeError, match="foo"):
        node.run()


@pytest.mark.parametrize(
    ("source", "keywords", "lost"),
    [
        (PET, {"segmentation": "AAL"}, "segmentation=AAL"),  # a PET image has no seg-
        (PET.replace("_run", "_echo-1_run"), {"desc": "preproc"}, "echo=1"),  # of the source
    ],
)
def test_entity_without_place_raises_and_writes_nothing(tmp_path, in_file, source, keywords, lost):
    with pytest.raises(ValueError, match=lost):
        sink(tmp_path, in_file(".nii.gz"), source, **keywords)
    assert not [f for f in (tmp_path / "out").rglob("*") if f.is_file()]


def test_dismissed_entity_is_left_out(tmp_path, in_file):
    result = sink(
        tmp_path,
        in_file(".svg"),
        FA.replace("_model", "_space-ACPC_model"),
        desc="m2m",
        dismiss_entities=["space"],
        **FIGURE,
    )
    assert "space-" not in result.outputs.out_file


def test_metadata_go_to_the_sidecar(tmp_path, in_file):
    meta = {"SkullStripped": False, "Sources": ["bids:raw:x.nii.gz"]}
    result = sink(tmp_path, in_file(".nii.gz"), PET, space="T1w", desc="preproc", meta_dict=meta)
    sidecar = Path(result.outputs.out_meta)
    assert sidecar.name == f"{PET_STEM}_space-T1w_desc-preproc_pet.json"
    assert json.loads(sidecar.read_text()) == meta


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, in_file, renamed):
    sink(tmp_path, in_file(".nii.gz"), PET, space="T1w", desc="preproc", meta_dict={"A": 1})
    written = {file: file.stat().st_size for file in (tmp_path / "out").rglob("*.*")}
    assert {file: renamed[file] for file in written} == written
    assert {file.suffix for file in written} == {".gz", ".json"}


def test_existing_file_is_replaced(tmp_path, in_file):
    for value in (1, 2):
        file = in_file(".nii.gz")
        nb.Nifti1Image(np.full((3, 4, 5), value, np.float32), np.eye(4)).to_filename(file)
        result = sink(tmp_path, file, PET, desc="preproc", space="T1w")
    assert nb.load(result.outputs.out_file).get_fdata().max() == 2


def test_import_leaves_the_home_directory_alone(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TEMPLATEFLOW")}
    code = (
        "import m2m_bids.interfaces.bids, os, pathlib; home = os.environ['TEMPLATEFLOW_HOME'];"
        "assert pathlib.Path(home).is_dir(); print(home)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(home), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (home / ".cache" / "templateflow").exists()
    assert not Path(done.stdout.strip()).exists()  # removed at exit


def test_chosen_templateflow_home_is_kept(tmp_path):
    (tmp_path / "tpl-none").mkdir()
    code = "import m2m_bids.interfaces.bids, os; print(os.environ['TEMPLATEFLOW_HOME'])"
    environment = {**os.environ, "TEMPLATEFLOW_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path)
