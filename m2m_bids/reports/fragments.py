"""Build the pieces of HTML in a report; every string from files is escaped, none is trusted."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

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
    >>> "<tr><th>Tracer</th><td>&lt;script&gt;</td></tr>" in summary_html({"Tracer": "<script>"})
    True
    """
    box = f'<p class="alert alert-{level}" role="alert">{escape(message)}</p>' if message else ""
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{_cell_text(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f'{box}<table class="table table-sm m2m-facts">{rows}</table>' if rows else box


def scan_table_html(rows: Sequence[Mapping[str, object]]) -> str:
    """
    Tabulate scans and their numbers, one row each.

    Parameters
    ----------
    rows : sequence of mapping of str to object
        Cells by column name; columns appear in the order in which the rows first name them, and a
        missing or ``None`` cell is a dash. Units belong into the column names. The column
        ``status`` is shown in colour.

    Returns
    -------
    str
        HTML.
    """
    if not rows:
        return '<p class="alert alert-secondary" role="alert">No scan was found.</p>'
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(_table_cell(name, row.get(name)) for name in columns)}</tr>" for row in rows
    )
    return (
        '<div class="m2m-numbers"><table class="table table-sm table-striped">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def about_html(facts: Mapping[str, object], *, command: str = "") -> str:
    """
    List versions and the command line.

    Parameters
    ----------
    facts : mapping of str to object
        Versions, run identifier, times.
    command : str
        Command line of the run.

    Returns
    -------
    str
        HTML.
    """
    line = f"<h3>Command</h3>{text_html(command)}" if command else ""
    return summary_html(facts) + line


def text_html(content: str) -> str:
    """Show plain text as it is, in a box."""
    return f'<pre class="m2m-text">{escape(content)}</pre>'


def errors_html(log_dir: Path) -> str:
    """
    Show the crash files of a run.

    Parameters
    ----------
    log_dir : Path
        Folder of Nipype's crash files; it need not exist. Text files are shown whole; pickled
        ones are only named, since reading a pickle runs what is in it.

    Returns
    -------
    str
        HTML.
    """
    crash_files = sorted(Path(log_dir).glob("crash*")) if Path(log_dir).is_dir() else []
    if not crash_files:
        return '<p class="alert alert-success" role="alert">No errors to report.</p>'
    count = f"{len(crash_files)} step(s) failed. Click on a line for the details."
    parts = [f'<p class="alert alert-danger" role="alert">{count}</p>']
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


def citation_text(*, version: str, methods: str, software: Mapping[str, str]) -> str:
    """
    Fill in the text for a methods section, with references.

    Parameters
    ----------
    version : str
        Version of m2m-bids.
    methods : str
        Paragraphs on the steps that ran, Markdown.
    software : mapping of str to str
        Version of each package used.

    Returns
    -------
    str
        Markdown.
    """
    template = Template(files("m2m_bids.data").joinpath("citation.md").read_text("UTF-8"))
    versions = ", ".join(f"{name} {number}" for name, number in software.items())
    return template.substitute(version=version, methods=methods.strip(), software=versions)


def _cell_text(value: object) -> str:
    """Format and escape one value."""
    if value is None or value == "":
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "<br />".join(_cell_text(item) for item in value)
    return escape(str(value))


def _table_cell(column: str, value: object) -> str:
    """Format a cell: numbers to the right, a status as a badge, long text in several lines."""
    content = _cell_text(value)
    if column == "status":
        color = STATUS_COLORS.get(str(value), "info")
        return f'<td><span class="badge bg-{color}">{content}</span></td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="m2m-value">{content}</td>'
    return (
        f'<td class="m2m-long">{content}</td>'
        if len(content) > LONG_TEXT
        else f"<td>{content}</td>"
    )
