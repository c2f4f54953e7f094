"""The token that other programs fill rows with: it must not be one that ends an answer.

lumen itself needs none, since it knows which positions hold nothing. Trainers and servers of other makers read
`pad_token`, and many of them mask every token that equals it: were it EOS, no model would learn to stop.

What is chosen is the first that there is of
    1. the `pad_token` of the tokenizer's own files, unless it is EOS
    2. a token by one of the names in `NAMES`
    3. the first special token that is reserved, by the look of its name, or is of the kind "unused"
    4. the token for what no other token covers
    5. a new one, where the embedding has a row that no token uses
and from the second on none that ends an answer or begins a text.
"""

import re

from lumen.errors import CheckpointError
from lumen.text.added_tokens import add_tokens
from lumen.text.tokenizer import Tokenizer
from lumen.text.tokenizer_files import TokenKind

NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|placeholder|>")
RESERVED = re.compile(r"[<\[]\|?[\w ]*(reserved|unused|placeholder|dummy|control|extra)[\w ]*\|?[>\]]", re.IGNORECASE)
NEW = "<|pad|>"


def choose_pad(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, str]:
    """`tokenizer` with a padding token, and a sentence that says which one, empty where it had one already.

    rows  of the embedding: a new token needs one that is free
    """
    if tokenizer.pad_id is not None and tokenizer.pad_id != tokenizer.eos_id:
        return tokenizer, ""
    taken = {*tokenizer.stop_ids, tokenizer.bos_id}
    was = "" if tokenizer.pad_id is None else f", not {tokenizer.id_to_token(tokenizer.pad_id)!r}, which ends an answer"
    found = _existing(tokenizer, taken)
    if found is not None:
        text = tokenizer.id_to_token(found)
        return tokenizer.with_roles(pad_token=text), f"The padding token is {text!r} (id {found}){was}."
    if (made := _made(tokenizer, rows)) is not None:
        return made, f"The padding token is {NEW!r} (id {made.pad_id}), new in a free row of the embedding{was}."
    stays = f"{tokenizer.id_to_token(tokenizer.pad_id)!r}, which ends an answer, stays" if was else "there is none"
    return tokenizer, (
        f"No token can be the padding token, and the embedding has no free row for one: {stays}. lumen needs none; "
        "other trainers may mask the end of answers together with the padding."
    )


def _existing(tokenizer: Tokenizer, taken: set[int | None]) -> int | None:
    """The id of the best token that is there already, or None."""
    special = (TokenKind.CONTROL, TokenKind.USER, TokenKind.UNUSED)
    free = {
        token.text: id
        for id, token in enumerate(tokenizer.tokens)
        if token is not None and token.kind in special and id not in taken
    }
    named = [free[name] for name in NAMES if name in free]
    reserved = [
        id for text, id in free.items() if RESERVED.fullmatch(text) or tokenizer.tokens[id].kind is TokenKind.UNUSED
    ]
    unknown = [] if tokenizer.unk_id in taken or tokenizer.unk_id is None else [tokenizer.unk_id]
    return next(iter(named + reserved + unknown), None)


def _made(tokenizer: Tokenizer, rows: int) -> Tokenizer | None:
    """The tokenizer with one token more; None where no row is free, or its files cannot take one."""
    if tokenizer.size >= rows or tokenizer.token_to_id(NEW) is not None:
        return None
    try:
        return add_tokens(tokenizer, [NEW], special=True).with_roles(pad_token=NEW)
    except CheckpointError:  # ids with a gap before the new one, which the tokenizers library would close
        return None
