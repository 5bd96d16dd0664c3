import json

import pytest

from m2m_bids.bids.layout import group_by_folder, read_sidecar
from m2m_bids.json_files import read_json_object


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    file = tmp_path / "a.json"
    digits = "9" * 5000
    file.write_text(f'{{"a": NaN, "b": [1e400, -Infinity, 2.5], "c": {digits}, "d": {2**62}}}')
    content = read_json_object(file)
    assert content == {"a": None, "b": [None, None, 2.5], "c": None, "d": 2**62}
    json.dumps(content, allow_nan=False)


def test_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' + b"[" * 100_000, "cannot be read as JSON"),
        (rb'{"a": "\ud800"}', "cannot be read as JSON .*surrogates"),
        (b"\xff{}", "cannot be read as JSON"),
        (b"[]", "expected a JSON object, found list"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file}: {message}"):
        read_json_object(file)


def test_nested_values_are_not_used(tmp_path, caplog):
    """No field of PET has any, and deep ones could not be handed to workers."""
    image, file = tmp_path / "sub-1_pet.nii.gz", tmp_path / "sub-1_pet.json"
    nested = "[" * 500 + "]" * 500
    file.write_text(f'{{"Units": {nested}, "TracerName": {{}}, "FrameDuration": [1, 2]}}')
    metadata = read_sidecar(image, group_by_folder([file]))
    assert metadata == {"FrameDuration": [1, 2]}
    assert f"{image}: its Units is neither a value nor a list of values" in caplog.text


def test_every_plain_field_is_read(tmp_path):
    image, file = tmp_path / "sub-1_pet.nii.gz", tmp_path / "sub-1_pet.json"
    fields = {
        **{"InjectedMass": 1.5, "InjectedMassUnits": "ug", "AttenuationCorrection": "CT"},
        **{"ReconMethodParameterValues": [10, 16], "ImageDecayCorrected": False},
    }
    file.write_text(json.dumps({**fields, "MolarActivity": None}))
    assert read_sidecar(image, group_by_folder([file])) == fields
