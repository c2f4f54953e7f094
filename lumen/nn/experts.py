"""Mixture of experts in the place of a block's MLP: a router sends each token to a few of many small MLPs.

    s = router(x)                                                          one score an expert, in fp32
    y = Σ w[k] · E_k(x) over the K experts with the highest scores,        E(x) = down(f(gate(x)) · up(x))
    y = y + sigmoid(shared_gate(x)) · shared(x)                            where the family has a shared expert

The router is never quantized and never adapted, and its scores are computed in fp32: a rounding there is not a small
error, it sends a token elsewhere. The experts are, both: packed one by one, and a low-rank pair for each.

There is no auxiliary loss that balances the load, as there is none in transformers unless it is asked for. It keeps a
router that learns from sending everything to a few experts; beside an adapter the router is frozen, and sends tokens
where pretraining taught it to.

Decision: full fine-tuning has no such loss either · because runs are short and it changes what is optimized · revisit
when a run of a model with experts shows its load drifting.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.errors import CheckpointError
from lumen.nn.layers import MLP, Norm
from lumen.ops.experts import NF4Stack, Route, grouped_linear, nf4_grouped_linear, top_experts
from lumen.ops.gated import gated
from lumen.ops.nf4 import NF4
from lumen.spec import ModelSpec

MIXED = (
    "The experts of one layer are wanted all in 4 bits or all dense, and this checkpoint has both in one. Load the "
    "original in 16 bits; model.nf4=true packs it."
)


class Router(nn.Module):
    """Scores of x (…, D) → (…, outputs), all in fp32: the weight is stored so whatever the model's dtype."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class ExpertPair(NamedTuple):
    """The pair of one expert."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R)
    scale: float


class ExpertLoraPairs(nn.Module):
    """A and B of every expert of one stacked layer, always fp32; used and switched off like a `LoraPair`."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, rank: int, scale: float, dropout: float, device: torch.device
    ):
        """Each A is Kaiming-uniform, from torch's global random state; B is zero: training starts at the base."""
        super().__init__()
        self.a = nn.Parameter(torch.empty(experts, rank, inputs, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(experts, outputs, rank, dtype=torch.float32, device=device))
        for a in self.a.detach():
            nn.init.kaiming_uniform_(a, a=5**0.5)
        self.scale = scale
        self.dropout = dropout
        self.enabled = True

    def __getitem__(self, expert: int) -> "ExpertPair":
        return ExpertPair(self.a[expert], self.b[expert], self.scale)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return grouped_linear(grouped_linear(x, self.a, ends), self.b, ends) * self.scale


class ExpertLinear(nn.Module):
    """y[r] = W[e] x[r] + LoRA[e](x[r]), e the expert of row r. W is `weight` (dense) or `nf4` (packed, frozen)."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.experts, self.inputs, self.outputs = experts, inputs, outputs
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.nf4: NF4Stack | None = None
        self.lora: ExpertLoraPairs | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.nf4 is None else self.nf4.device

    def place(self, expert: int, weight: Tensor, dtype: torch.dtype) -> None:
        """Puts the frozen `weight` (outputs, inputs) in the place of one expert's, in `dtype`, on its own device.

        Experts come one by one, so that no more than one is ever held twice; the first decides where the stack lies.
        """
        if self.nf4 is not None:
            raise CheckpointError(MIXED)
        if self.weight.is_meta:
            stack = torch.empty(self.weight.shape, dtype=dtype, device=weight.device)
            self.weight = nn.Parameter(stack, requires_grad=False)
        self.weight.data[expert] = weight

    def place_packed(self, expert: int, packed: NF4) -> None:
        """The same with a weight in 4 bits, where the whole stack is to be so."""
        if self.nf4 is None:
            if not self.weight.is_meta:
                raise CheckpointError(MIXED)
            self.nf4, self.weight = NF4Stack(self.experts), None
        self.nf4.put(expert, packed)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, inputs), rows sorted by expert, those of expert e before `ends[e]` → (M, outputs)."""
        y = grouped_linear(x, self.weight, ends) if self.nf4 is None else nf4_grouped_linear(x, self.nf4, ends)
        if self.lora is not None and self.lora.enabled:
            y = y + self.lora(x, ends)
        return y


class ExpertMLPs(nn.Module):
    """The MLPs of all experts of a layer, each matrix a stack of X."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        experts, width = spec.experts.count, spec.experts.width
        self.gate = ExpertLinear(experts, spec.dim, width)
        self.up = ExpertLinear(experts, spec.dim, width)
        self.down = ExpertLinear(experts, width, spec.dim)
        self.kind = spec.mlp

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.down(gated(self.gate(x, ends), self.up(x, ends), self.kind), ends)


class Experts(nn.Module):
    """The module in the place of a block's MLP: x + post_norm(y(norm(x))), (B, T, D) → (B, T, D)."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        own = spec.experts
        self.router = Router(spec.dim, own.count)
        self.experts = ExpertMLPs(spec)
        self.shared = MLP(replace(spec, mlp_dim=own.shared)) if own.shared else None
        self.shared_gate = Router(spec.dim, 1) if own.shared_gate == "sigmoid" else None
        self.per_token, self.normalize = own.per_token, own.normalize

    def forward(self, x: Tensor, norm: Norm, post_norm: Norm | None) -> Tensor:
        y = self.outputs(norm(x))
        return x + (y if post_norm is None else post_norm(y))

    def outputs(self, x: Tensor) -> Tensor:
        """y of the equation."""
        tokens = x.flatten(0, -2)  # (N, D)
        weights, chosen = top_experts(self.router(tokens), self.per_token, self.normalize)
        route = Route.of(chosen, self.experts.gate.experts)
        y = route.from_experts(self.experts(route.to_experts(tokens), route.ends), weights).view_as(x)
        return y if self.shared is None else y + self._shared(x)

    def _shared(self, x: Tensor) -> Tensor:
        y = self.shared.outputs(x)
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid().to(x.dtype)
