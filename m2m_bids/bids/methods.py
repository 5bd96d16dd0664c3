"""What workflows say of themselves: kept in the sidecars of their images, joined to one text."""

from collections.abc import Iterable, Mapping
from typing import Any

METHODS_FIELD = "Methods"
"""Field of the sidecar of a registered image: paragraphs, by heading, of how it was made."""
# Registration comes after the preparation of all kinds of scans, quantification at the end.
_LAST = ("Registration", "Quantification")

Methods = Mapping[str, list[str]]


def read_description(text: str) -> dict[str, list[str]]:
    r"""
    Split what a workflow says of itself.

    Parameters
    ----------
    text : str
        A heading, and paragraphs below it, separated by empty lines; or nothing.

    Returns
    -------
    dict
        Paragraphs by heading.

    Examples
    --------
    >>> read_description("#### PET\n\nOne.\n\nTwo.\n")
    {'PET': ['One.', 'Two.']}
    """
    heading, *paragraphs = (part.strip() for part in text.split("\n\n"))
    return {heading.removeprefix("#### "): paragraphs} if heading else {}


def merge_methods(parts: Iterable[Methods]) -> dict[str, list[str]]:
    """
    Put together what parts of a workflow, or several scans, say of themselves.

    Parameters
    ----------
    parts : iterable of mapping
        Paragraphs by heading.

    Returns
    -------
    dict
        Each paragraph once, under its heading.
    """
    merged: dict[str, dict[str, None]] = {}
    for part in parts:
        for heading, paragraphs in part.items():
            merged.setdefault(heading, {}).update(dict.fromkeys(paragraphs))
    return {heading: list(merged[heading]) for heading in sorted(merged, key=_rank)}


def methods_markdown(methods: Methods) -> str:
    r"""
    Write methods in Markdown.

    Examples
    --------
    >>> methods_markdown({"PET": ["One.", "Two."]})
    '#### PET\n\nOne.\n\nTwo.\n'
    """
    sections = methods.items()
    return "\n".join("\n\n".join((f"#### {name}", *texts)) + "\n" for name, texts in sections)


def methods_in(sidecar: Mapping[str, Any]) -> dict[str, list[str]]:
    """Read the methods of a registered image; none of one that does not have them."""
    content = sidecar.get(METHODS_FIELD)
    if not isinstance(content, dict):
        return {}
    return {
        heading: [text for text in paragraphs if isinstance(text, str)]
        for heading, paragraphs in content.items()
        if isinstance(paragraphs, list)
    }


def _rank(heading: str) -> int:
    ranks = (rank for rank, name in enumerate(_LAST, 1) if heading.startswith(name))
    return next(ranks, 0)
