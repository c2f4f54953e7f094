"""Reads a vocabulary and its rules from `tokenizer.json` or `tokenizer.model` and the small JSON files beside them.

Vocabularies spell the bytes that their tokens stand for in two ways:
    byte-level      each byte is one visible character (GPT-2's table): a space is `Ġ`, a line feed `Ċ`
    sentencepiece   plain text with `▁` for a space, and `<0x0A>` for a byte that no piece covers

The files are not trusted. An id out of range or given twice, a byte token that is not one of `<0x00>` … `<0xFF>`, a
name in `tokenizer_config.json` that no token bears, a part that this module does not know: each is a CheckpointError
that says the file and the key.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import NamedTuple, Protocol

import tokenizers

from lumen.errors import CheckpointError, ConfigError
from lumen.formats.sentencepiece_model import parse_sentencepiece_model
from lumen.text.tokens import BYTE_TOKEN, Token, TokenKind, Vocabulary

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's spelling of bytes: visible Latin-1 characters stand for themselves, the others for U+0100 onwards."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


BYTE_OF = _byte_level_table()


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a vocabulary spells bytes, and whether a decoded text begins with a space that nobody wrote."""

    byte_level: bool
    strip_space: bool

    def bytes_of(self, token: Token) -> bytes:
        if token.kind is TokenKind.BYTE:
            return bytes.fromhex(token.text[3:5])
        if token.kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
            return token.text.encode()
        if not self.byte_level:
            return token.text.replace("▁", " ").encode()
        if token.kind is TokenKind.USER or not set(token.text) <= BYTE_OF.keys():
            return token.text.encode()
        return bytes(BYTE_OF[character] for character in token.text)


class Cutter(Protocol):
    """Cuts text into ids and adds nothing. Offsets are [start, end) in characters of the text."""

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


class Source(NamedTuple):
    """What `tokenizer.json` or `tokenizer.model` says, with the settings beside it.

    names   the text of bos_token, eos_token, pad_token and unk_token, or None
    around  ids before and after each text; None when that is left to tokenizer_config.json
    """

    vocabulary: Vocabulary
    spelling: Spelling
    cutter: Cutter
    names: dict[str, str | None]
    around: tuple[tuple[int, ...], tuple[int, ...]] | None


# --- the files beside ------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say together.

    path      of tokenizer_config.json, for messages
    values    all of tokenizer_config.json
    names     the text of bos_token, eos_token, pad_token and unk_token, or None
    special   the texts of further special tokens
    declared  id: (text, special) of tokens that were added to the vocabulary
    """

    path: Path
    values: dict
    names: dict[str, str | None]
    special: list[str]
    declared: dict[int, tuple[str, bool]]

    def all_special(self, names: dict[str, str | None]) -> list[tuple[str, str]]:
        """(key, text) of every token that is named as special: `names`, and the further ones."""
        further = [("additional_special_tokens", text) for text in self.special]
        return [(key, text) for key, text in names.items() if text is not None] + further

    def flag(self, key: str, default: bool) -> bool:
        found = self.values.get(key)
        if found is not None and not isinstance(found, bool):
            raise CheckpointError(f"{self.path}: {key}: true or false was wanted, found {found!r}.")
        return default if found is None else found


def read_settings(folder: Path, files: Mapping[str, bytes]) -> Settings:
    """The settings in `files`, a folder's files by name; what none of them says is left empty."""
    path = folder / "tokenizer_config.json"
    values, special_map, added = (
        read_json_object(folder / name, files.get(name, b"{}"))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    both = special_map | values  # tokenizer_config.json is the one that later tools keep up to date
    names = {key: _token_text(both[key], path, key) if both.get(key) is not None else None for key in NAMED}
    special = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        found = _part(both, key, list | dict, path) or []
        special += [_token_text(token, path, key) for token in (found.values() if isinstance(found, dict) else found)]
    declared = {id: (text, False) for text, id in added.items()}
    for id, token in (_part(values, "added_tokens_decoder", dict, path) or {}).items():
        key = f"added_tokens_decoder: {id}"
        if not re.fullmatch(r"[0-9]{1,9}", id):
            raise CheckpointError(f"{path}: {key}: an id was wanted.")
        declared[int(id)] = (_token_text(token, path, key), isinstance(token, dict) and token.get("special") is True)
    return Settings(path, values, names, special, declared)


def _part(values: dict, key: str, kind: type | UnionType, path: Path):
    """What `values` has under `key`, of that kind; or None."""
    found = values.get(key)
    if found is not None and not isinstance(found, kind):
        raise CheckpointError(f"{path}: {key}: a list or an object was wanted, found {found!r}.")
    return found


def _token_text(token: object, path: Path, key: str) -> str:
    """The text of a token that is written as "<s>" or as {"content": "<s>", ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: {key}: the text of a token was wanted, found {token!r}.")
    return text


def read_json_object(path: Path, data: bytes) -> dict:
    """The JSON object in `data`; refuses everything else, and a key that stands twice in one object."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise CheckpointError(f"{path}: {counts.most_common(1)[0][0]!r} stands there twice in one object.")
        return found

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: JSON was wanted, found something else: {error}. Is the file whole?") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was wanted, found {type(value).__name__}.")
    return value


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def read_tokenizer_json(path: Path, data: bytes, settings: Settings) -> Source:
    """The vocabulary, spelling and cutter of a `tokenizer.json` that holds a BPE model."""
    document = read_json_object(path, data)
    try:
        library = tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: the tokenizers library cannot read it: {error}") from None
    # What goes around a text is done by Tokenizer; a post-processor would also trim spaces off the offsets.
    library.post_processor = None
    library.no_truncation()
    library.no_padding()

    vocabulary = _vocabulary_of(document, path)
    _mark_named(vocabulary, settings, library)
    for text in vocabulary.texts(TokenKind.CONTROL, TokenKind.USER):
        if library.token_to_id(text) != vocabulary.ids[text]:  # the library numbers added tokens without gaps
            raise CheckpointError(
                f"{path}: added_tokens: {text!r} has id {vocabulary.ids[text]}, the tokenizers library gives it "
                f"{library.token_to_id(text)}. The ids of added tokens must follow the vocabulary without a gap."
            )
    names = dict(settings.names)
    names["unk_token"] = names["unk_token"] or next(iter(vocabulary.texts(TokenKind.UNKNOWN)), None)
    around = _template_of(document, path, vocabulary)
    return Source(vocabulary, _spelling_of(document, path), _JsonCutter(library), names, around)


def _mark_named(vocabulary: Vocabulary, settings: Settings, library: tokenizers.Tokenizer) -> None:
    """Makes special, in `vocabulary` and `library`, what the settings name so. transformers does the same."""
    for id, (text, special) in settings.declared.items():
        if vocabulary.ids.get(text) != id:
            raise CheckpointError(
                f"{settings.path}: added_tokens_decoder: {vocabulary.path} has no {text!r} with id {id}."
            )
        if special:
            vocabulary.mark_control(text, f"{settings.path}: added_tokens_decoder: {id}")
    added = library.get_added_tokens_decoder()
    for key, text in settings.all_special(settings.names):
        vocabulary.mark_control(text, f"{settings.path}: {key}")
        if vocabulary.ids[text] not in added:
            library.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True)])


class _JsonCutter:
    def __init__(self, library: tokenizers.Tokenizer):
        self._library = library

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._library.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def _vocabulary_of(document: dict, path: Path) -> Vocabulary:
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(f"{path}: model: a BPE vocabulary was wanted, found {kind!r}. lumen knows no other kind.")
    vocabulary, ids, unknown = Vocabulary(path), model["vocab"], model.get("unk_token")
    vocabulary.add_all(ids, "model.vocab")
    if model.get("byte_fallback"):
        for text in (text for text in ids if text.startswith("<0x") and text.endswith(">") and text != unknown):
            vocabulary.add(text, ids[text], TokenKind.BYTE, "model.vocab")
    if unknown in ids:
        vocabulary.add(unknown, ids[unknown], TokenKind.UNKNOWN, "model.vocab")
    for number, token in enumerate(document.get("added_tokens") or []):
        kind = TokenKind.CONTROL if token["special"] else TokenKind.USER
        if token["content"] == unknown:
            kind = TokenKind.UNKNOWN
        vocabulary.add(token["content"], token["id"], kind, f"added_tokens[{number}]")
    return vocabulary


def steps(part: dict | None, inner: str) -> Iterator[dict]:
    """The steps of a part of tokenizer.json: none for null, those under the key `inner` for a Sequence, or itself."""
    if part is not None and part.get("type") == "Sequence":
        for step in part[inner]:
            yield from steps(step, inner)
    elif part is not None:
        yield part


def prepend_scheme(metaspace: dict) -> str:
    """Where a Metaspace step puts a space before a text: "always", "first" or "never"; older files have a switch."""
    return metaspace.get("prepend_scheme") or ("always" if metaspace.get("add_prefix_space", True) else "never")


def _spelling_of(document: dict, path: Path) -> Spelling:
    """Read off the decoder, the part that turns tokens back into text."""
    decoders = {step["type"]: step for step in steps(document.get("decoder"), "decoders")}
    if "ByteLevel" in decoders:
        return Spelling(byte_level=True, strip_space=False)
    if "Metaspace" in decoders:
        return Spelling(byte_level=False, strip_space=prepend_scheme(decoders["Metaspace"]) != "never")
    if decoders.get("Replace", {}).get("pattern") == {"String": "▁"}:
        return Spelling(byte_level=False, strip_space=decoders.get("Strip", {}).get("start", 0) > 0)
    raise CheckpointError(
        f"{path}: decoder: ByteLevel, Metaspace or Replace '▁' was wanted, found {', '.join(decoders) or 'none'}."
    )


def _template_of(document: dict, path: Path, vocabulary: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What the post-processor puts before and after a text; None when it has no template."""
    template = None
    for step in steps(document.get("post_processor"), "processors"):
        kind = step.get("type")
        if kind == "TemplateProcessing":
            template = step
        elif kind != "ByteLevel":
            raise CheckpointError(f"{path}: post_processor: TemplateProcessing was wanted, found {kind!r}.")
    if template is None:
        return None
    before: list[int] = []
    after: list[int] = []
    side = before
    for item in template["single"]:
        if "Sequence" in item:
            side = after
            continue
        name = item["SpecialToken"]["id"]
        if name not in template["special_tokens"]:
            raise CheckpointError(f"{path}: post_processor: {name!r} is not among its special_tokens.")
        side += template["special_tokens"][name]["ids"]
    if unknown := set(before + after) - set(vocabulary.ids.values()):
        raise CheckpointError(f"{path}: post_processor: no token has id {unknown.pop()}.")
    return tuple(before), tuple(after)


# --- tokenizer.model -------------------------------------------------------------------------------------------------


def read_tokenizer_model(path: Path, data: bytes, settings: Settings) -> Source:
    """The vocabulary, spelling and cutter of a SentencePiece model.

    Names that no file gives are the model's own. Special tokens inside a text are cut out first, and every stretch
    between them is encoded as a text of its own, dummy prefix included, as llama.cpp does.
    """
    if settings.flag("legacy", True) is False:
        raise CheckpointError(
            f"{settings.path}: 'legacy' is false: no dummy prefix after special tokens. Only a tokenizer.json can "
            f"do that: open the folder with transformers' AutoTokenizer and save it there."
        )
    model = parse_sentencepiece_model(path, data)
    library = _load_sentencepiece(path, data)
    vocabulary = Vocabulary(path)
    for id, piece in enumerate(model.pieces):
        vocabulary.add(piece.text, id, TokenKind(piece.kind), "pieces")
    apart = set(vocabulary.texts(TokenKind.CONTROL, TokenKind.UNKNOWN))  # user-defined pieces are the library's work
    for id, (text, special) in settings.declared.items():
        if vocabulary.ids.get(text) != id:  # else it is one of the pieces, which knows its kind
            vocabulary.add(text, id, TokenKind.CONTROL if special else TokenKind.USER, f"{settings.path}: added tokens")
            apart.add(text)
    own = (library.bos_id(), library.eos_id(), library.pad_id(), library.unk_id())
    names = {key: model.pieces[id].text if id >= 0 else None for key, id in zip(NAMED, own, strict=True)}
    names |= {key: text for key, text in settings.names.items() if text is not None or key in settings.values}
    for key, text in settings.all_special(names):
        vocabulary.mark_control(text, f"{settings.path}: {key}")
        apart.add(text)
    spelling = Spelling(byte_level=False, strip_space=model.dummy_prefix)
    return Source(vocabulary, spelling, _PieceCutter(library, vocabulary.ids, apart), names, None)


def _load_sentencepiece(path: Path, data: bytes):
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError(
            f"{path}: reading a SentencePiece model needs one more package. Run: pip install 'lumen[sentencepiece]'"
        ) from None
    library = sentencepiece.SentencePieceProcessor()
    try:
        library.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: a SentencePiece model was wanted: {error}. Is the file whole?") from None
    return library


class _PieceCutter:
    """Cuts with sentencepiece, after the texts in `apart` were cut out."""

    def __init__(self, library, ids: Mapping[str, int], apart: Iterable[str]):
        self._library = library
        self._ids = ids
        self._apart = re.compile("|".join(re.escape(text) for text in sorted(apart, key=len, reverse=True)))

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for match in self._apart.finditer(text):
            self._cut(text, start, match.start(), ids, offsets)
            ids.append(self._ids[match.group()])
            offsets.append(match.span())
            start = match.end()
        self._cut(text, start, len(text), ids, offsets)
        return ids, offsets

    def _cut(self, text: str, start: int, end: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        """Appends the ids and offsets of text[start:end]."""
        if start == end:
            return
        found = self._library.encode(text[start:end], return_type="offset_mapping")
        ids += found["ids"]
        last = (0, 0)
        spans = []
        for piece, (begin, stop) in zip(reversed(found["pieces"]), reversed(found["offsets"]), strict=True):
            # Of the bytes of one character, sentencepiece gives the character to the last.
            if begin == stop == last[0] and BYTE_TOKEN.fullmatch(piece):
                begin, stop = last
            spans.append((start + begin, start + stop))
            last = (begin, stop)
        offsets += reversed(spans)
