"""The small layers of a block: norm, embedding, gated MLP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.nn.linear import Linear
from lumen.ops.gated import gated
from lumen.ops.rms_norm import rms_norm
from lumen.spec import ModelSpec


class Norm(nn.Module):
    """RMSNorm over the last axis, plain or plus one as the spec says."""

    def __init__(self, spec: ModelSpec, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = spec.norm_eps
        self.plus_one = spec.norm == "rms_plus_one"

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.plus_one)


class Embedding(nn.Module):
    """Token ids (B, T) → (B, T, D) in `dtype`, scaled as the spec says; a tied head reads the same weight."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.vocab, spec.dim))
        self.scale = spec.dim**0.5 if spec.embed_scale == "sqrt_dim" else float(spec.embed_scale)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        x = F.embedding(tokens, self.weight).to(dtype)
        # the factor is rounded to the activations' dtype first, as the checkpoints were trained
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=dtype, device=x.device)


class MLP(nn.Module):
    """down(f(gate(x)) · up(x))"""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.gate = Linear(spec.dim, spec.mlp_dim)
        self.up = Linear(spec.dim, spec.mlp_dim)
        self.down = Linear(spec.mlp_dim, spec.dim)
        self.kind = spec.mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate(x), self.up(x), self.kind))
