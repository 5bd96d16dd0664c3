import re
import shutil
import subprocess

import nibabel as nb
import numpy as np
import pytest
import yaml

from m2m_bids.reports import html
from m2m_bids.reports.figures import anatomical_figure, flicker, select_labels
from m2m_bids.reports.fragments import (
    about_html,
    citation_text,
    errors_html,
    scan_table_html,
    summary_html,
)
from m2m_bids.reports.html import find_figures, offline_template, write_subject_report
from m2m_bids.reports.jacobian import jacobian_figure

RUN = "20260101-000000_abc"
EVIL = "<script>alert('x')</script>"
SCANS = {
    "sub-01_ses-M000_trc-18FFDG_rec-coregavg": "pet",
    "sub-01_ses-M000_trc-18FFDG_rec-coregiso": "pet",
    "sub-01_ses-M012_trc-18FAV45_run-02": "pet",
    "sub-01": "pet",  # no session, no tracer: still a scan of its own
    "sub-01_ses-M000_param-FA": "dwimap",
}
STATES = ("initial", "rigid", "m2m", "jacobian")
SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'


@pytest.fixture
def out_dir(tmp_path):
    """An output folder with empty figures, below folders whose names look like entities."""
    root = tmp_path / "sub-99" / "ses-XX" / "out"
    figures = root / "sub-01" / "figures"
    figures.mkdir(parents=True)
    for stem, suffix in SCANS.items():
        for desc in STATES:
            (figures / f"{stem}_desc-{desc}_{suffix}.svg").write_text(SVG)
        summary = summary_html({"Tracer": f"{stem}{EVIL}"}, message="Registered.")
        (figures / f"{stem}_desc-summary_{suffix}.html").write_text(summary)
    (figures / "sub-01_ses-M000_desc-anatomical_T1w.svg").write_text(SVG)
    log_dir = root / "sub-01" / "log" / RUN
    log_dir.mkdir(parents=True)
    crash = f"Node: single_subject_01_wf.rigid\nin_file = {EVIL}\nno equals sign\nValueError: x\n"
    (log_dir / "crash-20260101-root-rigid.txt").write_text(crash)
    (root / "logs").mkdir()
    (root / "logs" / "CITATION.md").write_text(f"# How to cite\n{EVIL} {{{{ jinja }}}}\n")
    return root


ROWS = [
    {"scan": "sub-01_pet", "status": "done", "folds (%)": 0.001234},
    {"scan": "sub-01_ses-M012_pet", "status": "failed", "reason": EVIL},
]


def write(out_dir, **keywords):
    return write_subject_report(
        out_dir,
        "01",
        RUN,
        rows=ROWS,
        facts={"Weights": EVIL, "Device": "cpu"},
        about={"m2m-bids": "0.1.0"},
        command=f"m2m-bids '{EVIL}'",
        **keywords,
    )


# --- assembled page --------------------------------------------------------------------------


def test_report_holds_every_figure_once_in_order(out_dir):
    page = write(out_dir).read_text()
    assert (out_dir / "sub-01.html").is_file()
    shown = re.findall(r'data="\./([^"]+)"', page)
    expected = {str(f.relative_to(out_dir)) for f in (out_dir / "sub-01/figures").glob("*.svg")}
    assert sorted(shown) == sorted(expected)
    assert len(expected) == 21
    sections = re.findall(r'<h1 class="sub-report-title[^>]*>([^<]+)<', page)
    assert sections == ["Summary", "Anatomical", "PET", "FA", "About", "Methods", "Errors"]
    first = [name for name in shown if "trc-18FFDG_rec-coregavg" in name]
    assert [re.search("desc-([a-z0-9]+)", name)[1] for name in first] == list(STATES)


def test_scans_are_told_apart_by_titles(out_dir):
    page = write(out_dir).read_text()
    titles = re.findall(r'<h2 class="sub-report-group[^>]*>([^<]+)</h2>', page)
    assert titles == [
        "ses-M000",
        "PET",
        "ses-M000, trc-18FFDG, rec-coregavg",
        "ses-M000, trc-18FFDG, rec-coregiso",
        "ses-M012, trc-18FAV45, run-02",
        "ses-M000, param-FA",
    ]
    body = page[page.index("</nav>") :]
    ids = re.findall(r'<div id="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'class="dropdown-item" href="#([^"]+)"', page)
    assert len(targets) == 6
    assert set(targets) <= set(ids)


def test_strings_from_files_are_text(out_dir):
    page = write(out_dir).read_text()
    assert "alert(" in page
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 9
    assert "{{ jinja }}" in page


def test_figures_are_not_rewritten(out_dir):
    before = {f: f.read_bytes() for f in out_dir.rglob("*.svg")}
    write(out_dir)
    assert {f: f.read_bytes() for f in out_dir.rglob("*.svg")} == before


def test_report_again_replaces_and_leaves_no_other_files(out_dir):
    first = write(out_dir).read_text()
    assert write(out_dir).read_text() == first
    assert sorted(f.name for f in out_dir.iterdir()) == ["logs", "sub-01", "sub-01.html"]


def test_page_without_figures_tells_what_failed(tmp_path):
    page = write_subject_report(tmp_path, "sub-7", RUN, rows=ROWS[1:]).read_text()
    assert "failed" in page
    assert "No errors to report" in page


@pytest.mark.parametrize("subject", ["", "01/..", "<b>", "sub-"])
def test_odd_subject_is_refused(tmp_path, subject):
    with pytest.raises(ValueError, match="subject"):
        write_subject_report(tmp_path, subject, RUN)


def test_names_alone_give_entities(tmp_path):
    file = tmp_path / "ses-XX"
    file.mkdir()
    (file / "sub-1_trc-A_desc-m2m_pet.svg").write_text(SVG)
    (file / "notes.txt").write_text("")
    (figure,) = find_figures(file)
    assert figure.scan == (("trc", "A"),)
    assert figure.entities["suffix"] == "pet"


# --- template --------------------------------------------------------------------------------


def test_template_needs_no_network():
    template = offline_template()
    assert "Bootstrap v5.2.3" in template
    assert "jQuery v3.6.0" in template
    assert not html.REMOTE_ASSET.search(
        re.sub(r"{% raw %}.*?{% endraw %}", "", template, flags=re.S)
    )
    assert "sourceMappingURL" not in template


@pytest.mark.parametrize(
    "asset",
    [
        '<script src="https://cdn.example.org/other@9/other.min.js"></script>',
        '<link rel="stylesheet" href="https://cdn.example.org/other.css">',
        "<script src='//cdn.example.org/other.js'></script>",
    ],
)
def test_unknown_remote_asset_is_refused(monkeypatch, tmp_path, asset):
    from nireports.assembler import data

    (tmp_path / "report.tpl").write_text(f"<head>{asset}</head><body></body>")
    monkeypatch.setattr(data, "load", lambda name: tmp_path / name)
    with pytest.raises(RuntimeError, match="needs the network"):
        offline_template()


def test_spec_covers_both_modalities_alike():
    spec = yaml.safe_load(html._asset("reports-spec.yml"))
    by_name = {section["name"]: section for section in spec["sections"]}
    assert by_name["PET"]["reportlets"] == by_name["FA"]["reportlets"]


# --- fragments -------------------------------------------------------------------------------


def test_table_keeps_columns_in_order_and_marks_what_is_missing():
    table = scan_table_html(ROWS)
    assert re.findall(r"<th>([^<]+)</th>", table) == ["scan", "status", "folds (%)", "reason"]
    assert "0.001234" in table
    assert table.count("&ndash;") == 2
    assert 'bg-danger">failed' in table
    assert "No scan" in scan_table_html([])


def test_fragments_format_and_escape():
    assert EVIL not in summary_html({EVIL: EVIL}, message=EVIL, level="warning")
    assert "a &lt;<br />1.5" in summary_html({"x": ["a <", 1.5]})
    assert ">yes<" in summary_html({"x": True})
    assert EVIL not in about_html({}, command=EVIL)


def test_errors_show_text_and_never_open_pickles(tmp_path):
    assert "No errors" in errors_html(tmp_path / "absent")
    (tmp_path / "crash-1.txt").write_text(f"Node: wf.node\n{EVIL}")
    (tmp_path / "crash-2.pklz").write_bytes(b"not a pickle")
    (tmp_path / "crash-3.txt").write_bytes(b"")
    shown = errors_html(tmp_path)
    assert "<summary>wf.node</summary>" in shown
    assert "3 step(s) failed" in shown
    assert "crash-2.pklz" in shown
    assert EVIL not in shown


def test_citation_is_filled_in():
    text = citation_text(version="1.2.3", methods="A $5 step.", software={"torch": "2.10"})
    assert "*m2m-bids* 1.2.3" in text
    assert "A $5 step." in text
    assert "Software: torch 2.10." in text
    for work in ("M2M-Reg", "ANTs", "Nipype", "GradICON", "MNI152"):
        assert work in text


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture
def real_report(tmp_path):
    """A report of the MNI152 template with all figures, 4 mm."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template, load_mni152_wm_mask

    t1w, mask, wm = (
        load(resolution=4)
        for load in (load_mni152_template, load_mni152_brain_mask, load_mni152_wm_mask)
    )
    labels = np.asarray(mask.dataobj).astype(np.uint8) + np.asarray(wm.dataobj).astype(np.uint8)
    dseg = nb.Nifti1Image(labels, mask.affine)
    figures = tmp_path / "sub-01" / "figures"
    anatomical_figure(t1w, mask, dseg, figures / "sub-01_desc-anatomical_T1w.svg")
    contours = {"white matter": select_labels(dseg, 2)}
    states = dict.fromkeys(("initial", "rigid", "m2m"), t1w)
    for stem, suffix, label in (("trc-FDG", "pet", "PET"), ("param-FA", "dwimap", "FA")):
        drawn = flicker(t1w, mask, states, tmp_path / "work", contours=contours, label=label)
        for name, file in drawn.items():
            shutil.copy(file, figures / f"sub-01_{stem}_desc-{name}_{suffix}.svg")
        ones = nb.Nifti1Image(np.ones(mask.shape, np.float32), mask.affine)
        jacobian_figure(ones, mask, figures / f"sub-01_{stem}_desc-jacobian_{suffix}.svg")
    return write_subject_report(tmp_path, "01", RUN, rows=ROWS, facts={"Weights": EVIL})


def browse(page, tmp_path, *arguments):
    """Open a page in Chromium, without a network, and return what it printed."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}",
        *arguments,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_page_works_in_a_browser_without_network(tmp_path, real_report):
    # The probe asks the page itself what it got, and writes the answer into its title.
    probe = """<script>window.addEventListener("load", function () {
      var objects = Array.from(document.querySelectorAll("object"));
      var style = getComputedStyle(document.querySelector(".navbar"));
      var toggle = document.querySelector(".dropdown-toggle");
      toggle.click();
      document.title = JSON.stringify([objects.length,
        objects.filter(function (o) { return o.offsetHeight > 300; }).length,
        style.position, typeof jQuery, typeof bootstrap,
        toggle.nextElementSibling.classList.contains("show")]);
    });</script>"""
    page = real_report.with_name("probe.html")
    page.write_text(real_report.read_text().replace("</head>", f"{probe}</head>", 1))
    done = browse(page, tmp_path, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert title == '[9,9,"fixed","function","object",true]'
    complaints = [
        line
        for line in done.stderr.splitlines()
        if "CONSOLE" in line or "ERR_" in line or "Failed to load" in line
    ]
    assert complaints == []
    # A missing figure is seen by the same means.
    next((tmp_path / "sub-01" / "figures").glob("*desc-rigid_pet.svg")).unlink()
    shown = browse(page, tmp_path, "--dump-dom")
    assert re.search(r"<title>(.*?)</title>", shown.stdout)[1] != title
