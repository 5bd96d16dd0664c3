"""Assemble the report of a participant with nireports, readable without a network."""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import yaml

from m2m_bids.reports.citation import Citation
from m2m_bids.reports.fragments import (
    about_html,
    errors_html,
    methods_html,
    scan_table_html,
    summary_html,
)
from m2m_bids.whole_files import flush

# What `svg.write_svg` and `charts` say of a figure, in its first tag.
DESCRIPTION = re.compile(r'aria-label="([^"]*)"')
SIZE = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
DESCRIBED_CHARACTERS = 5000
ASSETS = ("bootstrap.min.css", "report.css", "bootstrap.bundle.min.js")


def write_subject_report(
    out_dir: Path,
    subject: str,
    run_uuid: str,
    *,
    rows: Sequence[Mapping[str, object]] = (),
    facts: Mapping[str, object] | None = None,
    about: Mapping[str, object] | None = None,
    weights: Mapping[str, object] | None = None,
    command: str = "",
    citation: Citation | None = None,
    crash_files: Sequence[Path] = (),
) -> Path:
    """
    Write ``sub-<subject>.html`` from the figures in ``sub-<subject>/figures``.

    The text parts of the page are left beside the figures, as
    ``sub-<subject>_desc-*_report.html``.

    Parameters
    ----------
    out_dir : Path
        Root of the output dataset.
    subject : str
        Participant label, with or without ``sub-``.
    run_uuid : str
        Identifier of the run.
    rows : sequence of mapping
        Scans and their numbers, see `scan_table_html`.
    facts : mapping
        What was used: T1w, weights and their hash, device, thresholds.
    about : mapping
        Versions of the software.
    weights : mapping
        What the card of the weights says.
    command : str
        Command line of the run.
    citation : Citation, optional
        How the subject's scans were made, and whom to cite.
    crash_files : sequence of Path
        Of failed steps, see `errors_html`.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    ValueError
        If the label holds anything but letters, digits and ``+``.
    """
    subject = subject.removeprefix("sub-")
    if not re.fullmatch(r"[A-Za-z0-9+]+", subject):
        raise ValueError(f"subject is {subject!r}: expected letters and digits, as in 01")
    out_dir = Path(out_dir).absolute()
    figures_dir = out_dir / f"sub-{subject}" / "figures"
    parts = {
        "summary": summary_html({"Participant": f"sub-{subject}", **(facts or {})}),
        "numbers": scan_table_html(rows),
        "about": about_html({**(about or {}), "Run": run_uuid}, command=command, weights=weights),
        "methods": methods_html(citation.markdown, citation.bibtex)
        if citation
        else methods_html("No scan of this participant is registered."),
        "errors": errors_html(crash_files, _failures(rows)),
    }
    for name, html in parts.items():
        write_fragment(figures_dir, f"sub-{subject}_desc-{name}_report", html)
    return _assemble(out_dir, subject, run_uuid, find_figures(figures_dir))


def _failures(rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Say why scans have failed, by their names."""
    return {str(r["scan"]): str(r.get("reason")) for r in rows if r.get("status") == "failed"}


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


def write_fragment(figures_dir: Path, name: str, html: str) -> Path:
    """Write a piece of HTML to where the report finds it."""
    file = Path(figures_dir) / f"{name}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html, "UTF-8")
    return file


def _assemble(out_dir: Path, subject: str, run_uuid: str, figures: list[Figure]) -> Path:
    """Have nireports make the page, and put it in place once it is whole."""
    from nireports.assembler.report import Report, SubReport
    from nireports.assembler.reportlet import Reportlet

    class ScanReportlet(Reportlet):
        """Figures with words for those who do not see them, which nireports' own have not."""

        def __init__(self, query: dict):
            self.name, self.description = query["name"], None
            self.title, self.subtitle = query.get("title"), query.get("subtitle")
            found = _find(figures, query["bids"])
            self.components = [
                (_embed(figure, query, out_dir), query.get("caption")) for figure in found
            ]

    class SubjectReport(Report):
        """A report whose sections may repeat for every scan."""

        def index(self, config):
            for section in config["sections"]:
                parts = [ScanReportlet(query) for query in _expand(section, figures)]
                if shown := [part for part in parts if not part.is_empty()]:
                    is_nested = "scans" in section
                    self.sections.append(
                        SubReport(section["name"], isnested=is_nested, reportlets=shown)
                    )

    out_file = out_dir / f"sub-{subject}.html"
    with tempfile.TemporaryDirectory() as folder:
        template_file, spec_file = Path(folder, "report.tpl"), Path(folder, "spec.yml")
        template_file.write_text(page_template(), "UTF-8")
        spec = yaml.safe_load(_asset("reports-spec.yml"))
        spec |= {"template_path": str(template_file), "title": f"m2m-bids: sub-{subject}"}
        spec_file.write_text(yaml.safe_dump(spec, sort_keys=False), "UTF-8")
        report = SubjectReport(out_dir, run_uuid, bootstrap_file=spec_file, plugins=[])
        report.out_filename = out_dir / f".{out_file.name}.part"
        report.generate_report()
    flush(report.out_filename)
    os.replace(report.out_filename, out_file)
    return out_file


def page_template() -> str:
    """
    Put style sheets and script into the template of the page, which then needs no other file.

    Returns
    -------
    str
        Jinja2 template.
    """
    tags = {".css": "style", ".js": "script"}
    assets = []
    for name in ASSETS:
        tag = tags[Path(name).suffix]
        content = re.sub(r"(/[/*]# sourceMappingURL=)[^\n]*", "", _asset(name))
        assets.append(f"<{tag}>{{% raw %}}{content}{{% endraw %}}</{tag}>")
    return _asset("report.tpl").replace("{{ assets }}", "\n".join(assets))


def _find(figures: list[Figure], wanted: Mapping[str, object]) -> list[Figure]:
    """Figures with these entities; `scan` must match whole."""
    entities = {key: value for key, value in wanted.items() if key != "scan"}
    return [
        figure
        for figure in figures
        if wanted.get("scan") in (None, figure.scan)
        and all(figure.entities.get(key) == value for key, value in entities.items())
    ]


def _embed(figure: Figure, query: Mapping, out_dir: Path) -> str:
    """Show a figure: a piece of HTML as it is, a page in a frame, or an image."""
    file = Path(figure.path)
    shown_as = query.get("show", "picture")
    if file.suffix == ".html" and shown_as != "frame":
        return file.read_text("UTF-8")
    name = file.relative_to(out_dir).as_posix()
    address = f"./{quote(name)}"
    words = f"{query['subtitle']}, {query['scan']}"
    size = ""
    if file.suffix == ".svg":
        start = file.read_text("UTF-8")[:DESCRIBED_CHARACTERS]
        words = told[1] if (told := DESCRIPTION.search(start)) else words
        # Room is kept for what is not loaded yet, so that links into the page find their place.
        if found := SIZE.search(start):
            size = f' width="{found[1]}" height="{found[2]}"'
            size += f' style="aspect-ratio: {found[1]} / {found[2]}"'
    content = {
        "picture": f'<img src="{address}" alt="{words}" loading="lazy"{size}>',
        # Only so do animations stop where the pointer is.
        "object": f'<object type="image/svg+xml" data="{address}" aria-label="{words}"{size}>'
        f"{words}</object>",
        "frame": f'<iframe src="{address}" title="{words}" loading="lazy"></iframe>',
    }[shown_as]
    return (
        f'<div class="reportlet">{content}</div>'
        f'<small>File: <a href="{address}" target="_blank">{escape(name)}</a></small>'
    )


def anchor_of(scan: Iterable[tuple[str, str]], desc: str, suffix: str) -> str:
    """
    Name the place of a scan's figure in the report of its participant.

    Parameters
    ----------
    scan : iterable of (str, str)
        Entities of the figure's name, without the participant and description.
    desc, suffix : str
        Of the figure: "summary" for the head of the scan's part.
    """
    name = "_".join(f"{key}-{value}" for key, value in scan) or suffix
    return f"{name}_{desc}_{suffix}"


def _expand(section: dict, figures: list[Figure]) -> list[dict]:
    """Reportlets of a section, repeated for each scan under a title where the section says so."""
    suffix = section.get("scans")
    if suffix is None:
        start = f"m2m-{section['name'].lower()}"
        return [{**query, "name": f"{start}-{i}"} for i, query in enumerate(section["reportlets"])]
    expanded = []
    scans = sorted({figure.scan for figure in figures if figure.entities["suffix"] == suffix})
    for scan in scans:
        title = ", ".join(f"{key}-{value}" for key, value in scan) or section["name"]
        is_first = True
        for query in section["reportlets"]:
            bids = {**query["bids"], "suffix": suffix, "scan": scan}
            if not _find(figures, bids):
                continue
            anchor = anchor_of(scan, bids["desc"], suffix)
            expanded.append({
                **query,
                "bids": bids,
                "name": escape(anchor),
                "scan": escape(title),
                "title": escape(title) if is_first else None,
            })  # fmt: skip
            is_first = False
    return expanded


def _asset(name: str) -> str:
    """Read a file of ``data/report``."""
    return files("m2m_bids.data").joinpath("report", name).read_text("UTF-8")
