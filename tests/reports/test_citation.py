"""The text for a methods section has those references that it names, and no others."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from m2m_bids.reports.citation import CITED, cite, markdown_html

REFERENCES = json.loads((files("m2m_bids.data") / "references.json").read_text("UTF-8"))
WORKFLOWS = Path(__file__).parents[2] / "workflows"


def made(methods):
    return cite(methods=methods, software={"m2m-bids": "1.2.3", "torch": "2.10"})


def test_text_is_filled_in():
    text = made("#### Step\n\nA $5 step, <script>a</script>.").markdown
    assert "*m2m-bids* 1.2.3" in text
    assert "A $5 step" in text
    assert "Software: m2m-bids 1.2.3, torch 2.10." in text
    assert "Nipype* (Gorgolewski et al., 2011)" in text


def test_only_what_is_cited_is_listed():
    citation = made("Once [@choo2025; @fischl2012], and again [@choo2025].")
    assert "Once (Choo et al., 2025; Fischl, 2012), and again (Choo et al., 2025)." in (
        citation.markdown
    )
    listed = re.findall(r"^- (\w+)", citation.markdown, re.M)
    assert listed == ["Choo", "Fischl", "Gorgolewski"]
    assert re.findall(r"^@\w+\{(\w+),$", citation.bibtex, re.M) == [
        "choo2025",
        "fischl2012",
        "gorgolewski2011",
    ]
    assert "[@" not in citation.markdown + citation.html
    assert citation.html.count("<li>") == 3


def test_html_has_the_same_text_and_no_code():
    page = made("#### Step\n\n<script>a</script> <img src=x onerror=y>").html
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert re.findall(r"<h(\d)>", page) == ["1", "2", "3", "2"]
    assert markdown_html("[a](javascript:b)").count("href") == 0
    assert '<html lang="en">' in page


def test_bibtex_is_balanced_and_whole():
    bibtex = made("".join(f"[@{key}]" for key in REFERENCES)).bibtex
    entries = re.findall(r"^@(\w+)\{(\w+),\n((?:  \w+ = \{.*\},\n)+)\}$", bibtex, re.M)
    assert {key: kind for kind, key, _ in entries} == {
        key: entry["type"] for key, entry in REFERENCES.items()
    }
    for _, key, fields in entries:
        names = re.findall(r"^  (\w+) =", fields, re.M)
        assert set(names) == REFERENCES[key].keys() - {"type"}
        assert fields.count("{") == fields.count("}")
    assert "pages = {2033--2044}" in bibtex
    assert "author = {Rousset, O. G. and Ma, Y. and Evans, A. C.}" in bibtex


def test_unknown_reference_is_an_error():
    with pytest.raises(KeyError, match="nobody1900"):
        made("As [@nobody1900] says.")


def test_every_key_of_the_workflows_is_known_and_every_reference_is_used():
    sources = [file.read_text() for file in WORKFLOWS.glob("*.py")]
    sources.append((files("m2m_bids.data") / "citation.md").read_text("UTF-8"))
    cited = {
        key.strip().removeprefix("@")
        for text in sources
        for found in CITED.findall(text)
        for key in found.split(";")
    }
    assert cited == REFERENCES.keys()
