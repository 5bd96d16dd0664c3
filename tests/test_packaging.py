"""The wheel and the source distribution hold what they should, built from a clean copy."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from m2m_bids import __version__

ROOT = Path(__file__).parents[1]
PARTS = ("m2m_bids", "workflows", "tests", "containers", "docs", ".ci")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.partial")


def package_files(folder):
    """Files of a folder of the checkout, relative to it, as POSIX names."""
    return {
        file.relative_to(ROOT / folder).as_posix()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in {".pyc", ".partial"}
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Names in the source distribution, without its top folder, and the opened wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=LEFT_OUT)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    # Without isolation nothing is downloaded; the wheel is built from the source distribution.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    result = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist_file,), (wheel_file,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist_file) as archive:
        sdist_names = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel_file) as wheel:
        yield sdist_names, wheel


def test_wheel_holds_the_package_and_its_workflows(distributions):
    names = set(distributions[1].namelist())
    assert {f"m2m_bids/workflows/{name}" for name in package_files("workflows")} <= names
    assert {f"m2m_bids/{name}" for name in package_files("m2m_bids")} <= names


def test_wheel_holds_the_data(distributions):
    names = set(distributions[1].namelist())
    for name in (
        "citation.md",
        "mni152_64x3mm.npz",
        "quality.json",
        "report/reports-spec.yml",
        "weights/default/card.json",
        "weights/default/weights.safetensors",
    ):
        assert f"m2m_bids/data/{name}" in names


def test_wheel_holds_nothing_else(distributions):
    tops = {name.partition("/")[0] for name in distributions[1].namelist()}
    assert tops == {"m2m_bids", f"m2m_bids-{__version__}.dist-info"}
    assert not [name for name in distributions[1].namelist() if "test" in Path(name).name]


def test_wheel_is_below_the_limit_of_its_weights(distributions):
    weights = [info for info in distributions[1].infolist() if "/weights/" in info.filename]
    assert 0 < sum(info.file_size for info in weights) < 25e6


def test_wheel_has_its_commands_and_licences(distributions):
    _, wheel = distributions
    info = f"m2m_bids-{__version__}.dist-info"
    commands = wheel.read(f"{info}/entry_points.txt").decode()
    assert "m2m-bids = m2m_bids.cli.run:main" in commands
    assert "m2m-bids-simulate = m2m_bids.cli.simulate:main" in commands
    licences = {name for name in wheel.namelist() if name.startswith(f"{info}/licenses/")}
    assert f"{info}/licenses/LICENSE" in licences
    assert f"{info}/licenses/m2m_bids/data/LICENSES.md" in licences
    assert f"{info}/licenses/m2m_bids/data/report/LICENSES.md" in licences


def test_source_distribution_can_be_built_and_tested(distributions):
    names = distributions[0]
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGES.md"):
        assert name in names
    for name in ("constraints.txt", "Makefile", "CITATION.cff", ".ci/run", "tests/conftest.py"):
        assert name in names
    assert {f"workflows/{name}" for name in package_files("workflows")} <= names
    assert {f"tests/{name}" for name in package_files("tests")} <= names


def test_constraints_pin_every_requirement():
    pins = [
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["test"], *extras["docs"]]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    assert names <= set(pins)
    assert len(pins) == len(set(pins))
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {__version__}\n" in citation
    assert __version__ in (ROOT / "CHANGES.md").read_text()
