import pytest
from nipype.interfaces.utility import Function, IdentityInterface
from nipype.pipeline import engine as pe
from nipype.pipeline.engine.utils import generate_expanded_graph

from m2m_bids.cli.steps import node_names, step_of

PET = "sub_01_ses_M000_trc_18FFDG_rec_coregiso_pet_wf"


def same(x):
    return x


@pytest.mark.parametrize(
    ("name", "step"),
    [
        (
            f"m2m_bids_wf.sub_01_wf.{PET}.quantification_wf.correct_pv",
            ("sub-01", "sub-01_ses-M000_trc-18FFDG_rec-coregiso_pet", "quantification",
             "correct partial volume effects"),
        ),
        (
            f"m2m_bids_wf.sub_01_wf.{PET}.T1w_res_native_wf.make_grid",
            ("sub-01", "sub-01_ses-M000_trc-18FFDG_rec-coregiso_pet", "T1w res native",
             "make grid"),
        ),
        (
            "m2m_bids_wf.sub_X1_wf.sub_X1_T1w_MNI152NLin2009aSym_wf.normalize_t1w",
            ("sub-X1", "sub-X1_T1w_MNI152NLin2009aSym", "template", "normalize T1w"),
        ),
        (
            "evaluation_wf.sub_01_ses_1_pet_to_sub_02_ses_1_T1w_wf.register_syn_mi",
            ("", "sub-01_ses-1_pet_to_sub-02_ses-1_T1w", "comparison", "register syn mi"),
        ),
        ("some_wf.node", ("", "", "comparison", "node")),
    ],
)  # fmt: skip
def test_where_a_node_is(name, step):
    assert tuple(step_of(name)) == step


def test_names_are_those_that_nipype_runs():
    """Of a nested workflow, in an order that it can run in, without what only passes on."""
    inner, outer = pe.Workflow("inner_wf"), pe.Workflow("outer_wf")
    inputnode = pe.Node(IdentityInterface(["x"]), name="inputnode")
    second = pe.Node(Function(["x"], ["y"], function=same), name="second")
    first = pe.Node(Function(["x"], ["y"], function=same), name="first")
    inner.connect(inputnode, "x", second, "x")
    outer.connect(first, "y", inner, "inputnode.x")
    first.inputs.x = 1
    names = list(node_names(outer))
    assert names == ["outer_wf.first", "outer_wf.inner_wf.second"]
    graph = generate_expanded_graph(outer._create_flat_graph())
    assert set(names) == {node.fullname for node in graph}
