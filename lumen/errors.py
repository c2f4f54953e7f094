"""What lumen raises when a user's input is wrong: one family of exceptions, and the hint that goes with a misspelt
name.

A message holds what was wanted, what was found, where, and what to do. `ConfigError` is the one that means "asked
wrongly": the verbs turn it into exit code 2, every other `LumenError` into 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LumenError(Exception):
    """Anything lumen refuses, with a message for the person who asked."""


class ConfigError(LumenError):
    """A run was described wrongly: an unknown key, a value of the wrong type or outside its range."""


class SpecError(LumenError):
    """No page of `model_specs/` describes this checkpoint, or the page and `config.json` disagree."""


class CheckpointError(LumenError):
    """Weights, an adapter or a training checkpoint on disk are missing, damaged or of another shape."""


class DataError(LumenError):
    """A record, a chat template or an image cannot be used."""


class KernelError(LumenError):
    """An operation was asked for something that no implementation of it can do."""


class ExportError(LumenError):
    """A file cannot be written so that it would behave like the model that was trained."""


def closest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'rank'?` for the nearest of `known`, or an empty string when nothing is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
