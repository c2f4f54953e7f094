"""Examples of unequal length become rows of at most `length` tokens with as little padding as possible.

Best-fit decreasing: the longest example first, each into the fullest row that still has room for it. Never more than
11/9 of the rows that the best packing needs, plus one (Johnson 1974), and with many short examples nearly all are full.
The same examples always give the same rows; only the order of the rows is shuffled, later, by `batch.RowStream`.
"""

import hashlib
from array import array
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lumen.data.batch import Row
from lumen.errors import DataError
from lumen.text.conversation import Encoded


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The rows of a data set, and what became of its examples."""

    rows: tuple[Row, ...]
    length: int  # T, the most tokens that a row may hold
    truncated: int = 0  # examples that were cut: they lost their end, or were split
    dropped: int = 0  # examples that are in no row

    @property
    def examples(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(sum(len(example.ids) for example in row) for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for row in self.rows for example in row)

    @property
    def counted(self) -> int:
        """Tokens that are learned; a document's first has nothing before it to be predicted from."""
        return sum(_counted(example) for row in self.rows for example in row)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and of what is learned, in the order of the rows: equal data, equal text."""
        digest = hashlib.sha256()
        for row in self.rows:
            for example in row:
                digest.update(array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.learn))
        return digest.hexdigest()

    @property
    def efficiency(self) -> float:
        """The share of all positions, 0 ... 1, that hold a token if every row is padded to `length`."""
        return self.tokens / (len(self.rows) * self.length)


def pack(encoded: Sequence[Encoded], length: int, *, packing: bool = True, too_long: str = "error") -> Packed:
    """Every example once, whole, in rows of at most `length` tokens.

    packing   False: one example a row, in the order given
    too_long  what happens to an example longer than `length`: "error", "drop", "truncate" (its end is cut off, and if
              nothing that is learned is left, it is dropped) or "split" (for long documents, into pieces of `length`
              that begin with the last token of the one before, so that every token is predicted once; a piece sees
              nothing else of the others)

    DataError for no examples, for one that is too long under "error", and if no token at all is learned.
    """
    if not encoded:
        raise DataError("The data set is empty: there are no examples to pack.")
    assert all(example.ids for example in encoded), "every encoded example has a token"
    fitting, truncated = _shortened(encoded, length, too_long)
    dropped = sum(len(example.ids) > length for example in encoded) - truncated
    rows = _best_fit(fitting, length) if packing else [(example,) for example in fitting]
    packed = Packed(rows=tuple(rows), length=length, truncated=truncated, dropped=dropped)
    if not packed.counted:
        raise DataError(
            f"Nothing is learned in any of the {len(encoded)} examples; data.max_length={length} truncated {truncated} "
            f"and dropped {packed.dropped}. Do they have answers, and does data.train_on select them?"
        )
    return packed


def _shortened(encoded: Sequence[Encoded], length: int, too_long: str) -> tuple[list[Encoded], int]:
    """The examples that fit, as `too_long` says, and how many of them were cut."""
    fitting, cut = [], 0
    for number, example in enumerate(encoded, 1):
        if len(example.ids) <= length:
            fitting.append(example)
            continue
        if too_long == "error":
            raise DataError(
                f"{example.source or f'example {number} of {len(encoded)}'}: {len(example.ids)} tokens, but "
                f"data.max_length is {length}. Raise it, or set data.too_long to 'split', 'truncate' or 'drop'."
            )
        starts = {"drop": [], "truncate": [0], "split": range(0, len(example.ids) - 1, length - 1)}[too_long]
        pieces = [_piece(example, start, length) for start in starts]
        learned = [piece for piece in pieces if _counted(piece)]
        fitting += learned
        cut += bool(learned)
    return fitting, cut


def _piece(example: Encoded, start: int, length: int) -> Encoded:
    where = slice(start, start + length)
    return replace(example, ids=example.ids[where], learn=example.learn[where])


def _best_fit(encoded: Sequence[Encoded], length: int) -> list[Row]:
    rows: list[list[Encoded]] = []
    with_room = defaultdict(list)  # free positions → the rows that have exactly so many
    rooms: list[int] = []  # its keys in ascending order: at most `length`, however many rows there are
    for example in sorted(encoded, key=lambda example: len(example.ids), reverse=True):
        size = len(example.ids)
        found = bisect_left(rooms, size)
        if found < len(rooms):
            room = rooms[found]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[found]
        else:
            room, row = length, []
            rows.append(row)
        row.append(example)
        if room > size:
            if room - size not in with_room:
                insort(rooms, room - size)
            with_room[room - size].append(row)
    return rows


def _counted(example: Encoded) -> int:
    return sum(example.learn[1:])
