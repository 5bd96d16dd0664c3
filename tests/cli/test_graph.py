"""The drawing of a workflow, of real ones and of one whose stages are known."""

import json
import os
import re
import shutil

import pytest
from nipype.interfaces.utility import Function, IdentityInterface
from nipype.pipeline import engine as pe

from m2m_bids.bids.query import query
from m2m_bids.cli.graph import stage_graph, write_graphs
from m2m_bids.settings import Settings
from m2m_bids.workflows.base import init_m2m_bids_wf
from m2m_bids.workflows.registration import RegistrationOptions


def subject_wf(label, *, has_pet=True):
    """Three stages: the T1w's goes to both others, and the PET's reference to its outputs."""
    workflow = pe.Workflow(f"sub_{label}_wf")
    anatomy = pe.Workflow(f"sub_{label}_T1w_wf")
    anatomy.add_nodes([node("conform_t1w"), pe.Node(IdentityInterface(["x"]), name="inputnode")])
    workflow.add_nodes([anatomy])
    if not has_pet:
        return workflow
    scan = pe.Workflow(f"sub_{label}_pet_wf")
    reference, outputs = pe.Workflow("reference_wf"), pe.Workflow("outputs_wf")
    reference.add_nodes([node("static_reference")])
    outputs.add_nodes([node("save_scan")])
    scan.connect(reference, "static_reference.out", outputs, "save_scan.value")
    workflow.connect(anatomy, "conform_t1w.out", scan, "reference_wf.static_reference.value")
    workflow.connect(anatomy, "conform_t1w.out", scan, "outputs_wf.save_scan.other")
    return workflow


def node(name):
    function = Function(input_names=["value", "other"], output_names=["out"])
    function.inputs.function_str = "def f(value=None, other=None):\n    return value\n"
    return pe.Node(function, name=name)


def drawn(dot):
    """Read frames' labels and arrows between stages from a drawing."""
    labels = dict(re.findall(r"(s\d+_\d+) \[label=<.*?<b>(.*?)</b>", dot))
    arrows = [(labels[a], labels[b]) for a, b in re.findall(r"(s\d+_\d+) -> (s\d+_\d+);", dot)]
    return re.findall(r'^label="(.*?)"', dot, re.MULTILINE), arrows


def test_stages_and_what_needs_what():
    workflow = pe.Workflow("m2m_bids_wf")
    workflow.add_nodes([subject_wf("01")])
    dot = stage_graph(workflow)
    frames, arrows = drawn(dot)
    assert frames == ["sub-01", "T1w", "pet"]
    # That outputs need the anatomy follows.
    assert arrows == [("anatomy", "reference"), ("reference", "outputs")]
    for words in ("conform T1w", "static reference", "save scan"):
        assert dot.count(f">{words}<") == 1
    assert "inputnode" not in dot


def test_subjects_that_are_alike_are_drawn_once():
    workflow = pe.Workflow("m2m_bids_wf")
    labels = [f"{number:02d}" for number in range(1, 9)]
    workflow.add_nodes([subject_wf(label, has_pet=label != "03") for label in labels])
    frames, _ = drawn(stage_graph(workflow))
    assert sorted(frames) == sorted(
        [
            *("sub-01, sub-02, sub-04, sub-05, sub-06 and 2 more, alike", "T1w", "pet"),
            *("sub-03", "T1w"),
        ]
    )


@pytest.fixture
def write(tmp_path):
    """Write the graphs of one scan's workflow; return the folder."""
    for name in ("anat/sub-1_T1w.nii.gz", "pet/sub-1_trc-FDG_pet.nii.gz"):
        (tmp_path / "bids/sub-1" / name).parent.mkdir(parents=True)
        (tmp_path / "bids/sub-1" / name).write_text("image")
    content = {"Name": "Test", "BIDSVersion": "1.10.0"}
    (tmp_path / "bids/dataset_description.json").write_text(json.dumps(content))
    settings = Settings(
        bids_dir=tmp_path / "bids", output_dir=tmp_path / "out", work_dir=tmp_path / "work"
    )
    options = RegistrationOptions(
        transform="m2m",
        weights=tmp_path,
        weights_sha256="",
        n_refine=7,
        device="cpu",
        use_gpu=False,
        random_seed=5,
        omp_nthreads=2,
    )

    def call():
        workflow = init_m2m_bids_wf(settings, query(tmp_path / "bids"), options)
        write_graphs(workflow, tmp_path / "logs")
        return tmp_path / "logs"

    return call


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphs_are_drawn(write):
    folder = write()
    for kind in ("colored", "exec"):
        dot = (folder / f"graph_{kind}.dot").read_text()
        assert "register_m2m" in dot
        assert "extract_brain" in dot
        assert "<svg" in (folder / f"graph_{kind}.svg").read_text()
    svg = (folder / "graph.svg").read_text()
    for words in ("sub-1", "trc-FDG_pet", "registration", "extract brain", "M2M-Reg"):
        assert words in re.sub(r"&#45;", "-", svg)


def test_graphs_without_graphviz(write, tmp_path, monkeypatch, caplog):
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path / "empty"))
    folder = write()
    assert "register with M2M-Reg" in (folder / "graph.dot").read_text()
    for kind in ("colored", "exec"):
        assert "register_m2m" in (folder / f"graph_{kind}.dot").read_text()
    assert "install graphviz" in caplog.text
    assert not list(folder.glob("*.svg"))
