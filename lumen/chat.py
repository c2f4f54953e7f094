"""python -m lumen.chat: talk to a model, or to what a run made of it; or ask one question and leave.

A run's folder is the base model it names, held as it was trained (in 4 bits where the run says so), with the run's
adapter beside it; or the whole model that a full fine-tuning left. The conversation is put into the chat template that
the run trained with. A model without a template, as a base model, continues the text as it stands, each line anew.

Answers go to stdout as they come, everything else to stderr.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lumen.errors import ConfigError, LumenError, closest
from lumen.models.decoder import Decoder
from lumen.sampling import check_options, generate
from lumen.source import find_source
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import StreamDecoder, Tokenizer
from lumen.text.turns import chat_template, prompt_ids, question_ids

COMMANDS = {
    "/system": "/system TEXT  sets the system text and begins a new conversation; without TEXT there is none",
    "/reset": "/reset        begins a new conversation under the same system text",
    "/save": "/save FILE    adds the conversation to FILE as one line of jsonl, which lumen.train reads",
    "/exit": "/exit         leaves, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said, and how long that took."""

    text: str
    tokens: int  # the stop token included
    finish: str  # "stop", "length", or "interrupted"
    seconds: float  # the reading of the prompt included

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model with its tokenizer, its chat template if it has one, and the options of `generate`."""

    model: Decoder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    options: dict[str, float]

    def answer(self, messages: list[dict], on_text: Callable[[str], None]) -> Answer:
        """The answer to `messages`; without a template, what continues the last one.

        on_text  called with each piece of text as it becomes certain

        A KeyboardInterrupt ends the answer, which is then what was said so far. Raises what `generate` and the template
        refuse.
        """
        stops, stream = self.tokenizer.stop_ids, StreamDecoder(self.tokenizer, skip_special=True)
        said, heard = [], []

        def say(text: str) -> None:
            if text:
                said.append(text)
                on_text(text)

        def hear(_row: int, token: int) -> None:
            heard.append(token)
            if token not in stops:
                say(stream.push(token))

        began_s = time.perf_counter()
        try:
            prompts = [self._prompt(messages)]
            (generation,) = generate(self.model, prompts, stop_ids=stops, on_token=hear, **self.options)
            finish = generation.finish
            say(stream.flush())
        except KeyboardInterrupt:
            finish = "interrupted"
        seconds = time.perf_counter() - began_s
        return Answer(text="".join(said), tokens=len(heard), finish=finish, seconds=seconds)

    def _prompt(self, messages: list[dict]) -> list[int]:
        if self.template is None:
            return question_ids(messages[-1]["content"], self.tokenizer)
        return prompt_ids(messages, self.tokenizer, self.template)


def load_speaker(source: str, options: dict[str, float]) -> Speaker:
    """The speaker in what `source` names: a run's folder, an adapter's, a model's, or "lumen-demo".

    Raises what `find_source` does for a path that is none of these, and what loading raises for what is damaged there.
    """
    model, tokenizer = find_source(source).load()
    return Speaker(model=model, tokenizer=tokenizer, template=chat_template(tokenizer), options=options)


@dataclass
class Chat:
    """A conversation with a person: lines go in, answers come out, until there is nothing more to say."""

    speaker: Speaker
    system: str = ""
    messages: list[dict] = field(default_factory=list)  # the turns of user and assistant, without the system text

    def run(self) -> None:
        """Reads stdin to its end, or until /exit."""
        while (line := _read_line()) is not None:
            command, _, rest = line.partition(" ")
            if command == "/exit":
                return
            try:
                if command.startswith("/"):
                    self.command(command, rest.strip())
                elif line:
                    self.ask(line)
            except BrokenPipeError:  # nobody listens any more
                raise
            except (LumenError, OSError) as error:  # a refused message or file is no reason to end the conversation
                _note(f"error: {error}")

    def ask(self, text: str) -> None:
        """Adds a user's turn and the answer to it; the conversation stays as it was if nothing is answered."""
        turn = {"role": "user", "content": text}
        answer = self.speaker.answer([*self._opening(), *self.messages, turn], _print)
        _print("\n")
        if answer.finish != "stop":
            _note({"length": "(cut off: no room for more tokens)", "interrupted": "(interrupted)"}[answer.finish])
        if answer.tokens:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]

    def command(self, command: str, argument: str) -> None:
        """Does one of COMMANDS; ConfigError for another."""
        if command not in COMMANDS:
            raise ConfigError(f"there is no {command}.{closest(command, COMMANDS)}\n" + "\n".join(COMMANDS.values()))
        if command == "/save":
            self.save(argument)
            return
        if command == "/system":
            self.system = argument
        self.messages.clear()
        _note("a new conversation" + (f", under: {self.system}" if self.system else ""))

    def save(self, path: str) -> None:
        """Adds the conversation to the file at `path`."""
        if not path or not self.messages:
            raise ConfigError("there is nothing to save yet." if path else "/save wants the name of a file.")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": [*self._opening(), *self.messages]}, ensure_ascii=False) + "\n")
        _note(f"added to {path}")

    def _opening(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] if self.system else []


def _read_line() -> str | None:
    """The next line of stdin without its blanks; None at the end. Ctrl-C begins the line again."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            _note("\n/exit or Ctrl-D leaves")


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed or interrupted, 2 asked wrongly."""
    asked = _parser().parse_args(arguments)
    options = {name: getattr(asked, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")}
    try:
        if asked.json and asked.prompt is None:
            raise ConfigError("--json wants one question, as --prompt TEXT.")
        check_options(**options)
        speaker = load_speaker(asked.model, options)
        if speaker.template is None:
            _note(f"{asked.model} has no chat template: it continues the text as it stands.")
        if asked.prompt is not None:
            return _ask_once(speaker, asked.prompt, asked.json)
        _begin(speaker)
        Chat(speaker).run()
    except ConfigError as error:
        _note(f"error: {error}")
        return 2
    except LumenError as error:
        _note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _note("interrupted")
        return 1
    return 0


def _ask_once(speaker: Speaker, prompt: str, as_json: bool) -> int:
    answer = speaker.answer([{"role": "user", "content": prompt}], (lambda _: None) if as_json else _print)
    if as_json:
        told = {name: getattr(answer, name) for name in ("tokens", "finish", "tokens_per_s")}
        print(json.dumps({"prompt": prompt, "answer": answer.text, **told}))
    else:
        _print("\n")
        _note(f"({answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s, {answer.finish})")
    return 1 if answer.finish == "interrupted" else 0


def _begin(speaker: Speaker) -> None:
    model = speaker.model
    _note(f"{model.spec.name}, {model.dtype} on {model.device}, a context of {model.spec.context_length} tokens")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and editing; Windows has none
        _note("\n".join(COMMANDS.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lumen.chat",
        description="Talk to a model, or ask it one question.",
        epilog="In a conversation: " + ", ".join(COMMANDS) + ".",
    )
    parser.add_argument("model", metavar="MODEL|RUN_FOLDER", help="a model's folder, a run's folder, or lumen-demo")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer and leave")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer; default %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0 = all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest, P of the probability"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only those P times as likely as the likeliest"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the dice; the same seed, the same answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; wants --prompt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
