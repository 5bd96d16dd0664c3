"""Assemble the report of a participant with nireports, readable without a network."""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import yaml

from m2m_bids.reports.fragments import (
    about_html,
    errors_html,
    scan_table_html,
    summary_html,
    text_html,
)

REMOTE_ASSET = re.compile(
    r"""<(?:script|link|img|iframe|object)\b[^>]*(?:src|href|data)=["'](?:https?:)?//[^>]*>""",
    re.IGNORECASE,
)
SCRIPT_LINK = re.compile(r'<script src="https?://[^"]*/(?P<name>[^/"]+)"[^>]*></script>')
STYLE_LINK = re.compile(r'<link href="https?://[^"]*/(?P<name>[^/"]+)"[^>]*>')
# npm's jquery package names the file that the CDN calls jquery-3.6.0.min.js without its version.
VERSION_IN_NAME = re.compile(r"-\d+(\.\d+)*(?=\.min\.)")


def write_subject_report(
    out_dir: Path,
    subject: str,
    run_uuid: str,
    *,
    rows: Sequence[Mapping[str, object]] = (),
    facts: Mapping[str, object] | None = None,
    about: Mapping[str, object] | None = None,
    command: str = "",
) -> Path:
    """
    Write ``sub-<subject>.html`` from the figures in ``sub-<subject>/figures``.

    Besides the rows and facts given here, the page takes in ``logs/CITATION.md`` and the crash
    files under ``sub-<subject>/log/<run_uuid>``. Its own text parts are left beside the figures
    as ``sub-<subject>_desc-*_report.html``.

    Parameters
    ----------
    out_dir : Path
        Root of the output dataset.
    subject : str
        Participant label, with or without ``sub-``.
    run_uuid : str
        Identifier of the run, which names the folder of its crash files.
    rows : sequence of mapping
        Scans and their numbers, see `scan_table_html`.
    facts : mapping
        What was used: T1w, weights and their hash, device, thresholds.
    about : mapping
        Versions of the software.
    command : str
        Command line of the run.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    ValueError
        If the label holds anything but letters, digits and ``+``.
    RuntimeError
        If nireports' template needs a file from the network that does not come with m2m-bids.
    """
    subject = subject.removeprefix("sub-")
    if not re.fullmatch(r"[A-Za-z0-9+]+", subject):
        raise ValueError(f"subject is {subject!r}: expected letters and digits, as in 01")
    out_dir = Path(out_dir).absolute()
    figures_dir = out_dir / f"sub-{subject}" / "figures"
    citation_file = out_dir / "logs" / "CITATION.md"
    citation = citation_file.read_text("UTF-8") if citation_file.is_file() else ""
    parts = {
        "summary": summary_html({"Participant": f"sub-{subject}", **(facts or {})}),
        "numbers": scan_table_html(rows),
        "about": about_html({**(about or {}), "Run": run_uuid}, command=command),
        "methods": text_html(citation or "No logs/CITATION.md was written."),
        "errors": errors_html(out_dir / f"sub-{subject}" / "log" / run_uuid),
    }
    figures_dir.mkdir(parents=True, exist_ok=True)
    for name, html in parts.items():
        (figures_dir / f"sub-{subject}_desc-{name}_report.html").write_text(html, "UTF-8")
    return _assemble(out_dir, subject, run_uuid, find_figures(figures_dir))


def offline_template() -> str:
    """
    Put the style sheet and scripts into nireports' template in place of its links to them.

    Returns
    -------
    str
        Jinja2 template.

    Raises
    ------
    RuntimeError
        If the installed nireports links to a file of another name than those in ``data/report``.
    """
    from nireports.assembler import data

    template = data.load("report.tpl").read_text("UTF-8")
    template = SCRIPT_LINK.sub(lambda link: _inline(link, "script"), template)
    template = STYLE_LINK.sub(lambda link: _inline(link, "style"), template)
    own_style = f"<style>{_raw(_asset('report.css'))}</style>"
    template = template.replace("</head>", f"{own_style}\n</head>", 1)
    template = template.replace('<body style="font-family: helvetica;">', "<body>")
    without_raw = re.sub(r"{% raw %}.*?{% endraw %}", "", template, flags=re.DOTALL)
    if remote := REMOTE_ASSET.search(without_raw):
        raise RuntimeError(
            f"the report template of the installed nireports needs the network: {remote[0][:120]} "
            "is not among the files in m2m_bids/data/report. Install nireports 25 or 26."
        )
    return template


class Figure(NamedTuple):
    """A file for the report; `entities` are those of its name, by their short keys."""

    path: str
    entities: dict[str, str]

    @property
    def scan(self) -> tuple[tuple[str, str], ...]:
        """Entities that tell scans apart: all but the participant, description and format."""
        left_out = {"sub", "desc", "extension", "suffix"}
        return tuple(item for item in self.entities.items() if item[0] not in left_out)


def find_figures(figures_dir: Path) -> list[Figure]:
    """
    Read the names of the figures in a folder.

    Only the names count: nireports' own index reads entities from the whole path, and a folder
    such as ``ses-01`` above the output would become the session of every figure.

    Parameters
    ----------
    figures_dir : Path
        Folder of ``.svg`` and ``.html`` files.

    Returns
    -------
    list of Figure
        Sorted by name.
    """
    found = []
    for file in sorted(Path(figures_dir).iterdir()):
        if file.suffix not in (".svg", ".html"):
            continue
        *pairs, suffix = file.stem.split("_")
        entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
        found.append(Figure(str(file), {**entities, "suffix": suffix, "extension": file.suffix}))
    return found


def _assemble(out_dir: Path, subject: str, run_uuid: str, figures: list[Figure]) -> Path:
    """Have nireports make the page, and put it in place once it is whole."""
    from nireports.assembler.report import Report, SubReport
    from nireports.assembler.reportlet import Reportlet

    class SubjectReport(Report):
        """A report whose sections may repeat for every scan."""

        def index(self, config):
            for section in config["sections"]:
                queries = _expand(section, figures)
                made = (
                    Reportlet(_Layout(out_dir, figures), config=query, out_dir=out_dir)
                    for query in queries
                )
                if reportlets := [reportlet for reportlet in made if not reportlet.is_empty()]:
                    self.sections.append(
                        SubReport(
                            section["name"], isnested="scans" in section, reportlets=reportlets
                        )
                    )

    out_file = out_dir / f"sub-{subject}.html"
    with tempfile.TemporaryDirectory() as folder:
        template_file, spec_file = Path(folder, "report.tpl"), Path(folder, "spec.yml")
        template_file.write_text(offline_template(), "UTF-8")
        spec = yaml.safe_load(_asset("reports-spec.yml"))
        spec |= {"template_path": str(template_file), "title": f"m2m-bids: sub-{subject}"}
        spec_file.write_text(yaml.safe_dump(spec, sort_keys=False), "UTF-8")
        report = SubjectReport(out_dir, run_uuid, bootstrap_file=spec_file, plugins=[])
        report.out_filename = out_dir / f".{out_file.name}.part"
        report.generate_report()
    os.replace(report.out_filename, out_file)
    return out_file


class _Layout:
    """The part of a pybids layout that nireports' reportlets use."""

    def __init__(self, root: Path, figures: list[Figure]):
        self.root = str(root)
        self._figures = figures

    def get(self, **query: object) -> list[Figure]:
        """Figures with these entities; `scan` must match whole."""
        scan = query.pop("scan", None)
        return [
            figure
            for figure in self._figures
            if scan in (None, figure.scan)
            and all(figure.entities.get(key) == value for key, value in query.items())
        ]


def _expand(section: dict, figures: list[Figure]) -> list[dict]:
    """Reportlets of a section, repeated for each scan under a title where the section says so."""
    suffix = section.get("scans")
    if suffix is None:
        named = {"name": f"m2m-{section['name'].lower()}"}
        return [
            {**query, "name": f"{named['name']}-{i}"}
            for i, query in enumerate(section["reportlets"])
        ]
    expanded = []
    scans = sorted({figure.scan for figure in figures if figure.entities["suffix"] == suffix})
    for scan in scans:
        name = "_".join(f"{key}-{value}" for key, value in scan) or suffix
        title = ", ".join(f"{key}-{value}" for key, value in scan) or section["name"]
        is_first = True
        for query in section["reportlets"]:
            bids = {**query["bids"], "suffix": suffix, "scan": scan}
            if not _Layout(Path(), figures).get(**bids):
                continue
            anchor = f"{name}_{bids['desc']}_{suffix}"
            extra = {"title": escape(title)} if is_first else {}
            expanded.append({**query, "bids": bids, "name": escape(anchor), **extra})
            is_first = False
    return expanded


def _inline(link: re.Match, tag: str) -> str:
    """Replace a link to a file on the network by the file, if it is one of those shipped."""
    name = VERSION_IN_NAME.sub("", link["name"])
    if not files("m2m_bids.data").joinpath("report", name).is_file():
        return link[0]
    content = re.sub(r"(/[/*]# sourceMappingURL=)[^\n]*", "", _asset(name))
    if f"</{tag}" in content.lower():
        raise RuntimeError(f"{name} holds a closing {tag} tag and cannot be put into a page")
    return f"<{tag}>{_raw(content)}</{tag}>"


def _raw(content: str) -> str:
    """Keep Jinja2 from reading a text."""
    return f"{{% raw %}}{content}{{% endraw %}}"


def _asset(name: str) -> str:
    """Read a file of ``data/report``."""
    return files("m2m_bids.data").joinpath("report", name).read_text("UTF-8")
