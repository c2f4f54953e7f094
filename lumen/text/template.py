"""A checkpoint's Jinja chat template, rendered where it can do no harm.

The template that comes with a checkpoint is the truth about its chat format: training text, prompts and exports are
what it renders. It is also a program by someone unknown, so it runs in jinja2's immutable sandbox in a process of its
own (`sandbox.py`), with a limit on time, memory and output. The environment is the one templates are written for: that
of transformers' `apply_chat_template`.
"""

import atexit
import copy
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lumen.errors import DataError

TIME_LIMIT_S = 5.0
OUTPUT_LIMIT = 16_000_000  # characters; a context of a million tokens is about 4 million

# What templates call: a variable of that name would take its place.
RESERVED = frozenset({"range", "dict", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"})


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a template wrote, and which characters of it stood in `{% generation %}` blocks."""

    text: str
    spans: tuple[tuple[int, int], ...]  # [start, end) in characters, ascending


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the names of the tokens it may write.

    now  the moment that `strftime_now` tells; None is the moment of rendering. A run fixes it, so that the same
         configuration gives the same tokens tomorrow.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    now: datetime | None = None

    def render(
        self,
        messages: Sequence[dict],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[dict] | None = None,
        documents: Sequence[dict] | None = None,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The conversation as text, special tokens included.

        add_generation_prompt   ends with what opens the assistant's next turn
        continue_final_message  ends with the last message's last word, without what would close its turn
        variables               what else the template reads, as `enable_thinking`; plain JSON values

        Raises DataError where the template refuses, fails, or goes past a limit.
        """
        if not continue_final_message:
            prompt = {"add_generation_prompt": add_generation_prompt, "tools": tools, "documents": documents}
            return self._ask({**variables, "messages": messages, **prompt}).text
        if add_generation_prompt:
            raise DataError("continue_final_message and add_generation_prompt exclude each other: ask for one.")
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        text = self.render(_with_mark(messages, mark), tools=tools, documents=documents, **variables)
        if text.count(mark) != 1:
            raise DataError("the chat template does not write the last message once and whole: it cannot be continued.")
        return text.partition(mark)[0]

    def render_marked(self, messages: Sequence[dict], *, tools: Sequence[dict] | None = None) -> Rendering:
        """The conversation as text, with the spans of its `{% generation %}` blocks; none if the template has none."""
        prompt = {"add_generation_prompt": False, "tools": tools, "documents": None}
        return self._ask({"messages": messages, **prompt}, marks=True)

    def _ask(self, variables: dict, marks: bool = False) -> Rendering:
        if taken := RESERVED & variables.keys():
            raise DataError(f"{', '.join(sorted(taken))}: a function of the chat template, not a variable to set.")
        variables = {"bos_token": self.bos_token, "eos_token": self.eos_token, **variables}
        now = self.now.isoformat() if self.now else None
        request = {"source": self.source, "variables": variables, "now": now}
        reply = _child.ask({**request, "marks": marks, "output_limit": OUTPUT_LIMIT})
        if "error" in reply:
            raise DataError(f"The chat template refuses this conversation: {reply['error'].rstrip('.')}.")
        return Rendering(text=reply["text"], spans=tuple((start, end) for start, end in reply["spans"]))


def _with_mark(messages: Sequence[dict], mark: str) -> list[dict]:
    """A copy of `messages` whose last text ends in `mark`."""
    messages = copy.deepcopy(list(messages))
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + mark
        return messages
    texts = [part for part in content or [] if part.get("type") == "text"]
    if not texts:
        raise DataError("continue_final_message wants a last message with text; there is none.")
    texts[-1]["text"] += mark
    return messages


class _Child:
    """The process that renders, started when first asked and again after it had to be killed.

    A lock keeps two threads from speaking at once; a forked copy of this process gets a child of its own, since two
    readers of one pipe would take each other's replies.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def ask(self, request: dict) -> dict:
        """The child's reply; DataError when it takes longer than `TIME_LIMIT_S` or dies of the template."""
        try:
            line = json.dumps(request)
        except (TypeError, ValueError) as wrong:
            raise DataError(f"A conversation holds what JSON cannot: {wrong}.") from None
        if self._owner != os.getpid():
            self._begin()
        with self._lock:
            process = self._started()
            late = threading.Timer(TIME_LIMIT_S, process.kill)
            late.start()
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:
                self._stop()  # its reply would be taken for the next request's
                raise
            finally:
                late.cancel()
            if reply:
                return json.loads(reply)
            self._stop()
            return {"error": f"it ran for longer than {TIME_LIMIT_S:g} s, or ended the process that renders"}

    def _started(self) -> subprocess.Popen:
        if self._process and self._process.poll() is None:
            return self._process
        program = Path(__file__).with_name("sandbox.py")
        command = [sys.executable, "-P", str(program)]  # -P: the folder of this file is not a place to import from
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # a session of its own: Ctrl-C is the parent's to handle
        self._process = subprocess.Popen(command, text=True, encoding="ascii", start_new_session=True, **pipes)
        if not self._process.stdout.readline():
            self._stop()
            raise DataError(f"Chat templates need jinja2, and {sys.executable} cannot run {program}.")
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process and self._owner == os.getpid():  # a fork's copy is not its own to end
            process.kill()
            process.communicate()


_child = _Child()
atexit.register(_child._stop)
