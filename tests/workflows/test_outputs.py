"""Names and metadata of what the workflows write, compared with what `bids.naming` expects."""

import json
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.bids.labels import LabelFile
from m2m_bids.bids.naming import (
    TISSUES,
    expected_anat_outputs,
    expected_class_outputs,
    expected_outputs,
    parse_name,
)
from m2m_bids.bids.precomputed import Precomputed
from m2m_bids.bids.query import Scan
from m2m_bids.evaluation.labels import CLASSES
from m2m_bids.workflows.outputs import (
    FRAME_INPUTS,
    init_anatomical_outputs_wf,
    init_scan_outputs_wf,
)
from m2m_bids.workflows.registration import OUTPUTS, RegistrationOptions

RIGID = RegistrationOptions(
    transform="rigid",
    weights=None,
    weights_sha256="",
    n_refine=60,
    device="auto",
    use_gpu=False,
    random_seed=4,
    omp_nthreads=1,
)
T1W_NAMES = [
    "sub-01_T1w.nii.gz",
    "sub-01_T1w.nii",
    "sub-01_ses-M000_acq-MPRAGE_rec-norm_run-01_T1w.nii.gz",
    "sub-01_ses-M000_run-2_echo-1_part-mag_T1w.nii.gz",
    "sub-01_task-rest_ce-GD_T1w.nii.gz",
    "sub-01_space-orig_T1w.nii.gz",
]


def anatomical_wf(tmp_path, name):
    bids_dir, entities = tmp_path / "bids", parse_name(name).entities
    session = f"ses-{entities['ses']}" if "ses" in entities else "."
    t1w_file = bids_dir / "sub-01" / session / "anat" / name
    workflow = init_anatomical_outputs_wf(
        t1w_file=t1w_file,
        t1w_entities=entities,
        output_dir=tmp_path / "out",
        datasets={"raw": bids_dir},
    )
    return workflow, entities


@pytest.mark.parametrize("name", T1W_NAMES)
def test_anatomical_names_are_those_expected(tmp_path, monkeypatch, name):
    """The names by which a finished scan is told from one that is not."""
    monkeypatch.chdir(tmp_path)
    workflow, entities = anatomical_wf(tmp_path, name)
    image = tmp_path / "image.nii"
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(image)
    for sink in ("ds_t1w", "ds_mask", "ds_dseg"):
        node = workflow.get_node(sink)
        interface = type(node.interface)(**node.inputs.get())
        interface.inputs.in_file = str(image)
        if sink == "ds_t1w":
            interface.inputs.meta_dict = {"SkullStripped": False}
        if sink == "ds_mask":
            interface.inputs.meta_dict = {"Type": "Brain"}
        interface.run()
    save_probabilities(workflow, [image, image, image])
    found = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    expected = expected_anat_outputs(entities, tmp_path / "out")
    assert found == set(expected.values())
    # Another program's tissues come without: those of an earlier run are not of them.
    save_probabilities(workflow)
    assert {key for key, file in expected.items() if not file.exists()} == {
        f"{tissue}{end}" for tissue in TISSUES for end in ("", "_json")
    }


def save_probabilities(workflow, files=None):
    node = workflow.get_node("save_probabilities")
    interface = type(node.interface)(**node.inputs.get())
    if files:
        interface.inputs.in_files = [str(file) for file in files]
    interface.run()


def test_anatomical_sources(tmp_path):
    workflow, _ = anatomical_wf(tmp_path, T1W_NAMES[2])
    source = [f"bids:raw:sub-01/ses-M000/anat/{T1W_NAMES[2]}"]
    assert workflow.get_node("describe_t1w").inputs.sources == source
    assert workflow.get_node("describe_mask").inputs.sources == source
    assert workflow.get_node("ds_dseg").inputs.meta_dict["Sources"] == source


def test_classes_and_their_table_lie_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bids_dir, name = tmp_path / "bids", "sub-01_ses-M000_run-1_T1w.nii.gz"
    entities = parse_name(name).entities
    aseg = tmp_path / "freesurfer/sub-01/mri/aseg.mgz"
    aseg.parent.mkdir(parents=True)
    aseg.touch()
    workflow = init_anatomical_outputs_wf(
        t1w_file=bids_dir / "sub-01/ses-M000/anat" / name,
        t1w_entities=entities,
        output_dir=tmp_path / "out",
        datasets={"raw": bids_dir, "freesurfer": tmp_path / "freesurfer"},
        precomputed=Precomputed(labels=LabelFile(aseg, "freesurfer")),
    )
    node = workflow.get_node("save_classes")
    interface = type(node.interface)(**node.inputs.get())
    classes = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    nb.Nifti1Image(classes, np.eye(4)).to_filename(tmp_path / "labels.nii.gz")
    interface.inputs.image = str(tmp_path / "labels.nii.gz")
    interface.run()
    files = expected_class_outputs(entities, tmp_path / "out")
    folder = tmp_path / "out/sub-01/ses-M000/anat"
    assert set(files.values()) == set(folder.iterdir())
    assert files["image"].name == "sub-01_ses-M000_run-1_seg-m2m11_dseg.nii.gz"
    assert np.array_equal(nb.load(files["image"]).dataobj, classes)
    assert json.loads(files["image_json"].read_text())["Sources"] == [
        f"bids:raw:sub-01/ses-M000/anat/{name}",
        "bids:freesurfer:sub-01/mri/aseg.mgz",
    ]
    table = [line.split("\t") for line in files["table"].read_text().splitlines()]
    assert table[0] == ["index", "name"]
    assert {int(number): label for number, label in table[1:]} == CLASSES


@pytest.fixture(params=["pet", "fa"])
def scan(request, tmp_path):
    t1w = tmp_path / "bids/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
    if request.param == "pet":
        file = tmp_path / "bids/sub-01/ses-2/pet/sub-01_ses-2_trc-FDG_rec-a_run-02_pet.nii.gz"
    else:
        file = tmp_path / "dti/sub-01/ses-2/dwi/sub-01_ses-2_space-ACPC_param-fa_dwimap.nii.gz"
    return Scan(
        modality=request.param,
        file=file,
        entities=parse_name(file).entities,
        t1w=t1w,
        t1w_entities=parse_name(t1w).entities,
        sidecar={"TracerName": "FDG"} if request.param == "pet" else {},
    )


def scan_wf(scan, tmp_path, options=RIGID):
    return init_scan_outputs_wf(
        scan=scan,
        output_dir=tmp_path / "out",
        datasets={"raw": tmp_path / "bids", "dti": tmp_path / "dti"},
        options=options,
    )


def test_scan_names_are_those_expected(scan, tmp_path):
    """Those of the deformable step too, so that a rigid run can remove older ones."""
    inputs = scan_wf(scan, tmp_path).get_node("save_scan").inputs
    expected = expected_outputs(scan, tmp_path / "out", "m2m")
    assert inputs.outputs == {key: str(file) for key, file in expected.items()}


def test_scan_metadata(scan, tmp_path):
    inputs = scan_wf(scan, tmp_path).get_node("save_scan").inputs
    sources = inputs.sidecar["sources"]
    root = "dti" if scan.modality == "fa" else "raw"
    assert sources[0].startswith(f"bids:{root}:sub-01/ses-2/")
    assert sources[1] == "bids:raw:sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
    reference = "bids::sub-01/ses-1/anat/sub-01_ses-1_desc-preproc_T1w.nii.gz"
    assert inputs.sidecar["spatial_reference"] == reference
    assert inputs.sidecar["is_skull_stripped"] is (scan.modality == "fa")
    assert inputs.sidecar["source_metadata"] == scan.sidecar
    # Steps of refinement are no part of how a rigid result came about.
    assert inputs.provenance == {
        "transform_requested": "rigid",
        "refine_steps": None,
        "random_seed": 4,
    }


def test_figures_go_to_the_subject_with_the_names_of_the_scan(scan, tmp_path):
    inputs = scan_wf(scan, tmp_path).get_node("save_figures").inputs
    assert Path(inputs.figures_dir) == tmp_path / "out/sub-01/figures"
    stems = {"pet": "sub-01_ses-2_trc-FDG_rec-a_run-02", "fa": "sub-01_ses-2"}
    assert inputs.stem == stems[scan.modality]
    assert inputs.suffix == {"pet": "pet", "fa": "dwimap"}[scan.modality]


def test_all_that_registration_gives_is_saved(scan, tmp_path):
    workflow = scan_wf(scan, tmp_path)
    fields = set(workflow.get_node("inputnode").inputs.copyable_trait_names())
    assert fields == {"reference_method", *FRAME_INPUTS, *OUTPUTS}
    doc = " ".join(init_scan_outputs_wf.__doc__.replace("\\\n", " ").split())
    assert all(name in doc for name in fields)
    saved = {
        name
        for source, _, data in workflow._graph.edges(data=True)
        for _, name in data["connect"]
        if source.name == "inputnode"
    }
    assert saved == fields - {"figures"} | {"in_files"}
