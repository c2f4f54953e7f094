"""Files of training data become records: conversations, prompts with completions, or plain text.

A file's ending says how its rows are written (.jsonl .json .csv .parquet .txt), a row's keys say what it holds:

    messages                     [{role, content, weight?, tool_calls?, …}], with `tools`      → Conversation
    conversations                [{from, value}], with `system` and `tools`                    → Conversation
    instruction, input?, output  one question and its answer, with `system`                    → Conversation
    prompt, completion           two texts, or two lists of messages                → PromptCompletion or Conversation
    question, answer             two texts                                                     → PromptCompletion
    text                         a document                                                    → Text

Other keys are the file's own notes and are left alone; rows of preferences (`chosen`, `rejected`) are refused.
Every refusal is a DataError that names the file and the line.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from lumen.errors import DataError, closest
from lumen.text.conversation import ROLES, Conversation, PromptCompletion, Record, Text, Turn

FORMATS = {"auto": Record, "chat": Conversation, "prompt-completion": PromptCompletion, "text": Text}

PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
PREFERENCE = ("chosen", "rejected")

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

WANTED = (
    "'messages' (role, content), 'conversations' (from, value), 'instruction' + 'output', "
    "'prompt' + 'completion', 'question' + 'answer', or 'text'"
)

DOCUMENT_END = "<|endoftext|>"  # on a line of its own, between two documents of a .txt file


def read_records(path: str | Path, format: str = "auto") -> list[Record]:
    """All records of one file, in the file's order.

    format  what is wanted: `chat` makes conversations of prompts and completions too, `prompt-completion` the reverse
            for rows of two texts; `auto` takes each row as its keys say

    Raises DataError for a row that cannot be read or learned from, and for a file without any.
    """
    path = Path(path)
    if format not in FORMATS:
        raise DataError(f"{format!r} is no format of records.{closest(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    suffix = path.suffix.lower()
    if suffix not in _ROWS:
        raise DataError(f"{path}: wanted a file ending in {', '.join(_ROWS)}, found {path.suffix or 'no ending'!r}.")
    try:
        records = [_record(row, source, format) for source, row in _ROWS[suffix](path)]
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file. Paths in a run file are relative to that file.") from None
    except OSError as wrong:
        raise DataError(f"{path}: cannot be read: {wrong.strerror}.") from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    if not records:
        raise DataError(f"{path}: wanted at least one record, found an empty file.")
    return records


def _not_utf8(path: Path) -> DataError:
    """What to say of a file that is not UTF-8; the decoder itself has seen a piece of it and knows no line."""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as wrong:
        line, found = data[: wrong.start].count(b"\n") + 1, data[wrong.start]
        return DataError(
            f"{path}:{line}: wanted UTF-8 text, found byte {found:#04x}. A file in another encoding becomes UTF-8 by "
            "iconv, as by: iconv -f LATIN1 -t UTF-8 OLD > NEW"
        )
    return DataError(f"{path}: was changed while it was read.")


# --- rows of a file, each with its place -----------------------------------------------------------------------------


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", _parsed(line.rstrip(), f"{path}:{number}")


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    rows = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: wanted a list of records, found {_kind(rows)}. One record a line is a .jsonl file.")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}: record {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        limit = csv.field_size_limit(2**31 - 1)  # a document may be longer than Python's 131,072 characters
        try:
            names = reader.fieldnames or []
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path}:1: the header names the column {twice[0]!r} twice.")
            for row in reader:
                source = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{source}: the row and the header have different numbers of cells.")
                yield source, row
        except csv.Error as wrong:
            raise DataError(f"{path}:{reader.line_num}: {wrong}.") from None
        finally:
            csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'lumen[data]'.") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as wrong:
        raise DataError(f"{path}: {wrong}") from None
    for number, row in enumerate(rows, 1):
        # a column that exists for one row exists for all: None says that this row has no such key
        held = {key: value for key, value in row.items() if value is not None}
        if not held:
            raise DataError(f"{path.name}: record {number}: every column is null: {', '.join(row)}.")
        yield f"{path.name}: record {number}", held


def _text_rows(path: Path) -> Iterator[tuple[str, object]]:
    first, lines = 1, []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(keepends=True), 1):
        if line.strip() != DOCUMENT_END:
            lines.append(line)
            continue
        if text := "".join(lines).strip():
            yield f"{path.name}:{first}", {"text": text}
        first, lines = number + 1, []
    if text := "".join(lines).strip():
        yield f"{path.name}:{first}", {"text": text}


_ROWS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _text_rows}


def _parsed(text: str, where: str) -> object:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # an escape of half a character beyond the first 65,536; two of them are one
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as wrong:
        half = wrong.object[wrong.start]
        raise DataError(f"{where}: wanted Unicode text, found {half!r}, one half of a surrogate pair alone.") from None
    except json.JSONDecodeError as wrong:
        place = f"line {wrong.lineno} " if wrong.lineno > 1 else ""
        raise DataError(f"{where}: wanted JSON, but at {place}column {wrong.colno}: {wrong.msg}.") from None
    except (ValueError, RecursionError) as wrong:  # a number of thousands of digits, lists nested as deep
        raise DataError(f"{where}: wanted JSON that can be read: {wrong}.") from None


# --- one row ---------------------------------------------------------------------------------------------------------


def _record(row: object, source: str, format: str) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{source}: wanted an object with {WANTED}; found {_kind(row)}.")
    if any(key in row for key in PREFERENCE) or isinstance(row.get("label"), bool):
        raise DataError(f"{source}: a row of preferences: it does not say what to imitate, but what is better.")
    record = _by_keys(row, source, format)
    if not isinstance(record, FORMATS[format]):
        raise DataError(f"{source}: wanted data.format = {format!r}, found a row with {', '.join(map(repr, row))}.")
    return record


def _by_keys(row: dict, source: str, format: str) -> Record:
    if "messages" in row or "conversations" in row:
        items = row["messages"] if "messages" in row else row["conversations"]
        return _conversation(_turns(items, source), row, source)
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            return _pair(row, asked, answered, source, format)
    if "text" in row:
        return Text(_words(row, "text", source), source)
    raise DataError(f"{source}: wanted {WANTED}; found {', '.join(map(repr, row)) or 'no key at all'}.")


def _pair(row: dict, asked: str, answered: str, source: str, format: str) -> Record:
    """Two texts; an instruction with its answer is said to an assistant, unless plain prompts are asked for."""
    if isinstance(row[asked], list):
        context = tuple(Turn(t.role, t.content, 0, t.more) for t in _turns(row[asked], source))
        return _conversation(context + _turns(row[answered], source), row, source)
    prompt, completion = _words(row, asked, source), _words(row, answered, source)
    if asked == "instruction" and row.get("input"):
        prompt += "\n\n" + _words(row, "input", source)
    if format == "chat" or (format == "auto" and asked == "instruction"):
        return _conversation((Turn("user", prompt), Turn("assistant", completion)), row, source)
    if row.get("system"):
        raise DataError(
            f"{source}: 'system' belongs to a conversation. Set data.format to 'chat', or put it into the {asked}."
        )
    return PromptCompletion(prompt + "\n\n" if asked == "instruction" else prompt, completion, source)


def _words(row: dict, key: str, source: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{source}: {key!r} wants text, found {_kind(row[key])}.")
    if not row[key].strip():
        raise DataError(f"{source}: {key!r} is empty: there is nothing to learn from it.")
    return row[key]


# --- conversations ---------------------------------------------------------------------------------------------------


def _conversation(turns: tuple[Turn, ...], row: dict, source: str) -> Conversation:
    if system := row.get("system"):
        if not isinstance(system, str):
            raise DataError(f"{source}: 'system' wants text, found {_kind(system)}.")
        turns = (Turn("system", system), *turns)
    if not any(turn.role == "assistant" and turn.weight for turn in turns):
        raise DataError(f"{source}: no turn of the assistant is to be learned; a conversation wants at least one.")
    return Conversation(turns, _tools(row.get("tools"), source), source)


def _tools(tools: object, source: str) -> tuple[dict, ...]:
    """The tools on offer: a list of JSON schemas, or that list as a string, as ShareGPT files write it."""
    if isinstance(tools, str):
        tools = _parsed(tools or "[]", f"{source}: 'tools'")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{source}: 'tools' wants a list of objects, found {_kind(tools)}.")
    return tuple(tools)


def _turns(items: object, source: str) -> tuple[Turn, ...]:
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else _kind(items)
        raise DataError(f"{source}: wanted a list of messages, found {found}.")
    return tuple(_turn(item, f"{source}, message {number}") for number, item in enumerate(items, 1))


def _turn(item: object, where: str) -> Turn:
    if not isinstance(item, dict):
        raise DataError(f"{where}: wanted an object with role and content, found {_kind(item)}.")
    if "from" in item:
        return _sharegpt_turn(item, where)
    role = item.get("role")
    if role not in ROLES:
        hint = closest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{where}: wanted a role of {', '.join(ROLES)}; found {role!r}.{hint}")
    # in the order of the row, which a template may show; None is what Parquet has for a key that only other turns have
    more = {key: item[key] for key in item if key not in ("role", "content", "weight") and item[key] is not None}
    weight = item.get("weight")
    return _checked(Turn(role, item.get("content"), 1 if weight is None else weight, more), weight is not None, where)


def _sharegpt_turn(item: dict, where: str) -> Turn:
    role = SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
    if role is None:
        hint = closest(str(item["from"]), SHAREGPT_ROLES)
        raise DataError(f"{where}: wanted 'from' of {', '.join(SHAREGPT_ROLES)}; found {item['from']!r}.{hint}")
    if item["from"] != "function_call":
        return _checked(Turn(role, item.get("value")), False, where)
    calls = _parsed(str(item.get("value")), where)
    calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    if not all(isinstance(call["function"], dict) and "name" in call["function"] for call in calls):
        raise DataError(f"{where}: a function_call wants JSON with 'name', found {item.get('value')!r}.")
    return Turn(role, "", more={"tool_calls": calls})


def _checked(turn: Turn, weighted: bool, where: str) -> Turn:
    """The turn, if it can be rendered and, where it is to be learned, says something."""
    calls = turn.more.get("tool_calls")
    if not isinstance(turn.content, str | list) and not (turn.content is None and calls):
        raise DataError(f"{where}: wanted content as text or a list of parts, found {_kind(turn.content)}.")
    for key, value in (("tool_calls", calls), ("content", None if isinstance(turn.content, str) else turn.content)):
        if value is not None and not (isinstance(value, list) and all(isinstance(part, dict) for part in value)):
            raise DataError(f"{where}: {key!r} wants a list of objects, found {_kind(value)}.")
    if not all(isinstance(call.get("function", call), dict) for call in calls or ()):
        raise DataError(f"{where}: the 'function' of a tool call wants an object.")
    if weighted and (turn.role != "assistant" or turn.weight not in (0, 1)):
        found = f"{turn.weight!r} for {turn.role!r}"
        raise DataError(f"{where}: a weight is 0 or 1 and belongs to the assistant; found {found}.")
    empty = not turn.content or (isinstance(turn.content, str) and not turn.content.strip())
    if turn.role == "assistant" and turn.weight and empty and not calls:
        raise DataError(f"{where}: the assistant says nothing. Drop the turn, or give it weight 0.")
    return turn


def _kind(value: object) -> str:
    """What a JSON value is, in words for a message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"the number {value!r}")
