"""Keys and values of the tokens seen so far, for decoding: of all of them, or of those that a window still reaches.

A step of T tokens hands every layer the keys and values that its queries can see, ending where the queries end, as
`ops/attention.reach` wants them: S = all tokens for a full layer, S = min(all, window − 1 + T) for a window
layer (`KVCache.seen`). What lies further back, no later query can reach either, and a window layer forgets it:

    a full layer    holds every token
    a window layer  holds the last window − 1 tokens, and has room for an eighth of a window more. When a step finds no
                    room, the last window − 1 move to the front: about 8 columns a decoding step on average, not all.
                    A long step, as a prompt, is not stored whole: its keys are joined to those of the window for the
                    queries of the step, and only the last window − 1 are kept.

Buffers grow on demand, each by half of what it needs, up to the `capacity` that the caller names: a long limit costs
nothing until it is used. Growing copies one layer at a time.

`length` and `starts`, which say what column is written and how many are read, are kept in Python: no step is launched
quite as the one before. `nn/static_cache.py` keeps them on the device, for steps that are.
"""

import torch
from torch import Tensor

from lumen.spec import ModelSpec

ROOM = 256  # tokens, the least that a buffer grows by


class KVCache:
    """Keys and values (B, room, K, E) of every layer, each token's document, and how many tokens there were.

    The decoder opens a step with `extend`, every layer then calls `append`; both write in place.

    capacity  the most tokens that will ever come
    reach     (B, 1) int64, the last position that each row comes to before any answer; None when nobody said. A prompt
              that is read in pieces is turned by it as if it were read at once.
    """

    def __init__(self, spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.windows = [layer.window for layer in spec.layers]
        self.capacity = capacity
        empty = torch.zeros(rows, 0, spec.kv_heads, spec.head_dim, dtype=dtype, device=device)
        self.keys, self.values = [empty] * len(spec.layers), [empty] * len(spec.layers)
        self.document: Tensor | None = None  # (B, room), from the first step that has documents on
        self.reach: Tensor | None = None
        self.length = 0
        # window → the token in the first column of its layers' buffers, before the step that is open and after it
        self.starts = dict.fromkeys(self.windows, (0, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, empty room included."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def seen(self, window: int, tokens: int) -> int:
        """S, the keys that the last step's `tokens` queries are given in a layer of this window; 0 = no window."""
        return min(self.length, window - 1 + tokens) if window else self.length

    def extend(self, tokens: int, document: Tensor | None) -> Tensor | None:
        """Opens a step of `tokens`; the documents (B, length) of all tokens, the new ones included.

        None stands for document 0 everywhere, and is returned as long as nothing else was given.
        """
        start, self.length = self.length, self.length + tokens
        assert self.length <= self.capacity, "the caller names a capacity that is large enough"
        for window, (_, first) in self.starts.items():
            fits = self.length - first <= self._most(window)
            self.starts[window] = (first, first if fits else self.length - (window - 1))
        if document is None and self.document is None:
            return None
        if self.document is None:
            self.document = torch.zeros(self.keys[0].shape[0], 0, dtype=torch.int64, device=self.keys[0].device)
        self.document = _with_room(self.document, self.length, self.capacity)
        if document is not None:
            self.document[:, start : self.length] = document
        return self.document[:, : self.length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the step's k, v (B, T, K, E) of one layer; the keys and values (B, S, K, E) that its queries see."""
        return self._append(self.keys, layer, k), self._append(self.values, layer, v)

    def take(self, layer: int) -> tuple[int, Tensor, Tensor]:
        """What one layer holds after the last step, which is forgotten here: the token in the first column, keys and
        values (B, n, K, E) from there to the last token.
        """
        first = self.starts[self.windows[layer]][1]
        keys, values = (buffers[layer][:, : self.length - first] for buffers in (self.keys, self.values))
        self.keys[layer] = self.values[layer] = keys.new_zeros(keys.shape[0], 0, *keys.shape[2:])
        return first, keys, values

    def _append(self, buffers: list[Tensor], layer: int, new: Tensor) -> Tensor:
        T, window = new.shape[1], self.windows[layer]
        first, kept = self.starts[window]
        past, end = self.length - T - first, self.length - first  # columns before the step, and with it
        since = end - self.seen(window, T)  # the first column that the step sees
        if first == kept:
            buffers[layer] = _with_room(buffers[layer], end, self._most(window))
            buffers[layer][:, past:end] = new
            return buffers[layer][:, since:end]
        seen = torch.cat([buffers[layer][:, since:past], new], dim=1)
        buffers[layer] = _with_room(buffers[layer], window - 1, self._most(window))
        buffers[layer][:, : window - 1] = seen[:, seen.shape[1] - (window - 1) :]
        return seen

    def _most(self, window: int) -> int:
        """Columns that a buffer may come to."""
        return min(self.capacity, window - 1 + max(1, window // 8)) if window else self.capacity


def _with_room(buffer: Tensor, columns: int, most: int) -> Tensor:
    """The buffer (B, room, …) itself where it has that many columns, else a larger copy, zeros behind."""
    held = buffer.shape[1]
    if columns <= held:
        return buffer
    size = min(most, columns + max(columns // 2, ROOM))
    larger = buffer.new_zeros(buffer.shape[0], size, *buffer.shape[2:])
    larger[:, :held] = buffer
    return larger
