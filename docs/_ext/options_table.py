"""A directive that lists the options of a command from its parser."""

import argparse
from collections.abc import Iterator, Sequence
from importlib import import_module

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_TITLES = {"positional arguments": "what is read and written", "options": "others"}


class OptionsTable(SphinxDirective):
    """``{options} MODULE:FUNCTION``: a table for each group of the parser that it builds."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the tables in Markdown, and have them read."""
        module, _, function = self.arguments[0].partition(":")
        parser = getattr(import_module(module), function)()
        text = "\n".join(_parser_lines(parser))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _parser_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Write a table for each command, or for each group of options where there is one command."""
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in commands:
        for name, command in action.choices.items():
            yield from _group_lines(f"{parser.prog} {name}", command._actions)
    if commands:
        return
    for group in parser._action_groups:
        title = _TITLES.get(group.title, group.title)
        yield from _group_lines(f"{title[0].upper()}{title[1:]}", group._group_actions)


def _group_lines(title: str, actions: Sequence[argparse.Action]) -> Iterator[str]:
    rows = [_row(action) for action in actions if action.dest != "help"]
    if rows:
        yield from (f"## {title}", "", "| | |", "|---|---|", *rows, "")


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
    text = (action.help or "").replace("%%", "%")
    for mark in ("|", "--", "*"):
        text = text.replace(mark, f"\\{mark}")
    values = _values(action).replace("|", "\\|")
    return f"| {names} {f'`{values}`' if values else ''} | {text.replace('<', '&lt;')} |"


def _values(action: argparse.Action) -> str:
    """Name the values of an option as its help does."""
    if action.nargs == 0 or not (action.option_strings or action.metavar):
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    name = action.metavar or choices or action.dest.upper()
    return f"{name} ..." if action.nargs == "+" else str(name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("options", OptionsTable)
    return {"parallel_read_safe": True}
