"""Rows of tokens and their cache: prompts are read in pieces, then every row grows by one token a step.

Prompts of unequal length stand in one batch with padding on their left, so that all rows end and grow at the same
place. Padding is document -1, the rest document 0, and positions count from the first real token: a row attends to what
it would attend to alone.

A step does little, in many launches: a GPU waits for Python most of the time. Where a GPU can, the step is therefore
captured as a CUDA graph over tensors that stay where they are (`nn/static_cache.py`) and replayed as one launch.
`ops.explain()["decoding"]` says which step served last, and why:

    graph      that
    static     the same step over the same tensors, launched from Python; bit-equal to the graph
    reference  a step of the model over the growing `KVCache`; it serves every model, on every device
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lumen.data.batch import PADDING
from lumen.models.decoder import Decoder
from lumen.nn.cache import KVCache
from lumen.nn.static_cache import StaticCache
from lumen.ops._choose import choice
from lumen.spec import ModelSpec


class Decoding:
    """Rows that grow by a token a step, and the logits of the token that follows each.

    max_tokens  the most tokens that a row is continued by; the last of them is never read
    chunk       tokens of the prompts that are read at once
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int, chunk: int):
        self.model = model
        self.chunk = chunk
        self.capacity = max(map(len, prompts)) + max_tokens - 1
        self.rows = [list(prompt) for prompt in prompts]  # all tokens, those of ended rows included
        self.switches = _switches(model.spec)
        self.kind = choice("decoding", available(model))

    def read(self) -> Tensor:
        """Reads all rows from their beginning, into a new cache; logits (B, V) of what follows each."""
        model, rows = self.model, len(self.rows)
        tokens, positions, document = (
            tensor if tensor is None else tensor.to(model.device) for tensor in _left_padded(self.rows)
        )
        self.static = None  # a cache from before makes room
        self.positions = positions[:, -1:]  # (B, 1)
        self.cache = KVCache(model.spec, rows, self.capacity, model.dtype, model.device)
        self.cache.reach = self.positions
        for start in range(0, tokens.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            own = None if document is None else document[:, part]
            hidden = model(tokens[:, part], positions[:, part], own, self.cache)
        if self.kind != "reference" and tokens.shape[1] < self.capacity:
            first = torch.tensor([tokens.shape[1] - len(row) for row in self.rows], dtype=torch.int32)
            cache = StaticCache(self.cache, first.to(model.device), self.capacity)
            self.static = _StaticStep(model, cache, self.positions, captured=self.kind == "graph")
        return model.logits(hidden[:, -1])

    def step(self, chosen: Tensor, tokens: Sequence[int]) -> Tensor:
        """Adds one token to each row, given as (B,) and as a list; logits (B, V), good until the next step."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        if any(len(row) - 1 in self.switches for row in self.rows):
            return self.read()
        if self.static is not None:
            return self.static(chosen)
        self.positions = self.positions + 1
        # what is generated belongs to document 0
        return self.model.logits(self.model(chosen[:, None], self.positions, None, self.cache)[:, -1])


def available(model: Decoder) -> dict[str, str]:
    """The kinds of step that can serve this model where it lies, best first, with the reason for taking each."""
    if any(layer.sparse for layer in model.spec.layers):
        return {"reference": "experts: how many tokens each gets decides the shapes of a step"}
    static = {"static": "the step that a graph captures, launched from Python"}
    if model.device.type != "cuda":
        return {"reference": "not on a GPU: there are no launches to save"} | static
    graph = {"graph": "a CUDA graph: one launch a token"}
    return graph | static | {"reference": "the growing cache, launched from Python"}


class _StaticStep:
    """One step of all rows, its tensors the same at every call.

    A first call launches from Python and so compiles what it needs; where it is to be captured, the second one is, and
    every later one is a replay. A cache that grows has other buffers, and all of this begins again.
    """

    def __init__(self, model: Decoder, cache: StaticCache, positions: Tensor, captured: bool):
        self.model, self.cache, self.captured = model, cache, captured
        self.tokens = torch.zeros_like(positions)  # (B, 1), read by the step
        self.positions = positions.clone()  # (B, 1), of the last token; the step itself counts on
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self, chosen: Tensor) -> Tensor:
        """Logits (B, V) after the tokens `chosen` (B,); the next call overwrites them."""
        if self.cache.full:
            self.graph, self.warm = None, False
            self.cache.grow()
        self.cache.columns += 1
        self.tokens.copy_(chosen[:, None])
        if not (self.captured and self.warm):
            self.warm = True
            return self._run()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads may launch meanwhile: only what this one does belongs to the step
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._run()
            self.graph = graph
        self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        self.positions += 1
        return self.model.logits(self.model(self.tokens, self.positions, None, self.cache)[:, -1])


def _switches(spec: ModelSpec) -> set[int]:
    """Lengths beyond which a row turns by other frequencies, so that no key from before is right any more."""
    return {layer.rope.trained_length for layer in spec.layers if layer.rope.kind == "longrope"}


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, positions and documents (B, T) of the prompts, ending at the right edge; documents only with padding."""
    T = max(len(prompt) for prompt in prompts)
    tokens, positions = torch.zeros(2, len(prompts), T, dtype=torch.int64)
    document = torch.full((len(prompts), T), PADDING)
    for row, prompt in enumerate(prompts):
        start = T - len(prompt)
        tokens[row, start:] = torch.tensor(prompt)
        positions[row, start:] = torch.arange(len(prompt))
        document[row, start:] = 0
    return tokens, positions, document if (document == PADDING).any() else None
