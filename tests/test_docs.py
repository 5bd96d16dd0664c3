"""The documentation is built without warnings, and holds what it should."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2m_bids.cli import convert, simulate
from m2m_bids.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "m2m-bids": build_parser(),
    "m2m-bids.sif": build_parser(),
    "m2m-bids-convert": convert._build_parser(),
    "m2m-bids-simulate": simulate._build_parser(),
}
# Options of docker, singularity, sbatch, torchrun, pip, dask, and of a module of this package.
OTHERS_OPTIONS = {
    *("--rm", "--gpus", "--user", "--build-arg", "--cleanenv", "--containall", "--nv"),
    *(
        "--array",
        "--export",
        "--time",
        "--partition",
        "--gres",
        "--comment",
        "--nproc-per-node",
        "--no-python",
        "--nthreads",
        "--workers",
    ),
}
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
    methods = (tmp_path / "html" / "methods.html").read_text()
    assert "<math" in methods
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css)', methods + usage + api)
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


def shown_commands():
    """List the lines of the pages that call a program: its name, its arguments, the page."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for line in re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE):
            words = [] if " build " in line else re.split(r"\s+#", line)[0].split()
            found = [index for index, word in enumerate(words) if word in PARSERS]
            if found and not {"LEVEL", "sbatch"} & set(words):
                _, *arguments = shlex.split(" ".join(words[found[-1] :]))
                yield pytest.param(words[found[-1]], arguments, id=f"{page.stem}: {line[:70]}")


@pytest.mark.parametrize(("program", "arguments"), list(shown_commands()))
def test_commands_of_the_pages_are_understood(program, arguments):
    PARSERS[program].parse_args(arguments)


def test_commands_of_the_pages_are_found():
    programs = [command.values[0] for command in shown_commands()]
    assert set(programs) == set(PARSERS)
    assert len(programs) > 15


def test_options_of_the_pages_exist():
    known = {name for parser in PARSERS.values() for name in options_of(parser)} | OTHERS_OPTIONS
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", text)
        assert {name.replace("_", "-") for name in named} <= known, page.name


def options_of(parser):
    """List the long options of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from options_of(command)


def test_rows_of_the_reliability_page_are_tests():
    """The last column has pytest's names of tests, below tests/; '::' alone is the same file."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.partition("## Faults")[2].partition("## ")[0]
    rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    assert len(rows) > 25
    for row in rows[2:]:
        file = ""
        named = re.findall(r"`([^`]*)`", row.split("|")[-2])
        assert named, row
        for test in named:
            name, *parts = test.split("::")
            file = name or file
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert parts, test
            for part in parts:
                assert re.search(rf"^ *(def|class) {part}\b", source, re.MULTILINE), test


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
