"""The tiny checkpoints that every proof of a page is made on, each written once for all tests of this folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import byte_level_tokenizer, family

from lumen.export.gguf import GGUFReport, write_gguf


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A folder with weights, config.json and a tokenizer, and transformers' model of it; no test changes either."""

    folder: Path
    theirs: transformers.PreTrainedModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Tiny]:
    """shape → `Tiny`. With `narrow`, all matrices are two thirds as wide: see `test_family_gguf.py` for why."""
    made: dict[tuple[str, bool], Tiny] = {}

    def make(shape: str, *, narrow: bool = False) -> Tiny:
        if (shape, narrow) not in made:
            folder = tmp_path_factory.mktemp("tiny")
            theirs = family(folder, shape)
            if narrow:
                with torch.no_grad():
                    for parameter in theirs.parameters():
                        if parameter.ndim > 1:
                            parameter.mul_(2 / 3)
                theirs.save_pretrained(folder)
            byte_level_tokenizer(folder)
            made[shape, narrow] = Tiny(folder=folder, theirs=theirs)
        return made[shape, narrow]

    return make


@pytest.fixture(scope="session")
def exported(tiny, tmp_path_factory) -> Callable[[str, str], GGUFReport]:
    """(shape, type) → the report of the GGUF file of that type, of the shape's narrow model."""
    reports: dict[tuple[str, str], GGUFReport] = {}

    def export(shape: str, quant: str) -> GGUFReport:
        if (shape, quant) not in reports:
            path = tmp_path_factory.mktemp("gguf") / f"{quant}.gguf"
            reports[shape, quant] = write_gguf(tiny(shape, narrow=True).folder, path, quant)
        return reports[shape, quant]

    return export
