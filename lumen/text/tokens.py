"""What a token is, and the tokens of a vocabulary while its files are read.

The files are not trusted: an id out of range or given twice, a text given twice, a byte token that is not one of
`<0x00>` … `<0xFF>` is a CheckpointError that says the file and the key.
"""

import enum
import re
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from lumen.errors import CheckpointError, closest

MAX_ID = 2**22  # sixteen times the largest vocabulary known; a larger id is damage, or an attempt on our memory
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenKind(enum.IntEnum):
    """What a token is; the numbers are SentencePiece's, and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2  # stands for what no token covers
    CONTROL = 3  # structure, no part of the text: <s>, <|eot_id|>
    USER = 4  # added to the vocabulary; found in a text before the rest is cut
    UNUSED = 5
    BYTE = 6  # one byte, spelled <0x0A>


class Token(NamedTuple):
    """One entry of a vocabulary; `text` as its file spells it: `Ġthe`, `▁the`, `<0x0A>`, `<|eot_id|>`."""

    text: str
    kind: TokenKind


class Vocabulary:
    """Tokens by id while they are read; refuses ids out of range, and ids or texts that are given twice."""

    def __init__(self, path: Path):
        self.path = path
        self.ids: dict[str, int] = {}
        self._tokens: dict[int, Token] = {}

    def add(self, text: object, id: object, kind: TokenKind, key: str) -> None:
        """Adds a token, or changes the kind of the one with this very text and id; `key` says where it stands."""
        if not isinstance(text, str) or type(id) is not int or not 0 <= id < MAX_ID:
            raise CheckpointError(
                f"{self.path}: {key}: a text with an id below {MAX_ID} was wanted, found {text!r}: {id!r}."
            )
        if kind is TokenKind.BYTE and not BYTE_TOKEN.fullmatch(text):
            raise CheckpointError(
                f"{self.path}: {key}: a byte token is one of <0x00> to <0xFF>, found {text!r} (id {id})."
            )
        holder, known = self._tokens.get(id), self.ids.get(text)
        if holder is not None and holder.text != text:
            raise CheckpointError(f"{self.path}: {key}: {text!r} is given id {id}, which {holder.text!r} has already.")
        if known is not None and known != id:
            raise CheckpointError(f"{self.path}: {key}: {text!r} is given id {id}, but it has id {known} already.")
        self.ids[text], self._tokens[id] = id, Token(text, kind)

    def add_all(self, ids: dict[str, object], key: str) -> None:
        """As `add` of each, as a normal token. A sound vocabulary that is the first, the usual case, is not looked at
        one by one: a hundred thousand tokens take a tenth of the time."""
        found = list(ids.values())
        sound = {type(id) for id in found} == {int} and len(set(found)) == len(found)
        if not sound or self.ids or not 0 <= min(found) <= max(found) < MAX_ID:
            for text, id in ids.items():
                self.add(text, id, TokenKind.NORMAL, key)
            return
        tokens = map(partial(tuple.__new__, Token), zip(ids, repeat(TokenKind.NORMAL)))
        self.ids, self._tokens = dict(ids), dict(zip(found, tokens, strict=True))

    def mark_control(self, text: str, named_by: str) -> None:
        """Makes a token structure, because `named_by` uses it so. The unknown token stays the unknown token."""
        if text not in self.ids:
            near = closest(text, self.texts(TokenKind.CONTROL, TokenKind.USER))
            raise CheckpointError(f"{named_by} is {text!r}, a token that {self.path} lacks.{near}")
        if self._tokens[self.ids[text]].kind is not TokenKind.UNKNOWN:
            self._tokens[self.ids[text]] = Token(text, TokenKind.CONTROL)

    def texts(self, *kinds: TokenKind) -> list[str]:
        return [token.text for token in self._tokens.values() if token.kind in kinds]

    def tokens(self) -> tuple[Token | None, ...]:
        """By id, None for an id that no token has."""
        return tuple(map(self._tokens.get, range(max(self._tokens, default=-1) + 1)))
