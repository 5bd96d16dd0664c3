"""Add the inputs and outputs of Nipype interfaces, which are traits, to their docstrings."""

from collections.abc import Iterator

from sphinx.application import Sphinx


def add_fields(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Append to a docstring what its interface takes and gives."""
    for title, attribute in (("Inputs", "input_spec"), ("Outputs", "output_spec")):
        spec = getattr(obj, attribute, None)
        if what == "class" and spec is not None:
            lines += ["", *_field_lines(title, spec)]


def _field_lines(title: str, spec: type) -> Iterator[str]:
    yield from (f".. rubric:: {title}", "")
    for name, trait in spec().items():
        needed = " (needed)" if trait.mandatory else ""
        yield from (f"``{name}``{needed}", f"    {trait.desc or ''}", "")


def setup(app: Sphinx) -> dict[str, bool]:
    """Follow autodoc."""
    app.connect("autodoc-process-docstring", add_fields)
    return {"parallel_read_safe": True}
