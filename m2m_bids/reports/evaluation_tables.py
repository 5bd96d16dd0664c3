"""Tabulate an evaluation for its page: Table 1, Table 2, and what failed."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal, NamedTuple

from m2m_bids.reports.evaluation_rows import (
    MODALITIES,
    STARTS,
    Row,
    baseline_of,
    is_own,
    least_p_value,
    mean_dsc,
    method_titles,
    modality_title,
    n_lost,
    n_pairs,
    statistic,
)

DASH = "–"  # noqa: RUF001 (the dash of an empty cell)
SIGNIFICANCE = 0.05


class Number(NamedTuple):
    """A column of Table 1 and how it is shown and judged."""

    key: str
    title: str
    detail: str  # unit, or which of two definitions
    digits: int
    best: Literal["highest", "lowest"]
    is_cost: bool  # of deforming: no merit of a method that does not
    definition: str

    @property
    def label(self) -> str:
        """Title with unit, plain text."""
        return f"{self.title} ({self.detail})" if self.detail else self.title


NUMBERS = (
    Number(
        "dsc",
        "DSC",
        "",
        3,
        "highest",
        False,
        "Dice similarity coefficient, 2 |A ∩ B| / (|A| + |B|), of the moved labels A and the "
        "fixed T1w's labels B: 0 apart, 1 equal. Mean over the classes, then over the pairs. A "
        "class that is in neither image is left out; one that is in one image only has 0.",
    ),
    Number(
        "hd95_mm",
        "HD95",
        "mm",
        2,
        "lowest",
        False,
        "95 % Hausdorff distance, mm: 95th percentile of the distances from the surface of the "
        "moved label to that of the fixed one or back, whichever is larger. Mean over the classes "
        "that are in both images, then over the pairs.",
    ),
    Number(
        "folding_percent",
        "%|J| ≤ 0",
        "world",
        3,
        "lowest",
        True,
        "Folds: share of the fixed brain's voxels where the Jacobian determinant of the whole "
        "map, in world millimetres, is not positive, percent.",
    ),
    Number(
        "folding_percent_paper",
        "%|J| < 0",
        "paper",
        3,
        "lowest",
        True,
        "Folds as the M2M-Reg paper counts them: share of the whole grid, background too, where "
        "the determinant of differences from voxel to voxel is negative, percent.",
    ),
    Number(
        "landmark_error_mm",
        "Landmarks",
        "mm",
        2,
        "lowest",
        False,
        "Mean distance between where the map puts landmarks of the fixed image and where the "
        "known or reference transform puts them, mm. Only where there is such a transform.",
    ),
    Number(
        "seconds",
        "Time",
        "s",
        1,
        "lowest",
        True,
        "Wall-clock time of the registration of one pair, s.",
    ),
    Number(
        "peak_memory_gb",
        "Memory",
        "GB",
        2,
        "lowest",
        True,
        "Largest memory in use during the registration of one pair, GB.",
    ),
)
DSC, FOLDING = NUMBERS[0], NUMBERS[2]


def main_table(summaries: Sequence[Row], records: Sequence[Row], *, caption: str) -> str:
    """
    Tabulate Table 1: a row for each method, a group of columns for each modality.

    Parameters
    ----------
    summaries : sequence of mapping
        Of one kind of pair.
    records : sequence of mapping
        Of the same kind; they say why a method has no numbers.
    caption : str
        Plain text.

    Returns
    -------
    str
        HTML. Columns without any value are left out.
    """
    rows = [*summaries, *records]
    found = {str(row["modality"]) for row in rows}
    modalities = [*(m for m in MODALITIES if m in found), *sorted(found - set(MODALITIES))]
    of_modality = {m: [row for row in summaries if row["modality"] == m] for m in modalities}
    columns = {m: _known_numbers(of_modality[m]) for m in modalities}
    body = []
    for method, title in method_titles(rows).items():
        cells = [f'<th scope="row">{escape(title)}</th>']
        for modality in modalities:
            tried = [
                row for row in records if (row["modality"], row["method"]) == (modality, method)
            ]
            cells += _method_cells(method, of_modality[modality], tried, columns[modality])
        css_class = ' class="m2m-own"' if is_own(method) else ""
        body.append(f"<tr{css_class}>{''.join(cells)}</tr>")
    return table_html(caption, _main_head(columns), "".join(body))


def _known_numbers(summaries: Sequence[Row]) -> list[Number]:
    """Numbers that at least one method has."""
    return [
        number
        for number in NUMBERS
        if any(statistic(row, number.key, "mean") is not None for row in summaries)
    ]


def _main_head(columns: Mapping[str, Sequence[Number]]) -> str:
    arrows = {"highest": "↑", "lowest": "↓"}
    groups, names = "", ""
    for modality, numbers in columns.items():
        groups += (
            f'<th scope="colgroup" colspan="{1 + len(numbers)}" class="m2m-first m2m-group">'
            f"{escape(modality_title(modality))}</th>"
        )
        names += '<th scope="col" class="m2m-first">Pairs</th>'
        for number in numbers:
            hint = escape(f"{number.definition} Best: {number.best}.")
            names += (
                f'<th scope="col"><abbr title="{hint}">{escape(number.title)}</abbr><br>'
                f"<small>{escape(number.detail)}</small> {arrows[number.best]}</th>"
            )
    return (
        f'<tr><th scope="col" rowspan="2">Method</th>{groups}</tr>'
        f'<tr class="m2m-names">{names}</tr>'
    )


def _method_cells(
    method: str, summaries: Sequence[Row], tried: Sequence[Row], columns: Sequence[Number]
) -> list[str]:
    """Cells of a method in the columns of a modality; `summaries` are of all its methods."""
    summary = next((row for row in summaries if row["method"] == method), None)
    if summary is None or not n_pairs(summary):
        span = f'colspan="{1 + len(columns)}"'
        reason = _why_nothing(tried)
        return [f'<td {span} class="m2m-first m2m-absent"><span>{reason}</span></td>']
    count = str(n_pairs(summary))
    if lost := n_lost(summary):
        count += f" of {n_pairs(summary) + lost}&nbsp;†"
    cells = [f'<td class="m2m-value m2m-first">{count}</td>']
    for number in columns:
        mean = mean_text(summary, number)
        is_best = competes(summary, number, summaries) and mean == best_text(number, summaries)
        lines = [f"<strong>{mean}</strong>" if is_best else mean]
        if (deviation := statistic(summary, number.key, "sd")) is not None:
            lines.append(f"± {deviation:.{number.digits}f}")
        if number is DSC:
            lines += _dsc_notes(summary, summaries)
        notes = "".join(f"<br><small>{line}</small>" for line in lines[1:])
        cells.append(f'<td class="m2m-value">{lines[0]}{notes}</td>')
    return cells


def _why_nothing(tried: Sequence[Row]) -> str:
    """Say why a method has no numbers, escaped."""
    reasons = list(
        dict.fromkeys(f"{row.get('status')}: {row.get('reason') or 'no reason'}" for row in tried)
    )
    if not reasons:
        return "not run"
    more = f" (other reasons: {len(reasons) - 1}, see below)" if len(reasons) > 1 else ""
    return escape(reasons[0] + more)


def mean_text(summary: Row, number: Number) -> str:
    """Write the mean of a number, a dash if it is not known."""
    mean = statistic(summary, number.key, "mean")
    return DASH if mean is None else f"{mean:.{number.digits}f}"


def interval_text(summary: Row, number: Number) -> str:
    """Write the confidence interval of a mean, a dash if it is not known."""
    low, high = (statistic(summary, number.key, name) for name in ("ci_low", "ci_high"))
    if low is None or high is None:
        return DASH
    return f"[{low:.{number.digits}f}, {high:.{number.digits}f}]"


def competes(summary: Row, number: Number, summaries: Sequence[Row]) -> bool:
    """
    Return whether a method may have the best mean of a number.

    Parameters
    ----------
    summary : mapping
    number : Number
    summaries : sequence of mapping
        Of all methods of the same kind and modality.

    Returns
    -------
    bool
        False for a number of fewer pairs than others have, since its mean is over other pairs,
        and for the cost of deforming where nothing is deformed.
    """
    count = f"{number.key}_n"
    return (
        statistic(summary, number.key, "mean") is not None
        and n_pairs(summary, count) == max(n_pairs(row, count) for row in summaries)
        and not (number.is_cost and summary["method"] in STARTS)
    )


def best_text(number: Number, summaries: Sequence[Row]) -> str | None:
    """
    Return the best mean of a number as it is shown, so that what looks equal is best together.

    Parameters
    ----------
    number : Number
    summaries : sequence of mapping
        Of all methods of one kind and modality.

    Returns
    -------
    str or None
        ``None`` with fewer than two methods that compete.
    """
    shown = [mean_text(row, number) for row in summaries if competes(row, number, summaries)]
    choose = max if number.best == "highest" else min
    return choose(shown, key=float) if len(shown) > 1 else None


def _dsc_notes(summary: Row, summaries: Sequence[Row]) -> list[str]:
    """Lines below a mean DSC: interval and test, HTML; no test where it could find nothing."""
    baseline = baseline_of(summaries)
    interval, p_value = interval_text(summary, DSC), statistic(summary, "dsc", "p")
    notes = [] if interval == DASH else [interval]
    if baseline is not None and summary["method"] == baseline["method"]:
        notes.append("best baseline")
    elif baseline is None or p_value is None:
        return notes
    elif least_p_value(summaries) < SIGNIFICANCE:
        notes.append(_test_text(p_value, mean_dsc(summary), mean_dsc(baseline)))
    return notes


def _test_text(p_value: float, mean: float | None, reference: float | None) -> str:
    if p_value >= SIGNIFICANCE or mean is None or reference is None:
        return p_text(p_value)
    sign, word = ("▲", "better") if mean > reference else ("▼", "worse")
    return (
        f'<span class="m2m-{word}"><span aria-hidden="true">{sign}</span>'
        f'<span class="visually-hidden">{word}</span> {p_text(p_value)}</span>'
    )


def p_text(p_value: float) -> str:
    """
    Write a p value, escaped.

    >>> p_text(0.0004), p_text(0.0312)
    ('p &lt; 0.001', 'p = 0.031')
    """
    return "p &lt; 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def share_table(shares: Sequence[tuple[float, Row]], *, caption: str) -> str:
    """
    Tabulate Table 2: DSC and folds against the share of pre-aligned pairs.

    Parameters
    ----------
    shares : sequence of (float, mapping)
        Share in percent, and summary of the weights trained with it.
    caption : str
        Plain text.

    Returns
    -------
    str
        HTML.
    """
    names = ("Pre-aligned pairs", "Registration", "Pairs", DSC.label, "95 % CI", FOLDING.label)
    rows = {
        (f"{share:g} %", modality_title(summary["modality"])): (
            str(n_pairs(summary)),
            mean_text(summary, DSC),
            interval_text(summary, DSC),
            mean_text(summary, FOLDING),
        )
        for share, summary in shares
    }
    body = "".join(
        f'<tr><th scope="row">{escape(share)}</th><td>{escape(modality)}</td>'
        f"{value_cells(values)}</tr>"
        for (share, modality), values in rows.items()
    )
    return table_html(caption, head_row(names), body)


def problem_table(records: Sequence[Row], *, caption: str) -> str:
    """
    List what is missing, failed or was kept rigid, once for each method and reason.

    Parameters
    ----------
    records : sequence of mapping
    caption : str
        Plain text.

    Returns
    -------
    str
        HTML; a sentence if there is nothing to list.
    """
    titles = method_titles(records)
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for record in records:
        status, reason = str(record.get("status")), str(record.get("reason") or "n/a")
        if status == "done":
            if reason in ("n/a", "nan"):
                continue
            status = "done, kept rigid"
        grouped.setdefault((titles[str(record["method"])], status, reason), []).append(record)
    if not grouped:
        return '<p class="alert alert-success">Every method ran on every pair.</p>'
    body = []
    for (title, status, reason), rows in grouped.items():
        names = dict.fromkeys(modality_title(row["modality"]) for row in rows)
        body.append(
            f'<tr><th scope="row">{escape(title)}</th><td>{escape(status)}</td>'
            f'<td class="m2m-long">{escape(reason)}</td><td>{"<br>".join(map(escape, names))}</td>'
            f'<td class="m2m-long">{_pair_list(rows)}</td></tr>'
        )
    head = head_row(("Method", "Status", "Reason", "Registration", "Pairs"))
    return table_html(caption, head, "".join(body))


def _pair_list(records: Sequence[Row]) -> str:
    """Name the pairs, escaped; several are folded away."""
    pairs = list(dict.fromkeys(str(row["pair"]) for row in records))
    names = "<br>".join(map(escape, pairs))
    if len(pairs) == 1:
        return names
    return f"<details><summary>{len(pairs)} pairs</summary>{names}</details>"


def head_row(names: Sequence[str]) -> str:
    """Name the columns of a table, given as plain text."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return f"<tr>{cells}</tr>"


def value_cells(values: Sequence[str]) -> str:
    """Make cells of numbers, given as plain text."""
    return "".join(f'<td class="m2m-value">{escape(value)}</td>' for value in values)


def table_html(caption: str, head: str, body: str, *, css_class: str = "") -> str:
    """
    Put rows into a table that scrolls sideways in a narrow window, its first column standing.

    Parameters
    ----------
    caption : str
        Plain text; it also names the region that scrolls.
    head, body : str
        HTML of ``tr`` elements.
    css_class : str
        Further class of the table.

    Returns
    -------
    str
        HTML.
    """
    return (
        f'<div class="m2m-wide" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<table class="table table-sm m2m-evaluation {css_class}">'
        f"<caption>{escape(caption)}</caption>"
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )
