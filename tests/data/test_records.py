"""Files of training data: every shape that is read, and what is refused with which words."""

import json
from pathlib import Path

import pytest

from lumen.data.records import read_records
from lumen.errors import DataError
from lumen.text.conversation import Conversation, PromptCompletion, Text, Turn

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def write(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def only(folder: Path, row: object, format: str = "auto"):
    (record,) = read_records(write(folder, row), format)
    return record


def refusal(folder: Path, row: object, format: str = "auto") -> str:
    with pytest.raises(DataError) as refused:
        read_records(write(folder, row), format)
    return str(refused.value)


# --- shapes of a row -------------------------------------------------------------------------------------------------


def test_messages_become_a_conversation_with_its_place(tmp_path):
    record = only(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "id": 7})
    assert record.turns == (
        Turn("user", "2+2?"),
        Turn("assistant", "4", 0),
        Turn("user", "2+2?"),
        Turn("assistant", "4"),
    )
    assert record.source == "data.jsonl:1" and record.tools == ()
    assert record.messages == [USER, ANSWER, USER, ANSWER]


def test_tools_calls_and_thoughts_reach_the_template_as_they_were(tmp_path):
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "name": "add", "content": "4"},
        ANSWER,
    ]
    record = only(tmp_path, {"messages": messages, "tools": tools})
    assert record.messages == messages and record.tools == tuple(tools)


def test_sharegpt_rows_become_the_same_conversation_as_messages(tmp_path):
    row = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Count."}
    same = {"messages": [{"role": "system", "content": "Count."}, USER, ANSWER]}
    assert only(tmp_path, row).turns == only(tmp_path, same).turns


def test_sharegpt_function_calls_become_tool_calls(tmp_path):
    talk = [
        ("human", "2+2?"),
        ("function_call", '{"name": "add", "arguments": {"a": 2}}'),
        ("observation", "4"),
        ("gpt", "4"),
    ]
    tools = '[{"name": "add"}]'
    record = only(tmp_path, {"conversations": [{"from": who, "value": said} for who, said in talk], "tools": tools})
    assert record.turns[1].more["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert [turn.role for turn in record.turns] == ["user", "assistant", "tool", "assistant"]
    assert record.tools == ({"name": "add"},)


def test_an_instruction_is_said_to_the_assistant(tmp_path):
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Count."}
    assert only(tmp_path, row).turns == (
        Turn("system", "Count."),
        Turn("user", "Add.\n\n2 and 2"),
        Turn("assistant", "4"),
    )
    plain = {key: value for key, value in row.items() if key != "system"}
    assert only(tmp_path, plain, "prompt-completion") == PromptCompletion("Add.\n\n2 and 2\n\n", "4", "data.jsonl:1")
    with pytest.raises(DataError, match="'system' belongs to a conversation"):
        only(tmp_path, row, "prompt-completion")
    assert only(tmp_path, {**row, "input": "", "system": ""}).turns[0] == Turn("user", "Add.")


@pytest.mark.parametrize("asked, answered", [("prompt", "completion"), ("question", "answer")])
def test_two_texts_are_a_prompt_and_its_completion_or_on_request_a_conversation(tmp_path, asked, answered):
    row = {asked: "2+2=", answered: "4", "input": "a note"}
    assert only(tmp_path, row) == PromptCompletion("2+2=", "4", "data.jsonl:1")
    assert only(tmp_path, row, "chat").turns == (Turn("user", "2+2="), Turn("assistant", "4"))


def test_of_a_prompt_in_messages_no_answer_is_learned(tmp_path):
    record = only(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [turn.weight for turn in record.turns if turn.role == "assistant"] == [0, 1]


def test_a_text_is_a_document(tmp_path):
    assert only(tmp_path, {"text": "Once.", "label": 3}) == Text("Once.", "data.jsonl:1")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_line_keeps_its_number_past_empty_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"text": "a"}\n\n\n{"text": "b"}\n')
    assert [record.source for record in read_records(path)] == ["data.jsonl:1", "data.jsonl:4"]


def test_json_csv_and_parquet_hold_the_same_records_as_jsonl(tmp_path):
    rows = [{"prompt": "a,\n", "completion": "ü"}, {"prompt": "b", "completion": '"c"'}]
    wanted = [(record.prompt, record.completion) for record in read_records(write(tmp_path, *rows))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "data.csv").write_text('prompt,completion\n"a,\n",ü\nb,"""c"""\n', encoding="utf-8")
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name in ("data.json", "data.csv", "data.parquet"):
        assert [(record.prompt, record.completion) for record in read_records(tmp_path / name)] == wanted, name
    assert read_records(tmp_path / "data.csv")[1].source == "data.csv:4"


def test_a_text_file_is_one_document_or_several_between_end_marks(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\ntwo\n")
    assert read_records(path) == [Text("one\ntwo", "data.txt:1")]
    path.write_text("one\n<|endoftext|>\ntwo\n\n<|endoftext|>\n")
    assert read_records(path) == [Text("one", "data.txt:1"), Text("two", "data.txt:3")]


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("gsm8k/train.jsonl", PromptCompletion, 7473),
        ("llamafactory/glaive_toolcall_en_demo.json", Conversation, 300),
        ("llamafactory/identity.json", Conversation, 91),
        ("mt_bench/dummy_conversation.json", Conversation, 500),
        ("sgd_multiturn/dev_messages.jsonl", Conversation, 200),
    ],
)
def test_published_data_sets_are_read_whole(shared_data, name, kind, count):
    records = read_records(shared_data / "datasets" / name)
    assert len(records) == count and all(type(record) is kind for record in records)


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "kto_en_demo.json"])
def test_preferences_are_not_taken_for_answers_to_imitate(shared_data, name):
    with pytest.raises(DataError, match="preferences"):
        read_records(shared_data / "datasets" / "llamafactory" / name)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, words",
    [
        ([1], "data.jsonl:1: wanted an object with 'messages'"),
        ({}, "found no key at all"),
        ({"mesages": []}, "'prompt' + 'completion', 'question' + 'answer', or 'text'; found 'mesages'"),
        ({"messages": []}, "found an empty list"),
        ({"messages": "hi"}, "wanted a list of messages, found text"),
        ({"messages": ["hi"]}, "message 1: wanted an object with role and content, found text"),
        ({"messages": [{"role": "assistent", "content": "4"}]}, "found 'assistent'. Did you mean 'assistant'?"),
        ({"messages": [{"content": "4"}]}, "found None"),
        ({"messages": [{"role": "user", "content": 4}, ANSWER]}, "as text or a list of parts, found the number 4"),
        ({"messages": [USER]}, "no turn of the assistant is to be learned"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no turn of the assistant is to be learned"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "a weight is 0 or 1 and belongs to the assistant; found 0.5"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "found 1 for 'user'"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2: the assistant says nothing"),
        ({"messages": [USER, ANSWER], "tools": 3}, "'tools' wants a list of objects, found the number 3"),
        ({"conversations": [{"from": "humn", "value": "4"}]}, "found 'humn'. Did you mean 'human'?"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a function_call wants JSON with 'name'"),
        ({"prompt": "a", "completion": 4}, "'completion' wants text, found the number 4"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"text": "  "}, "'text' is empty"),
        ({"text": None}, "'text' wants text, found nothing"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_refused_with_its_line(tmp_path, row, words):
    message = refusal(tmp_path, row)
    assert message.startswith("data.jsonl:1") and words in message


def test_an_empty_answer_with_weight_zero_or_with_tool_calls_is_kept(tmp_path):
    calls = [{"function": {"name": "add", "arguments": {}}}]
    messages = [
        USER,
        {"role": "assistant", "content": "", "weight": 0},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    assert len(only(tmp_path, {"messages": messages}).turns) == 3


def test_a_row_of_another_format_than_asked_is_refused(tmp_path):
    assert "wanted data.format = 'text', found a row with 'messages'" in refusal(
        tmp_path, {"messages": [USER, ANSWER]}, "text"
    )
    with pytest.raises(DataError, match="Did you mean 'chat'"):
        read_records(tmp_path / "data.jsonl", "chats")


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("data.jsonl", b"", "found an empty file"),
        ("data.jsonl", b"\n \n", "found an empty file"),
        ("data.jsonl", b'{"text": "a"}\n{"text": \n', "data.jsonl:2: wanted JSON, but at column 9"),
        ("data.jsonl", b'{"text": "a\xff"}\n', "data.jsonl:1: wanted UTF-8 text, found byte 0xff"),
        ("data.jsonl", b'{"text": "a"}\n' * 20_000 + b'{"text": "caf\xe9"}\n', "data.jsonl:20001: wanted UTF-8 text"),
        ("data.txt", b"one\ncaf\xe9\n", "data.txt:2: wanted UTF-8 text, found byte 0xe9"),
        (
            "data.jsonl",
            b'{"text": "a"}\n{"text": "a \\ud83d b"}\n',
            "data.jsonl:2: wanted Unicode text, found '\\ud83d'",
        ),
        ("data.json", b'{"text": "a"}', "wanted a list of records, found an object"),
        ("data.json", b"[]", "found an empty file"),
        ("data.csv", b"prompt,completion\na\n", "data.csv:2: the row and the header have different numbers of cells"),
        ("data.csv", b"prompt,completion\na,b,c\n", "different numbers of cells"),
        ("data.parquet", b"not parquet", "data.parquet: "),
        ("data.txt", b" \n", "found an empty file"),
        ("data.yaml", b"", "wanted a file ending in .jsonl, .json, .csv, .parquet, .txt, found '.yaml'"),
    ],
)
def test_a_file_that_is_damaged_or_empty_is_refused_with_the_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as refused:
        read_records(tmp_path / name)
    assert words in str(refused.value)


def test_an_ending_in_capitals_and_an_escaped_pair_are_read(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "a \\ud83d\\ude00"}\n')
    [record] = read_records(tmp_path / "A.JSONL")
    assert record.text == "a \N{GRINNING FACE}"


def test_a_row_of_nulls_is_told_as_such(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet: record 2: every column is null: text\."):
        read_records(tmp_path / "data.parquet")


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        read_records(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"conversations": [{"from": ["x"], "value": "a"}]}', "wanted 'from' of"),
        ("[" * 200_000, "wanted JSON that can be read"),
        ('{"text": ' + "9" * 5000 + "}", "wanted JSON that can be read"),
        ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": "foo"}]}', "'tool_calls' wants a list"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": 3}]}]}', "wants an object"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "'content' wants a list of objects"),
    ],
)
def test_what_only_looks_like_a_row_is_refused_with_its_line(tmp_path, line, words):
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as refused:
        read_records(path)
    assert "data.jsonl:1" in str(refused.value) and words in str(refused.value)


def test_a_weight_that_other_turns_have_is_not_missed_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    weights = [("user", None), ("assistant", 0), ("user", None), ("assistant", 1)]
    messages = [{"role": role, "content": "a", "weight": weight} for role, weight in weights]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "data.parquet")
    [record] = read_records(tmp_path / "data.parquet")
    assert [turn.weight for turn in record.turns] == [1, 0, 1, 1]


def test_further_keys_of_a_message_keep_their_order(tmp_path):
    row = {
        "messages": [{"z": 1, "role": "user", "a": 2, "content": "hi", "m": 3}, {"role": "assistant", "content": "b"}]
    }
    assert list(only(tmp_path, row).turns[0].more) == ["z", "a", "m"]


def test_a_csv_header_that_names_a_column_twice_is_refused_and_long_cells_are_read(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match="names the column 'prompt' twice"):
        read_records(path)
    path.write_text("text\n" + "x" * 200_000 + "\n")
    [record] = read_records(path)
    assert len(record.text) == 200_000
