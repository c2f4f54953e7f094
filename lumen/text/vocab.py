"""A tokenizer as a GGUF file keeps it, so that llama.cpp cuts text into the same ids.

llama.cpp has two ways of its own, and the file names one of them:

    gpt2    byte-level BPE: tokens and merges, and in `pre` the name of the rule that cuts text into words beforehand.
            The rules are code in llama.cpp; which one a tokenizer.json means is found by its regular expression.
    llama   SentencePiece BPE: tokens and scores. The two neighbours go together whose union scores highest, so the
            rank of a merge, negated, is a score.

Decision: an unknown rule is refused, never written as `default`. Because: the file would load, and answer nonsense to
numbers and punctuation. Revisit when: llama.cpp reads the expression itself.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lumen.errors import ExportError
from lumen.formats.sentencepiece_model import parse_sentencepiece_model
from lumen.text.tokenizer import TEXT_ENDS, TURN_ENDS, Tokenizer
from lumen.text.tokenizer_files import Token, TokenKind, prepend_scheme, read_json_object, steps

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_OF_REGEX = {
    "|".join([_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _SIGNS, _BLANKS]): "llama-bpe",
    "|".join([_CONTRACTIONS, _WORD, r"\p{N}", _SIGNS, _BLANKS]): "qwen2",
    "|".join([_CONTRACTIONS, _MARKED_WORD, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _BLANKS]): "qwen35",
    "|".join([_CASED_WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _BLANKS]): "tekken",
}
WHOLE_WORDS_FIRST = {"llama-bpe", "tekken"}  # a word that is a token is taken without merging, under these rules

# Scores that take part in no merge worth making. The numbers are those of llama.cpp's converter.
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0
UNREACHED_SCORE = -1e9

BLANKS_STAY = "Runs of blanks, and blanks around a text: the tokenizer drops them, llama.cpp does not."


@dataclass(frozen=True, kw_only=True)
class GGUFVocab:
    """The values of `tokenizer.ggml.*`; lists are by id, as long as the embedding has rows.

    model         "gpt2", with merges, or "llama", with scores; `pre` is "default" for the latter
    token_types   numbers of TokenKind
    bos_id, …     a None leaves the key out
    differences   one sentence for each kind of text that llama.cpp will cut into other ids than we do
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    bos_id: int
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    eot_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    differences: tuple[str, ...]


def gguf_vocab(tokenizer: Tokenizer, rows: int) -> GGUFVocab:
    """The vocabulary of `tokenizer` for an embedding of `rows` rows; a row without a token gets an unused one.

    Raises ExportError for a tokenizer that llama.cpp cannot reproduce: an unknown rule for words, something other than
    BOS and EOS around a text, no token that ends one, more ids than rows.
    """
    if tokenizer.size > rows:
        raise ExportError(
            f"The tokenizer has {tokenizer.size} ids, the embedding {rows} rows. Tokens were added without making the "
            f"embedding larger; export with the tokenizer that belongs to the model."
        )
    document = None
    if "tokenizer.json" in tokenizer.files:
        document = read_json_object(Path("tokenizer.json"), tokenizer.files["tokenizer.json"])
    if tokenizer.spelling.byte_level:
        rules = _byte_level_rules(document)
    elif document is not None:
        rules = _sentencepiece_rules(document, tokenizer)
    else:
        rules = _sentencepiece_model_rules(tokenizer)

    padding = [None] * (rows - tokenizer.size)
    tokens = [_written(token, id, rules.model) for id, token in enumerate([*tokenizer.tokens, *padding])]
    _refuse_twins(tokens)
    ends = _ends_of(tokenizer)
    return GGUFVocab(
        model=rules.model,
        pre=rules.pre,
        tokens=tuple(token.text for token in tokens),
        token_types=tuple(int(token.kind) for token in tokens),
        scores=None if rules.scores is None else (*rules.scores, *(PADDING_SCORE for _ in padding)),
        merges=rules.merges,
        bos_id=ends.bos,
        eos_id=ends.eos,
        unk_id=tokenizer.unk_id,
        pad_id=tokenizer.pad_id,
        eot_id=ends.eot,
        add_bos=bool(tokenizer.prefix),
        add_eos=bool(tokenizer.suffix),
        add_space_prefix=rules.add_space_prefix,
        differences=tuple(dict.fromkeys([*rules.differences, *ends.differences])),
    )


class _Rules(NamedTuple):
    """How llama.cpp is to cut text, and where it will cut otherwise; scores of the tokenizer's own ids."""

    model: str
    pre: str
    scores: list[float] | None
    merges: tuple[str, ...] | None
    add_space_prefix: bool
    differences: list[str]


# --- tokens ----------------------------------------------------------------------------------------------------------


def _written(token: Token | None, id: int, model: str) -> Token:
    """A token as the file has it."""
    if token is None:
        return Token(f"[PAD{id}]", TokenKind.UNUSED)
    if token.kind is not TokenKind.USER:
        return token
    if re.fullmatch(r"<[|｜].*[|｜]>|<unused.*>|<pad>|<mask>", token.text, re.DOTALL):
        return Token(token.text, TokenKind.CONTROL)  # so does llama.cpp's converter: nobody wants to read <|fim_pad|>
    # llama.cpp looks for these in the text as it was typed, before spaces become ▁.
    return Token(token.text.replace("▁", " ") if model == "llama" else token.text, TokenKind.USER)


def _refuse_twins(tokens: list[Token]) -> None:
    first: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if first.setdefault(token.text, id) != id:
            raise ExportError(
                f"Tokens {first[token.text]} and {id} are both written {token.text!r}; GGUF wants one each."
            )


class _Ends(NamedTuple):
    bos: int
    eos: int
    eot: int | None
    differences: list[str]


def _ends_of(tokenizer: Tokenizer) -> _Ends:
    """The tokens that begin a text, end it, and end a turn.

    llama.cpp stops at EOS, at one end of turn, and at those that it knows by their text. A BOS or EOS that the file
    leaves out would be id 11 or 1, whatever that is: no BOS is written as EOS, which stands for it in texts on end.
    """
    bos, eos, stops = tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids
    if tokenizer.prefix not in ((), (bos,)) or tokenizer.suffix not in ((), (eos,)):
        raise ExportError(
            f"The tokenizer puts {tokenizer.prefix} before and {tokenizer.suffix} after a text. GGUF can say "
            f"BOS ({bos}) and EOS ({eos}) and nothing else: change post_processor in tokenizer.json, or name them."
        )
    if not stops:
        raise ExportError("No token ends an answer. Name an eos_token in tokenizer_config.json.")
    eos = stops[0] if eos is None else eos
    others = {id: tokenizer.id_to_token(id) for id in stops if id != eos and tokenizer.id_to_token(id) is not None}
    known = sorted((id for id, text in others.items() if text in TURN_ENDS), key=lambda id: TURN_ENDS.index(others[id]))
    custom = [id for id, text in others.items() if text not in TURN_ENDS + TEXT_ENDS]
    eot = next(iter(custom + known), None)
    differences = [
        f"An answer that ends with {others[id]!r} goes on: GGUF can name one end of turn, which is {others[eot]!r}."
        for id in custom[1:]
    ]
    return _Ends(eos if bos is None else bos, eos, eot, differences)


def _differences(document: dict) -> list[str]:
    """What a tokenizer.json of either kind can say and llama.cpp cannot do."""
    picky = [token["content"] for token in document["added_tokens"] if token["lstrip"] or token["rstrip"]]
    words = [token["content"] for token in document["added_tokens"] if token["single_word"]]
    return [f"Blanks beside {text!r}: the tokenizer drops them, llama.cpp does not." for text in picky] + [
        f"{text!r} inside a word: llama.cpp finds it there, the tokenizer does not." for text in words
    ]


def _lost_with(normalizer: dict) -> str:
    """What text is cut otherwise without this normalizer; ExportError where that would be every text."""
    if normalizer["type"] in ("NFC", "NFKC", "NFD", "NFKD"):
        return f"Text that is not in Unicode's form {normalizer['type']}: llama.cpp does not bring it there."
    if normalizer["type"] == "Replace" and normalizer["pattern"].get("Regex") in (r"\A +| +\z", " {2,}"):
        return BLANKS_STAY
    raise ExportError(
        f"tokenizer.json: normalizer: llama.cpp does nothing like {normalizer}, so most text would differ."
    )


# --- gpt2 ------------------------------------------------------------------------------------------------------------


def _byte_level_rules(document: dict) -> _Rules:
    pre = _pre_of(document)
    differences = _differences(document)
    for step in steps(document.get("normalizer"), "normalizers"):
        differences.append(_lost_with(step))
    whole, wanted = bool(document["model"].get("ignore_merges")), pre in WHOLE_WORDS_FIRST
    if whole != wanted:
        differences.append(
            f"A word that is a token which no merges make: ignore_merges is {whole}, {pre} has {wanted}."
        )
    merges = tuple(" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(document))
    return _Rules("gpt2", pre, None, merges, add_space_prefix=False, differences=differences)


def _pre_of(document: dict) -> str:
    """The name of the rule that cuts text into words."""
    found = list(steps(document.get("pre_tokenizer"), "pretokenizers"))
    kinds = [step["type"] for step in found]
    last = found[-1] if found else {}
    if kinds and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        splits_itself = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and splits_itself:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and splits_itself and found[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits_itself and found[0]["behavior"] == "Isolated":
            regex = found[0]["pattern"].get("Regex")
            if regex in PRE_OF_REGEX and not found[0].get("invert"):
                return PRE_OF_REGEX[regex]
    raise ExportError(
        f"tokenizer.json: pre_tokenizer: llama.cpp has no rule that cuts text into words as {found} does. "
        f"Known are those of {', '.join(sorted({'gpt-2', 'smollm', *PRE_OF_REGEX.values()}))}."
    )


def _merges(document: dict) -> Iterator[list[str]]:
    """Pairs in order of rank, from either way of writing them: "a b", or ["a", "b"]."""
    for merge in document["model"]["merges"]:
        yield merge.split(" ") if isinstance(merge, str) else merge


# --- llama -----------------------------------------------------------------------------------------------------------


def _sentencepiece_rules(document: dict, tokenizer: Tokenizer) -> _Rules:
    """For a tokenizer.json that spells as SentencePiece; a tokenizer.model with the same pieces gives their scores."""
    _refuse_missing_bytes(tokenizer)
    schemes, differences = [], _differences(document)
    for step in steps(document.get("normalizer"), "normalizers"):
        if step == {"type": "Prepend", "prepend": "▁"}:
            schemes.append("always")
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            differences.append(_lost_with(step))
    for step in steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            schemes.append(prepend_scheme(step))
        elif not (
            step["type"] == "Split" and step["pattern"] == {"String": " "}
        ):  # Gemma's, idle: spaces are ▁ by then
            raise ExportError(f"tokenizer.json: pre_tokenizer: llama.cpp cannot cut SentencePiece text as {step} does.")
    if "first" in schemes:
        differences.append("A text after a special token: llama.cpp puts a space before it, as at the very beginning.")

    scores = _scores_from_merges(document, tokenizer)
    if "tokenizer.model" in tokenizer.files:
        pieces = parse_sentencepiece_model(Path("tokenizer.model"), tokenizer.files["tokenizer.model"]).pieces
        if [piece.text for piece in pieces] == [tokenizer.id_to_token(id) for id in range(len(pieces))]:
            scores[: len(pieces)] = [piece.score for piece in pieces]
    return _Rules("llama", "default", scores, None, not {"always", "first"}.isdisjoint(schemes), differences)


def _sentencepiece_model_rules(tokenizer: Tokenizer) -> _Rules:
    """For a tokenizer.model alone."""
    model = parse_sentencepiece_model(Path("tokenizer.model"), tokenizer.files["tokenizer.model"])
    if model.model_type != "bpe" or not model.marks_spaces:
        raise ExportError(
            f"tokenizer.model: a BPE model that writes ▁ before a word was wanted, found {model.model_type}. "
            f"llama.cpp merges pieces by score and cannot do what this one does."
        )
    _refuse_missing_bytes(tokenizer)
    differences = []
    if model.charsmap:
        differences.append("Characters that the tokenizer rewrites first (NFKC): llama.cpp takes them as they are.")
    if model.trims_whitespace:
        differences.append(BLANKS_STAY)
    if model.dummy_prefix and any(piece.kind == TokenKind.USER for piece in model.pieces):
        differences.append("A text after a user-defined token: llama.cpp puts a space before it.")
    scores = [piece.score for piece in model.pieces]
    scores += [ADDED_SCORE] * (tokenizer.size - len(scores))
    return _Rules("llama", "default", scores, None, model.dummy_prefix, differences)


def _scores_from_merges(document: dict, tokenizer: Tokenizer) -> list[float]:
    """Minus the rank of the first merge that yields the token.

    That gives the order of the true scores, and order is all that llama.cpp looks at. What no merge yields must never
    be made; special tokens, bytes and added tokens are not made but found.
    """
    rank: dict[str, int] = {}
    for number, pair in enumerate(_merges(document)):
        rank.setdefault("".join(pair), number)
    words = document["model"]["vocab"]
    scores = []
    for token in tokenizer.tokens:
        if token is None:
            scores.append(PADDING_SCORE)
        elif token.text not in words:
            scores.append(ADDED_SCORE)
        elif token.kind is TokenKind.NORMAL:
            scores.append(-float(rank[token.text]) if token.text in rank else UNREACHED_SCORE)
        else:
            scores.append(0.0)
    return scores


def _refuse_missing_bytes(tokenizer: Tokenizer) -> None:
    missing = [text for byte in range(256) if tokenizer.token_to_id(text := f"<0x{byte:02X}>") is None]
    if missing:
        raise ExportError(
            f"The vocabulary has no token for {len(missing)} of the 256 bytes, the first is {missing[0]}. "
            f"llama.cpp writes characters that no piece covers as bytes, and would stop there."
        )
