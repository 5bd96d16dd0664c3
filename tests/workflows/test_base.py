"""The workflow of a run, built for cohorts of every kind, without running it."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import networkx as nx
import nibabel as nb
import numpy as np
import pytest
from nipype.interfaces.base import isdefined

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.bids.diffusion import GradientFiles
from m2m_bids.bids.query import Scan
from m2m_bids.cohort import write_training_arrays
from m2m_bids.settings import Settings
from m2m_bids.workflows.base import (
    anatomical_wf_name,
    identifier,
    init_m2m_bids_wf,
    init_single_subject_wf,
    methods_text,
    scan_request,
    scan_wf_name,
)
from m2m_bids.workflows.cohort import EvaluationImages, TrainingImages
from m2m_bids.workflows.registration import RegistrationOptions


def options(**changes):
    given = {
        "transform": "m2m",
        "weights": DEFAULT_WEIGHTS,
        "weights_sha256": "abc",
        "n_refine": 7,
        "device": "cpu",
        "use_gpu": False,
        "random_seed": 5,
        "omp_nthreads": 2,
    }
    return RegistrationOptions(**{**given, **changes})


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "bids/derivatives/dti").mkdir(parents=True)
    return Settings(
        bids_dir=tmp_path / "bids",
        output_dir=tmp_path / "out",
        work_dir=tmp_path / "work",
        derivatives=(("dti", tmp_path / "bids/derivatives/dti"),),
        random_seed=5,
    )


@pytest.fixture
def scan(settings):
    """Make a scan, with its T1w of a session of choice."""

    def make(modality, subject="01", session="M000", t1w_session="M000", **more):
        root = settings.bids_dir if modality == "pet" else settings.derivative_dirs["dti"]
        entities = {"sub": subject, "ses": session, **more.pop("entities", {})}
        end = "pet" if modality == "pet" else "param-FA_dwimap"
        if modality == "fa":
            entities["param"] = "FA"
        stem = "_".join(f"{k}-{v}" for k, v in entities.items() if k != "param")
        t1w = f"sub-{subject}/ses-{t1w_session}/anat/sub-{subject}_ses-{t1w_session}_T1w.nii.gz"
        files = {
            "file": root / f"sub-{subject}/ses-{session}/dwi/{stem}_{end}.nii.gz",
            "t1w": settings.bids_dir / t1w,
        }
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("image")
        return Scan(
            modality=modality,
            entities=entities,
            t1w_entities={"sub": subject, "ses": t1w_session},
            source="raw" if modality == "pet" else "dti",
            **files,
            **more,
        )

    return make


def parts(workflow):
    return {name.rpartition(".")[0] for name in workflow.list_node_names()}


def unset_inputs(workflow):
    """Mandatory inputs of nodes that are neither set nor connected."""
    graph = workflow._create_flat_graph()
    found = []
    for node in graph.nodes:
        connected = {
            name for *_, data in graph.in_edges(node, data=True) for _, name in data["connect"]
        }
        for name in node.inputs.traits(mandatory=True):
            if name not in connected and not isdefined(getattr(node.inputs, name)):
                found.append(f"{node.fullname}.{name}")
    return found


@pytest.mark.parametrize("transform", ["m2m", "rigid"])
@pytest.mark.parametrize("modality", ["pet", "fa"])
def test_every_input_is_given(settings, scan, transform, modality):
    weights = DEFAULT_WEIGHTS if transform == "m2m" else None
    workflow = init_m2m_bids_wf(
        settings, [scan(modality)], options(transform=transform, weights=weights)
    )
    assert not unset_inputs(workflow)
    assert workflow.base_dir == str(settings.work_dir)
    has_m2m = any(name.endswith(".register_m2m") for name in workflow.list_node_names())
    assert has_m2m is (transform == "m2m")


@pytest.mark.parametrize("transform", ["m2m", "rigid"])
def test_scans_without_a_t1w_go_to_the_template(settings, scan, transform):
    """It is loaded once, aligned affinely, and nothing is written as if there were a T1w."""
    spaces = ("MNI152NLin2009aSym:res-2", "T1w:res-native", "MNI152NLin2009cAsym")
    settings = dataclasses.replace(settings, output_spaces=spaces)
    missing = {"t1w": None, "t1w_entities": {}, "template": "MNI152NLin2009aSym"}
    scans = [replace(scan(kind), t1w_choice="no T1w image", **missing) for kind in ("pet", "fa")]
    weights = DEFAULT_WEIGHTS if transform == "m2m" else None
    registration = options(transform=transform, weights=weights)
    workflow = init_m2m_bids_wf(settings, scans, registration)
    assert not unset_inputs(workflow)
    nodes = {}
    for node in workflow._get_all_nodes():
        nodes.setdefault(node.name, []).append(node)
    assert len(nodes["take_template"]) == 1
    assert all(node.inputs.is_affine for node in nodes["register_rigid"])
    assert {node.inputs.template for node in nodes["measure_scan"]} == {"MNI152NLin2009aSym"}
    assert not {"extract_brain", "ds_t1w", "normalize_t1w"} & nodes.keys()
    assert len(nodes["save_in_space"]) == 2
    for node in nodes["save_scan"]:
        # The numbers for quality control say in themselves what the target was.
        named = {key: file for key, file in node.inputs.outputs.items() if key != "qc_json"}
        names = [Path(file).name for file in named.values()]
        assert all("MNI152NLin2009aSym" in name for name in names)
        assert not any("T1w" in name or "rigid" in name for name in names)
        assert node.inputs.made_from["Target"] == "MNI152NLin2009aSym"
        assert "no T1w image" in node.inputs.sidecar["description"]
    text = methods_text(workflow)
    assert "Registration to a template" in text
    assert "Anatomical reference" not in text
    assert "rigid transform" not in text


def test_scans_of_one_t1w_share_its_preparation(settings, scan):
    scans = [
        scan("pet", entities={"trc": "FDG"}),
        scan("pet", session="M012", entities={"trc": "FDG"}),
        scan("fa", session="M024"),
    ]
    workflow = init_single_subject_wf(settings, scans, options(), name="sub_01_wf")
    anatomical = anatomical_wf_name(scans[0])
    assert {anatomical_wf_name(other) for other in scans} == {anatomical}
    brains = [name for name in workflow.list_node_names() if name.endswith("extract_brain")]
    assert brains == [f"{anatomical}.extract_brain"]
    ds_t1w = [name for name in workflow.list_node_names() if name.endswith("ds_t1w")]
    assert ds_t1w == [f"outputs_{anatomical}.ds_t1w"]
    for other in scans:
        name = scan_wf_name(other)
        source = workflow.get_node(f"{name}.reference_wf.inputnode")
        assert source.inputs.in_file == str(other.file)
        assert {f"{name}.registration_wf", f"{name}.outputs_wf"} <= parts(workflow)
    assert workflow.get_node(f"{anatomical}.inputnode").inputs.t1w_file == str(scans[0].t1w)
    assert not unset_inputs(workflow)


def test_two_t1w_images_are_prepared_apart(settings, scan):
    scans = [scan("pet"), scan("fa", session="M012", t1w_session="M012")]
    workflow = init_single_subject_wf(settings, scans, options(), name="sub_01_wf")
    brains = [name for name in workflow.list_node_names() if name.endswith("extract_brain")]
    assert len(brains) == 2
    graph = workflow._create_flat_graph()
    for other in scans:
        # What comes before a scan's registration is of its own T1w alone.
        (node,) = [
            node
            for node in graph.nodes
            if node.fullname.endswith(f"{scan_wf_name(other)}.registration_wf.register_rigid")
        ]
        before = {source.fullname.split(".")[1] for source in nx.ancestors(graph, node)}
        assert before == {anatomical_wf_name(other), scan_wf_name(other)}


def test_subjects_are_apart(settings, scan):
    scans = [scan("pet"), scan("fa"), scan("pet", subject="02")]
    workflow = init_m2m_bids_wf(settings, scans, options())
    tops = {name.split(".")[0] for name in workflow.list_node_names()}
    assert tops == {"sub_01_wf", "sub_02_wf"}
    assert len({id(node) for node in workflow._get_all_nodes()}) == len(workflow.list_node_names())
    for node in workflow._create_flat_graph().nodes:
        subject = node.fullname.split(".")[1].split("_")[1]
        crash_dir = settings.output_dir / f"sub-{subject}" / "log" / settings.run_uuid
        assert node.config["execution"]["crashdump_dir"] == str(crash_dir)


@pytest.mark.parametrize("durations", [[60, 120.5], [60, "n/a", None], "n/a", -3, {"a": []}])
def test_timing_reaches_the_pet_reference_whatever_it_is(settings, scan, durations):
    settings = dataclasses.replace(settings, pet_reference="sum")
    pet = scan("pet", sidecar={"FrameDuration": durations, "TracerName": "FDG"})
    workflow = init_single_subject_wf(settings, [pet], options(), name="sub_01_wf")
    for name in ("static_reference", "estimate_motion"):
        node = workflow.get_node(f"{scan_wf_name(pet)}.reference_wf.{name}")
        assert node.inputs.sidecar == {"FrameDuration": durations}
    node = workflow.get_node(f"{scan_wf_name(pet)}.reference_wf.static_reference")
    assert node.inputs.kind == "sum"
    assert not unset_inputs(workflow)


def test_motion_correction_can_be_off(settings, scan):
    settings = dataclasses.replace(settings, hmc_off=True)
    workflow = init_m2m_bids_wf(settings, [scan("pet")], options())
    assert not [name for name in workflow.list_node_names() if "estimate_motion" in name]
    assert "were not aligned" in methods_text(workflow)
    assert not unset_inputs(workflow)


@pytest.mark.parametrize("modality", ["pet", "fa"])
def test_what_is_registered_of_pet_is_not_what_is_written(settings, scan, modality):
    """Negative voxels are left out of registration alone."""
    settings = dataclasses.replace(settings, output_spaces=("T1w:res-native",))
    one = scan(modality)
    workflow = init_single_subject_wf(settings, [one], options(), name="sub_01_wf")
    scan_wf = workflow.get_node(scan_wf_name(one))
    given = {
        (target.name, field): output
        for _, target, data in scan_wf._graph.out_edges(
            scan_wf.get_node("reference_wf"), data=True
        )
        for output, field in data["connect"]
    }
    registered = "registered_file" if modality == "pet" else "out_file"
    expected = {
        ("registration_wf", "inputnode.moving_file"): f"outputnode.{registered}",
        ("registration_wf", "inputnode.native_file"): "outputnode.out_file",
        ("quantification_wf", "inputnode.native_file"): "outputnode.out_file",
        ("T1w_res_native_wf", "inputnode.moving_file"): "outputnode.out_file",
    }
    if modality == "pet":
        # Which a correction for partial volume effects takes.
        expected |= {
            ("quantification_wf", f"inputnode.{field}"): f"outputnode.{field}"
            for field in ("frames_file", "frame_xfms")
        }
        # And other spaces: all frames, and what is said of the static image.
        expected |= {
            ("T1w_res_native_wf", "inputnode.frames_file"): "outputnode.frames_file",
            ("T1w_res_native_wf", "inputnode.frame_xfms"): "outputnode.frame_xfms",
            ("T1w_res_native_wf", "inputnode.reference_method"): "outputnode.method",
        }
    assert {key: given[key] for key in expected} == expected


def test_options_reach_every_node(settings, scan):
    workflow = init_m2m_bids_wf(settings, [scan("pet")], options(use_gpu=True, omp_nthreads=4))
    nodes = {node.name: node for node in workflow._get_all_nodes()}
    assert nodes["register_m2m"].n_procs == 1
    assert nodes["register_m2m"].interface.inputs.use_gpu is True
    for name in ("extract_brain", "correct_bias", "register_rigid"):
        # ANTs has one thread.
        assert nodes[name].n_procs == 1
    for name in ("extract_brain", "register_rigid"):
        assert nodes[name].inputs.random_seed == 5


def test_every_space_has_its_image_and_every_t1w_its_template_once(settings, scan):
    spaces = ("MNI152NLin2009aSym:res-2", "MNI152NLin2009aSym:res-native", "T1w:res-native")
    settings = dataclasses.replace(settings, output_spaces=spaces)
    scans = [scan("pet"), scan("fa")]
    workflow = init_single_subject_wf(settings, scans, options(), name="wf")
    names = workflow.list_node_names()
    assert [name for name in names if name.endswith("normalize_t1w")] == [
        "sub_01_ses_M000_T1w_MNI152NLin2009aSym_wf.normalize_t1w"
    ]
    for one in scans:
        saved = [name for name in names if name.startswith(scan_wf_name(one))]
        assert sum(name.endswith("save_in_space") for name in saved) == 3
        # Two grids of one template share their transforms.
        xfms = [
            file
            for node in workflow.get_node(scan_wf_name(one))._get_all_nodes()
            if node.name == "save_in_space"
            for key, file in node.inputs.outputs["m2m"].items()
            if key.endswith("xfm")
        ]
        assert len(xfms) == len(set(xfms)) == 2
        assert sum(name.endswith("compose_xfms") for name in saved) == 1
    assert not unset_inputs(workflow)
    grids = [node for node in workflow._get_all_nodes() if node.name == "make_grid"]
    found = sorted(node.inputs.resolution for node in grids if isdefined(node.inputs.resolution))
    assert found == ["2", "2", "native", "native", "native", "native"]
    assert "MNI152NLin2009aSym" in methods_text(workflow)


@pytest.mark.parametrize("order", [1, -1])
def test_methods_are_told_once(settings, scan, order):
    """However many subjects and scans there are, and whichever kinds a subject lacks."""
    scans = [
        scan("pet", subject="01", entities={"trc": "FDG"}),
        scan("fa", subject="01"),
        scan("pet", subject="02"),
        scan("fa", subject="03"),
    ][::order]
    text = methods_text(init_m2m_bids_wf(settings, scans, options()))
    titles = [line for line in text.splitlines() if line.startswith("####")]
    assert titles[0] == "#### Anatomical reference"
    assert set(titles[1:3]) == {"#### PET", "#### Diffusion"}
    assert titles[3:] == ["#### Registration", "#### Quantification"]
    for words in ("averaged over tissue", "with a Markov random field"):
        assert " ".join(text.split()).count(words) == 1


def test_each_scan_keeps_what_was_done_for_it(settings, scan):
    """In its sidecar: its T1w, its way to a template, itself, and nothing of another scan."""
    settings = dataclasses.replace(settings, output_spaces=("MNI152NLin2009aSym:res-2",))
    missing = {"t1w": None, "t1w_entities": {}, "template": "MNI152NLin2009aSym"}
    scans = [scan("pet"), scan("fa"), replace(scan("pet", session="M012"), **missing)]
    workflow = init_m2m_bids_wf(settings, scans, options())
    of_t1w = ["Anatomical reference", "Template"]
    last = ["Registration", "Quantification"]
    nodes = [f"sub_01_wf.{scan_wf_name(one)}.outputs_wf.save_scan" for one in scans]
    assert [list(workflow.get_node(name).inputs.methods) for name in nodes] == [
        [*of_t1w, "PET", *last],
        [*of_t1w, "Diffusion", *last],
        ["PET", "Registration to a template", "Quantification"],
    ]


def test_methods_tell_what_runs(settings, scan):
    rigid = options(transform="rigid", weights=None)
    text = methods_text(init_m2m_bids_wf(settings, [scan("fa")], rigid))
    assert "M2M-Reg" not in text
    assert "#### PET" not in text
    assert "#### Diffusion" in text


PIECES = {
    "desc-preproc_T1w": ("correct_bias", "take_t1w"),
    "desc-brain_mask": ("extract_brain", "take_mask"),
    "dseg": ("segment_tissues", "take_tissues"),
}


@pytest.mark.parametrize(
    "pieces",
    [
        ["desc-brain_mask"],
        ["dseg"],
        ["desc-preproc_T1w"],
        ["desc-preproc_T1w", "desc-brain_mask", "dseg"],
    ],
)
def test_precomputed_pieces_replace_steps(settings, scan, pieces):
    pet = scan("pet")
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(pet.t1w)
    folder = settings.derivative_dirs["dti"] / "sub-01/ses-M000/anat"
    folder.mkdir(parents=True)
    files = {piece: folder / f"sub-01_ses-M000_{piece}.nii.gz" for piece in pieces}
    for file in files.values():
        nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(file)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    assert not unset_inputs(workflow)
    nodes = {node.name: node for node in workflow._get_all_nodes()}
    for piece, (computed, taken) in PIECES.items():
        assert (computed in nodes, taken in nodes) == (piece not in pieces, piece in pieces)
    assert ("align_template" in nodes) == ("desc-brain_mask" in pieces)
    graph = workflow._create_flat_graph()
    (register,) = (node for node in graph.nodes if node.name == "register_m2m")
    sources = {ancestor.name for ancestor in nx.ancestors(graph, register)}
    used = {PIECES[piece][piece in pieces] for piece in ("desc-preproc_T1w", "desc-brain_mask")}
    assert used <= sources
    uri = f"bids:dti:sub-01/ses-M000/anat/sub-01_ses-M000_{pieces[0]}.nii.gz"
    described = {"desc-preproc_T1w": "describe_t1w", "desc-brain_mask": "describe_mask"}
    node = nodes[described.get(pieces[0], "ds_dseg")]
    found = node.inputs.meta_dict["Sources"] if pieces[0] == "dseg" else node.inputs.sources
    assert uri in found
    assert "precomputed" in methods_text(workflow)


def test_brain_extraction_reaches_its_node(settings, scan):
    for source in ("auto", "template", "skip"):
        given = replace(settings, brain_extraction=source)
        workflow = init_m2m_bids_wf(given, [scan("pet")], options())
        nodes = {node.name: node for node in workflow._get_all_nodes()}
        assert nodes["extract_brain"].inputs.source == source
        assert "extract_brain" in nodes
        assert ("without skull" in methods_text(workflow)) == (source == "skip")


@pytest.mark.parametrize("source", ["auto", "synthstrip"])
def test_synthstrip_reaches_its_node(settings, scan, tmp_path, source):
    model = tmp_path / "synthstrip.1.pt"
    model.touch()
    given = replace(settings, brain_extraction=source, synthstrip_model=model)
    workflow = init_m2m_bids_wf(given, [scan("pet")], options())
    (node,) = (n for n in workflow._get_all_nodes() if n.name == "extract_brain")
    assert (node.inputs.source, node.inputs.synthstrip_model) == (source, str(model))
    assert node.inputs.n_threads == 2
    assert node.mem_gb > 3  # of its smallest grid
    assert "SynthStrip" in methods_text(workflow)
    assert not unset_inputs(workflow)


@pytest.fixture
def freesurfer(settings, scan):
    """A scan, and settings with FreeSurfer's folder of its T1w; all images are of one grid."""
    pet = scan("pet")
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(pet.t1w)
    folder = settings.bids_dir.parent / "freesurfer/sub-01_ses-M000/mri"
    folder.mkdir(parents=True)
    for name in ("aparc+aseg", "orig", "rawavg", "brainmask"):
        image = nb.MGHImage(np.ones((3, 4, 5), np.uint8), np.eye(4))
        image.to_filename(folder / f"{name}.mgz")
    return pet, replace(settings, fs_subjects_dir=folder.parents[1])


def test_freesurfer_replaces_steps_and_gives_classes(freesurfer):
    pet, settings = freesurfer
    workflow = init_m2m_bids_wf(settings, [pet], options())
    assert not unset_inputs(workflow)
    nodes = {node.name: node for node in workflow._get_all_nodes()}
    assert {"take_freesurfer", "align_template", "take_tissues", "correct_bias"} <= nodes.keys()
    assert not {"extract_brain", "segment_tissues", "take_mask"} & nodes.keys()
    uris = [
        f"bids:freesurfer:sub-01_ses-M000/mri/{name}.mgz" for name in ("aparc+aseg", "brainmask")
    ]
    assert nodes["describe_mask"].inputs.sources[1:] == uris
    sidecar = nodes["ds_dseg"].inputs.meta_dict
    assert sidecar["Sources"][1:] == uris
    assert "seg-m2m11" not in sidecar["Description"]
    assert nodes["save_classes"].inputs.sources[1:] == uris[:1]
    assert nodes["prepare_labels"].inputs.scheme == "freesurfer"
    assert methods_text(workflow).count("from FreeSurfer") == 2


def test_derivatives_come_before_freesurfer(freesurfer):
    pet, settings = freesurfer
    folder = settings.derivative_dirs["dti"] / "sub-01/ses-M000/anat"
    folder.mkdir(parents=True)
    mask = folder / "sub-01_ses-M000_desc-brain_mask.nii.gz"
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(mask)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    graph = workflow._create_flat_graph()
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["take_mask"].inputs.in_file == str(mask)
    assert nodes["take_freesurfer"] in nx.ancestors(graph, nodes["take_tissues"])
    assert nodes["take_freesurfer"] not in nx.ancestors(graph, nodes["align_template"])
    dseg = folder / "sub-01_ses-M000_dseg.nii.gz"
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(dseg)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    nodes = {node.name: node for node in workflow._get_all_nodes()}
    assert "take_freesurfer" not in nodes
    assert nodes["take_tissues"].inputs.in_files == [str(dseg)]
    assert "save_classes" in nodes  # which the dataset does not have


def test_freesurfer_of_another_grid_is_left_alone(freesurfer):
    pet, settings = freesurfer
    rawavg = settings.fs_subjects_dir / "sub-01_ses-M000/mri/rawavg.mgz"
    nb.MGHImage(np.ones((3, 4, 6), np.uint8), np.eye(4)).to_filename(rawavg)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    nodes = {node.name: node for node in workflow._get_all_nodes()}
    assert {"extract_brain", "segment_tissues"} <= nodes.keys()
    assert not {"take_freesurfer", "save_classes"} & nodes.keys()
    assert "no labels of FreeSurfer" in nodes["ds_dseg"].inputs.meta_dict["Description"]


def test_classes_are_written_of_labels_in_derivatives(settings, scan):
    pet = scan("pet")
    folder = settings.derivative_dirs["dti"] / "sub-01/ses-M000/anat"
    folder.mkdir(parents=True)
    file = folder / "sub-01_ses-M000_desc-aseg_dseg.nii.gz"
    for one in (pet.t1w, file):
        nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(one)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    (node,) = (n for n in workflow._get_all_nodes() if n.name == "prepare_labels")
    assert node.inputs.label_file == str(file)
    assert not unset_inputs(workflow)
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4) + 1e-2).to_filename(file)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    assert "prepare_labels" not in {node.name for node in workflow._get_all_nodes()}


@pytest.mark.parametrize("offset_mm", [0, 20])
def test_transforms_to_templates_are_taken_from_datasets_of_this_t1w(settings, scan, offset_mm):
    """Of a dataset whose mask is 20 mm off, neither is used: the T1w is registered instead."""
    settings = dataclasses.replace(settings, output_spaces=("MNI152NLin2009aSym",))
    pet = scan("pet")
    folder = settings.derivative_dirs["dti"] / "sub-01/ses-M000/anat"
    folder.mkdir(parents=True)
    stem = folder / "sub-01_ses-M000"
    names = [
        f"{stem}_from-{start}_to-{end}_mode-image_xfm.h5"
        for start, end in (("T1w", "MNI152NLin2009aSym"), ("MNI152NLin2009aSym", "T1w"))
    ]
    for name in names:
        Path(name).touch()
    moved = np.eye(4)
    moved[0, 3] = offset_mm
    mask = Path(f"{stem}_desc-brain_mask.nii.gz")
    for file, affine in ((pet.t1w, np.eye(4)), (mask, moved)):
        nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), affine).to_filename(file)
    workflow = init_m2m_bids_wf(settings, [pet], options())
    nodes = {node.name: node for node in workflow._get_all_nodes()}
    assert ("normalize_t1w" in nodes) is (offset_mm > 0)
    assert not unset_inputs(workflow)
    request = scan_request(pet, settings, options())
    used = request.spaces
    # What is brought to a space depends on all that the registration does.
    assert all(made.items() >= request.registration.items() for made in used.values())
    assert nodes["save_in_space"].inputs.made_from in used.values()
    assert any("TemplateTransforms" in made for made in used.values()) is (offset_mm == 0)
    if offset_mm == 0:
        assert nodes["take_xfms"].inputs.xfm_file == names[0]
        assert len(nodes["save_in_space"].inputs.sidecar["sources"]) == 3
    else:
        assert "extract_brain" in nodes


def test_cohort_levels_compute_the_anatomy_themselves(settings, scan, images):
    """Labels that methods are evaluated with must not help them."""
    pet = scan("pet")
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(pet.t1w)
    folder = settings.derivative_dirs["dti"] / "sub-01/ses-M000/anat"
    folder.mkdir(parents=True)
    file = folder / "sub-01_ses-M000_dseg.nii.gz"
    nb.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)).to_filename(file)
    rigid = options(transform="rigid", weights=None)
    workflow = init_m2m_bids_wf(settings, [pet], rigid, images=images)
    assert "take_tissues" not in {node.name for node in workflow._get_all_nodes()}


def test_cohort_levels_are_not_helped_by_freesurfer(freesurfer, images):
    pet, settings = freesurfer
    rigid = options(transform="rigid", weights=None)
    workflow = init_m2m_bids_wf(settings, [pet], rigid, images=images)
    names = {node.name for node in workflow._get_all_nodes()}
    assert {"extract_brain", "segment_tissues"} <= names
    assert not {"take_freesurfer", "take_tissues", "prepare_labels"} & names


@pytest.mark.parametrize(
    "names",
    [
        ("sub-01_trc-18F+X_pet", "sub-01_trc-18FX_pet"),
        ("sub-01_ses-1_pet", "sub-01_ses-11_pet"),
        ("sub-01_run-1_pet", "sub-01_run-01_pet"),
    ],
)
def test_identifiers_are_nodes_names_of_their_own(names):
    made = {identifier(name) for name in names}
    assert len(made) == len(names)
    assert all(name.isidentifier() for name in made)


@pytest.fixture(params=["train", "evaluate"])
def images(request, tmp_path):
    """Where the images of a cohort level go."""
    folder = tmp_path / "images"
    if request.param == "train":
        return TrainingImages(folder, 64, 3.0)
    return EvaluationImages(folder)


def test_cohort_levels_write_images_instead_of_derivatives(settings, scan, images):
    workflow = init_m2m_bids_wf(
        settings,
        [scan("pet"), scan("fa"), scan("pet", subject="02")],
        options(transform="rigid", weights=None),
        images=images,
    )
    assert not unset_inputs(workflow)
    names = workflow.list_node_names()
    assert sum(name.endswith("images_wf.save_images") for name in names) == 3
    assert not [name for name in names if "outputs" in name]
    # The T1w of a session is prepared once, for both of its scans.
    assert sum(name.endswith("extract_brain") for name in names) == 2
    graph = workflow._create_flat_graph()
    for node in graph.nodes:
        if node.name == "save_images":
            sources = {ancestor.name for ancestor in nx.ancestors(graph, node)}
            assert {"register_rigid", "extract_brain", "segment_tissues"} <= sources
            folder, name = Path(node.inputs.out_dir).parent, Path(node.inputs.out_dir).name
            assert (folder, node.inputs.description["name"]) == (images.folder, name)


def test_images_to_evaluate_are_made_anew_where_a_file_differs_or_is_cut_off(scan, tmp_path, fill):
    images, pet = EvaluationImages(tmp_path / "images"), scan("pet")
    assert not images.has(pet)
    file = images.folder / pet.name / "scan.json"
    file.parent.mkdir(parents=True)
    fill(*(file.with_name(f"{name}.nii.gz") for name in ("moving", "t1w", "mask", "dseg")))
    file.write_text(json.dumps(images.description(pet)))
    assert images.has(pet)
    mask = file.with_name("mask.nii.gz")
    mask.write_bytes(mask.read_bytes()[:-1])
    assert not images.has(pet)
    fill(mask)
    assert images.has(pet)
    file.write_text('{"name": ')
    assert not images.has(pet)
    file.write_text(json.dumps(images.description(pet)))
    pet.t1w.write_bytes(b"other")
    assert not images.has(pet)


def test_images_to_train_on_are_made_anew_where_an_array_is_cut_off(scan, tmp_path):
    images, pet = TrainingImages(tmp_path / "images", 16, 3.0), scan("pet")
    assert not images.has(pet)
    folder = images.folder / pet.name
    arrays = {"functional": np.ones((16, 16, 16), np.float16)}
    write_training_arrays(folder, {"name": pet.name}, arrays)
    assert images.has(pet)
    whole = (folder / "functional.npy").read_bytes()
    for part in (0, 100, len(whole) - 1):
        (folder / "functional.npy").write_bytes(whole[:part])
        assert not images.has(pet)


def test_fa_is_fitted_where_the_scan_is_diffusion_weighted(settings, scan):
    gradients = GradientFiles(settings.bids_dir / "a.bval", settings.bids_dir / "a.bvec")
    for file in gradients:
        file.write_text("image")
    fitted = replace(scan("fa"), gradients=gradients, source="raw")
    workflow = init_single_subject_wf(settings, [fitted], options(), name="sub_01_wf")
    reference_wf = workflow.get_node(scan_wf_name(fitted)).get_node("reference_wf")
    inputs = reference_wf.get_node("fit_tensor").inputs
    assert (inputs.bval_file, inputs.bvec_file) == tuple(map(str, gradients))
    assert (inputs.is_raw, inputs.random_seed) == (True, 5)
    assert reference_wf.inputs.inputnode.in_file == str(fitted.file)
    assert "Eddy currents" in methods_text(workflow)
    save_scan = workflow.get_node(scan_wf_name(fitted)).get_node("outputs_wf.save_scan")
    sources = save_scan.inputs.sidecar["sources"]
    assert len(sources) == 4
    assert sources[1:3] == ["bids:raw:a.bval", "bids:raw:a.bvec"]
    scan_wf = workflow.get_node(scan_wf_name(fitted))
    diffusivities_wf = scan_wf.get_node("diffusivities_wf")
    assert {name for name in diffusivities_wf.list_node_names() if name.startswith("save")} == {
        "save_md", "save_ad", "save_rd",
    }  # fmt: skip
    given = [field for _, field in scan_wf._graph.edges[reference_wf, diffusivities_wf]["connect"]]
    assert sorted(given) == [f"inputnode.{field}" for field in ("ad_file", "md_file", "rd_file")]


def test_images_of_a_cohort_are_made_of_the_gradients_too(settings, scan, tmp_path):
    gradients = GradientFiles(settings.bids_dir / "a.bval", settings.bids_dir / "a.bvec")
    for file in gradients:
        file.write_text("image")
    fa, images = scan("fa"), EvaluationImages(tmp_path / "images")
    fitted = replace(fa, gradients=gradients, source="raw")
    before = images.description(fitted)
    gradients.bvec.write_text("1 0 0")
    assert images.description(fitted) != before
    assert "gradients" not in images.description(fa)


def test_diffusivities_of_a_map_come_along_where_there_are_any(settings, scan):
    fa = scan("fa")
    workflow = init_single_subject_wf(settings, [fa], options(), name="sub_01_wf")
    assert workflow.get_node(scan_wf_name(fa)).get_node("diffusivities_wf") is None
    md_file = fa.file.with_name(fa.file.name.replace("param-FA", "param-MD"))
    md_file.touch()
    workflow = init_single_subject_wf(settings, [fa], options(), name="sub_01_wf")
    diffusivities_wf = workflow.get_node(scan_wf_name(fa)).get_node("diffusivities_wf")
    assert diffusivities_wf.inputs.inputnode.md_file == str(md_file)
    assert diffusivities_wf.get_node("save_ad") is None
    made_from = diffusivities_wf.get_node("save_md").inputs.made_from
    assert made_from == scan_request(fa, settings, options()).registration
