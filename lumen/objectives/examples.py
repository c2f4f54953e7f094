"""What a run learns from and is evaluated on: records read, split, put into the model's words, packed into rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lumen.config import Data, RunConfig
from lumen.data.packing import Packed, pack
from lumen.data.records import read_records
from lumen.demo import DATA, demo_data
from lumen.errors import ConfigError, DataError
from lumen.source import locate
from lumen.spec import ModelSpec, load_family
from lumen.text.chat_format import write_jinja
from lumen.text.conversation import Conversation, PromptCompletion, Record
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer, load_tokenizer
from lumen.text.turns import chat_template, encode_conversation, encode_prompt_completion, encode_text


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The rows of a run, and the words they were written in."""

    spec: ModelSpec
    tokenizer: Tokenizer  # with the chat template of the run
    train: Packed
    held_out: Packed | None


def load_examples(config: RunConfig) -> Examples:
    """Reads and encodes all data of a run; reads no weights.

    The chat template is the run's own file, else the checkpoint's, else, for a base model and conversations, that of
    its family's page. DataError, with file and line, for what cannot be read or learned from.
    """
    folder = locate(config.model.path)
    spec, tokenizer = load_family(folder), load_tokenizer(folder)
    if config.data.chat_template:
        tokenizer = tokenizer.with_chat_template(_read_template(config.data.chat_template))
    train, held_out = read_splits(config.data, config.train.seed)
    if tokenizer.chat_template is None and spec.chat and any(isinstance(record, Conversation) for record in train):
        tokenizer = tokenizer.with_chat_template(write_jinja(spec.chat))
    template = chat_template(tokenizer)
    packed = [encode_records(part, config.data, tokenizer, template) for part in (train, held_out) if part]
    for part in packed:
        _refuse_unknown_ids(part, spec, folder)
    return Examples(spec=spec, tokenizer=tokenizer, train=packed[0], held_out=packed[1] if held_out else None)


def encode_records(
    records: Sequence[Record], data: Data, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Packed:
    """Records become rows as `data` says.

    DataError for a conversation without a chat template, for an example that is too long, and when nothing is learned.
    """
    encoded = []
    for record in records:
        if isinstance(record, Conversation):
            if template is None:
                raise DataError(
                    f"{record.source}: a conversation wants a chat template, and this model brings none. "
                    "Name a Jinja file as data.chat_template."
                )
            encoded.append(encode_conversation(record, tokenizer, template, train_on=data.train_on))
        elif isinstance(record, PromptCompletion):
            encoded.append(encode_prompt_completion(record, tokenizer))
        else:
            encoded.append(encode_text(record, tokenizer))
    return pack(encoded, data.max_length, packing=data.packing, too_long=data.too_long)


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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {path} cannot be read as text: {error}.") from None


def _refuse_unknown_ids(packed: Packed, spec: ModelSpec, folder: Path) -> None:
    """DataError for a token without a row in the embedding: the tokenizer is not this model's."""
    for example in (example for row in packed.rows for example in row):
        if (top := max(example.ids)) >= spec.vocab:
            raise DataError(
                f"{example.source}: holds the token {top}, but the model in {folder} has {spec.vocab} rows of "
                "embedding. Is the tokenizer in its folder the model's own?"
            )
