"""A dictionary from a TOML or JSON file becomes a frozen dataclass, or an error that names the key.

msgspec checks the types and ranges; this module adds what a person needs: unknown keys and unknown words are refused
with the nearest known one, and every message names the file, the dotted key, what was wanted and what was found.
"""

import dataclasses
import re
import types
import typing

import msgspec

from lumen.errors import ConfigError, LumenError, closest

T = typing.TypeVar("T")


def read(cls: type[T], data: dict, where: str, error: type[LumenError] = ConfigError) -> T:
    """`data` as an instance of the dataclass `cls`, nested dataclasses included.

    where  names the source in messages, as `run.toml`
    error  what is raised for an unknown key, a missing key, a value of the wrong type or outside its range
    """
    _refuse_unknown(cls, data, where, "", error)
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as found:
        raise error(f"{where}: {_explain(str(found), data)}") from None


def _refuse_unknown(hint: object, value: object, where: str, key: str, error: type[LumenError]) -> None:
    """Raises for a key that no field bears and for a word that is none of a `Literal`'s; msgspec says the rest."""
    if (words := _words(hint)) and isinstance(value, str) and value not in words:
        raise error(f"{where}: {key} must be one of {', '.join(words)}; found {value!r}.{closest(value, words)}")
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        for member in value:
            _refuse_unknown(typing.get_args(hint)[0], member, where, key, error)
    cls = _dataclass_in(hint)
    if cls is None or not isinstance(value, dict):
        return
    hints = typing.get_type_hints(cls)
    for name, inner in value.items():
        dotted = f"{key}.{name}" if key else name
        if name not in hints:
            raise error(f"{where}: unknown key {dotted!r}.{closest(name, hints)} Known here: {', '.join(hints)}.")
        _refuse_unknown(hints[name], inner, where, dotted, error)


def _options(hint: object) -> tuple[object, ...]:
    """The alternatives of `X | Y`, or the hint alone."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _dataclass_in(hint: object) -> type | None:
    """The dataclass that a hint such as `Lora` or `Lora | None` allows."""
    return next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)


def _words(hint: object) -> tuple[str, ...]:
    """What to write where not every text will do, as for `Literal["lora", "full"]`, or for `int | Literal["auto"]`."""
    options = _options(hint)
    literals = [option for option in options if typing.get_origin(option) is typing.Literal]
    if not literals or str in options:
        return ()
    words = tuple(str(word) for literal in literals for word in typing.get_args(literal))
    return (*words, *("a number" for option in options if option in (int, float)))


def _explain(complaint: str, data: dict) -> str:
    """msgspec's "Expected `int` >= 1 - at `$.lora.rank`" as "lora.rank: wanted int >= 1, found 0."."""
    reason, _, path = complaint.partition(" - at `")
    path = path.rstrip("`").removeprefix("$")
    reason = reason.replace("`", "")
    key = path.lstrip(".") or "the top level"
    if missing := re.fullmatch(r"Object missing required field (\w+)", reason):
        return f"{key}: the key {missing[1]!r} is missing."
    wanted = reason.removeprefix("Expected ").split(", got ")[0]
    found = _value_at(data, path)
    if reason == wanted or isinstance(
        found, dict | list
    ):  # a table or a list would bury the message: its type is enough
        return f"{key}: {reason}."
    return f"{key}: wanted {wanted}, found {found!r}."


def _value_at(data: object, path: str) -> object:
    """The value at msgspec's path; the container itself where the path says `[...]`, for any of its members."""
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path):
        data = data[name] if name else data[int(index)]
    return data
