"""Text to token ids and back, for a model's folder with `tokenizer.json` or `tokenizer.model`.

The tokenizers and sentencepiece libraries cut text into ids. All else is decided here, once for both: which ids go
before and after a text, where an answer ends, and what ids say.

Every token stands for bytes, and `decode` is these bytes joined and read as UTF-8. Bytes only ever get appended, so
`StreamDecoder` says piece by piece exactly what `decode` says at once. Where the tokenizer starts a text with a space
of its own (SentencePiece's dummy prefix), the decoded text loses that space again, at its very beginning.
"""

import codecs
import dataclasses
import functools
import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lumen.errors import CheckpointError, DataError
from lumen.formats.atomic import write_bytes, write_json
from lumen.text.tokenizer_files import (
    Cutter,
    Settings,
    Spelling,
    Token,
    TokenKind,
    read_json_object,
    read_settings,
    read_tokenizer_json,
    read_tokenizer_model,
)

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
SPECIAL_MAP = "special_tokens_map.json"
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    CONFIG,
    SPECIAL_MAP,
    "added_tokens.json",
    TEMPLATE,
    GENERATION,
)

# Where an answer ends, whatever `eos_token` says: chat fine-tunes often keep their base model's.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")

# SentencePiece shows each byte that is no UTF-8 as one U+FFFD. Python's decoder keeps such a byte as a lone surrogate.
_LONE_BYTES = {0xDC00 + byte: "\ufffd" for byte in range(0x80, 0x100)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary and its rules. It never changes: a run that brings its own chat template gets another one.

    tokens          by id; None where no token has that id
    bos_id …        ids of the named tokens, None for a tokenizer without one
    prefix, suffix  what `encode(special_tokens=True)` puts around a text: BOS, EOS or nothing
    stop_ids        where an answer ends: eos, then what `generation_config.json` and the known chat formats add
    chat_template   Jinja text, or None
    files           the tokenizer's own files by name, as `save` writes them; among them `generation_config.json`, which
                    tells other programs where an answer ends
    """

    tokens: tuple[Token | None, ...] = field(repr=False)
    spelling: Spelling
    cutter: Cutter = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    stop_ids: tuple[int, ...]
    chat_template: str | None = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)

    @property
    def size(self) -> int:
        """The number of ids, those of added tokens and gaps included: an embedding needs at least as many rows."""
        return len(self.tokens)

    @property
    def add_bos(self) -> bool:
        return self.bos_id in self.prefix

    @property
    def add_eos(self) -> bool:
        return self.eos_id in self.suffix

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are structure and no text, the unknown token among them."""
        structure = (TokenKind.CONTROL, TokenKind.UNKNOWN)
        return frozenset(id for id, token in enumerate(self.tokens) if token is not None and token.kind in structure)

    def token_to_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text`."""
        return self._ids.get(text)

    def id_to_token(self, id: int) -> str | None:
        """The token as the vocabulary spells it, which is not what it says: see `decode`."""
        token = self.tokens[id] if 0 <= id < self.size else None
        return None if token is None else token.text

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of `text`. The text of a special token, as `<|eot_id|>`, becomes its one id.

        special_tokens  puts BOS and EOS around it, where the tokenizer's own files say so
        Refuses half a surrogate pair, which has no UTF-8, with DataError.
        """
        _refuse_surrogates(text)
        ids = self.cutter.encode(text)
        return [*self.prefix, *ids, *self.suffix] if special_tokens else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text` and the [start, end) of the characters that each of them covers.

        All tokens that are bytes of one character bear that character's offsets. A token that is nothing but the dummy
        prefix covers no character (sentencepiece) or shares the first one (tokenizers).
        """
        _refuse_surrogates(text)
        return self.cutter.encode_with_offsets(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text that `ids` stand for, special tokens by name or left out; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self, skip_special=skip_special)
        return decoder.push(*ids) + decoder.flush()

    def bytes_of(self, id: int) -> bytes:
        """What one token says; nothing for an id that no token has, as those of an embedding's padding rows."""
        if id < 0:
            raise DataError(f"A token id was wanted, found {id}. Targets that do not count have no text.")
        return self._bytes[id] if id < self.size else b""

    def with_chat_template(self, text: str) -> "Tokenizer":
        """The same tokenizer with another chat template, which `save` then writes."""
        files = {**self.files, TEMPLATE: text.encode()}
        if CONFIG in files:  # readers that do not know chat_template.jinja look here
            config = read_json_object(Path(CONFIG), files[CONFIG]) | {"chat_template": text}
            files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return dataclasses.replace(self, chat_template=text, files=files)

    def with_roles(self, **names: str) -> "Tokenizer":
        """The same vocabulary with other tokens in the roles `eos_token` and `pad_token`, in all files that `save`
        writes. A new EOS ends an answer, and so does the one before it.
        """
        files = dict(self.files)
        for name in (CONFIG, SPECIAL_MAP):
            if name == CONFIG or name in files:
                values = read_json_object(Path(name), files.get(name, b"{}")) | names
                files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
        ids = {f"{role}_id": self.token_to_id(text) for role, text in names.items()}
        pad_id = ids.get("pad_token_id")
        if "eos_token_id" in ids:
            ids["eos_token_id"] = list(dict.fromkeys([ids["eos_token_id"], *self.stop_ids]))
        generation = read_json_object(Path(GENERATION), files.get(GENERATION, b"{}")) | ids
        files[GENERATION] = (json.dumps(generation, indent=2) + "\n").encode()
        if len(names) == 1 and pad_id is not None and self.tokens[pad_id].kind is TokenKind.CONTROL:
            # the usual case: a token that is cut out of texts already, so nothing is read again; the unknown may not be
            return dataclasses.replace(self, pad_id=pad_id, files=files)
        return tokenizer_of(files)

    def save(self, folder: Path | str) -> None:
        """Writes the tokenizer's files into `folder`, which exists; files of the same names are replaced.

        A model's config.json that lies there already is made to name the same EOS and padding token.
        """
        for name, data in self.files.items():
            write_bytes(Path(folder) / name, data)
        if (path := Path(folder) / "config.json").is_file():
            self._name_in_config(path)

    def _name_in_config(self, path: Path) -> None:
        config = read_json_object(path, path.read_bytes())
        agreed, found = dict(config), config.get("eos_token_id")
        if self.eos_id not in (None, *(found if isinstance(found, list) else [found])):
            agreed["eos_token_id"] = list(self.stop_ids)
        if self.pad_id is not None:
            agreed["pad_token_id"] = self.pad_id
        if agreed != config:
            write_json(path, agreed)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token.text: id for id, token in enumerate(self.tokens) if token is not None}

    @functools.cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        return tuple(b"" if token is None else self.spelling.bytes_of(token) for token in self.tokens)


class StreamDecoder:
    """Says what ids mean while they come in; what `push` and `flush` return, joined, is `decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        errors = "replace" if tokenizer.spelling.byte_level else "surrogateescape"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = True

    def push(self, *ids: int) -> str:
        """The text that is certain after these ids; the first bytes of an unfinished character are held back."""
        return self._say(b"".join(self._tokenizer.bytes_of(id) for id in ids if id not in self._skipped))

    def flush(self) -> str:
        """What was held back, an unfinished character as U+FFFD. The next `push` begins a new text."""
        text = self._say(b"", final=True)
        self._at_start = True
        return text

    def _say(self, data: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(data, final).translate(_LONE_BYTES)
        if text and self._at_start:
            self._at_start = False
            return text.removeprefix(" ") if self._tokenizer.spelling.strip_space else text
        return text


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder, from `tokenizer.json`, else from `tokenizer.model`.

    BOS and EOS are added where the post-processor of `tokenizer.json` has them; without one, where `add_bos_token` and
    `add_eos_token` of `tokenizer_config.json` say so; a `tokenizer.model` about which nothing is said adds BOS.
    Raises CheckpointError, with file and key, for files that are missing, damaged or contradict each other, and
    ConfigError when `tokenizer.model` is all there is and sentencepiece is not installed.
    """
    folder = Path(folder)
    return tokenizer_of({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, folder)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Inside the `with` Python's garbage collector rests. It would walk over the hundreds of thousands of tokens again
    and again while they are read, a third of the time, and none of them is garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_collector()
def tokenizer_of(files: Mapping[str, bytes], folder: Path = Path()) -> Tokenizer:
    """The tokenizer that `files` describe, by name; `folder` is where messages say that they lie."""
    files = dict(files)
    settings = read_settings(folder, files)
    if "tokenizer.json" in files:
        source = read_tokenizer_json(folder / "tokenizer.json", files["tokenizer.json"], settings)
    elif "tokenizer.model" in files:
        source = read_tokenizer_model(folder / "tokenizer.model", files["tokenizer.model"], settings)
    else:
        raise CheckpointError(
            f"{folder}: tokenizer.json or tokenizer.model was wanted, found neither.{_advice(folder)}"
        )

    named = {key: source.vocabulary.ids.get(text) for key, text in source.names.items()}
    prefix, suffix = source.around or (
        _added(settings, "bos_token", named, default="tokenizer.json" not in files),
        _added(settings, "eos_token", named, default=False),
    )
    tokens = source.vocabulary.tokens()
    generation = read_json_object(folder / GENERATION, files.get(GENERATION, b"{}"))
    stop_ids = _stop_ids(folder / GENERATION, generation, named["eos_token"], source.vocabulary.ids, tokens)
    if stop_ids:
        generation |= {"eos_token_id": list(stop_ids)}
        files[GENERATION] = (json.dumps(generation, indent=2) + "\n").encode()
    return Tokenizer(
        tokens=tokens,
        spelling=source.spelling,
        cutter=source.cutter,
        bos_id=named["bos_token"],
        eos_id=named["eos_token"],
        pad_id=named["pad_token"],
        unk_id=named["unk_token"],
        prefix=prefix,
        suffix=suffix,
        stop_ids=stop_ids,
        chat_template=_chat_template(settings, files),
        files=files,
    )


def _advice(folder: Path) -> str:
    if (folder / "vocab.json").is_file():
        return " vocab.json alone does not say how text is cut: open and save it with transformers' AutoTokenizer."
    if (folder / "tekken.json").is_file():
        return " tekken.json is not read: fetch tokenizer.json, from the model's repository or a conversion of it."
    return " Is this a model's folder?"


def _added(settings: Settings, key: str, named: dict[str, int | None], default: bool) -> tuple[int, ...]:
    """The one id that `add_bos_token` or `add_eos_token` asks for, or none."""
    if not settings.flag(f"add_{key}", default):
        return ()
    if named[key] is None:
        raise CheckpointError(f"{settings.path}: add_{key} is wanted, but there is no {key}. Name one, or say false.")
    return (named[key],)


def _stop_ids(
    path: Path, generation: dict, eos: int | None, ids: Mapping[str, int], tokens: tuple[Token | None, ...]
) -> tuple[int, ...]:
    stops = [] if eos is None else [eos]
    found = generation.get("eos_token_id")
    for id in found if isinstance(found, list) else [] if found is None else [found]:
        if type(id) is not int or id < 0:
            raise CheckpointError(f"{path}: eos_token_id: an id or a list of ids was wanted, found {found!r}.")
        stops.append(id)
    ends = (ids[text] for text in TURN_ENDS + TEXT_ENDS if text in ids)
    stops += sorted(id for id in ends if tokens[id].kind is TokenKind.CONTROL)
    return tuple(dict.fromkeys(stops))


def _chat_template(settings: Settings, files: Mapping[str, bytes]) -> str | None:
    """`chat_template.jinja`, else what tokenizer_config.json has: one text, or several of which "default" is taken."""
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{settings.path.with_name(TEMPLATE)}: UTF-8 was wanted: {error}.") from None
    found = settings.values.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{settings.path}: chat_template: a text or a list of named texts was wanted, found {type(found).__name__}."
        )
    return found


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise DataError(
            f"Text was wanted, found half a surrogate pair at character {error.start}, in {around!r}. "
            f"Was an emoji cut in two?"
        ) from None
