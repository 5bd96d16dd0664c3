"""The text for a methods section, with those references that it names: Markdown, HTML, BibTeX."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib.resources import files
from string import Template
from typing import NamedTuple

CITED = re.compile(r"\[(@[\w-]+(?:; ?@[\w-]+)*)\]")
# Levels of headings in the text, which has its parts four deep, to those of a page of its own.
HEADINGS = {1: 1, 2: 2, 4: 3}
MOST_NAMED = 5


class Citation(NamedTuple):
    """One text in three forms: two to read, and its references as BibTeX."""

    markdown: str
    html: str
    bibtex: str


def cite(
    *,
    methods: str,
    software: Mapping[str, str],
    templates: Sequence[str] = (),
    has_t1w: bool = True,
    untold: Sequence[str] = (),
) -> Citation:
    """
    Fill in the text for a methods section, with the references that it names.

    Parameters
    ----------
    methods : str
        What was done, Markdown; references are ``[@key; @other]``, with keys of
        ``data/references.json``.
    software : mapping of str to str
        Version of m2m-bids and of each package used.
    templates : sequence of str
        Templates that scans without a T1w were registered to.
    has_t1w : bool
        Whether scans were registered to a T1w.
    untold : sequence of str
        Scans of which it is not known what was done.

    Returns
    -------
    Citation

    Raises
    ------
    KeyError
        If a key is not among the references.
    """
    template = Template(files("m2m_bids.data").joinpath("citation.md").read_text("UTF-8"))
    version = software.get("m2m-bids", "")
    text = template.safe_substitute(
        version=version,
        target=_target(templates, has_t1w),
        methods=methods.strip(),
        software=", ".join(f"{name} {number}" for name, number in software.items()),
        untold=_untold(untold),
    )
    keys = sorted({key for cited in CITED.findall(text) for key in _keys(cited)})
    references = "\n".join(f"- {_reference(_references()[key])}" for key in keys)
    cited = CITED.sub(lambda found: _in_text(_keys(found[1])), text)
    markdown = cited.replace("$references", references)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>How to cite m2m-bids {escape(version)}</title>\n</head>\n<body>\n<main>\n"
        f"{markdown_html(markdown)}</main>\n</body>\n</html>\n"
    )
    return Citation(markdown, page, "\n".join(_bibtex(key, _references()[key]) for key in keys))


def markdown_html(text: str, *, deeper: int = 0) -> str:
    r"""
    Turn Markdown into HTML; HTML in it is shown as text.

    Parameters
    ----------
    text : str
        Markdown with headings of the levels 1, 2 and 4.
    deeper : int
        Added to the level of each heading, to put the text into a page.

    Returns
    -------
    str
        HTML.

    Examples
    --------
    >>> markdown_html("#### *A* <b>", deeper=1)
    '<h4><em>A</em> &lt;b&gt;</h4>\n'
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False})
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            level = int(token.tag[1:])
            token.tag = f"h{min(HEADINGS.get(level, level) + deeper, 6)}"
    return parser.renderer.render(tokens, parser.options, {})


@lru_cache(maxsize=1)
def _references() -> dict[str, dict]:
    return json.loads(files("m2m_bids.data").joinpath("references.json").read_text("UTF-8"))


def _target(templates: Sequence[str], has_t1w: bool) -> str:
    """Say what images were registered to."""
    named = f"the template {' or '.join(templates)}"
    if not has_t1w:
        return named
    target = "the T1-weighted image of the same participant"
    return f"{target} or, for lack of one, to {named}" if templates else target


def _untold(scans: Sequence[str]) -> str:
    """Say of which scans the text does not tell."""
    if not scans:
        return ""
    shown = ", ".join(scans[:MOST_NAMED])
    if (n_more := len(scans) - MOST_NAMED) > 0:
        shown += f" and {n_more} more"
    untold = "The text does not tell how these were made, by a version that did not keep it"
    return f"\n\n{untold}: {shown}."


def _keys(cited: str) -> list[str]:
    """Keys in ``@a; @b``."""
    return [key.strip().removeprefix("@") for key in cited.split(";")]


def _in_text(keys: Sequence[str]) -> str:
    """Spell a citation: (Choo et al., 2025; Fischl, 2012)."""
    spelled = []
    for key in keys:
        entry = _references()[key]
        first, *others = (author.partition(",")[0] for author in entry["author"])
        who = f"{first} et al." if len(others) > 1 else " & ".join([first, *others])
        spelled.append(f"{who}, {entry['year']}")
    return f"({'; '.join(spelled)})"


def _reference(entry: Mapping) -> str:
    """Spell an entry of the list of references."""
    *first, last = entry["author"]
    who = f"{', '.join(first)}, & {last}" if first else last
    where = f"*{entry.get('journal') or entry['booktitle']}*"
    if "volume" in entry:
        where += f", {entry['volume']}" + (f"({entry['number']})" if "number" in entry else "")
    if "pages" in entry:
        where += f", {entry['pages']}"
    address = f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url")
    link = f" <{address}>" if address else ""
    note = f" ({entry['note']})" if "note" in entry else ""
    return f"{who} ({entry['year']}). {entry['title']}. {where}.{link}{note}"


def _bibtex(key: str, entry: Mapping) -> str:
    """Spell an entry in BibTeX, UTF-8; double braces keep the capitals of a title."""
    fields = {name: value for name, value in entry.items() if name not in ("type", "author")}
    fields = {"author": " and ".join(entry["author"]), **fields}
    fields["title"] = f"{{{fields['title']}}}"
    if "pages" in fields:
        fields["pages"] = fields["pages"].replace("-", "--")
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@{entry['type']}{{{key},\n{lines}}}\n"
