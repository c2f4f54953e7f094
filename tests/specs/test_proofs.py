"""The table of proofs: every mark in it stands for a test that runs, and the file on disk is the generated one."""

import importlib
from pathlib import Path

import pytest
from proofs import MISSING, PROOFS, proofs_section, shapes
from tiny_models import FAMILIES

from lumen.describe import families_page
from lumen.spec import Family

README = Path(__file__).resolve().parents[2] / "model_specs" / "README.md"


def test_every_page_has_a_tiny_model():
    assert {page for page, _, _ in FAMILIES.values()} == set(Family.names())


@pytest.mark.parametrize("key", PROOFS)
def test_the_test_of_a_proof_runs_for_every_shape_that_the_table_marks(key):
    module, _, name = PROOFS[key].test.partition(".")
    marks = {mark.name: mark for mark in getattr(importlib.import_module(module), name).pytestmark}
    assert marks.keys() == {"parametrize"}  # no skip, no xfail
    assert marks["parametrize"].args == ("shape", shapes(key))


def test_what_is_missing_is_missing_of_something_and_says_why():
    assert MISSING.keys() <= FAMILIES.keys()
    for lacking in MISSING.values():
        assert lacking.keys() <= PROOFS.keys() and all(len(reason) > 20 for reason in lacking.values())


def test_a_page_without_a_proof_shows_the_reason_in_place_of_a_mark(monkeypatch):
    monkeypatch.setitem(MISSING, "gemma", {"f16": "an example of a reason"})
    monkeypatch.setitem(MISSING, "qwen2 tied", {"f16": "another reason"})
    assert "gemma" not in shapes("f16") and "qwen2 tied" not in shapes("f16") and "qwen2" in shapes("f16")
    section = proofs_section()
    column = list(PROOFS).index("f16") + 1
    cells = {row.split(" | ")[0].strip("| `"): row.strip("| ").split(" | ") for row in section.splitlines()}
    assert cells["gemma"][column] == "[1]" and cells["qwen2"][column] == "✅ [2]"
    assert "[1] gemma: an example of a reason" in section and "[2] qwen2 tied: another reason" in section


def test_the_page_on_disk_is_the_generated_one():
    assert README.read_text("utf-8") == families_page() + proofs_section(), "run scripts/families_table"
