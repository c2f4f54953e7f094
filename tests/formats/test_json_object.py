"""Files that are to hold one JSON object: what is read, and what is refused with which words."""

import pytest

from lumen.errors import CheckpointError
from lumen.formats.json_object import read_object


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        read_object(path, CheckpointError, "It belongs to a model.")
    return str(refused.value)


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, {"ä": null}]}', "utf-8")
    assert read_object(tmp_path / "a.json", CheckpointError, "") == {"a": [1, {"ä": None}]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1', "is not JSON: Expecting ',' delimiter"),
        (b"", "is not JSON: Expecting value"),
        (b'{"a": "\xff"}', "is not JSON: 'utf-8' codec can't decode"),
        (b"[1]", "wanted a JSON object, found list"),
        (b"[" * 100_000, "its lists or objects nest too deeply"),
        (b'{"a":' * 100_000, "its lists or objects nest too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON: Exceeds the limit"),
    ],
)
def test_what_holds_no_object_is_refused(tmp_path, data, words):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert words in refusal(path) and str(path) in refusal(path)


def test_a_path_that_leads_to_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    (tmp_path / "round").symlink_to("round")
    for name, words in {
        "missing": "does not exist. It belongs to a model.",
        "folder": "cannot be read: Is a directory. It belongs to a model.",
        "file/a.json": "cannot be read: Not a directory. It belongs to a model.",
        "round": "cannot be read: Too many levels of symbolic links. It belongs to a model.",
    }.items():
        assert refusal(tmp_path / name) == f"{tmp_path / name} {words}"
