"""The decoder: token ids to hidden states. Every text family is this one module with its switches set by a `ModelSpec`.

The forward pass ends at the last normed hidden state. Training turns it into a loss without ever building logits
(`ops/linear_loss.py`), sampling multiplies one row by the head (`Decoder.logits`).
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.nn.attention import Attention, Places
from lumen.nn.cache import KVCache
from lumen.nn.experts import ExpertLoraPairs, Experts
from lumen.nn.layers import MLP, Embedding, Norm
from lumen.nn.linear import Linear
from lumen.nn.recompute import KEEP_ALL, Keeping, Mover, lots, recomputed, recomputed_rows
from lumen.nn.rope import Rotation
from lumen.nn.static_cache import StaticCache
from lumen.ops.attention import reach
from lumen.ops.project import hold_unpacked
from lumen.spec import ModelSpec


class Block(nn.Module):
    """x + attention, then x + MLP; each half normed before, and after too where the family says `around`."""

    def __init__(self, spec: ModelSpec, index: int):
        super().__init__()
        around = spec.norm_at == "around"
        self.attn_norm = Norm(spec, spec.dim)
        self.attn = Attention(spec, index)
        self.attn_post_norm = Norm(spec, spec.dim) if around else None
        self.mlp_norm = Norm(spec, spec.dim)
        self.mlp = Experts(spec) if spec.layers[index].sparse else MLP(spec)
        self.mlp_post_norm = Norm(spec, spec.dim) if around else None

    def forward(self, x: Tensor, places: dict[str, Places], cache: KVCache | StaticCache | None = None) -> Tensor:
        x = self.attn(x, self.attn_norm, self.attn_post_norm, places, cache)
        return self.mlp(x, self.mlp_norm, self.mlp_post_norm)

    def keeping_attention(self, x: Tensor, places: dict[str, Places], random: bool) -> Tensor:
        """The same, the MLP recomputed in the backward pass."""
        x = self.attn(x, self.attn_norm, self.attn_post_norm, places, None)
        return recomputed_rows(self.mlp, x, self.mlp_norm, self.mlp_post_norm, random=random)

    def keeping_input(self, x: Tensor, places: dict[str, Places], random: bool) -> Tensor:
        """The same, all of it recomputed in the backward pass; of many rows, the MLP apart from the rest."""
        if lots(x) > 1:
            return recomputed(self.keeping_attention, x, places, random, random=random)
        return recomputed(self, x, places, random=random)


class Decoder(nn.Module):
    """A decoder-only transformer; its parameters are named by role (`blocks.3.attn.q.weight`).

    dtype      of the activations; parameters may be wider and are rounded where they are used
    keeping    what each block keeps for its backward pass (`nn/recompute.py`); changed by assignment
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.keeping: tuple[Keeping, ...] = (KEEP_ALL,) * len(spec.layers)
        self._mover: Mover | None = None
        self.embed = Embedding(spec)
        self.blocks = nn.ModuleList(Block(spec, index) for index in range(len(spec.layers)))
        self.norm = Norm(spec, spec.dim)
        self.head = None if spec.tied else Linear(spec.dim, spec.vocab)
        self.rotation = Rotation(spec)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding itself where it is tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document: Tensor | None = None,
        cache: KVCache | StaticCache | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm, in `dtype`.

        tokens, positions  (B, T) int64; a document's positions start at 0
        document           (B, T) int64, the document of each token in its row; −1 is padding; None means one a row
        cache              keys and values of the tokens before these; extended in place. A static one takes one token
                           a row and no documents
        """
        if cache is not None:
            document = cache.extend(tokens.shape[1], document)  # (B, S)
        places = self._places(positions, document, cache)
        x = self.embed(tokens, self.dtype)
        if self.training and torch.is_grad_enabled() and cache is None:
            x = self._trained(x, places)
        else:
            for block in self.blocks:
                x = block(x, places, cache)
        return self.norm(x)

    def hold_unpacked(self) -> int:
        """Unpacks the blocks' NF4 weights for good, beside the packed ones; the bytes it takes. Experts stay packed."""
        held = 0
        for block in self.blocks:
            groups = [(block.attn.q, block.attn.k, block.attn.v), (block.attn.o,)]
            if isinstance(block.mlp, MLP):
                groups += [(block.mlp.gate, block.mlp.up), (block.mlp.down,)]
            for group in groups:
                if all(layer.nf4 is not None for layer in group):
                    held += hold_unpacked([layer.nf4 for layer in group], self.dtype)
        return held

    def _trained(self, x: Tensor, places: dict[str, Places]) -> Tensor:
        """All blocks, each keeping for its backward pass what `keeping` says."""
        if any(keeping.moved for keeping in self.keeping):
            self._mover = self._mover or Mover(x.device)
            self._mover.start()
        # other dropout notes its seeds; to ask for the state of random numbers is not possible in a CUDA graph
        random = any(pair.dropout for pair in self.modules() if isinstance(pair, ExpertLoraPairs))
        for block, keeping in zip(self.blocks, self.keeping, strict=True):
            with self._mover.block(x) if keeping.moved else nullcontext():
                if keeping.level == "all":
                    x = block(x, places)
                elif keeping.level == "attention":
                    x = block.keeping_attention(x, places, random)
                else:
                    x = block.keeping_input(x, places, random)
        return x

    def _places(
        self, positions: Tensor, document: Tensor | None, cache: KVCache | StaticCache | None
    ) -> dict[str, Places]:
        """What each kind of layer turns by and sees: made once, read by all its layers. Keys end with the queries."""
        T, windows, places = positions.shape[1], {layer.kind: layer.window for layer in self.spec.layers}, {}
        furthest = None if cache is None else cache.reach
        for kind, (cos, sin) in self.rotation.tables(positions, furthest).items():
            if isinstance(cache, StaticCache):
                places[kind] = (cos, sin, cache.filled(windows[kind]))
                continue
            S = T if cache is None else cache.seen(windows[kind], T)
            seen = None if document is None else document[:, -S:]
            places[kind] = (cos, sin, reach(T, S, seen, windows[kind], positions.device))
        return places

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (…, V) of hidden states (…, D), soft-capped where the family caps them."""
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype)).float()
        cap = self.spec.logits_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
