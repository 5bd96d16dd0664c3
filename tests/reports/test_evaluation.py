import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import nibabel as nb
import numpy as np
import pytest

from m2m_bids.evaluation.records import summarize, write_records
from m2m_bids.reports.evaluation import EvaluationRun, write_evaluation_report
from m2m_bids.reports.page import POLICY
from m2m_bids.reports.pictures import ExamplePair, MovedImage

EVIL = "\"'><script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "hr", "input", "link"}
METHODS = {
    "initial": ("Initial", 0.4),
    "rigid": ("Rigid", 0.5),
    "syn-mi": ("SyN (MI)", 0.6),
    "fireants-mi": ("FireANTs (MI)", None),
    "m2m:a": ("GradICON, M2M-Reg", 0.7),
}


def make_records(n_pairs=8, modalities=("pet", "fa"), kind="between"):
    """Records whose DSC is a method's level, a pair's offset and noise; FireANTs is missing."""
    generator = np.random.default_rng(0)
    records = []
    for modality in modalities:
        for i in range(n_pairs):
            offset = generator.normal(0, 0.02)
            for method, (title, level) in METHODS.items():
                record = {
                    "pair": f"pair-{i}-{modality}",
                    "moving_subject": f"{i:02d}",
                    "fixed_subject": f"{i + 1:02d}",
                    "modality": modality,
                    "kind": kind,
                    "method": method,
                    "title": title,
                    "status": "missing" if level is None else "done",
                    "reason": "install FireANTs with pip" if level is None else "n/a",
                }
                if level is not None:
                    dsc = level + offset + generator.normal(0, 0.01)
                    record |= {
                        "dsc": dsc,
                        "dsc_thalamus": dsc + 0.1,
                        "dsc_putamen": dsc - 0.1,
                        "hd95_mm": 5 - 4 * dsc,
                        "seconds": 10 * level,
                        "folding_percent": "n/a" if level < 0.6 else 0.0,
                    }
                records.append(record)
    return records


def pictures(records):
    data = np.zeros((16, 18, 16), np.float32)
    data[4:12, 4:14, 4:12] = 1
    image = nb.Nifti1Image(data, np.diag([8.0, 8, 8, 1]))
    moved = {"rigid": MovedImage(image, image), "m2m:a": MovedImage(image, image)}
    pair = records[0]["pair"]
    return [
        ExamplePair(pair, "pet", image, image, moved, labels=image, structures={"brain": (1,)})
    ]


TRAININGS = {
    "M2M-Reg": [
        {"iteration": 100.0, "lncc": 0.30, "dsc": 0.45, "dsc_before": 0.4},
        {"iteration": 200.0, "lncc": 0.31, "dsc": 0.55, "dsc_before": 0.4},
    ],
    "without labels": [{"iteration": 100.0, "lncc": 0.3}, {"iteration": 200.0, "lncc": 0.5}],
}


def make_shares(records):
    (summary,) = (
        row for row in summarize(records) if (row["method"], row["modality"]) == ("m2m:a", "pet")
    )
    return [(share, {**summary, "dsc_mean": 0.6 + share / 1000}) for share in (100, 0, 5)]


class Page(HTMLParser):
    """Tags with their attributes, text by section, and whether all tags are closed in order."""

    def __init__(self, content):
        super().__init__()
        self.content, self.tags, self.open, self.texts = content, [], [], []
        self.is_balanced = True
        self.feed(content)
        self.close()
        self.is_balanced &= not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.is_balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def section(self, name):
        """Page of one section."""
        start = self.content.index(f'<h2 id="{name}"')
        return Page(self.content[start : self.content.index("</section>", start)])

    def sections(self):
        return re.findall(r"<h2 [^>]*>([^<]+)</h2>", self.content)

    def rows(self, caption):
        """Cells of a table's body, HTML, by the name of the row."""
        table = self.content[self.content.index(f"<caption>{caption}") :]
        body = table[table.index("<tbody>") : table.index("</tbody>")]
        found = {}
        for row in re.findall(r"<tr.*?</tr>", body, flags=re.DOTALL):
            name, *cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
            found[name] = cells
        return found


def write(tmp_path, records=None, summaries=None, **keywords):
    records = make_records() if records is None else records
    summaries = summarize(records) if summaries is None else summaries
    file = write_evaluation_report(tmp_path / "evaluation.html", records, summaries, **keywords)
    return Page(file.read_text("UTF-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page with all its parts."""
    records = make_records()
    return write(
        tmp_path_factory.mktemp("full"),
        records,
        run=EvaluationRun(
            facts={"Device": "cpu"},
            caveats=["This run is reduced."],
            command="m2m-bids in out evaluate",
            software={"antspyx": "1.2"},
        ),
        trainings=TRAININGS,
        shares=make_shares(records),
        examples=pictures(records),
    )


# --- page ------------------------------------------------------------------------------------


def test_sections_of_a_whole_page(full):
    assert full.is_balanced
    assert full.sections() == [
        "In short",
        "What was run",
        "Table 1",
        "Overlap of every pair",
        "Table 2",
        "Training",
        "Pictures",
        "Failures",
        "Definitions",
        "Caveats",
        "Software",
    ]
    assert "This run is reduced." in full.section("caveats").text
    assert "m2m-bids in out evaluate" in full.section("software").text
    assert "8 pairs, 9 participants, 5 methods" in full.section("what-was-run").text


def test_parts_without_input_are_left_out(tmp_path):
    names = write(tmp_path).sections()
    assert not {"Table 2", "Training", "Pictures", "Software"} & set(names)
    assert {"Table 1", "Failures", "Definitions", "Caveats"} <= set(names)


def test_page_is_one_file_that_loads_and_runs_nothing(full):
    assert not [
        tag for tag, _ in full.tags if tag in {"script", "link", "iframe", "object", "base"}
    ]
    (policy,) = (a["content"] for a in full.named("meta") if "http-equiv" in a)
    assert policy == POLICY
    for _, attributes in full.tags:
        for name in ("src", "href", "xlink:href"):
            assert re.match(r"#|data:image/", attributes.get(name, "#"))
    addresses = re.findall(r"url\([\"']?([^\"')]{0,20})", full.content)
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert "@import" not in full.content


def test_identifiers_are_unique_and_references_reach_them(full):
    ids = [attributes["id"] for _, attributes in full.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:xlink:)?href="#([^"]+)"|url\(#([^)]+)\)', full.content)
    targets = {a or b for a, b in references} | {
        a["aria-labelledby"] for a in full.named("section")
    }
    assert len(targets) > 20
    assert targets <= set(ids)


def test_page_can_be_read_aloud(full):
    assert full.named("html") == [{"lang": "en"}]
    for attributes in full.named("svg"):
        assert attributes["role"] == "img"
        assert attributes["aria-label"]
    assert len(full.named("svg")) == 2 + 2 * 2 + 1 + 2 + 3  # all, classes, shares, training, grid
    tables = [a for a in full.named("table") if "m2m-evaluation" in a["class"]]
    assert len(tables) == full.content.count("<caption>") == 5
    for start in re.finditer(r'<table class="[^"]*m2m-evaluation', full.content):
        table = Page(full.content[start.start() : full.content.index("</table>", start.start())])
        assert all("scope" in attributes for attributes in table.named("th"))
    levels = [int(level) for level in re.findall(r"<h([1-6])\b", full.content)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_same_input_same_page(tmp_path, full):
    records = make_records()
    again = write(tmp_path, records, trainings=TRAININGS, examples=pictures(records))
    more = write(tmp_path, records, trainings=TRAININGS, examples=pictures(records))
    assert again.content == more.content
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.html"]


def test_records_are_required(tmp_path):
    with pytest.raises(ValueError, match="records is empty"):
        write(tmp_path, [], [])


# --- hostile and missing input ---------------------------------------------------------------


def test_every_text_is_escaped(tmp_path):
    records = [
        {
            **row,
            **{key: f"{row[key]}{EVIL}" for key in ("pair", "title", "reason", "moving_subject")},
        }
        for row in make_records(6)
    ]
    for row in records:
        if "dsc" in row:
            row[f"dsc_{EVIL}"] = row["dsc"]
    summaries = summarize([{k: v for k, v in row.items() if EVIL not in k} for row in records])
    shares = [(5, {**row, "modality": EVIL}) for row in summaries[-1:]]
    page = write(
        tmp_path,
        records,
        summaries,
        run=EvaluationRun({EVIL: EVIL}, [EVIL], EVIL, {EVIL: EVIL}),
        trainings={EVIL: TRAININGS["M2M-Reg"]},
        shares=shares,
        examples=pictures(records),
    )
    assert page.is_balanced
    assert not page.named("script")
    assert not page.named("img")
    assert not [
        name for _, attributes in page.tags for name in attributes if name.startswith("on")
    ]
    for name in page.sections():
        if name != "Definitions":
            content = page.section(name.lower().replace(" ", "-")).content
            assert "&lt;script&gt;" in content or "&lt;script>" in content, name


@pytest.mark.parametrize("key", ["modality", "kind", "method"])
def test_unknown_keys_are_text_too(tmp_path, key):
    page = write(tmp_path, [{**row, key: EVIL + row[key]} for row in make_records(2)])
    assert page.is_balanced
    assert not page.named("script")


def test_odd_characters_and_formulas_in_names(tmp_path):
    records = [
        {
            **row,
            "title": f"{row['title']} $\\frac{{1}}$\x00\x0b\ud800",
            "pair": row["pair"] + "\x1b",
        }
        for row in make_records(5)
    ]
    page = write(tmp_path, records)
    assert page.is_balanced
    assert "SyN (MI) $\\frac{1}$" in page.section("overlap-of-every-pair").text


def test_nothing_measured(tmp_path):
    records = [
        {**row, "dsc": "n/a", "dsc_thalamus": None, "dsc_putamen": float("nan"), "hd95_mm": "n/a"}
        for row in make_records(2)
    ]
    page = write(tmp_path, records)
    assert "without labels there is no DSC" in page.section("overlap-of-every-pair").text
    assert "no overlap could be measured" in page.section("in-short").text
    head = page.content[page.content.index("<caption>") :].partition("</thead>")[0]
    assert "HD95" not in head
    assert "Time" in head


def test_bare_records(tmp_path):
    keys = ("pair", "method", "modality", "kind", "status")
    page = write(tmp_path, [{key: row[key] for key in keys} for row in make_records(2)])
    assert page.is_balanced
    assert "fireants-mi" in page.section("table-1").text


def test_one_pair(tmp_path):
    page = write(tmp_path, make_records(1, ("pet",)), trainings={"r": TRAININGS["M2M-Reg"][:1]})
    assert page.is_balanced
    assert "one pair only" in page.section("caveats").text
    assert "±" not in "".join(page.rows("Registration between subjects")["SyN (MI)"])


def test_few_pairs_cannot_be_significant(tmp_path):
    # Three methods are tested against the best baseline: 3 * 2 / 2**n.
    text = write(tmp_path, make_records(6)).section("caveats").text
    assert "with 6 pairs and so many methods, no p can be below 0.094" in text
    assert min(row["dsc_p"] for row in summarize(make_records(6)) if row["dsc_p"] != "n/a") > 0.09
    assert "no p can be below" not in write(tmp_path, make_records(7)).section("caveats").text


def test_numbers_read_back_from_the_tables_give_the_same_page(tmp_path):
    records = make_records()
    summaries = write_records(records, tmp_path / "tables")
    read = []
    for name in ("evaluation", "summary"):
        with (tmp_path / "tables" / f"{name}.tsv").open(newline="") as stream:
            read.append(list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)))
    page, again = write(tmp_path, records, summaries), write(tmp_path, *read)
    for name in ("in-short", "table-1", "failures", "caveats"):
        assert again.section(name).content == page.section(name).content


# --- numbers ---------------------------------------------------------------------------------


def test_table_1_holds_means_and_deviations(full):
    rows = full.rows("Registration between subjects")
    assert list(rows) == [title for title, _ in METHODS.values()]
    for method, (title, level) in METHODS.items():
        if level is None:
            continue
        for start, modality in ((0, "pet"), (5, "fa")):
            values = [
                row["dsc"]
                for row in make_records()
                if (row["method"], row["modality"]) == (method, modality)
            ]
            assert rows[title][start] == "8"
            cell = rows[title][start + 1]
            assert f"{np.mean(values):.3f}" in cell
            assert f"± {np.std(values, ddof=1):.3f}" in cell
            low, high = map(float, re.search(r"\[([\d.]+), ([\d.]+)\]", cell).groups())
            assert low < np.mean(values) < high


def test_best_is_bold_and_tested(full):
    rows = full.rows("Registration between subjects")
    bold = {
        title: [i for i, cell in enumerate(cells) if "<strong>" in cell]
        for title, cells in rows.items()
    }
    # Columns: pairs, DSC, HD95, folds, time, for both. Folds are equal; the rigid alignment is
    # faster than SyN, but deforms nothing.
    assert bold == {
        "Initial": [],
        "Rigid": [],
        "SyN (MI)": [3, 4, 8, 9],
        "FireANTs (MI)": [],
        "GradICON, M2M-Reg": [1, 2, 3, 6, 7, 8],
    }
    assert "best baseline" in rows["SyN (MI)"][1]
    # Of eight pairs all are better: 2 / 2**8, times three tests.
    assert "▲" in rows["GradICON, M2M-Reg"][1]
    assert f"p = {3 * 2 / 2**8:.3f}" in rows["GradICON, M2M-Reg"][1]
    assert "▼" in rows["Rigid"][1]


def test_in_short_says_who_is_above_whom(tmp_path, full):
    first = full.section("in-short").text
    assert re.search(
        r"GradICON, M2M-Reg \(mean DSC 0\.\d+, n = 8\) is above the best baseline, SyN", first
    )
    assert "Folds: 0.000 %" in first
    worse = [
        {**row, "dsc": row["dsc"] - 0.3} if row["method"] == "m2m:a" else row
        for row in make_records()
    ]
    assert (
        "is below the best baseline, SyN (MI)" in write(tmp_path, worse).section("in-short").text
    )
    without = [row for row in make_records() if row["method"] != "m2m:a"]
    assert "no network of m2m-bids to compare" in write(tmp_path, without).section("in-short").text


def test_missing_method_is_a_row_with_its_reason(full):
    cells = full.rows("Registration between subjects")["FireANTs (MI)"]
    assert len(cells) == 2
    assert all("missing: install FireANTs with pip" in cell for cell in cells)
    listed = full.rows("Missing, failed, or kept rigid")
    assert list(listed) == ["FireANTs (MI)"]
    assert "16 pairs" in listed["FireANTs (MI)"][3]


def test_methods_that_failed_do_not_compete(tmp_path):
    records = make_records()
    failed = next(row for row in records if row["method"] == "m2m:a")
    for key in [key for key in failed if key.startswith(("dsc", "hd95", "seconds", "fold"))]:
        del failed[key]
    failed |= {"status": "failed", "reason": "out of memory"}
    kept = next(row for row in records[5:] if row["method"] == "m2m:a")
    kept["reason"] = "cycle error of 9 mm"
    page = write(tmp_path, records)
    cells = page.rows("Registration between subjects")["GradICON, M2M-Reg"]
    assert cells[0] == "7 of 8&nbsp;†"
    assert "<strong>" not in cells[1]
    assert "<strong>" in cells[6]
    start = page.section("failures").text
    assert "GradICON, M2M-Reg failed out of memory" in start
    assert "GradICON, M2M-Reg done, kept rigid cycle error of 9 mm" in start
    assert "averaged over the rest" in page.section("caveats").text
    assert "n = 7" in page.section("in-short").text
    assert "The two means are over different pairs" in page.section("in-short").text


def test_kinds_have_tables_of_their_own(tmp_path):
    within = [
        {**row, "pair": f"{row['pair']}-within", "landmark_error_mm": 1.0}
        for row in make_records(6, ("pet",), "within")
        if row["status"] == "done"
    ]
    page = write(tmp_path, [*within, *make_records(6, ("pet",))])
    captions = re.findall(r"<caption>(Registration [^<]+)", page.content)
    assert captions == ["Registration between subjects", "Registration within a subject"]
    assert len(page.rows(captions[0])["Rigid"]) == len(page.rows(captions[1])["Rigid"]) - 1


def test_shared_titles_are_told_apart(tmp_path):
    records = [{**row, "title": "same"} for row in make_records(5)]
    rows = write(tmp_path, records).rows("Registration between subjects")
    assert list(rows) == [f"same ({method})" for method in METHODS]


def test_box_plots_show_every_pair_of_every_class(full):
    section = full.section("overlap-of-every-pair").content
    n_values = sum(3 * ("dsc" in row) for row in make_records())
    assert len(re.findall(r"<title>pair-\d-(?:pet|fa): 0\.\d{3}</title>", section)) == n_values
    labels = [svg["aria-label"] for svg in Page(section).named("svg")]
    medians = np.median(
        [
            row["dsc"]
            for row in make_records()
            if row.get("title") == "Rigid" and row["modality"] == "pet"
        ]
    )
    assert f"Rigid {medians:.3f}" in labels[0]
    assert sum("thalamus" in label for label in labels) == 2


def test_table_2_rises_with_the_share(full):
    rows = full.rows("DSC and folds by share of pre-aligned pairs")
    assert {name: cells[2] for name, cells in rows.items()} == {
        "0 %": "0.600",
        "5 %": "0.605",
        "100 %": "0.700",
    }


def test_training_table_holds_first_and_last_values(full):
    rows = full.rows("Trainings")
    assert rows["M2M-Reg"] == ["200", "0.400", "0.450 → 0.550", "0.300 → 0.310"]
    assert rows["without labels"] == ["200", "–", "–", "0.300 → 0.500"]  # noqa: RUF001


def test_pictures_have_their_dsc(full):
    (cells,) = full.rows("Moved images by pair and method").values()
    scores = {
        row["method"]: row["dsc"]
        for row in make_records()
        if row["pair"] == "pair-0-pet" and "dsc" in row
    }
    assert len(cells) == 3
    assert f"DSC {scores['rigid']:.3f}" in cells[1]
    assert f"DSC {scores['m2m:a']:.3f}" in cells[2]


def test_picture_without_result_says_so(tmp_path):
    records = make_records(2)
    first, second = pictures(records)[0], pictures(records[5:])[0]
    second.moved.pop("rigid")
    page = write(tmp_path, records, examples=[first, second])
    rows = page.rows("Moved images by pair and method")
    assert "no result" in rows["pair-1-pet<br><small>PET → T1w</small>"][1]


# --- in a browser ----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width_px", [420, 1400])
def test_page_fits_its_window(tmp_path, full, width_px):
    # The probe asks the page itself what it got, and writes the answer into its title.
    probe = """<script>window.addEventListener("load", function () {
      var root = document.documentElement;
      document.title = JSON.stringify([innerWidth, root.scrollWidth,
        Array.from(document.querySelectorAll("svg")).filter(function (svg) {
          return svg.getBoundingClientRect().height < 60; }).length]);
    });</script>"""
    file = tmp_path / "probe.html"
    allowed = full.content.replace(POLICY, f"{POLICY}; script-src 'unsafe-inline'")
    file.write_text(allowed.replace("</head>", f"{probe}</head>", 1), "UTF-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=5000",
        "--hide-scrollbars",
        f"--window-size={width_px},900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        file.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", shown)[1]
    window_px, page_px, n_flat = json.loads(title)
    assert window_px == max(width_px, 500)  # no window of Chromium is narrower
    assert page_px == window_px  # wide tables scroll in themselves
    assert n_flat == 0
