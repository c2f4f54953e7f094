"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): y[n] = Σ_k weight[n, k] · E_{chosen[n, k]}(x[n]).

X experts, of which each of N tokens is sent to K. The N·K pairs are sorted by expert, so that every linear layer of the
experts is one grouped product: rows ends[e−1] … ends[e] − 1 meet the matrix of expert e.

    top_experts     scores of a router → which K experts, and how much each counts
    Route           the sorting: rows to their experts and back, with gradients that are gathers, never atomic sums
    grouped_linear  y[r] = W[expert of r] x[r]; gradients g W[e] for the rows, Σ g xᵀ over the rows of e for W[e]
    NF4Stack        a frozen W in 4 bits, each expert packed for itself; `nf4_grouped_linear` multiplies by it

An expert that gets no token costs nothing in the reference and has a gradient of zeros.

Milliseconds of one layer's product with the gradient of its rows, 4096 tokens in bf16 on an H200, torch 2.11:

                                                    grouped    reference    NF4 grouped    reference
    128 experts of 768 × 2048, 8 a token               0.48        10.1            4.2         57.6
    8 experts of 14336 × 4096, 2 a token               2.7          2.9           10.9          9.9
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.errors import KernelError
from lumen.ops._choose import choice, uncompiled
from lumen.ops.nf4 import BLOCK, NESTED_BLOCK, NF4, dequantize_nf4, nested_values, nf4_linear

ALIGNMENT = 8  # bf16 numbers in the 16 bytes that PyTorch's grouped product wants rows to begin at


# Choosing experts -----------------------------------------------------------------------------------------------------


def top_experts(scores: Tensor, count: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The `count` experts with the highest scores, and how much each counts.

    scores     (N, X) fp32, of the router
    normalize  scale the weights of a token to a sum of 1; else they are its probabilities among all X experts

    Returns (weights (N, K) fp32, chosen (N, K) int64), the highest first. The softmax is over all X in either case;
    gradients reach the scores through the weights, not through the choice.
    """
    weights, chosen = scores.softmax(-1).topk(count, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), chosen


@dataclass(frozen=True, eq=False)
class Route:
    """The N·K pairs (token, expert), sorted by expert and within one expert by token."""

    order: Tensor  # (N·K,) sorted row → pair n·K + k
    place: Tensor  # (N·K,) pair → sorted row
    ends: Tensor  # (X,) int32: rows of expert e end before ends[e]
    count: int  # K

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Route":
        """chosen  (N, K), from `top_experts`"""
        by_expert, order = chosen.flatten().sort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        ends = torch.searchsorted(by_expert, torch.arange(experts, device=order.device), right=True, out_int32=True)
        return cls(order, place, ends, chosen.shape[1])

    def to_experts(self, x: Tensor) -> Tensor:
        """(N, D) → (N·K, D): each token once for each of its experts, in sorted order."""
        return _ToExperts.apply(x, self)

    def from_experts(self, y: Tensor, weights: Tensor) -> Tensor:
        """(N·K, D) in sorted order → (N, D): the sum of a token's rows, weighted by `weights` (N, K)."""
        pairs = _FromExperts.apply(y, self).view(*weights.shape, -1)  # (N, K, D)
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), pairs).squeeze(1)


class _ToExperts(torch.autograd.Function):
    """A gather; its gradient gathers the K rows of a token and adds them. Saves nothing but the route."""

    @staticmethod
    def forward(ctx, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return x.index_select(0, route.order // route.count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        return grad.index_select(0, route.place).view(-1, route.count, grad.shape[1]).sum(1), None


class _FromExperts(torch.autograd.Function):
    """The permutation back to pairs; its gradient is the other permutation."""

    @staticmethod
    def forward(ctx, y: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return y.index_select(0, route.place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.route.order), None


# The grouped product --------------------------------------------------------------------------------------------------


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition: one product for each expert that has rows. Arguments as in `grouped_linear`."""
    groups = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    # unbind, not weight[e]: its gradient is one stack, where X selections would each fill a whole tensor with zeros
    parts = [F.linear(rows, w.to(x.dtype)) for rows, w in zip(groups, weight.unbind(), strict=True) if len(rows)]
    return torch.cat(parts)


class _GroupedLinear(torch.autograd.Function):
    """PyTorch's grouped product in both directions. Saves x, where the weight learns, and the weight as it is stored:
    rounded once more for the backward pass, a wider master leaves no copy behind."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight, ends)
        return F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = F.grouped_mm(grad, weight.to(grad.dtype), offs=ends) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad.t(), x, offs=ends).to(weight.dtype)
        return grad_x, grad_weight, None


@uncompiled
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row of x (M, in) times the matrix of its expert: (M, out) in x's dtype.

    weight  (X, out, in), x's dtype or wider; rounded to x's dtype, its gradient comes back in its own
    ends    (X,) int32: the rows of expert e end before ends[e] and begin where those of e − 1 end; ends[−1] = M

    In bf16 on a GPU one grouped product for all experts; elsewhere, and where rows are not whole steps of 16 bytes, one
    product for each expert that has rows.
    """
    available = {"reference": "one product for each expert that has rows"}
    if _can_group(x, weight.shape[1:]):
        available = {"grouped": "bf16 on a GPU: one product for all experts"} | available
    if choice("grouped_linear", available) == "grouped":
        return _GroupedLinear.apply(x, weight, ends)
    return grouped_linear_reference(x, weight, ends)


def _can_group(x: Tensor, widths: tuple[int, ...]) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and not any(width % ALIGNMENT for width in widths)


# Experts in 4 bits ----------------------------------------------------------------------------------------------------

CHUNK_ELEMENTS = 2**25  # unpacked at a time: 128 MiB as fp32


class NF4Stack:
    """X weights of one shape in NF4, each packed for itself, as if it stood alone; fills up as they come."""

    def __init__(self, experts: int):
        self.experts = experts
        self.shape: tuple[int, ...] = ()  # (out, in)
        self.dtype = torch.float32
        self._stacked: dict[str, Tensor] = {}  # the tensors of NF4, with a first axis of X

    @property
    def device(self) -> torch.device:
        return self._stacked["codes"].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._stacked.values())

    def put(self, expert: int, packed: NF4) -> None:
        """Makes `packed` expert number `expert`. KernelError where it is unlike those that are there."""
        if not self._stacked:
            self.shape, self.dtype = packed.shape, packed.dtype
            self._stacked = {name: one.new_empty((self.experts, *one.shape)) for name, one in packed.tensors.items()}
        if packed.shape != self.shape or packed.tensors.keys() != self._stacked.keys():
            raise KernelError(
                f"NF4 wants experts of one shape and one kind of scales in a layer, found {packed.shape} with "
                f"{', '.join(packed.tensors)} beside {self.shape} with {', '.join(self._stacked)}."
            )
        for name, one in packed.tensors.items():
            self._stacked[name][expert] = one

    def __getitem__(self, expert: int) -> NF4:
        """One of them; its tensors are views of the stack."""
        own = {name: stacked[expert] for name, stacked in self._stacked.items()}
        return NF4(**{"nested_absmax": None, "offset": None} | own, shape=self.shape, dtype=self.dtype)

    def codes_and_scales(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Experts `first` to `end`: the codes (x, n / 2), and the scales (x, n / 64) in fp32."""
        own = {name: stacked[first:end] for name, stacked in self._stacked.items()}
        if "nested_absmax" not in own:
            return own["codes"], own["absmax"]
        scales = _nested_table(self.device)[own["absmax"].int()]
        nested = own["nested_absmax"].repeat_interleave(NESTED_BLOCK, dim=1)[:, : scales.shape[1]]
        return own["codes"], scales * nested + own["offset"][:, None]


def unpack_experts_reference(nf4: NF4Stack, dtype: torch.dtype) -> Tensor:
    """The definition: one expert after the other. Arguments as in `unpack_experts`."""
    return torch.stack([dequantize_nf4(nf4[expert], dtype) for expert in range(nf4.experts)])


def unpack_experts(nf4: NF4Stack, dtype: torch.dtype) -> Tensor:
    """(X, out, in) in `dtype`, bit-equal to unpacking each expert alone.

    Several are unpacked at once, as one weight whose scales are at hand: many small experts would else be many times
    as many launches on a GPU. That takes experts of whole blocks, as all published ones are.
    """
    size = math.prod(nf4.shape)
    if size % BLOCK:
        return unpack_experts_reference(nf4, dtype)
    out = torch.empty(nf4.experts, *nf4.shape, dtype=dtype, device=nf4.device)
    step = max(1, CHUNK_ELEMENTS // size)
    for first in range(0, nf4.experts, step):
        codes, scales = nf4.codes_and_scales(first, first + step)
        shape = (len(codes), *nf4.shape)
        flat = NF4(
            codes=codes.flatten(), absmax=scales.flatten(), nested_absmax=None, offset=None, shape=shape, dtype=dtype
        )
        out[first : first + step] = dequantize_nf4(flat)
    return out


@cache
def _nested_table(device: torch.device) -> Tensor:
    return nested_values().to(device)


def nf4_grouped_linear_reference(x: Tensor, nf4: NF4Stack, ends: Tensor) -> Tensor:
    """The definition: one packed product for each expert that has rows. Arguments as in `nf4_grouped_linear`."""
    groups = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([nf4_linear(rows, nf4[e]) for e, rows in enumerate(groups) if len(rows)])


class _NF4GroupedLinear(torch.autograd.Function):
    """All experts are unpacked in each direction and freed at once; saves neither x nor a weight."""

    @staticmethod
    def forward(ctx, x: Tensor, nf4: NF4Stack, ends: Tensor) -> Tensor:
        ctx.nf4 = nf4
        ctx.save_for_backward(ends)
        return F.grouped_mm(x, unpack_experts(nf4, x.dtype).transpose(1, 2), offs=ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (ends,) = ctx.saved_tensors
        return F.grouped_mm(grad.contiguous(), unpack_experts(ctx.nf4, grad.dtype), offs=ends), None, None


@uncompiled
def nf4_grouped_linear(x: Tensor, nf4: NF4Stack, ends: Tensor) -> Tensor:
    """`grouped_linear` for a frozen, packed weight: (M, in) → (M, out) in x's dtype. Saves neither x nor a weight.

    Where there are fewer rows than experts, as while decoding, only the experts that have rows are unpacked.
    """
    available = {"reference": "only the experts that have rows are unpacked"}
    if _can_group(x, nf4.shape) and len(x) >= nf4.experts:
        available = {"grouped": "bf16 on a GPU: one product for all experts"} | available
    if choice("nf4_grouped_linear", available) == "grouped":
        return _NF4GroupedLinear.apply(x, nf4, ends)
    return nf4_grouped_linear_reference(x, nf4, ends)
