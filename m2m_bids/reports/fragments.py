"""Build the pieces of HTML in a report; every string from files is escaped, none is trusted."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Literal

from m2m_bids.reports.citation import markdown_html

Level = Literal["info", "success", "warning", "danger"]
STATUS_COLORS = {
    "done": "success",
    "rigid only": "warning text-dark",
    "skipped": "secondary",
    "failed": "danger",
}
LONG_TEXT = 40  # characters from which a table cell may break into lines


def summary_html(facts: Mapping[str, object], *, message: str = "", level: Level = "info") -> str:
    """
    List what was used and decided, below an optional message.

    Parameters
    ----------
    facts : mapping of str to object
        Name and value of each line; a list becomes one line per item.
    message : str
        Said first, in a coloured box: the decision, or what went wrong.
    level : {'info', 'success', 'warning', 'danger'}
        Colour of the message.

    Returns
    -------
    str
        HTML.

    Examples
    --------
    >>> ">Tracer</th><td>&lt;script&gt;</td></tr>" in summary_html({"Tracer": "<script>"})
    True
    """
    box = f'<p class="alert alert-{level}">{escape(message)}</p>' if message else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{_cell_text(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'{box}<table class="table table-sm m2m-facts">{rows}</table>' if rows else box


def scan_table_html(rows: Sequence[Mapping[str, object]]) -> str:
    """Tabulate scans and their numbers, as `table_html` does."""
    if not rows:
        return '<p class="alert alert-secondary">No scan was found.</p>'
    return table_html(rows, name="Scans and numbers")


def table_html(rows: Sequence[Mapping[str, object]], *, name: str, is_whole: bool = False) -> str:
    """
    Tabulate numbers, of a scan or a region in each row; a large table scrolls.

    Parameters
    ----------
    rows : sequence of mapping of str to object
        One at least. Cells by column name; columns appear in the order in which the rows first
        name them, and a missing or ``None`` cell is a dash. Units belong into the column names.
        The column ``status`` is shown in colour.
    name : str
        What the table shows, for those who do not see it.
    is_whole : bool
        Show all rows, however many there are.

    Returns
    -------
    str
        HTML.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(
        f'<th scope="col"{_side(rows[0].get(column))}>{escape(str(column))}</th>'
        for column in columns
    )
    body = "".join(
        f"<tr>{''.join(_table_cell(column, row.get(column)) for column in columns)}</tr>"
        for row in rows
    )
    whole = " m2m-whole" if is_whole else ""
    return (
        f'<div class="m2m-numbers{whole}" tabindex="0" role="region" aria-label="{escape(name)}">'
        '<table class="table table-sm table-striped">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def about_html(
    facts: Mapping[str, object],
    *,
    command: str = "",
    weights: Mapping[str, object] | None = None,
) -> str:
    """
    List versions, the weights and the command line.

    Parameters
    ----------
    facts : mapping of str to object
        Versions, run identifier, times.
    command : str
        Command line of the run.
    weights : mapping of str to object
        What the card of the weights says.

    Returns
    -------
    str
        HTML.
    """
    line = f"<h3>Command</h3>{text_html(command)}" if command else ""
    card = f"<h3>Weights of the network</h3>{summary_html(weights)}" if weights else ""
    versions = f"<h3>Versions</h3>{summary_html(facts)}" if facts else ""
    return f"{versions}{card}{line}"


def text_html(content: str) -> str:
    """Show plain text as it is, in a box."""
    return f'<pre class="m2m-text">{escape(content)}</pre>'


def errors_html(crash_files: Sequence[Path], failures: Mapping[str, str] | None = None) -> str:
    """
    Show what has failed.

    Parameters
    ----------
    crash_files : sequence of Path
        Nipype's crash files. Text files are shown whole; pickled ones are only named, since
        reading a pickle runs what is in it.
    failures : mapping of str to str, optional
        Why scans have failed, by their names.

    Returns
    -------
    str
        HTML.
    """
    parts = [
        f'<p class="alert alert-danger">{escape(scan)} failed: {escape(reason)}</p>'
        for scan, reason in (failures or {}).items()
    ]
    if crash_files:
        count = f"{len(crash_files)} step(s) failed. Click on a line for the details."
        parts.append(f'<p class="alert alert-danger">{count}</p>')
    elif not parts:
        return '<p class="alert alert-success">No errors to report.</p>'
    for file in crash_files:
        if file.suffix == ".txt":
            content = file.read_text(encoding="UTF-8", errors="replace")
        else:
            content = f"Open with: nipypecli crash {file}"
        name = content.splitlines()[0].removeprefix("Node:").strip() if content else ""
        summary = name if file.suffix == ".txt" and name else file.name
        parts.append(
            f"<details><summary>{escape(summary)}</summary>"
            f"<p><small>File: <code>{escape(str(file))}</code></small></p>{text_html(content)}"
            "</details>"
        )
    return "".join(parts)


def methods_html(markdown: str, bibtex: str = "") -> str:
    """
    Show the text for a methods section, and its references as BibTeX.

    Parameters
    ----------
    markdown : str
        Text of ``logs/CITATION.md``.
    bibtex : str
        Of ``logs/CITATION.bib``.

    Returns
    -------
    str
        HTML for a section of a page.
    """
    shown = f'<div class="m2m-methods">{markdown_html(markdown, deeper=2)}</div>'
    if bibtex:
        shown += f"<details><summary>References as BibTeX</summary>{text_html(bibtex)}</details>"
    return shown


def _cell_text(value: object) -> str:
    """Format and escape one value."""
    if value is None or value == "":
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # Large ones as whole numbers, as those beside them may be.
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "<br />".join(_cell_text(item) for item in value)
    return escape(str(value))


def _table_cell(column: str, value: object) -> str:
    """Format a cell: numbers to the right, a status as a badge, long text in several lines."""
    content = _cell_text(value)
    if column == "status":
        color = STATUS_COLORS.get(str(value), "info")
        return f'<td><span class="badge bg-{color}">{content}</span></td>'
    if side := _side(value):
        return f"<td{side}>{content}</td>"
    return (
        f'<td class="m2m-long">{content}</td>'
        if len(content) > LONG_TEXT
        else f"<td>{content}</td>"
    )


def _side(value: object) -> str:
    """Attribute of a cell that puts numbers to the right."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return ' class="m2m-value"' if is_number else ""
