"""The workflow of an evaluation: its graph, and runs of methods that compute nothing."""

from dataclasses import replace

import networkx as nx
import nibabel as nb
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from nipype.interfaces.base import isdefined

from m2m_bids.api import DEFAULT_WEIGHTS
from m2m_bids.bids.labels import LabelFile
from m2m_bids.evaluation.record_files import read_record
from m2m_bids.spatial.images import save_image
from m2m_bids.spatial.itk import write_affine
from m2m_bids.workflows.evaluation import (
    MethodOptions,
    MovingLabels,
    PairInputs,
    RunOptions,
    Task,
    init_evaluation_wf,
    node_names,
    pair_wf_name,
)

OPTIONS = RunOptions(device="cpu", use_gpu=False, random_seed=5, omp_nthreads=2, spacing_mm=3.0)
SHIFT_MM = np.array([7.5, 0.0, 0.0])  # from points of the fixed image to those of the moving one
M2M = MethodOptions("m2m:default", DEFAULT_WEIGHTS, "abc", n_refine=7, can_use_gpu=True)


def cube(centre_mm, spacing_mm=2.5, size=40):
    """Image of a cube with half an edge of 20 mm, intensities and labels in one."""
    affine = from_matvec(np.eye(3) * spacing_mm, [-spacing_mm * size / 2] * 3)
    points = apply_affine(affine, np.moveaxis(np.indices((size,) * 3), 0, -1))
    distance = np.abs(points - centre_mm).max(-1)
    data = np.where(distance < 10, 2, np.where(distance < 20, 1, 0))
    return nb.Nifti1Image(data.astype(np.uint8), affine)


@pytest.fixture
def pair(tmp_path):
    """A cube, and the same one elsewhere, aligned but for the shift."""
    fixed, moving = cube((0, 0, 0)), cube(SHIFT_MM)
    mask = nb.Nifti1Image((np.asarray(fixed.dataobj) > 0).astype(np.uint8), fixed.affine)
    files = {
        "moving_file": save_image(moving, tmp_path / "moving.nii"),
        "fixed_file": save_image(fixed, tmp_path / "t1w.nii"),
        "mask_file": save_image(mask, tmp_path / "mask.nii"),
        "dseg_file": save_image(fixed, tmp_path / "dseg.nii"),
        "template2anat": write_affine(np.eye(4), tmp_path / "template.txt"),
        "rigid_xfm": write_affine(from_matvec(np.eye(3), SHIFT_MM), tmp_path / "rigid.txt"),
    }
    return PairInputs(
        name="sub-a_pet_to_sub-b_T1w",
        modality="pet",
        fixed_labels=LabelFile(files["dseg_file"], "tissues"),
        moving_labels=MovingLabels(LabelFile(files["moving_file"], "tissues")),
        reference_xfm=files["rigid_xfm"],
        **files,
    )


@pytest.fixture
def task(tmp_path):
    def make(method, **changes):
        method = method if isinstance(method, MethodOptions) else MethodOptions(method)
        name = method.key.replace(":", "_")
        known = {"pair": "a_to_b", "method": method.key}
        return Task(method, known, {"by": name}, tmp_path / "records" / name, **changes)

    return make


@pytest.fixture
def build(tmp_path):
    def make(*pairs, options=OPTIONS):
        return init_evaluation_wf(
            pairs=pairs,
            options=options,
            base_dir=tmp_path / "work",
            crash_dir=tmp_path / "crashes",
        )

    return make


def nodes_of(workflow):
    return {node.name: node for node in workflow._create_flat_graph().nodes}


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


@pytest.mark.parametrize("has_rigid", [True, False])
@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("is_shown", [True, False])
def test_every_input_is_given(build, task, pair, has_rigid, has_labels, is_shown):
    pair = replace(
        pair,
        rigid_xfm=pair.rigid_xfm if has_rigid else None,
        moving_labels=pair.moving_labels if has_labels else None,
    )
    tasks = [task(key, is_shown=is_shown) for key in ("initial", "rigid", M2M)]
    workflow = build((pair, tasks), (replace(pair, name="other"), tasks[:1]))
    assert not unset_inputs(workflow)
    nodes = nodes_of(workflow)
    assert ("align" in nodes) is not has_rigid
    assert ("moving_labels" in nodes) is has_labels
    assert ("move_m2m_default" in nodes) is is_shown
    names = workflow.list_node_names()
    assert sum(name.endswith(".fixed_labels") for name in names) == 2
    assert sum(name.endswith(".register_rigid") for name in names) == 1


def test_what_a_record_depends_on_is_named(build, task, pair):
    pair = replace(pair, rigid_xfm=None)
    workflow = build((pair, [task("syn-mi", is_shown=True), task("rigid")]))
    graph = workflow._create_flat_graph()
    (save,) = [node for node in graph.nodes if node.name == "save_syn_mi"]
    before = {node.name for node in nx.ancestors(graph, save)} - {"inputnode", "rigidnode"}
    assert before | {"save_syn_mi"} == set(node_names("syn-mi"))
    assert save.fullname == f"evaluation_wf.{pair_wf_name(pair.name)}.save_syn_mi"
    for node in graph.nodes:
        assert node.config["execution"]["crashdump_dir"].endswith("crashes")


def test_options_reach_every_node(build, task, pair):
    options = replace(OPTIONS, use_gpu=True, device="cuda")
    pair = replace(pair, rigid_xfm=None)
    nodes = nodes_of(build((pair, [task(M2M), task("syn-mi")]), options=options))
    own, other = (nodes[f"register_{key}"] for key in ("m2m_default", "syn_mi"))
    assert own.inputs.weights == str(DEFAULT_WEIGHTS)
    assert (own.inputs.weights_sha256, own.inputs.n_refine) == ("abc", 7)
    assert (own.inputs.use_gpu, other.inputs.use_gpu) == (True, False)
    assert (own.n_procs, other.n_procs) == (1, 2)
    assert not isdefined(other.inputs.weights)
    assert other.inputs.spacing_mm == 3.0
    for name in ("align", "register_syn_mi"):
        assert nodes[name].inputs.random_seed == 5


def test_records_are_right_and_failures_are_kept_apart(build, task, pair, tmp_path):
    """The headers are off by a shift that the rigid map knows; unusable weights are reported."""
    broken = MethodOptions("m2m:broken", tmp_path / "no_weights", "abc")
    broken.weights.mkdir()
    tasks = [task("initial", is_shown=True), task("rigid", is_shown=True),
             task(broken, is_shown=True)]  # fmt: skip
    build((pair, tasks)).run(plugin="Linear")
    initial, rigid, failed = (read_record(t.out_dir, t.made_with) for t in tasks)
    assert initial["status"] == rigid["status"] == "done"
    assert (initial["pair"], initial["method"]) == ("a_to_b", "initial")
    assert rigid["dsc"] == 1
    # Of the 7 voxels along an edge of the inner cube, the shift by 3 leaves 4 that overlap.
    assert initial["dsc_white_matter"] == pytest.approx(4 / 7)
    assert rigid["landmark_error_mm"] < 1e-4
    assert initial["landmark_error_mm"] == pytest.approx(SHIFT_MM[0], abs=1e-4)
    assert initial["folding_percent"] == 0
    moved, labels = (nb.load(tasks[1].out_dir / f"moved{end}.nii.gz") for end in ("", "_labels"))
    expected = np.asarray(nb.load(pair.fixed_file).dataobj)
    np.testing.assert_allclose(moved.get_fdata(), expected, atol=1e-5)
    classes = np.where(expected == 1, 21, np.where(expected == 2, 22, 0))
    np.testing.assert_array_equal(labels.dataobj, classes)
    assert failed["status"] == "missing"
    assert "card.json" in failed["reason"]
    assert [path.name for path in tasks[2].out_dir.iterdir()] == ["record.json"]


def test_one_pair_that_crashes_leaves_the_others(build, task, pair, tmp_path):
    nb.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_filename(tmp_path / "empty.nii")
    bad = replace(pair, name="bad", fixed_labels=LabelFile(tmp_path / "empty.nii", "tissues"))
    good, other = task("rigid"), replace(task("rigid"), out_dir=tmp_path / "records" / "bad")
    workflow = build((bad, [other]), (pair, [good]))
    for node in workflow._get_all_nodes():
        node.config["execution"]["stop_on_first_crash"] = False
    workflow.config["execution"]["crashfile_format"] = "txt"
    with pytest.raises(RuntimeError):
        workflow.run(plugin="Linear")
    assert read_record(good.out_dir, good.made_with)["dsc"] == 1
    assert not other.out_dir.exists()
