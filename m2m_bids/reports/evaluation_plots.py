"""Plot an evaluation for its page: overlap of every pair, Table 2's curve, Fig. 1."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median

from m2m_bids.reports.charts import MIN_BOX, Series, box_plot, line_plot
from m2m_bids.reports.evaluation_rows import (
    STARTS,
    Row,
    as_number,
    class_title,
    group_rows,
    group_title,
    is_own,
    mean_dsc,
    method_titles,
    modality_title,
    statistic,
)
from m2m_bids.reports.evaluation_tables import (
    DASH,
    head_row,
    share_table,
    table_html,
    value_cells,
)

STARTS_NAME, OTHERS_NAME, OWN_NAME = "nothing deformed", "other methods", "networks of m2m-bids"
FAMILIES = {STARTS_NAME: "#6b6b6b", OTHERS_NAME: "#c24e00", OWN_NAME: "#0072b2"}
CLASS_PREFIX = "dsc_"
CLASS_WIDTH_IN = 3.4

Log = Sequence[Mapping[str, float]]  # a run's validation log


def overlap_plots(records: Sequence[Row]) -> str:
    """
    Draw the DSC of every pair, over all classes and for each class.

    Parameters
    ----------
    records : sequence of mapping
        ``dsc``, and one ``dsc_<class>`` for each class.

    Returns
    -------
    str
        HTML; a sentence if no pair has a DSC.
    """
    panels, classes = "", ""
    for i, ((kind, modality), rows) in enumerate(group_rows(records).items()):
        name = group_title(kind, modality)
        panels += _figure(_plot_of(rows, "dsc", f"dsc-{i}", name))
        if small := _class_plots(rows, f"class-{i}", name):
            classes += (
                f'<h3>Classes: {escape(name)}</h3><div class="m2m-small-panels">{small}</div>'
            )
    if not panels:
        return "<p>No overlap was measured: without labels there is no DSC.</p>"
    colors = " ".join(
        '<span class="m2m-family">'
        f'<span class="m2m-key" style="background: {color}"></span>{name}</span>'
        for name, color in FAMILIES.items()
    )
    note = (
        "A point is a pair; point at it for its name. A box spans the quartiles, its line is the "
        "median, and the whiskers reach the farthest points within 1.5 box lengths. Boxes are "
        f"drawn from {MIN_BOX} pairs on. The classes share one axis.<br>{colors}"
    )
    return f'<p class="elem-caption">{note}</p><div class="m2m-panels">{panels}</div>{classes}'


def _class_plots(records: Sequence[Row], key: str, name: str) -> str:
    """Small plots of the DSC of each class, on one axis, in the order of the records' columns."""
    columns = dict.fromkeys(
        column for row in records for column in row if column.startswith(CLASS_PREFIX)
    )
    values = [as_number(row.get(column)) for row in records for column in columns]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    limits = (min(known) - 0.02, max(known) + 0.02)
    return "".join(
        _figure(_plot_of(records, column, f"{key}-{i}", name, limits=limits))
        for i, column in enumerate(columns)
    )


def _plot_of(
    records: Sequence[Row],
    column: str,
    key: str,
    name: str,
    *,
    limits: tuple[float, float] | None = None,
) -> str:
    """Box plots of a number of all methods that have it; an empty string if none has."""
    titles = method_titles(records)
    values: dict[str, dict[str, float]] = {}
    for row in records:
        value = as_number(row.get(column))
        if row.get("status") == "done" and value is not None:
            values.setdefault(titles[str(row["method"])], {})[str(row["pair"])] = value
    if not values:
        return ""
    of_class = class_title(column.removeprefix(CLASS_PREFIX)) if column != "dsc" else ""
    medians = ", ".join(
        f"{title} {median(scores.values()):.3f}" for title, scores in values.items()
    )
    return box_plot(
        values,
        key=key,
        description=f"Box plots of DSC, {of_class or 'mean of classes'}, {name}. "
        f"Medians: {medians}.",
        x_label="DSC",
        colors={title: FAMILIES[_family(method)] for method, title in titles.items()},
        title=of_class or name,
        limits=limits,
        **({"width_in": CLASS_WIDTH_IN} if of_class else {}),
    )


def _family(method: str) -> str:
    if method in STARTS:
        return STARTS_NAME
    return OWN_NAME if is_own(method) else OTHERS_NAME


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else ""


def share_curve(shares: Sequence[tuple[float, Row]]) -> str:
    """
    Draw and tabulate Table 2: DSC against the share of pre-aligned pairs.

    Parameters
    ----------
    shares : sequence of (float, mapping)
        Share in percent, and summary of the weights trained with it.

    Returns
    -------
    str
        HTML; an empty string without shares.
    """
    if not shares:
        return ""
    shares = sorted(shares, key=lambda item: item[0])
    places = {share: i for i, share in enumerate(dict.fromkeys(share for share, _ in shares))}
    series = []
    for modality in dict.fromkeys(str(summary["modality"]) for _, summary in shares):
        rows = [(places[share], row) for share, row in shares if row["modality"] == modality]
        series.append(
            Series(
                modality_title(modality),
                [place for place, _ in rows],
                [mean_dsc(row) for _, row in rows],
                interval=[
                    (statistic(row, "dsc", "ci_low"), statistic(row, "dsc", "ci_high"))
                    for _, row in rows
                ],
            )
        )
    plot = line_plot(
        series,
        key="shares",
        description="Mean DSC against the share of pre-aligned pairs; the table has the values.",
        x_label="share of pre-aligned pairs (%), not to scale",
        y_label="mean DSC, 95 % CI",
        x_ticks={place: f"{share:g}" for share, place in places.items()},
    )
    note = (
        "Each point is M2M-Reg trained anew, this share of its bridge pairs being aligned "
        "beforehand; 0 % is unsupervised. Bars: 95 % confidence interval over participants, "
        "which does not cover how much one training differs from the next."
    )
    table = share_table(shares, caption="DSC and folds by share of pre-aligned pairs")
    return (
        f'<p class="elem-caption">{note}</p>'
        f'<div class="m2m-panels">{_figure(plot)}<div>{table}</div></div>'
    )


def training_curves(trainings: Mapping[str, Log]) -> str:
    """
    Draw Fig. 1: overlap and similarity over the training of each run, on common axes.

    Parameters
    ----------
    trainings : mapping of str to sequence of mapping
        Validation log of each run by its title: ``iteration``, ``lncc`` and, where labels are
        known, ``dsc`` and ``dsc_before``.

    Returns
    -------
    str
        HTML; an empty string without logs.
    """
    trainings = {name: rows for name, rows in trainings.items() if rows}
    if not trainings:
        return ""
    plots = _training_plot(trainings, "dsc", "DSC (dashed: before)")
    plots += _training_plot(trainings, "lncc", "LNCC of both modalities")
    note = (
        "Validation pairs during training, as in Fig. 1 of the M2M-Reg paper. Where the "
        "similarity of both modalities (LNCC) rises while the overlap of labels (DSC) falls, the "
        "similarity misleads."
    )
    return (
        f'<p class="elem-caption">{note}</p><div class="m2m-panels">{plots}</div>'
        f"{_training_table(trainings)}"
    )


def _training_plot(trainings: Mapping[str, Log], column: str, label: str) -> str:
    series = [
        Series(
            name,
            [row["iteration"] for row in rows],
            [as_number(row.get(column)) for row in rows],
            reference=_first_known(rows, "dsc_before") if column == "dsc" else None,
        )
        for name, rows in trainings.items()
    ]
    if all(y is None for line in series for y in line.y):
        return ""
    return _figure(
        line_plot(
            series,
            key=f"training-{column}",
            description=f"{label} over iterations; the table has the first and last values.",
            x_label="iteration",
            y_label=label,
        )
    )


def _training_table(trainings: Mapping[str, Log]) -> str:
    body = ""
    for name, rows in trainings.items():
        before = _first_known(rows, "dsc_before")
        values = (
            f"{rows[-1]['iteration']:.0f}",
            DASH if before is None else f"{before:.3f}",
            _course(rows, "dsc"),
            _course(rows, "lncc"),
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{value_cells(values)}</tr>'
    names = ("Run", "Iterations", "DSC before", "DSC, first → last", "LNCC, first → last")
    return table_html("Trainings", head_row(names), body)


def _first_known(rows: Iterable[Mapping[str, float]], column: str) -> float | None:
    values = (as_number(row.get(column)) for row in rows)
    return next((value for value in values if value is not None), None)


def _course(rows: Log, column: str) -> str:
    first, last = _first_known(rows, column), _first_known(reversed(rows), column)
    return DASH if first is None or last is None else f"{first:.3f} → {last:.3f}"
