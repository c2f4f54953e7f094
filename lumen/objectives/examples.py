"""What a run learns from and is evaluated on: records read, split, put into the model's words, packed into rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lumen.config import Data, RunConfig
from lumen.data.packing import Packed, pack
from lumen.data.records import read_records
from lumen.demo import DATA, demo_data
from lumen.errors import ConfigError, DataError
from lumen.objectives.encoding import encode_all
from lumen.peft_files import adapted_vocabulary
from lumen.source import Source, starting_point
from lumen.spec import ModelSpec, load_family
from lumen.text.added_tokens import add_tokens
from lumen.text.chat_format import with_default_system
from lumen.text.conversation import Conversation, Encoded, Record
from lumen.text.named_formats import EOS, adopt_format, end_of_turn, load_format, with_turns
from lumen.text.padding import choose_pad
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer
from lumen.text.turns import chat_template

LOG = logging.getLogger("lumen")
MOSTLY_NOTHING = 0.9  # of the examples: when so many teach nothing, the markers are probably wrong


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The rows of a run, and the words they were written in."""

    spec: ModelSpec  # with the rows that embedding and head will have
    source: Source
    before: Tokenizer  # what the base or its adapter brings, without the tokens that the run adds
    tokenizer: Tokenizer  # with the chat template, the EOS and the padding token of the run
    train: Packed
    held_out: Packed | None
    notes: tuple[str, ...] = ()  # what was chosen for the run, and what about its data may be a mistake; also logged


def load_examples(config: RunConfig) -> Examples:
    """Reads and encodes all data of a run; reads no weights. What was chosen for it goes to the logger `lumen`.

    DataError, with file and line, for what cannot be read or learned from.
    """
    source = starting_point(config)
    folder, before = source.base, source.tokenizer()
    tokenizer = add_tokens(before, config.tokens.add, special=config.tokens.special) if config.tokens.add else before
    spec = load_family(folder)
    rows = adapted_vocabulary(source.adapter, spec) if source.adapter else spec.vocab
    if config.tokens.add and before.size > rows:
        raise ConfigError(f"tokens.add: the tokenizer has {before.size} ids and the embedding {rows} rows already.")
    spec = replace(spec, vocab=max(rows, tokenizer.size if config.tokens.add else 0))
    train, held_out = read_splits(config.data, config.train.seed)
    tokenizer, notes = dress(tokenizer, spec, config.data, any(isinstance(record, Conversation) for record in train))
    template = chat_template(tokenizer)
    encoded = [encode_all(part, config.data, tokenizer, template) for part in (train, held_out) if part]
    packed = [_pack(part, config.data) for part in encoded]
    for part in packed:
        _refuse_unknown_ids(part, spec, folder)
    if config.tokens.add:
        ids = f"{before.size} to {before.size + len(config.tokens.add) - 1}"
        notes.append(f"{len(config.tokens.add)} tokens are new, ids {ids}; embedding and head have {spec.vocab} rows.")
    if config.data.response_part:
        notes += _doubts(encoded[0], config.data, tokenizer)
    for note in notes:
        LOG.warning("%s", note)
    return Examples(
        spec=spec,
        tokenizer=tokenizer,
        train=packed[0],
        held_out=packed[1] if held_out else None,
        notes=tuple(notes),
        source=source,
        before=before,
    )


def dress(tokenizer: Tokenizer, spec: ModelSpec, data: Data, chats: bool) -> tuple[Tokenizer, list[str]]:
    """The checkpoint's tokenizer as the run uses and saves it, and a sentence for each choice that was made.

    chats  whether there are conversations, for which a base model gets the template of its family's page

    The chat template is the run's own file or format, else the checkpoint's, else the page's. ConfigError for a format
    that this tokenizer cannot end, and for a system text that the template does not write.
    """
    notes = []
    if data.chat_template:
        tokenizer = tokenizer.with_chat_template(_read_template(data.chat_template))
    elif data.chat_format:
        tokenizer, note = adopt_format(tokenizer, load_format(data.chat_format))
        notes.append(note)
    elif tokenizer.chat_template is None and spec.chat and chats:
        tokenizer = adopt_page(tokenizer, spec)
    if data.system:
        tokenizer = _with_system(tokenizer, data.system)
    tokenizer, note = choose_pad(tokenizer, spec.vocab)
    return tokenizer, [*notes, note] if note else notes


def adopt_page(tokenizer: Tokenizer, spec: ModelSpec) -> Tokenizer:
    """`tokenizer` with the chat template of its family's page; ConfigError where no token of it would end an answer."""
    end = end_of_turn(spec.chat)
    if EOS not in end and (tokenizer.token_to_id(end) is None or len(tokenizer.encode(end)) != 1):
        raise ConfigError(
            f"The checkpoint brings no chat template, and the turns of the page {spec.name!r} end with {end!r}, which "
            "is no token of its tokenizer: generation would not stop. Name a data.chat_format that can end turns with "
            "the EOS token, such as chatml, or add the token by tokens.add."
        )
    return with_turns(tokenizer, spec.chat)


def _with_system(tokenizer: Tokenizer, system: str) -> Tokenizer:
    """The tokenizer whose template writes `system` where a conversation brings no system text."""
    if tokenizer.chat_template is None:
        raise ConfigError("data.system wants a chat template, and this model brings none. Name a data.chat_format.")
    given = tokenizer.with_chat_template(with_default_system(tokenizer.chat_template, system))
    try:
        text = chat_template(given).render([{"role": "user", "content": "?"}])
    except DataError as refusal:
        raise ConfigError(f"data.system: {refusal} Leave data.system out, or name another data.chat_format.") from None
    if system.strip() not in text:
        raise ConfigError(
            f"data.system: the chat template does not write a system text; it makes {text[:200]!r}. Leave it out, or "
            "name another data.chat_format."
        )
    return given


def encode_records(
    records: Sequence[Record], data: Data, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Packed:
    """Records become rows as `data` says.

    DataError for a conversation without a chat template, for an example that is too long, and when nothing is learned.
    """
    return _pack(encode_all(records, data, tokenizer, template), data)


def _pack(encoded: Sequence[Encoded], data: Data) -> Packed:
    return pack(encoded, data.max_length, packing=data.packing, too_long=data.too_long)


def _doubts(encoded: Sequence[Encoded], data: Data, tokenizer: Tokenizer) -> list[str]:
    """What may be wrong with markers: that they leave nothing to learn, or never a token at which to stop."""
    length = data.max_length if data.too_long == "truncate" else None
    learned = [{id for id, learn in zip(e.ids[:length], e.learn[:length], strict=True) if learn} for e in encoded]
    nothing, endless = learned.count(set()), sum(ids.isdisjoint(tokenizer.stop_ids) for ids in learned)
    doubts = []
    if nothing >= MOSTLY_NOTHING * len(encoded):
        doubts.append(
            f"warning: in {nothing:,} of {len(encoded):,} examples nothing is learned. Do data.instruction_part and "
            "data.response_part stand in the text as `python -m lumen.inspect` shows it, and is data.max_length enough?"
        )
    if endless > nothing:
        stops = ", ".join(repr(tokenizer.id_to_token(id)) for id in tokenizer.stop_ids)
        doubts.append(
            f"warning: in {endless - nothing:,} of {len(encoded):,} examples no token is learned that ends an answer "
            f"({stops}): generation may not stop."
        )
    return doubts


def read_splits(data: Data, seed: int) -> tuple[list[Record], list[Record]]:
    """The records to train on and those to evaluate on: two sets of files, or one with a share held out."""
    train = [record for path in data.train for record in read_records(_locate(path), data.format)]
    if data.eval:
        return train, read_records(_locate(data.eval), data.format)
    held_out = round(len(train) * data.eval_fraction)
    if data.eval_fraction and not 0 < held_out < len(train):
        raise DataError(
            f"data.eval_fraction={data.eval_fraction} of {len(train)} records holds out {held_out}. Both parts want "
            "at least one."
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held_out])
    kept = [record for index, record in enumerate(train) if index not in chosen]
    return kept, [train[index] for index in sorted(chosen)]


def _locate(path: str) -> Path:
    """A packaged data set by its name, else the file that `path` names."""
    return demo_data(path) if path in DATA else Path(path)


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"data.chat_template: {path} cannot be read: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {path} cannot be read as UTF-8 text: {error}.") from None


def _refuse_unknown_ids(packed: Packed, spec: ModelSpec, folder: Path) -> None:
    """DataError for a token without a row in the embedding: the tokenizer is not this model's."""
    for example in (example for row in packed.rows for example in row):
        if (top := max(example.ids)) >= spec.vocab:
            raise DataError(
                f"{example.source}: holds the token {top}, but the model in {folder} has {spec.vocab} rows of "
                "embedding. Is the tokenizer in its folder the model's own?"
            )
