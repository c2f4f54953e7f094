"""Keys and values for steps of one token in each row, in tensors that stay where they are: a step can be a CUDA graph.

Every layer's buffer has the same columns, and a token's column is the same in all of them. How many are filled stands
in device memory, where the step itself counts on; a row sees the columns from the first token of its document, and
under a window w no more than the last w of them:

    first[b] = max(start[b], length − w)        without a window, start[b]

The prompts are read into a `KVCache`, whose keys and values are then taken over. A window layer holds all columns here,
those that no query reaches any more included, so that no step differs from another.
"""

import torch
from torch import Tensor

from lumen.nn.cache import KVCache
from lumen.ops.decode_attention import Filled, append_column

ROOM = 1024  # columns, the least that there is room for beyond those that are filled


class StaticCache:
    """Keys and values (B, room, K, E) of every layer, with the interface of `KVCache` for a step of one token.

    Takes over what `cache` holds, layer by layer, and leaves it empty.

    start     (B,) int32, the column in which each row begins: what lies before is padding
    capacity  the most columns that will ever be filled; there is room for half as many again as are filled, no more
    """

    reach = None  # a step of one token comes to no position but its own

    def __init__(self, cache: KVCache, start: Tensor, capacity: int):
        self.windows, self.capacity = cache.windows, capacity
        self.columns = cache.length  # filled ones, as Python counts them; only to know when there is room no more
        self.room = self._wanted()
        self.start = start
        self.length = torch.full((), cache.length, dtype=torch.int32, device=start.device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in range(len(self.windows)):
            first, keys, values = cache.take(layer)
            self.keys.append(self._placed(keys, first))
            self.values.append(self._placed(values, first))

    @property
    def full(self) -> bool:
        """Whether the next step finds no column; `grow` makes more, in new buffers."""
        return self.columns == self.room

    def grow(self) -> None:
        """Makes room for more columns; what was captured over the old buffers must be captured again."""
        assert self.columns < self.capacity, "the caller names a capacity that is large enough"
        filled, self.room = self.columns, self._wanted()
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = self._placed(buffer[:, :filled], 0)

    def extend(self, tokens: int, document: Tensor | None) -> None:
        """Opens a step of one token that belongs to the document before it; the count on the device goes on by one."""
        assert tokens == 1 and document is None, "a static step adds one token a row"
        self.length += 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the step's k, v (B, 1, K, E) of one layer; its whole buffers."""
        append_column(self.keys[layer], self.values[layer], k, v, self.length)
        return self.keys[layer], self.values[layer]

    def filled(self, window: int) -> Filled:
        """Which columns the step's queries see in layers of this window; 0 = no window."""
        first = torch.maximum(self.start, self.length - window) if window else self.start
        return Filled(length=self.length, first=first)

    def _wanted(self) -> int:
        return min(self.capacity, self.columns + max(self.columns // 2, ROOM))

    def _placed(self, held: Tensor, first: int) -> Tensor:
        """A new buffer with the columns `held` (B, n, K, E) at `first`; what lies elsewhere is never read."""
        buffer = held.new_empty(held.shape[0], self.room, *held.shape[2:])
        buffer[:, first : first + held.shape[1]] = held
        return buffer
