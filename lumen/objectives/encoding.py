"""Records become examples: tokens, and which of them are learned; of many records, in processes of their own.

Rendering a conversation and finding its answers takes some milliseconds, which many records make minutes. So chunks of
records go to workers, and come back in their order: examples and errors are those of one process, bit for bit.

Decision: a worker is this module as a program, spoken to over pipes, and not a child of `multiprocessing`.
Because: forking after CUDA and threads have started is unsound, and what is spawned imports the user's script once
more, which then needs a guard. A pipe also ends a worker however this process ends, so that none is left behind.
Revisit when: Python starts processes that do neither.

A worker imports no torch and starts in a third of a second. It reads one line of JSON with the tokenizer, then a line a
chunk; it answers each by a line of JSON and the numbers behind it:

    {"lengths": […], "sources": […]}   int32 ids of all examples, then a byte for each: whether it is learned
    {"error": message, "kind": name of the error's class}
"""

import base64
import json
import os
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from lumen.config import Data
from lumen.errors import CheckpointError, ConfigError, DataError, LumenError
from lumen.text.conversation import Conversation, Encoded, PromptCompletion, Record, Text, Turn
from lumen.text.markers import Markers, encode_by_markers
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer, tokenizer_of
from lumen.text.turns import encode_conversation, encode_prompt_completion, encode_text

CHUNK = 64  # records
LEAST = 2000  # records from which on "auto" starts workers: some seconds of work for one core
MOST = 8  # workers that "auto" starts
ERRORS = {kind.__name__: kind for kind in (CheckpointError, ConfigError, DataError)}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What turns a record into an example."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    markers: Markers | None
    train_on: str

    def encode(self, record: Record) -> Encoded:
        """DataError, with file and line, for what cannot be rendered or learned."""
        if isinstance(record, Conversation) and self.template is None:
            raise DataError(
                f"{record.source}: a conversation wants a chat template, and this model brings none. "
                "Name a data.chat_format, as chatml, or a Jinja file as data.chat_template."
            )
        if isinstance(record, PromptCompletion):
            return encode_prompt_completion(record, self.tokenizer)
        if self.markers:
            return encode_by_markers(record, self.tokenizer, self.template, self.markers, self.train_on)
        if isinstance(record, Conversation):
            return encode_conversation(record, self.tokenizer, self.template, train_on=self.train_on)
        return encode_text(record, self.tokenizer)

    def sent(self) -> dict[str, Any]:
        """As JSON, for a worker."""
        template = asdict(self.template) if self.template else None
        if self.template and self.template.now:
            template["now"] = self.template.now.isoformat()
        return {
            "files": {name: base64.b64encode(data).decode("ascii") for name, data in self.tokenizer.files.items()},
            "template": template,
            "markers": asdict(self.markers) if self.markers else None,
            "train_on": self.train_on,
        }

    @classmethod
    def received(cls, told: dict[str, Any]) -> "Encoder":
        template = told["template"]
        if template and template["now"]:
            template["now"] = datetime.fromisoformat(template["now"])
        return cls(
            tokenizer=tokenizer_of({name: base64.b64decode(data) for name, data in told["files"].items()}),
            template=ChatTemplate(**template) if template else None,
            markers=Markers(**told["markers"]) if told["markers"] else None,
            train_on=told["train_on"],
        )


def encode_all(
    records: Sequence[Record], data: Data, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[Encoded]:
    """Every record as an example, in order; on a terminal with a bar, where there are many.

    DataError as `Encoder.encode`, of the first record that has one; LumenError for a worker that ended by itself.
    """
    markers = Markers(instruction=data.instruction_part, response=data.response_part) if data.response_part else None
    encoder = Encoder(tokenizer=tokenizer, template=template, markers=markers, train_on=data.train_on)
    chunks = [records[start : start + CHUNK] for start in range(0, len(records), CHUNK)]
    workers = min(worker_count(data.workers, len(records)), len(chunks))
    encoded = _by_workers(chunks, encoder, workers) if workers else ([encoder.encode(r) for r in c] for c in chunks)
    with closing(encoded):  # an interrupt may come outside of it, and leave it to be ended at the process's own end
        return list(chain.from_iterable(_with_bar(encoded, len(chunks)) if len(records) >= LEAST else encoded))


def worker_count(asked: int | str, records: int) -> int:
    """How many processes encode so many records; 0 = this one does it."""
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores - 1, MOST)
    return workers if records >= LEAST and workers > 1 else 0


def _with_bar(encoded: Iterable[list[Encoded]], total: int) -> Iterable[list[Encoded]]:
    from rich.console import Console  # a worker does without
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal or console.is_dumb_terminal
    return track(encoded, "encoding", total=total, console=console, transient=True, disable=hidden)


# --- this process ----------------------------------------------------------------------------------------------------


def _by_workers(chunks: Sequence[Sequence[Record]], encoder: Encoder, count: int) -> Iterator[list[Encoded]]:
    """Each chunk as examples, in order. All workers have ended when this has, whether by its end or by an error."""
    free: SimpleQueue[_Worker] = SimpleQueue()
    workers: list[_Worker] = []

    def encode(chunk: Sequence[Record]) -> list[Encoded]:
        worker = free.get()
        try:
            return worker.encode(chunk, encoder)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(count, thread_name_prefix="lumen-encoding")  # one waits for each worker
    try:
        hello = json.dumps(encoder.sent()).encode() + b"\n"
        for _ in range(count):
            workers.append(_Worker(hello))
            free.put(workers[-1])
        yield from threads.map(encode, chunks)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.process.kill()
        threads.shutdown()  # before the pipes are closed that they read
        for worker in workers:
            worker.process.communicate()


class _Worker:
    """One process that encodes, from this side."""

    def __init__(self, hello: bytes) -> None:
        package = str(Path(__file__).resolve().parents[2])  # where this lumen is, wherever the process was started
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        # -P: the working directory is no place to import from; a session of its own: Ctrl-C is the parent's to handle
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lumen.objectives.encoding"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        self._hello = hello  # said with the first chunk, by the thread that waits for the answer

    def encode(self, chunk: Sequence[Record], encoder: Encoder) -> list[Encoded]:
        try:
            request = json.dumps([[type(record).__name__, asdict(record)] for record in chunk]).encode()
        except (TypeError, ValueError):  # JSON cannot hold it: what that means is said here
            return [encoder.encode(record) for record in chunk]
        try:
            self.process.stdin.write(self._hello + request + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            self._hello = b""
            reply = json.loads(line) if line else {}
            if "error" in reply:
                raise ERRORS.get(reply["kind"], LumenError)(reply["error"])
            lengths = reply["lengths"]
            numbers = self.process.stdout.read(5 * sum(lengths))
            return list(_unpacked(lengths, reply["sources"], numbers))
        except (OSError, KeyError, EOFError, json.JSONDecodeError):
            raise LumenError(
                f"A process that encodes {chunk[0].source or 'the data'} and what follows has ended by itself (exit "
                f"code {self.process.poll()}). Was the memory too small? With data.workers=0 there is none of them."
            ) from None


def _unpacked(lengths: list[int], sources: list[str], numbers: bytes) -> Iterator[Encoded]:
    total = sum(lengths)
    if len(numbers) != 5 * total:
        raise EOFError
    ids = array("i")
    ids.frombytes(numbers[: 4 * total])
    end = 0
    for length, source in zip(lengths, sources, strict=True):
        start, end = end, end + length
        learn = list(map(bool, numbers[4 * total + start : 4 * total + end]))
        yield Encoded(ids[start:end].tolist(), learn, source)


# --- a worker --------------------------------------------------------------------------------------------------------


def _record(kind: str, told: dict[str, Any]) -> Record:
    if kind == "Conversation":
        turns = tuple(Turn(**turn) for turn in told["turns"])
        return Conversation(turns, tuple(told["tools"]), told["source"])
    return {"PromptCompletion": PromptCompletion, "Text": Text}[kind](**told)


def _packed(encoded: Sequence[Encoded]) -> bytes:
    head = {"lengths": [len(each.ids) for each in encoded], "sources": [each.source for each in encoded]}
    ids = b"".join(array("i", each.ids).tobytes() for each in encoded)
    return json.dumps(head).encode() + b"\n" + ids + b"".join(bytes(each.learn) for each in encoded)


def work(requests: BinaryIO, replies: BinaryIO) -> None:
    """Encodes until `requests` ends, as it does when the other side does, however that happens."""
    encoder = None
    for line in requests:
        try:
            if encoder is None:
                encoder = Encoder.received(json.loads(line))
                continue
            reply = _packed([encoder.encode(_record(*told)) for told in json.loads(line)])
        except LumenError as error:
            reply = json.dumps({"error": str(error), "kind": type(error).__name__}).encode() + b"\n"
        replies.write(reply)
        replies.flush()


if __name__ == "__main__":
    try:
        work(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # the other side is gone; what is left in the buffer goes nowhere, and without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
