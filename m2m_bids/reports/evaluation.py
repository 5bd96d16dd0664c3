"""Write the page of an evaluation: tables, plots and pictures, readable without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from m2m_bids.reports.evaluation_plots import Log, overlap_plots, share_curve, training_curves
from m2m_bids.reports.evaluation_rows import (
    KINDS,
    Row,
    as_number,
    group_rows,
    method_titles,
    modality_title,
)
from m2m_bids.reports.evaluation_tables import head_row, main_table, problem_table, table_html
from m2m_bids.reports.evaluation_text import TABLE_NOTE, caveats, counts, definitions, verdicts
from m2m_bids.reports.fragments import about_html, summary_html
from m2m_bids.reports.page import write_page
from m2m_bids.reports.pictures import FIXED_COLOR, MOVED_COLOR, ExamplePair, draw_example

TITLE = "Evaluation of registrations"


@dataclass(frozen=True)
class EvaluationRun:
    """
    What an evaluation was, as its page tells it.

    Parameters
    ----------
    facts : mapping of str to object
        Data, labels, weights and their hash, device: name and value, or list of values.
    caveats : sequence of str
        What a reader must know of this run, such as what was reduced; shown before the general
        ones.
    command : str
        Command line.
    software : mapping of str to object
        Versions.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    command: str = ""
    software: Mapping[str, object] = field(default_factory=dict)


def write_evaluation_report(
    out_file: Path,
    records: Sequence[Row],
    summaries: Sequence[Row],
    *,
    run: EvaluationRun | None = None,
    trainings: Mapping[str, Log] | None = None,
    shares: Sequence[tuple[float, Row]] = (),
    examples: Sequence[ExamplePair] = (),
) -> Path:
    """
    Write the page of an evaluation.

    The page is one file: it loads nothing and runs nothing. Parts for which nothing is given are
    left out. Every text from the arguments is escaped.

    Parameters
    ----------
    out_file : Path
        HTML file to write; its folder is made.
    records : sequence of mapping
        A row for each pair and method, as in ``evaluation.tsv``.
    summaries : sequence of mapping
        A row for each kind, modality and method, as in ``summary.tsv``: ``n``,
        ``n_failed`` and ``n_missing`` pairs, ``dsc_baseline`` and ``dsc_p``, and for each number
        ``dsc_n``, ``dsc_mean``, ``dsc_sd``, ``dsc_ci_low``, ``dsc_ci_high`` and the like.
    run : EvaluationRun, optional
        What was run.
    trainings : mapping of str to sequence of mapping, optional
        Validation log of each run by its title, as `m2m_bids.reports.training.draw_training`
        takes it: Fig. 1.
    shares : sequence of (float, mapping)
        Share of pre-aligned pairs in percent, and the summary of the weights trained with it:
        Table 2.
    examples : sequence of ExamplePair
        Pairs to show: Fig. 3.

    Returns
    -------
    Path
        `out_file`.

    Raises
    ------
    ValueError
        If there are no records, or the brain mask of an example is empty.
    """
    if not records:
        raise ValueError("records is empty: expected a row for each pair and method, found none")
    run = run or EvaluationRun()
    facts = {**counts(records), "Methods": "; ".join(method_titles(records).values()), **run.facts}
    sections = {
        "In short": verdicts(summaries),
        "What was run": summary_html(facts),
        "Table 1": _table_1(records, summaries),
        "Overlap of every pair": overlap_plots(records),
        "Table 2": share_curve(shares),
        "Training": training_curves(trainings or {}),
        "Pictures": _pictures(examples, records),
        "Failures": problem_table(records, caption="Missing, failed, or kept rigid"),
        "Definitions": definitions(),
        "Caveats": caveats(records, summaries, run.caveats),
        "Software": about_html(run.software, command=run.command),
    }
    shown = {name: content for name, content in sections.items() if content}
    return write_page(out_file, TITLE, shown)


def _table_1(records: Sequence[Row], summaries: Sequence[Row]) -> str:
    """Table 1 of each kind of pair, and how to read it."""
    tables = ""
    for kind in dict.fromkeys(kind for kind, _ in group_rows([*records, *summaries])):
        of_kind = [[row for row in rows if row["kind"] == kind] for rows in (summaries, records)]
        tables += main_table(*of_kind, caption=f"Registration {KINDS.get(kind, kind)}")
    return f'{tables}<p class="elem-caption">{TABLE_NOTE}</p>'


def _pictures(examples: Sequence[ExamplePair], records: Sequence[Row]) -> str:
    """Fig. 3: a row for each pair, a column for each method."""
    if not examples:
        return ""
    methods = {
        method: title
        for method, title in method_titles(records).items()
        if any(method in example.moved for example in examples)
    }
    scores = {(row["pair"], row["method"]): as_number(row.get("dsc")) for row in records}
    body = ""
    for example in examples:
        drawn = draw_example(example, methods)
        # Long names break between their entities.
        pair = escape(example.pair).replace("_", "_<wbr>")
        name = f"{pair}<br><small>{escape(modality_title(example.modality))}"
        cells = "".join(
            _picture_cell(drawn.get(method), scores.get((example.pair, method)))
            for method in methods
        )
        body += f'<tr><th scope="row">{name}</small></th><td>{drawn["fixed"]}</td>{cells}</tr>'
    grid = table_html(
        "Moved images by pair and method",
        head_row(("Pair", "T1w (fixed)", *methods.values())),
        body,
        css_class="m2m-grid",
    )
    return f'<p class="elem-caption">{_picture_note(examples)}</p>{grid}'


def _picture_cell(svg: str | None, dsc: float | None) -> str:
    if svg is None:
        return "<td><small>no result</small></td>"
    return f"<td>{svg}{'' if dsc is None else f'<small>DSC {dsc:.3f}</small>'}</td>"


def _picture_note(examples: Sequence[ExamplePair]) -> str:
    note = "Middle axial and coronal slice; L is the participant's left. All images of a pair "
    note += "show the same slices, its moved images also in the same grey levels."
    structures = dict.fromkeys(name for example in examples for name in example.structures)
    if not structures:
        return note
    return (
        f"{note} Outlines of {escape(', '.join(structures))}: "
        f'<span class="m2m-key" style="background: {FIXED_COLOR}"></span>where the fixed T1w has '
        f'them, <span class="m2m-key" style="background: {MOVED_COLOR}"></span>where the method '
        "put those of the moving image."
    )
