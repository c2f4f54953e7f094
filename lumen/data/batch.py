"""Rows of encoded examples become tensors, and a data set becomes a stream of rows that can be taken up anywhere.

A row holds documents one after another. Its four tensors, for two documents `a b c` and `d e` in a row of six:

    tokens      a  b  c  d  e  0
    target      b  c  ·  e  ·  ·        · = -100: a document's last token has nothing to predict
    position    0  1  2  0  1  0        starts again with every document
    document    0  0  0  1  1 -1        -1 = padding
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from lumen.errors import DataError
from lumen.ops.linear_loss import UNCOUNTED
from lumen.text.conversation import Encoded

Row = Sequence[Encoded]  # the documents of a row, in order

PADDING = -1  # document of a position that belongs to none


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass and its loss need: four int64 tensors (B, T); and where it all was read, for messages."""

    tokens: Tensor
    target: Tensor  # the id to predict after this token; -100 does not count
    position: Tensor  # from 0 within each document
    document: Tensor  # from 0 within each row; -1 is padding
    learned: Tensor | None = None  # (M,) int64, the positions that count in the flattened batch; None = look for them
    packed: bool = True  # whether a row may hold several documents; without, the causal rule keeps padding apart
    sources: tuple[str, ...] = ()  # of its documents, as 'train.jsonl:12'

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; to a GPU without waiting for the copies."""
        if torch.device(device).type != "cuda":
            return replace(self, **{name: value.to(device) for name, value in self.tensors.items()})
        pinned = {name: value.pin_memory() for name, value in self.tensors.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in pinned.items()})

    @property
    def counted(self) -> Tensor:
        """How many targets count, an int64 scalar on the batch's device."""
        return (self.target != UNCOUNTED).sum()

    @property
    def filled(self) -> Tensor:
        """How many tokens are not padding, an int64 scalar on the batch's device."""
        return (self.document != PADDING).sum()


LEARNED_STEPS = 16  # into how many sizes the number of learned positions is rounded up where shapes are fixed


def stack(rows: Sequence[Row], width: int = 0) -> Batch:
    """A batch of `rows`, padded on the right with token 0, which no document sees.

    width  to how many tokens, and then `learned` too is filled up, with a position that does not count, so that few
           shapes ever occur; 0 = to the longest row, and nothing is filled up
    """
    fixed, width = bool(width), width or max(sum(len(example.ids) for example in row) for row in rows)
    columns = {
        "tokens": [_padded((example.ids for example in row), 0, width) for row in rows],
        "target": [_padded(map(_targets, row), UNCOUNTED, width) for row in rows],
        "position": [_padded((range(len(example.ids)) for example in row), 0, width) for row in rows],
        "document": [
            _padded(([n] * len(example.ids) for n, example in enumerate(row)), PADDING, width) for row in rows
        ],
    }
    sources = tuple(example.source for row in rows for example in row)
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    counts = tensors["target"].flatten() != UNCOUNTED
    learned = counts.nonzero().squeeze(1)
    if fixed:  # a document's last position never counts: there is always one to fill up with
        step = -(-len(counts) // LEARNED_STEPS)
        filler = (~counts).nonzero()[0].expand(-len(learned) % step)
        learned = torch.cat([learned, filler])
    return Batch(**tensors, learned=learned, packed=any(len(row) > 1 for row in rows), sources=sources)


def _padded(documents: Iterable[Iterable[int]], fill: int, width: int) -> list[int]:
    values = list(chain.from_iterable(documents))
    return values + [fill] * (width - len(values))


def _targets(example: Encoded) -> list[int]:
    """What follows each token, where that is learned."""
    following = zip(example.ids[1:], example.learn[1:], strict=True)
    return [token if learned else UNCOUNTED for token, learned in following] + [UNCOUNTED]


def batches(rows: Sequence[Row], batch_size: int, width: int = 0) -> Iterator[Batch]:
    """All `rows` in their order, `batch_size` to a batch, of `width` as in `stack`; the last may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield stack(rows[start : start + batch_size], width)


class RowStream:
    """The rows of a data set, epoch after epoch, each epoch in another order.

    The order follows from the seed and the number of the epoch alone. So `epoch` and `position`, the rows of this epoch
    that were taken, are all that a checkpoint must hold: a stream that starts there gives what this one would have.
    """

    def __init__(self, rows: Sequence[Row], *, seed: int, epoch: int = 0, position: int = 0):
        """DataError if there is no row, or if `position` lies behind the last one: the data has changed."""
        if not rows:
            raise DataError("There are no rows to train on.")
        if not 0 <= position < len(rows):
            raise DataError(
                f"The run stands at row {position} of epoch {epoch}, but the data has {len(rows)} rows. "
                "Were the data files, data.max_length or data.packing changed since it was saved?"
            )
        self.rows, self.seed = rows, seed
        self.epoch, self.position = epoch, position
        self._order = self._shuffled()

    def take(self, count: int) -> list[Row]:
        """The next `count` rows, or fewer at the end of an epoch: none is left out, none of the next one joins them."""
        taken = self._order[self.position : self.position + count]
        self.position += len(taken)
        if self.position == len(self.rows):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled()
        return [self.rows[index] for index in taken]

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)  # a text, so that no two (seed, epoch) share an order
        return order
