"""Tokens that a run adds to a tokenizer: their entries in its files, and the tokens that spelled them before.

A new token is found in a text as it stands, before anything is normalized or cut, and has the first id behind the
vocabulary: where the embedding was padded beyond the tokenizer, a row that was free.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lumen.errors import ConfigError
from lumen.text.tokenizer import CONFIG, Tokenizer, tokenizer_of
from lumen.text.tokenizer_files import read_json_object

LEGACY = "added_tokens.json"  # older writers' list; kept up to date where it is there


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> Tokenizer:
    """The tokenizer with `texts` as its next ids, each one token wherever it stands in a text.

    special  they are structure, and a decoder that leaves out special tokens leaves them out

    ConfigError for an empty text and one that is a token already; CheckpointError for a tokenizer.json whose ids have
    a gap, where the tokenizers library would number the new ones otherwise.
    """
    for number, text in enumerate(texts):
        if not text.strip():
            raise ConfigError(f"tokens.add: a text was wanted, found {text!r}.")
        if text in texts[:number]:
            raise ConfigError(f"tokens.add: {text!r} stands there twice.")
        if (id := tokenizer.token_to_id(text)) is not None:
            raise ConfigError(f"tokens.add: {text!r} is token {id} already. Take it out.")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    new = {tokenizer.size + number: {"content": text, **flags} for number, text in enumerate(texts)}
    files = dict(tokenizer.files)
    if "tokenizer.json" in files:
        document = _read(files, "tokenizer.json")
        entries = [{"id": id, **entry} for id, entry in new.items()]
        document["added_tokens"] = [*(document.get("added_tokens") or []), *entries]
        files["tokenizer.json"] = _written(document)
    config = _read(files, CONFIG)
    decoder = (config.get("added_tokens_decoder") or {}) | {str(id): entry for id, entry in new.items()}
    files[CONFIG] = _written(config | {"added_tokens_decoder": decoder})
    if LEGACY in files:
        files[LEGACY] = _written(_read(files, LEGACY) | {entry["content"]: id for id, entry in new.items()})
    return tokenizer_of(files)


def spelled_before(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[int, list[int]]:
    """The id that `add_tokens` gives each text → the ids of the tokens that spell it in `tokenizer`, without it."""
    return {tokenizer.size + number: tokenizer.encode(text) for number, text in enumerate(texts)}


def _read(files: dict[str, bytes], name: str) -> dict:
    return read_json_object(Path(name), files.get(name, b"{}"))


def _written(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
