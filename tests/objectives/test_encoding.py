"""Encoding in processes of its own: the same examples and the same errors, and no process that stays."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from lumen.config import Data, load_config
from lumen.errors import DataError, LumenError
from lumen.objectives import encoding
from lumen.objectives.encoding import Encoder, _Worker, encode_all, worker_count
from lumen.source import starting_point
from lumen.text.conversation import Conversation, PromptCompletion, Text, Turn
from lumen.text.turns import chat_template


@pytest.fixture(scope="module")
def tokenizer():
    """The demo's, with its chat template."""
    return starting_point(load_config("lumen-demo")).tokenizer()


def conversation(number: int, **more) -> Conversation:
    turns = (Turn("user", f"Two teas for {number}, please."), Turn("assistant", f"Äh \ud7ff {number}: yes.", more=more))
    return Conversation(turns, ({"type": "function"},) * (number % 2), f"chats.jsonl:{number}")


RECORDS = [
    *(conversation(number) for number in range(5)),
    PromptCompletion("One, ", "two\n", "pairs.jsonl:1"),
    Text("A document. Two? Äh 😀", "text.txt"),
    *(conversation(number) for number in range(5, 9)),
]


def children() -> set[str]:
    """Processes that this one has started and that still run, by the end of their command."""
    listed = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    own = str(os.getpid())
    return {line.split()[-1] for line in listed.splitlines() if line.split()[0] == own}


@pytest.mark.parametrize("data", [Data(), Data(instruction_part="Two", response_part="Äh")])
def test_workers_give_the_examples_of_one_process_in_their_order(tokenizer, data, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 3)
    template = replace(chat_template(tokenizer), now=datetime(2026, 1, 2, 3))
    alone = encode_all(RECORDS, replace(data, workers=0), tokenizer, template)
    assert encode_all(RECORDS, replace(data, workers=2), tokenizer, template) == alone
    assert [example.source for example in alone] == [record.source for record in RECORDS]
    assert "lumen.objectives.encoding" not in children()


def test_the_first_error_is_told_as_one_process_tells_it(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 2)
    silent = Conversation((Turn("user", "?"), Turn("assistant", "never", weight=0)), (), "chats.jsonl:77")
    records = [*RECORDS[:3], silent, *RECORDS[3:], replace(silent, source="chats.jsonl:99")]
    told = []
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"^chats\.jsonl:77: nothing of it is learned") as caught:
            encode_all(records, Data(workers=workers), tokenizer, chat_template(tokenizer))
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "lumen.objectives.encoding" not in children()


def test_workers_end_with_an_interrupt_that_comes_while_their_examples_are_counted(tokenizer, monkeypatch):
    def interrupted(encoded, _):
        next(iter(encoded))
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(encoding, "LEAST", 1)
    monkeypatch.setattr(encoding, "_with_bar", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        encode_all(RECORDS * 30, Data(workers=2), tokenizer, chat_template(tokenizer))
    assert caught.value.__traceback__ and "lumen.objectives.encoding" not in children()


def test_what_json_cannot_hold_is_refused_as_by_one_process(tokenizer):
    with pytest.raises(DataError, match="holds what JSON cannot"):
        encode_all([conversation(1, when=datetime.now())], Data(workers=1), tokenizer, chat_template(tokenizer))


def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer=tokenizer, template=chat_template(tokenizer), markers=None, train_on="all-assistant")


def test_a_worker_that_ends_by_itself_is_told(tokenizer):
    worker = _Worker(json.dumps(encoder(tokenizer).sent()).encode() + b"\n")
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(LumenError, match=r"encodes chats\.jsonl:0.*exit code -9.*data\.workers=0"):
        worker.encode(RECORDS[:2], encoder(tokenizer))
    worker.process.communicate()


def test_a_worker_ends_with_the_process_that_asked_it():
    worker = _Worker(b"")
    worker.process.stdin.close()
    assert worker.process.wait(timeout=30) == 0
    worker.process.stdout.close()


def test_a_worker_needs_no_torch():
    code = "import sys, lumen.objectives.encoding; assert 'torch' not in sys.modules"
    root = Path(encoding.__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize(
    ("asked", "records", "cores", "wanted"),
    [
        ("auto", 1999, 64, 0),
        ("auto", 2000, 64, 8),
        ("auto", 9999, 4, 3),
        ("auto", 9999, 2, 0),
        (0, 9999, 64, 0),
        (3, 9, 2, 3),
    ],
)
def test_workers_start_where_they_pay_or_are_asked_for(monkeypatch, asked, records, cores, wanted):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert worker_count(asked, records) == wanted
