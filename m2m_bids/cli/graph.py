"""Draw the workflow of a run: subjects, their images, and the stages of the work on each."""

import html
import logging
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import networkx as nx
from nipype.pipeline.engine import Workflow
from nipype.pipeline.engine.utils import generate_expanded_graph

from m2m_bids.cli.steps import Step, node_names, step_of

LOGGER = logging.getLogger("m2m_bids")
_FONT = 'fontname="Helvetica,Arial,sans-serif"'
# Colours by what the names of images have in them: fill of the stages, frame of the image.
_COLOURS = {
    "_T1w": ("#e8eef7", "#3b5b8c"),
    "_pet": ("#fbeee0", "#a8611a"),
    "": ("#e9f4ea", "#3f7a45"),
}
# Subjects that are named where more than one are alike.
_MOST_NAMED = 5


class _Stage(NamedTuple):
    """One part of the work on one image."""

    subject: str
    image: str
    name: str


class _Shape(NamedTuple):
    """Stages of a subject with their steps, and which stage needs which, the same for several."""

    steps: dict[_Stage, list[str]]
    edges: set[tuple[_Stage, _Stage]]
    subjects: list[str]


def write_graphs(workflow: Workflow, logs_dir: Path) -> None:
    """
    Write ``graph.svg``, and Nipype's own graphs ``graph_colored`` and ``graph_exec``.

    Parameters
    ----------
    workflow : Workflow
    logs_dir : Path
        Folder of the files; only ``.dot`` are written where Graphviz is not installed.
    """
    image_format = "svg" if shutil.which("dot") else "dot"
    logs_dir.mkdir(parents=True, exist_ok=True)
    file = logs_dir / "graph.dot"
    file.write_text(stage_graph(workflow), encoding="utf-8")
    if image_format == "svg":
        command = ["dot", "-Tsvg", "-o", file.with_suffix(".svg"), file]
        subprocess.run(command, check=True, capture_output=True)
    LOGGER.info("wrote %s", file.with_suffix(f".{image_format}"))
    for kind in ("colored", "exec"):
        workflow.write_graph(
            graph2use=kind,
            dotfilename=str(logs_dir / f"graph_{kind}.dot"),
            format=image_format,
            simple_form=True,
        )
    if image_format == "dot":
        LOGGER.warning(
            "the graphs are not drawn: Graphviz is not installed (apt-get install graphviz, or"
            " conda install graphviz); then: dot -Tsvg -O %s",
            logs_dir / "graph*.dot",
        )


def stage_graph(workflow: Workflow) -> str:
    """
    Describe a workflow by its stages.

    Subjects for whom the same is done are drawn once.

    Parameters
    ----------
    workflow : Workflow
        As ``init_m2m_bids_wf`` builds it.

    Returns
    -------
    str
        A graph in the DOT language: one box for each stage with its steps in it, framed by image
        and by subject, and arrows to the stages that need what another one makes.
    """
    lines = [
        "digraph stages {",
        f"rankdir=LR; nodesep=0.2; ranksep=0.5; node [shape=plain, {_FONT}, fontsize=11];",
        f'edge [color="#666666", arrowsize=0.7]; graph [{_FONT}, fontsize=13, style=rounded];',
    ]
    for number, shape in enumerate(_shapes(workflow)):
        lines += _subject_lines(shape, f"s{number}")
    return "\n".join([*lines, "}", ""])


def _shapes(workflow: Workflow) -> list[_Shape]:
    """Sort a workflow's nodes into subjects and stages; subjects that are alike go together."""
    steps: dict[str, dict[_Stage, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in node_names(workflow):
        step = step_of(name)
        stage = _stage_of(step)
        if step.words not in steps[step.subject][stage]:
            steps[step.subject][stage].append(step.words)
    edges = _edges(workflow)
    shapes: dict[str, _Shape] = {}
    for subject, own in steps.items():
        arrows = {pair for pair in edges if pair[0].subject == subject}
        text = repr((dict(own), sorted(arrows)))
        anonymous = re.sub(rf"\b{re.escape(subject)}(?=[_'])", "", text)
        shapes.setdefault(anonymous, _Shape(own, arrows, [])).subjects.append(subject)
    return list(shapes.values())


def _edges(workflow: Workflow) -> set[tuple[_Stage, _Stage]]:
    """List which stage needs which; not what follows from others."""
    graph = nx.DiGraph()
    for before, after in generate_expanded_graph(workflow._create_flat_graph()).edges():
        stages = _stage_of(step_of(before.fullname)), _stage_of(step_of(after.fullname))
        if stages[0] != stages[1]:
            graph.add_edge(*stages)
    return set(nx.transitive_reduction(graph).edges())


def _stage_of(step: Step) -> _Stage:
    return _Stage(step.subject, step.image, step.stage)


def _subject_lines(shape: _Shape, key: str) -> list[str]:
    """Draw a subject: a frame for each image in a frame with the subject's name."""
    nodes = {stage: f"{key}_{number}" for number, stage in enumerate(shape.steps)}
    images: Mapping[str, list[_Stage]] = defaultdict(list)
    for stage in shape.steps:
        images[stage.image].append(stage)
    lines = [
        f"subgraph cluster_{key} {{",
        f'label="{_subject_title(shape.subjects)}"; color="#999999"; labeljust=l; margin=14;',
    ]
    for number, (image, stages) in enumerate(images.items()):
        fill, frame = next(_COLOURS[part] for part in _COLOURS if part in image)
        title = image.removeprefix(f"{stages[0].subject}_")
        lines += [
            f"subgraph cluster_{key}_{number} {{",
            f'label="{title}"; color="{frame}"; fontcolor="{frame}"; labeljust=l; margin=10;',
            *(f"{nodes[stage]} [label=<{_box(stage.name, shape.steps[stage], fill, frame)}>];"
              for stage in stages),
            "}",
        ]  # fmt: skip
    lines += [f"{nodes[a]} -> {nodes[b]};" for a, b in sorted(shape.edges)]
    return [*lines, "}"]


def _subject_title(subjects: Sequence[str]) -> str:
    named = ", ".join(subjects[:_MOST_NAMED])
    more = len(subjects) - _MOST_NAMED
    return f"{named} and {more} more, alike" if more > 0 else named


def _box(name: str, steps: Sequence[str], fill: str, frame: str) -> str:
    """Write a stage as an HTML-like label: its name, and below it its steps."""
    rows = "".join(f'<tr><td align="left">{html.escape(step)}</td></tr>' for step in steps)
    title = f'<tr><td align="left"><b>{html.escape(name)}</b></td></tr>'
    return (
        f'<table border="1" color="{frame}" cellborder="0" cellspacing="0" cellpadding="3"'
        f' bgcolor="{fill}">{title}{rows}</table>'
    )
