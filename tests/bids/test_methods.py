import pytest

from m2m_bids.bids.methods import (
    METHODS_FIELD,
    merge_methods,
    methods_in,
    methods_markdown,
    read_description,
)


def test_paragraphs_are_told_once_under_one_heading():
    parts = [read_description(f"#### PET\n\n{text}\n") for text in ("A.", "B.\n\nA.", "C.")]
    assert methods_markdown(merge_methods(parts)) == "#### PET\n\nA.\n\nB.\n\nC.\n"
    assert read_description("") == {}


def test_what_is_done_last_is_told_last():
    pet = {name: ["x"] for name in ("Anatomy", "PET", "Registration", "Quantification")}
    fa = {name: ["x"] for name in ("Anatomy", "Diffusion", "Registration to a template")}
    assert list(merge_methods([pet, fa])) == [
        *("Anatomy", "PET", "Diffusion", "Registration", "Registration to a template"),
        "Quantification",
    ]


@pytest.mark.parametrize("content", [None, 3, [], "a", {"PET": 3}])
def test_damaged_methods_are_none(content):
    assert methods_in({METHODS_FIELD: content}) == {}


def test_what_is_text_of_them_is_kept():
    assert methods_in({METHODS_FIELD: {"PET": ["a", 3], "B": 2}}) == {"PET": ["a"]}
