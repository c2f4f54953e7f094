"""Rows of encoded examples become tensors, and a data set becomes a stream of rows that can be taken up anywhere.

A row holds documents one after another. Its four tensors, for two documents `a b c` and `d e` in a row of six:

    tokens      a  b  c  d  e  0
    target      b  c  ·  e  ·  ·        · = -100: a document's last token has nothing to predict
    position    0  1  2  0  1  0        starts again with every document
    document    0  0  0  1  1 -1        -1 = padding
"""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy
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

    @property
    def extent(self) -> str:
        """For messages, as "4 rows x 2,048 tokens"."""
        rows, width = self.tokens.shape
        return f"{rows:,} row{'s' * (rows > 1)} x {width:,} tokens"

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; to a GPU without waiting for the copies."""
        if torch.device(device).type != "cuda":
            return replace(self, **{name: value.to(device) for name, value in self.tensors.items()})
        pinned = {name: value if value.is_cuda else value.pin_memory() for name, value in self.tensors.items()}
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
    fills = {"tokens": 0, "target": UNCOUNTED, "position": 0, "document": PADDING}
    columns = {name: numpy.full((len(rows), width), fill, numpy.int64) for name, fill in fills.items()}
    for number, row in enumerate(rows):
        _fill({name: column[number] for name, column in columns.items()}, row)
    sources = tuple(example.source for row in rows for example in row)
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    counts = tensors["target"].flatten() != UNCOUNTED
    learned = counts.nonzero().squeeze(1)
    if fixed:  # a document's last position never counts: there is always one to fill up with
        step = -(-len(counts) // LEARNED_STEPS)
        filler = (~counts).nonzero()[0].expand(-len(learned) % step)
        learned = torch.cat([learned, filler])
    return Batch(**tensors, learned=learned, packed=any(len(row) > 1 for row in rows), sources=sources)


def _fill(columns: dict[str, numpy.ndarray], row: Row) -> None:
    """Writes the documents of `row` one after another into columns that hold padding; in place."""
    end = 0
    for number, example in enumerate(row):
        start, end = end, end + len(example.ids)
        ids = numpy.array(example.ids)
        columns["tokens"][start:end] = ids
        columns["target"][start : end - 1] = numpy.where(numpy.array(example.learn[1:], bool), ids[1:], UNCOUNTED)
        columns["position"][start:end] = numpy.arange(len(ids))
        columns["document"][start:end] = number


def batches(rows: Sequence[Row], batch_size: int, width: int = 0) -> Iterator[Batch]:
    """All `rows` in their order, `batch_size` to a batch, of `width` as in `stack`; the last may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield stack(rows[start : start + batch_size], width)


Item = TypeVar("Item")


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order, each made in a thread of its own while the one before it is worked on.

    An error is raised where the item that it kept from being made would have come. The thread ends with the iterator.
    """
    over = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lumen-batches") as worker:
        coming = worker.submit(next, items, over)
        while (item := coming.result()) is not over:
            coming = worker.submit(next, items, over)
            yield item


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
