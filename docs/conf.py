"""Sphinx: the documentation, built without a network by `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from m2m_bids import __version__
from m2m_bids.api import DEFAULT_WEIGHTS

project = "m2m-bids"
author = "the developers of m2m-bids"
copyright = "2026, the developers of m2m-bids"  # noqa: A001
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "interface_fields",
    "mathml",
    "options_table",
]
exclude_patterns = ["_build", "_ext"]
default_role = "literal"
html_math_renderer = "mathml"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"m2m-bids {__version__}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Names of defaults, not their values, among which are paths of this machine.
autodoc_preserve_defaults = True
# They are listed in the docstrings.
autodoc_default_options = {"exclude-members": "input_spec, output_spec"}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Inputs", "params_style"), ("Outputs", "params_style")]
# Nothing is looked up on the network: only references to this package are checked.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!m2m_bids).*")]


def name_default_weights(app, what, name, obj, options, signature, annotation):
    """Name the default weights: signatures that dataclasses make have their path."""
    if signature and str(DEFAULT_WEIGHTS) in signature:
        return signature.replace(repr(DEFAULT_WEIGHTS), "DEFAULT_WEIGHTS"), annotation
    return None


def setup(app):
    """Follow autodoc."""
    app.connect("autodoc-process-signature", name_default_weights)
