"""The documentation is built without warnings, and holds what it should."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2m_bids.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
# Pages that a checkout may lack.
OPTIONAL_PAGES = ("cluster", "quality", "reliability")


def build(source, out_dir):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", source, out_dir]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=source)


@pytest.fixture
def copy(tmp_path):
    """Copy what the documentation is made of."""
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("Sphinx is not installed: pip install '.[docs]'")
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("_build"))
    shutil.copy(ROOT / "CHANGES.md", folder)
    return folder


@pytest.mark.slow
def test_documentation_is_built_without_warnings(copy, tmp_path):
    result = build(copy / "docs", tmp_path / "html")
    assert (result.returncode, result.stderr) == (0, "")
    usage = (tmp_path / "html" / "usage.html").read_text()
    for action in build_parser()._actions:
        for name in set(action.option_strings) - {"-h", "--help"}:
            assert f'<span class="pre">{name}</span>' in usage
    api = (tmp_path / "html" / "api.html").read_text()
    for name in ("m2m_bids.api.register_files", "m2m_bids.workflows.base.init_m2m_bids_wf"):
        assert f'id="{name}"' in api
    # No path of the machine that built it.
    assert str(ROOT) not in re.sub(r"<[^>]*>", "", api)


@pytest.mark.slow
def test_pages_that_a_checkout_lacks_are_found_once_they_are_there(copy, tmp_path):
    for name in OPTIONAL_PAGES:
        page = copy / "docs" / f"{name}.md"
        if not page.is_file():
            page.write_text(f"# Guide to {name}\n\nWords.\n")
    assert build(copy / "docs", tmp_path / "html").stderr == ""
    index = (tmp_path / "html" / "index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in OPTIONAL_PAGES)


def test_pictures_are_small_and_there():
    named = set()
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        named |= set(re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8")))
    files = {file.name: file.stat().st_size for file in PICTURES.iterdir()}
    assert named == set(files)
    assert max(files.values()) < 150_000


def test_messages_of_the_troubleshooting_page_exist():
    """What a user is told to look for is in the program, or is put together or the system's."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    others = {"BrokenProcessPool", "No space left on device", "KeyboardInterrupt",
              "A process in the process pool was terminated abruptly",
              "SUVNotComputed", "SUVRNotComputed"}  # fmt: skip
    source = " ".join(
        re.sub(r'"\s*\n?\s*f?"', "", file.read_text(encoding="utf-8"))
        for folder in ("m2m_bids", "workflows")
        for file in (ROOT / folder).rglob("*.py")
    )
    terms = re.findall(r"^(`.*)\n: ", page, re.MULTILINE)
    assert len(terms) > 30
    for message in re.findall(r"`([^`]+)`", "\n".join(terms)):
        if message in others:
            continue
        for part in message.split("…"):
            assert part.strip(" :,%") in source, message
