"""The small layers of a block: norm, embedding, gated MLP."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.nn.linear import Linear
from lumen.nn.recompute import recomputing
from lumen.ops.project import project
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


def project_normed(layers: Sequence[Linear], x: Tensor, norm: Norm) -> tuple[Tensor, ...]:
    """The outputs of `layers` for norm(x), and x itself behind them: the residual stream goes on from there."""
    projections = [layer.projection() for layer in layers]
    return project(projections, x, norm=norm.weight, eps=norm.eps, plus_one=norm.plus_one)


class MLP(nn.Module):
    """x + post_norm(down(f(gate(n)) · up(n))) with n = norm(x)"""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.gate = Linear(spec.dim, spec.mlp_dim)
        self.up = Linear(spec.dim, spec.mlp_dim)
        self.down = Linear(spec.mlp_dim, spec.dim)
        self.kind = spec.mlp

    def forward(self, x: Tensor, norm: Norm, post_norm: Norm | None) -> Tensor:
        gate, up, x = project_normed((self.gate, self.up), x, norm)
        down = [self.down.projection()]
        if post_norm is None:
            return project(down, gate, up=up, kind=self.kind, residual=x, dead=recomputing())[0]
        return x + post_norm(project(down, gate, up=up, kind=self.kind)[0])

    def outputs(self, x: Tensor) -> Tensor:
        """down(f(gate(x)) · up(x)) alone, for who norms and adds itself."""
        gate, up = project([self.gate.projection(), self.up.projection()], x)
        return project([self.down.projection()], gate, up=up, kind=self.kind)[0]
