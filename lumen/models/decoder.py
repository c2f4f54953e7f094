"""The decoder: token ids to hidden states. Every text family is this one module with its switches set by a `ModelSpec`.

The forward pass ends at the last normed hidden state. Training turns it into a loss without ever building logits
(`ops/linear_loss.py`), sampling multiplies one row by the head (`Decoder.logits`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lumen.nn.attention import Attention, Places
from lumen.nn.cache import KVCache
from lumen.nn.layers import MLP, Embedding, Norm
from lumen.nn.linear import Linear
from lumen.nn.rope import Rotation
from lumen.ops.attention import attention_mask
from lumen.spec import ModelSpec


class Block(nn.Module):
    """x + attention, then x + MLP; each half normed before, and after too where the family says `around`."""

    def __init__(self, spec: ModelSpec, index: int):
        super().__init__()
        around = spec.norm_at == "around"
        self.attn_norm = Norm(spec, spec.dim)
        self.attn = Attention(spec, index)
        self.attn_post_norm = Norm(spec, spec.dim) if around else nn.Identity()
        self.mlp_norm = Norm(spec, spec.dim)
        self.mlp = MLP(spec)
        self.mlp_post_norm = Norm(spec, spec.dim) if around else nn.Identity()

    def forward(self, x: Tensor, places: dict[str, Places], cache: KVCache | None) -> Tensor:
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), places, cache))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """A decoder-only transformer; its parameters are named by role (`blocks.3.attn.q.weight`).

    dtype      of the activations; parameters may be wider and are rounded where they are used
    recompute  keep only each block's input for the backward pass and compute the block again there
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.recompute = False
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
        self, tokens: Tensor, positions: Tensor, document: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm, in `dtype`.

        tokens, positions  (B, T) int64; a document's positions start at 0
        document           (B, T) int64, the document of each token in its row; −1 is padding; None means one a row
        cache              keys and values of the tokens before these; extended in place
        """
        if cache is not None:
            document = cache.extend(tokens.shape[1], document)  # (B, S)
        places = self._places(positions, document, tokens.shape[1] if cache is None else cache.length)
        x = self.embed(tokens, self.dtype)
        for block in self.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, places, cache, use_reentrant=False)
            else:
                x = block(x, places, cache)
        return self.norm(x)

    def _places(self, positions: Tensor, document: Tensor | None, S: int) -> dict[str, Places]:
        """What each kind of layer turns by and sees: made once, read by all its layers. S keys end with the queries."""
        T, windows = positions.shape[1], {layer.kind: layer.window for layer in self.spec.layers}
        return {
            kind: (cos, sin, attention_mask(T, S, document, windows[kind], self.dtype, positions.device))
            for kind, (cos, sin) in self.rotation.tables(positions).items()
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (…, V) of hidden states (…, D), soft-capped where the family caps them."""
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype)).float()
        cap = self.spec.logits_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
