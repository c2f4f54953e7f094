"""Reads SentencePiece's `tokenizer.model`: the pieces with their scores and kinds, and how text is prepared.

The file is one protocol buffer message. A message is a row of fields, each a varint key = number << 3 | wire type, and
a value: 0 a varint · 1 eight bytes · 2 a varint length and that many bytes · 5 four bytes. The fields, from
`sentencepiece_model.proto`:

    ModelProto       1 pieces, repeated · 2 trainer_spec · 3 normalizer_spec
    SentencePiece    1 piece, UTF-8 · 2 score, float32 · 3 type, as in GGUF: 1 normal (default) … 6 byte
    TrainerSpec      3 model_type: 1 unigram (default), 2 bpe, 3 word, 4 char · 24 treat_whitespace_as_suffix
    NormalizerSpec   2 precompiled_charsmap · 3 add_dummy_prefix · 4 remove_extra_whitespaces · 5 escape_whitespaces,
                     these three true by default
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lumen.errors import CheckpointError

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PIECE_KINDS = range(1, 7)


class Piece(NamedTuple):
    text: str
    score: float
    kind: int  # 1 normal · 2 unknown · 3 control · 4 user-defined · 5 unused · 6 byte


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What the file says; a piece's id is its place.

    charsmap          whether characters are rewritten before anything else (NFKC and its like)
    dummy_prefix      a text gets a space before it
    trims_whitespace  blanks around a text go, runs of blanks become one
    marks_spaces      a space is written ▁ inside pieces, and at the beginning of a word, as all our families have it
    """

    pieces: tuple[Piece, ...]
    model_type: str
    charsmap: bool
    dummy_prefix: bool
    trims_whitespace: bool
    marks_spaces: bool


def parse_sentencepiece_model(path: Path, data: bytes) -> SentencePieceModel:
    """The model in `data`, the bytes of `path`. CheckpointError for what is not a sound message of this kind."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                trainer |= dict(_fields(value))
            elif number == 3:
                normalizer |= dict(_fields(value))
        if not pieces:
            raise ValueError("it has no pieces")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: a SentencePiece model was wanted: {error}. Is the file whole?") from None
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=MODEL_TYPES.get(trainer.get(3, 1), "unknown"),
        charsmap=bool(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        trims_whitespace=bool(normalizer.get(4, 1)),
        marks_spaces=bool(normalizer.get(5, 1)) and not trainer.get(24, 0),
    )


def _piece(message: int | bytes) -> Piece:
    fields = dict(_fields(message))
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or kind not in PIECE_KINDS:
        raise ValueError(f"a piece with the fields {fields} is none")
    return Piece(text.decode(), struct.unpack("<f", score)[0], kind)


def _fields(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field; a varint as int, everything else as its bytes."""
    if not isinstance(message, bytes):
        raise ValueError(f"the number {message} stands in a message's place")
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"a field has wire type {wire}")
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, at = _varint(message, at)
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes runs past the end")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, seven bits a byte with the low ones first, and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise ValueError("a number runs past the end")
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
    raise ValueError("a number has more than ten bytes")
