"""python -m lumen.chat: talk to a model, or to what a run made of it; or ask one question and leave.

A run's folder is the base model it names, held as it was trained (in 4 bits where the run says so), with the run's
adapter beside it; or the whole model that a full fine-tuning left. The conversation is put into the chat template that
the run trained with. A model without a template, as a base model, continues the text as it stands, each line anew.

Answers go to stdout as they come, everything else to stderr. How tokens are chosen is what the command line says, else
what the model's generation_config.json says, else the likeliest token every time.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lumen.errors import CheckpointError, ConfigError, LumenError, closest
from lumen.formats.atomic import write_bytes
from lumen.models.decoder import Decoder
from lumen.sampling import check_options, generate
from lumen.source import Source, find_source
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import GENERATION, Tokenizer
from lumen.text.tokenizer_files import read_json_object
from lumen.text.turns import chat_template, prompt_ids, question_ids

SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
NOT_FOLLOWED = {  # what else a generation_config.json may ask for, and which value asks for nothing
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), 0),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), 0),
    **dict.fromkeys(("stop_strings", "bad_words_ids", "force_words_ids", "sequence_bias", "constraints")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers", "top_h")),
}
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
    finish: str  # "stop", "length" (max_tokens came), "context" (it is full), or "interrupted"
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
    stop_strings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what a person should know of it before it speaks

    def answer(self, messages: list[dict], on_text: Callable[[str], None]) -> Answer:
        """The answer to `messages`; without a template, what continues the last one.

        on_text  called with each piece of text as it becomes certain

        A KeyboardInterrupt ends the answer, which is then what was said so far. Raises what `generate` and the template
        refuse.
        """
        said, heard, finish = [], [], "interrupted"

        def say(_row: int, text: str) -> None:
            said.append(text)
            on_text(text)

        began_s = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            (generation,) = generate(
                self.model,
                [self._prompt(messages)],
                stop_ids=self.tokenizer.stop_ids,
                stop_strings=self.stop_strings,
                tokenizer=self.tokenizer,
                on_token=lambda _row, token: heard.append(token),
                on_text=say,
                **self.options,
            )
            finish = generation.finish
        seconds = time.perf_counter() - began_s
        return Answer(text="".join(said), tokens=len(heard), finish=finish, seconds=seconds)

    def _prompt(self, messages: list[dict]) -> list[int]:
        if self.template is None:
            return question_ids(messages[-1]["content"], self.tokenizer)
        return prompt_ids(messages, self.tokenizer, self.template)

    def refuse_system(self) -> None:
        """ConfigError where there is no place for a system text."""
        if self.template is None:
            raise ConfigError("this model has no chat template, and so no place for a system text.")


def load_speaker(path: str, options: dict[str, float], stop_strings: tuple[str, ...] = ()) -> Speaker:
    """The speaker in what `path` names: a run's folder, an adapter's, a model's, "lumen-demo", or an id of the Hub.

    options  of `generate`; of those in `SAMPLING`, what is missing is filled in from the model's generation_config.json

    Raises what `find_source` does for a path that is none of these, what loading raises for what is damaged there, and
    CheckpointError for a generation_config.json that holds no numbers where it should.
    """
    source = find_source(path)
    model, tokenizer = source.load()
    template = chat_template(tokenizer)
    own = sampling_of(source, tokenizer, options)
    options = SAMPLING | own | options
    notes = []
    if template is None:
        notes.append(f"{path} has no chat template: it continues the text as it stands.")
    if changed := {name: value for name, value in own.items() if value != SAMPLING[name]}:
        notes.append(f"{GENERATION} of the model says: {_listed(changed)}")
    if unfollowed := _not_followed(_generation_config(source, tokenizer)[1]):
        notes.append(f"{GENERATION} of the model also says what lumen does not follow: {unfollowed}")
    cuts = {name: options[name] for name in ("top_k", "top_p", "min_p") if options[name] != SAMPLING[name]}
    if cuts and not options["temperature"]:
        notes.append(f"temperature is 0, which takes the likeliest token: {_listed(cuts)} changes nothing")
    return Speaker(
        model=model,
        tokenizer=tokenizer,
        template=template,
        options=options,
        stop_strings=stop_strings,
        notes=tuple(notes),
    )


def sampling_of(source: Source, tokenizer: Tokenizer, said: dict[str, float]) -> dict[str, float]:
    """What the model's own generation_config.json adds to what was `said` of the options in `SAMPLING`.

    Its temperature (1 where it names none) and its cuts count if it says `do_sample`, as in transformers, and the cuts
    also beside a temperature that was said. CheckpointError for a value that no answer can be sampled by.
    """
    path, found = _generation_config(source, tokenizer)
    if (sampled := found.get("do_sample")) not in (None, True, False):
        raise CheckpointError(f"{path}: do_sample: true or false was wanted, found {sampled!r}.")
    if not said.get("temperature", sampled):
        names = ["repetition_penalty"]
    else:
        names = list(SAMPLING)
        found = {"temperature": 1.0} | {name: value for name, value in found.items() if value is not None}
    return {
        name: _number(path, name, found[name]) for name in names if name not in said and found.get(name) is not None
    }


def _generation_config(source: Source, tokenizer: Tokenizer) -> tuple[Path, dict]:
    """What the model's generation_config.json says, and where it is, or would be."""
    path = source.base / GENERATION
    found = read_json_object(path, path.read_bytes()) if path.is_file() else {}
    return path, found | read_json_object(path, tokenizer.files.get(GENERATION, b"{}"))  # an adapter may bring its own


def _not_followed(found: dict) -> str:
    """What `found` says of the keys in `NOT_FOLLOWED`, listed."""
    said = {name: found.get(name) for name in NOT_FOLLOWED}
    asks = {name: value for name, value in said.items() if value not in (None, [], {}, NOT_FOLLOWED[name])}
    return ", ".join(f"{name} {value!r}" for name, value in asks.items())


def _number(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool):
        raise CheckpointError(f"{path}: {name}: a number was wanted, found {value!r}.")
    try:
        check_options(**{name: value})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error} Say --{name.replace('_', '-')} to go without it.") from None
    return value


def _listed(options: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


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
                    _refuse_bytes(line)
                    self.ask(line)
            except KeyboardInterrupt:  # between two answers; what was said before still stands
                _note("(interrupted)")
            except BrokenPipeError:  # nobody listens any more
                raise
            except (LumenError, OSError) as error:  # a refused message or file is no reason to end the conversation
                _note(f"error: {error}")

    def ask(self, text: str) -> None:
        """Adds a user's turn and the answer to it; the conversation stays as it was if nothing is answered."""
        answer = self.answer(text, _print)
        _print("\n")
        if answer.finish != "stop":
            _note(
                {
                    "length": f"(cut off after {answer.tokens} tokens; --max-tokens allows more)",
                    "context": "(cut off: the model's context is full; /reset begins a new conversation)",
                    "interrupted": "(interrupted)",
                }[answer.finish]
            )
        if answer.tokens:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]

    def answer(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """The answer to a user's turn after all that was said; the conversation stays as it is."""
        return self.speaker.answer([*self._opening(), *self.messages, {"role": "user", "content": text}], on_text)

    def command(self, command: str, argument: str) -> None:
        """Does one of COMMANDS; ConfigError for another."""
        if command not in COMMANDS:
            raise ConfigError(f"there is no {command}.{closest(command, COMMANDS)}\n" + "\n".join(COMMANDS.values()))
        if command == "/save":
            self.save(argument)
            return
        if command == "/system":
            if argument:
                self.speaker.refuse_system()
            self.system = argument
        self.messages.clear()
        _note("a new conversation" + (f", under: {self.system}" if self.system else ""))

    def save(self, path: str) -> None:
        """Adds the conversation to the file at `path`."""
        if not path or not self.messages:
            raise ConfigError("there is nothing to save yet." if path else "/save wants the name of a file.")
        if Path(path).is_dir():
            raise ConfigError(f"/save wants the name of a file, found the folder {path}.")
        file, line = Path(path), json.dumps({"messages": [*self._opening(), *self.messages]}, ensure_ascii=False)
        before = file.read_bytes() if file.exists() else b""
        end = b"" if before.endswith(b"\n") or not before else b"\n"
        write_bytes(file, before + end + line.encode() + b"\n")
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
    options = {name: value for name in (*SAMPLING, "max_tokens", "seed") if (value := getattr(asked, name)) is not None}
    try:
        if asked.json and asked.prompt is None:
            raise ConfigError("--json wants one question, as --prompt TEXT.")
        if "" in asked.stop:
            raise ConfigError("--stop wants a text to stop at, found an empty one.")
        check_options(**options)
        speaker = load_speaker(asked.model, options, tuple(asked.stop))
        if asked.system:
            speaker.refuse_system()
        if asked.prompt is None:
            _begin(speaker)
        for note in speaker.notes:
            _note(note)
        for text in (asked.system, asked.prompt):
            _refuse_bytes(text or "")
        chat = Chat(speaker, system=asked.system)
        if asked.prompt is not None:
            return _ask_once(chat, asked.prompt, asked.json)
        chat.run()
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


def _refuse_bytes(text: str) -> None:
    """ConfigError for a text that was not UTF-8: Python hands on such bytes as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        beginning = text[: wrong.start]
        raise ConfigError(
            f"UTF-8 was wanted, found another byte after {beginning!r}. In which encoding was it written?"
        ) from None


def _ask_once(chat: Chat, prompt: str, as_json: bool) -> int:
    answer = chat.answer(prompt, (lambda _: None) if as_json else _print)
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
    parser.add_argument("model", metavar="MODEL|RUN_FOLDER", help="a folder of either, or owner/name of the Hub")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer and leave")
    parser.add_argument("--system", metavar="TEXT", default="", help="system text that opens the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer; default %(default)s")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer before this text; repeatable"
    )
    group = parser.add_argument_group(
        "how tokens are chosen", f"What is not said here is as the model's {GENERATION} says."
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0, which is the default, takes the likeliest")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0 = all")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest, P of the probability; 1 = all")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="only those P times as likely as the likeliest; 0 = all"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="F", help="above 1, tokens come less easily again; 1 = as easily"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the dice; the same seed, the same answer; default 0"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; wants --prompt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
