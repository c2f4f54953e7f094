"""The small layers of a block: norm, embedding, gated MLP."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.nn.linear import Linear
from lumen.nn.recompute import recomputing
from lumen.ops.mlp import mlp
from lumen.ops.project import Projection, project
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
        # as each dtype of activations holds the factor, which is how the checkpoints were trained; numbers, so that no
        # step has a tensor to upload
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        self.rounded = {dtype: torch.tensor(self.scale, dtype=dtype, device="cpu").item() for dtype in dtypes}

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        x = F.embedding(tokens, self.weight).to(dtype)
        return x if self.scale == 1.0 else x * self.rounded[dtype]


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
        add = post_norm is None
        options = {"norm": norm.weight, "eps": norm.eps, "plus_one": norm.plus_one}
        down, x = mlp(*self._projections(), x, self.kind, **options, add=add, dead=add and recomputing())
        return down if add else x + post_norm(down)

    def outputs(self, x: Tensor) -> Tensor:
        """down(f(gate(x)) · up(x)) alone, for who norms and adds itself."""
        return mlp(*self._projections(), x, self.kind)[0]

    def _projections(self) -> tuple[list[Projection], Projection]:
        return [self.gate.projection(), self.up.projection()], self.down.projection()
