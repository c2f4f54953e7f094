"""Keys and values of the tokens seen so far, for decoding."""

import torch
from torch import Tensor

from lumen.spec import ModelSpec


class KVCache:
    """Room for `capacity` tokens in each of `rows` rows: (L, B, capacity, K, E) keys and values, and each token's
    document.

    The decoder opens a step with `extend`, every layer then calls `append`; both write in place.
    """

    def __init__(self, spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (len(spec.layers), rows, capacity, spec.kv_heads, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.document: Tensor | None = None  # (B, capacity), from the first step that has documents on
        self.length = 0

    def extend(self, tokens: int, document: Tensor | None) -> Tensor | None:
        """Makes room for `tokens` more; the documents (B, S) of all that is cached, the new ones included.

        None stands for document 0 everywhere, and is returned as long as nothing else was given.
        """
        start, self.length = self.length, self.length + tokens
        assert self.length <= self.keys.shape[2], "the caller asks for a cache that is large enough"
        if document is None and self.document is None:
            return None
        if self.document is None:
            self.document = torch.zeros(self.keys.shape[1:3], dtype=torch.int64, device=self.keys.device)
        if document is not None:
            self.document[:, start : self.length] = document
        return self.document[:, : self.length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the step's k, v (B, T, K, E) of one layer; all of that layer's keys and values so far (B, S, K, E)."""
        start = self.length - k.shape[1]
        self.keys[layer, :, start : self.length] = k
        self.values[layer, :, start : self.length] = v
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]
