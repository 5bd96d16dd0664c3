"""Imports point down: each part of the package uses only the parts listed for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "registration": {"json_files", "whole_files"},
    "spatial": {"json_files", "whole_files"},
    "json_files": set(),
    "whole_files": set(),
    "processes": set(),
    "bids": {"json_files", "spatial"},
    "preprocessing": {"spatial"},
    "evaluation": {"spatial", "whole_files"},
    "quantification": {"preprocessing", "spatial"},
    "quality": {"preprocessing", "spatial"},
    "simulation": {"registration", "spatial"},
    "reports": {"spatial", "whole_files"},
    "api": {"preprocessing", "registration", "simulation", "spatial"},
    "cohort": {"api", "evaluation", "json_files", "registration", "spatial", "whole_files"},
    "baselines": {"api", "preprocessing", "processes", "registration", "spatial"},
    "interfaces": {
        "api",
        "baselines",
        "bids",
        "cohort",
        "evaluation",
        "preprocessing",
        "quality",
        "quantification",
        "reports",
        "spatial",
        "whole_files",
    },
    "workflows": {"bids", "interfaces", "json_files", "settings", "spatial"},
    "cli": {
        "api",
        "baselines",
        "bids",
        "cohort",
        "evaluation",
        "json_files",
        "processes",
        "quality",
        "quantification",
        "registration",
        "reports",
        "settings",
        "simulation",
        "spatial",
        "workflows",
    },
}


def source_files(part):
    folder = ROOT / "workflows" if part == "workflows" else ROOT / "m2m_bids" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported_parts(path):
    """Parts of m2m_bids that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("m2m_bids."))


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_down(part):
    used = {name for path in source_files(part) for name in imported_parts(path)}
    assert used <= ALLOWED[part] | {part, "data", "__version__"}


def test_registration_is_pure_torch():
    code = "import sys, m2m_bids.registration; print({'nipype', 'nibabel'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"
