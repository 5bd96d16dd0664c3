"""Which subject, image and stage a node of a workflow belongs to, in plain words."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Workflow
from nipype.pipeline.engine.utils import topological_sort

# Entities that names of scans and T1w images can have; identifiers lose their dashes.
_ENTITY = re.compile(
    r"(?:(?<=_)|^)(sub|ses|sample|task|acq|ce|trc|stain|rec|dir|run|mod|echo|flip|inv|part|chunk"
    r"|param|space|cohort|res|desc)_(?=[^_])"
)
_WORDS = {
    "ds_t1w": "save T1w",
    "ds_mask": "save brain mask",
    "ds_dseg": "save tissues",
    "register_m2m": "register with M2M-Reg",
    "register_rigid": "register rigidly",
    "correct_pv": "correct partial volume effects",
}
_PARTS = {
    "t1w": "T1w",
    "m2m": "M2M-Reg",
    "fa": "FA",
    "pet": "PET",
    "suvr": "SUVR",
    "pv": "partial volume",
}


class Step(NamedTuple):
    """
    Where a node is.

    Attributes
    ----------
    subject : str
        Such as ``sub-01``; empty where a workflow has no subjects.
    image : str
        The scan, T1w image or pair of scans that it works on.
    stage : str
        Part of the work on that image, such as "registration".
    words : str
        What the node does.
    """

    subject: str
    image: str
    stage: str
    words: str


def step_of(fullname: str) -> Step:
    """
    Read the full name of a node.

    Parameters
    ----------
    fullname : str
        Names of the workflows around the node and its own, the outermost first.

    Examples
    --------
    >>> step_of("m2m_bids_wf.sub_01_wf.sub_01_ses_1_trc_FDG_pet_wf.registration_wf.register_m2m")
    Step(subject='sub-01', image='sub-01_ses-1_trc-FDG_pet', stage='registration',
         words='register with M2M-Reg')
    >>> step_of("m2m_bids_wf.sub_01_wf.sub_01_T1w_wf.extract_brain")[1:]
    ('sub-01_T1w', 'anatomy', 'extract brain')
    >>> step_of("m2m_bids_wf.sub_01_wf.outputs_sub_01_T1w_wf.ds_mask")[1:]
    ('sub-01_T1w', 'outputs', 'save brain mask')
    """
    *around, node = fullname.split(".")
    names = [name.removesuffix("_wf") for name in around[1:]]
    subject = ""
    if names and re.fullmatch(r"sub_[^_]+", names[0]):
        subject = _bids_name(names.pop(0))
    image = names.pop(0) if names else subject
    prefix, outputs_of, rest = image.partition("outputs_")
    if outputs_of and not prefix:
        image, names = rest, ["outputs", *names]
    default = "template" if "_T1w_" in image else "anatomy" if subject else "comparison"
    stage = " ".join(_plain(name) for name in names) or default
    return Step(subject, _bids_name(image), stage, _plain(node))


def node_names(workflow: Workflow) -> Iterator[str]:
    """Yield the full names of the nodes that a workflow runs, in an order that they can run in."""
    for node in topological_sort(workflow._graph)[0]:
        if isinstance(node, Workflow):
            yield from (f"{workflow.name}.{name}" for name in node_names(node))
        elif not isinstance(node.interface, IdentityInterface):
            yield f"{workflow.name}.{node.name}"


def _bids_name(identifier: str) -> str:
    """
    Give a name its dashes back.

    Examples
    --------
    >>> _bids_name("sub_01_ses_M000_param_FA_dwimap")
    'sub-01_ses-M000_param-FA_dwimap'
    """
    return _ENTITY.sub(r"\1-", identifier)


def _plain(name: str) -> str:
    """Spell a node's or workflow's name in words."""
    if name in _WORDS:
        return _WORDS[name]
    return " ".join(_PARTS.get(part, part) for part in name.split("_") if part)
