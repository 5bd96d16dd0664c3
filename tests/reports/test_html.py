import re

import pytest
import yaml

from m2m_bids.reports import html
from m2m_bids.reports.citation import Citation
from m2m_bids.reports.fragments import (
    about_html,
    errors_html,
    methods_html,
    scan_table_html,
    summary_html,
    table_html,
)
from m2m_bids.reports.html import find_figures, page_template, write_subject_report

RUN = "20260101-000000_abc"
EVIL = "<script>alert('x')</script>"
SCANS = {
    "sub-01_ses-M000_trc-18FFDG_rec-coregavg": "pet",
    "sub-01_ses-M000_trc-18FFDG_rec-coregiso": "pet",
    "sub-01_ses-M012_trc-18FAV45_run-02": "pet",
    "sub-01": "pet",  # no session, no tracer: still a scan of its own
    "sub-01_ses-M000_param-FA": "dwimap",
}
STATES = ("native", "initial", "rigid", "affine", "m2m", "grid", "jacobian", "cycle", "suvr")
SVG = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" '
    'aria-label="a &lt;figure&gt;"/>'
)


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
        (figures / f"{stem}_desc-viewer_{suffix}.html").write_text("<!DOCTYPE html>a page")
    (figures / "sub-01_ses-M000_desc-anatomical_T1w.svg").write_text(SVG)
    log_dir = root / "sub-01" / "log" / RUN
    log_dir.mkdir(parents=True)
    crash = f"Node: single_subject_01_wf.rigid\nin_file = {EVIL}\nno equals sign\nValueError: x\n"
    (log_dir / "crash-20260101-root-rigid.txt").write_text(crash)
    return root


ROWS = [
    {"scan": "sub-01_pet", "status": "done", "folds (%)": 0.001234},
    {"scan": "sub-01_ses-M012_pet", "status": "failed", "reason": EVIL},
]


CITATION = Citation(
    f"# How to cite\n{EVIL} {{{{ jinja }}}}\n", "", f"@article{{key,\n  title = {{{EVIL}}}\n}}\n"
)


def write(out_dir, **keywords):
    return write_subject_report(
        out_dir,
        "01",
        RUN,
        rows=ROWS,
        facts={"Weights": EVIL, "Device": "cpu"},
        about={"m2m-bids": "0.1.0"},
        command=f"m2m-bids '{EVIL}'",
        citation=CITATION,
        crash_files=sorted(out_dir.glob("sub-01/log/*/crash*")),
        **keywords,
    )


# --- assembled page --------------------------------------------------------------------------


def test_report_holds_every_figure_once_in_order(out_dir):
    page = write(out_dir).read_text()
    assert (out_dir / "sub-01.html").is_file()
    shown = re.findall(r'(?:data|img src)="\./([^"]+)"', page)
    expected = {str(f.relative_to(out_dir)) for f in (out_dir / "sub-01/figures").glob("*.svg")}
    assert sorted(shown) == sorted(expected)
    assert len(expected) == 46
    sections = re.findall(r'<h2 class="sub-report-title[^>]*>([^<]+)<', page)
    assert sections == ["Summary", "Anatomical", "PET", "FA", "About", "Methods", "Errors"]
    first = [name for name in shown if "trc-18FFDG_rec-coregavg" in name]
    assert [re.search("desc-([a-z0-9]+)", name)[1] for name in first] == list(STATES)


def test_what_is_shown_has_words(out_dir):
    """Images have those of their file, frames those of the scan; each is there only once."""
    page = write(out_dir).read_text()
    assert page.count('alt="a &lt;figure&gt;"') == 26
    assert page.count('aria-label="a &lt;figure&gt;"') == 20
    titles = re.findall(r'<iframe src="[^"]+" title="([^"]+)" loading="lazy">', page)
    assert "Viewer, ses-M000, trc-18FFDG, rec-coregavg" in titles
    assert len(set(titles)) == len(SCANS)
    assert "a page" not in page


def test_scans_are_told_apart_by_titles(out_dir):
    page = write(out_dir).read_text()
    titles = re.findall(r'<h3 class="sub-report-group[^>]*>([^<]+)</h3>', page)
    assert titles == [
        "ses-M000",
        "PET",
        "ses-M000, trc-18FFDG, rec-coregavg",
        "ses-M000, trc-18FFDG, rec-coregiso",
        "ses-M012, trc-18FAV45, run-02",
        "ses-M000, param-FA",
    ]
    body = page[page.index("</nav>") :]
    ids = re.findall(r' id="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'class="dropdown-item" href="#([^"]+)"', page)
    assert len(targets) == 6
    assert set(targets) <= set(ids)


def test_strings_from_files_are_text(out_dir):
    page = write(out_dir).read_text()
    assert "alert(" in page
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 10
    assert "{{ jinja }}" in page


def test_figures_are_not_rewritten(out_dir):
    before = {f: f.read_bytes() for f in out_dir.rglob("*.svg")}
    write(out_dir)
    assert {f: f.read_bytes() for f in out_dir.rglob("*.svg")} == before


def test_report_again_replaces_and_leaves_no_other_files(out_dir):
    first = write(out_dir).read_text()
    assert write(out_dir).read_text() == first
    assert sorted(f.name for f in out_dir.iterdir()) == ["sub-01", "sub-01.html"]


def test_report_is_on_the_disk_before_it_has_its_name(out_dir, renamed):
    file = write(out_dir)
    assert renamed == {file: file.stat().st_size}


def test_page_without_figures_tells_what_failed(tmp_path):
    page = write_subject_report(tmp_path, "sub-7", RUN, rows=ROWS[1:]).read_text()
    assert "sub-01_ses-M012_pet failed: &lt;script&gt;" in page
    assert "No errors to report" not in page
    assert "No errors to report" in write_subject_report(tmp_path, "7", RUN).read_text()


@pytest.mark.parametrize("subject", ["", "01/..", "<b>", "sub-", '0"1', "0'1"])
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


def test_page_needs_no_network(out_dir):
    template = page_template()
    assert "Bootstrap v5.2.3" in template
    assert "sourceMappingURL" not in template
    page = write(out_dir).read_text()
    # Links that a reader may follow are allowed, what a browser loads by itself is not.
    assert not re.search(r"""(?:src|data|<link[^>]* href)=["'](?:https?:)?//""", page)
    assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", page)
    assert page.count("<script>") == page.count("</script>") == 1


def test_spec_covers_both_modalities_alike():
    spec = yaml.safe_load(html._asset("reports-spec.yml"))
    by_name = {section["name"]: section for section in spec["sections"]}
    assert by_name["PET"]["reportlets"] == by_name["FA"]["reportlets"]


# --- fragments -------------------------------------------------------------------------------


def test_table_keeps_columns_in_order_and_marks_what_is_missing():
    table = scan_table_html(ROWS)
    assert re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', table) == [
        "scan",
        "status",
        "folds (%)",
        "reason",
    ]
    assert "0.001234" in table
    assert table.count("&ndash;") == 2
    assert 'bg-danger">failed' in table
    assert '<th scope="col" class="m2m-value">folds (%)</th>' in table
    assert "No scan" in scan_table_html([])


def test_fragments_format_and_escape():
    assert EVIL not in summary_html({EVIL: EVIL}, message=EVIL, level="warning")
    assert "a &lt;<br />1.5" in summary_html({"x": ["a <", 1.5]})
    assert ">yes<" in summary_html({"x": True})
    assert EVIL not in about_html({}, command=EVIL, weights={EVIL: EVIL})
    assert EVIL not in methods_html(EVIL, EVIL)
    assert EVIL not in table_html([{EVIL: EVIL, "a": 1}], name=f'"{EVIL}')


def test_errors_show_text_and_never_open_pickles(tmp_path):
    assert "No errors" in errors_html([])
    (tmp_path / "crash-1.txt").write_text(f"Node: wf.node\n{EVIL}")
    (tmp_path / "crash-2.pklz").write_bytes(b"not a pickle")
    (tmp_path / "crash-3.txt").write_bytes(b"")
    shown = errors_html(sorted(tmp_path.iterdir()), {EVIL: EVIL})
    assert "<summary>wf.node</summary>" in shown
    assert "3 step(s) failed" in shown
    assert "crash-2.pklz" in shown
    assert EVIL not in shown
