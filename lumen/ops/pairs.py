"""The low-rank pairs of a group of layers side by side, for `ops/project.py`: the waist and its gradients, also where a
layer drops elements of its input (`ops/dropout.py`) or learns the length of its rows (`ops/dora.py`).

    x̃ = thin(x), other elements for each layer      r = m / ‖V‖, 1 without a learned length      z = x̃ Wᵀ + (x̃ Aᵀ) uᵀ

                       nothing dropped             dropped, with PEFT's meaning: all that is added to W x sees x̃
    y                  r ∘ z                       x Wᵀ + (x̃ Aᵀ) uᵀ + (r − 1) ∘ z
    ∂x                 (r ∘ ∂y) W + ∂xa A          ∂y W + thin(∂xa A + ((r − 1) ∘ ∂y) W)

    ∂xa = (r ∘ ∂y) u        ∂A = ∂xaᵀ x̃        ∂B = scale · (r ∘ ∂y)ᵀ (x̃ Aᵀ)        ∂m = Σ ∂y ∘ z / ‖V‖

x̃ is made again wherever it is read. z is kept where m learns: as much as the layers put out; making it again would be
one more product with W.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lumen.ops.dora import row_lengths, scale_gradient, scale_rows, turned_lengths
from lumen.ops.dropout import thin_rows
from lumen.ops.fp8 import Fp8Weight, fp8_gradient
from lumen.ops.nf4 import NF4
from lumen.ops.product import add_product, product
from lumen.ops.waist import MOST_WAIST, normed_product, waist_gradients


@dataclass(frozen=True)
class Plan:
    """What of a group is no tensor: how the input is made, which layers there are."""

    source: str  # plain | norm | gated
    nf4: tuple[NF4 | None, ...]
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]  # 0 without an update
    scales: tuple[float, ...]
    dropouts: tuple[float, ...] = ()  # 0 where nothing is dropped
    decomposed: tuple[bool, ...] = ()  # whether the length of the rows learns
    eps: float = 0.0
    plus_one: bool = False
    kind: str = ""  # of the gated activation
    dead: bool = False  # the outputs are not needed: only what the backward pass wants is
    fp8: Fp8Weight | None = None  # W of all layers in 8 bits, if its products shall be of these
    learns: bool = False  # one of the W
    leaves: bool = False  # the update is not in the outputs: their reader adds it
    taken: tuple[float, ...] = ()  # the scales of the updates that are added here to the input's two halves

    @property
    def fused(self) -> bool:
        """Whether the pairs' skinny products are made on the way past what they read."""
        return 0 < self.waist <= MOST_WAIST and not self.thins and not self.learns

    @property
    def waist(self) -> int:
        """The ranks side by side, filled up to a multiple of 8: columns then begin at multiples of 16 bytes."""
        return -(-sum(self.ranks) // 8) * 8

    @property
    def thins(self) -> bool:
        return any(self.dropouts)

    @property
    def turns(self) -> bool:
        return any(self.decomposed)

    def pairs(self) -> Iterator[tuple[int, slice, slice]]:
        """(index, its outputs, its columns of the waist) of each layer that has a pair."""
        row = column = 0
        for i, (outputs, rank) in enumerate(zip(self.outputs, self.ranks, strict=True)):
            if rank:
                yield i, slice(row, row + outputs), slice(column, column + rank)
            row, column = row + outputs, column + rank


class Stacked(NamedTuple):
    """The weights of a group one under the other, in the input's dtype."""

    weight: Tensor  # W (Σ out, in); not written where its products are in 8 bits
    u: Tensor  # (Σ out, W), scale · B on a block diagonal; W = plan.waist, no columns where there is no pair
    a: Tensor  # A (W, in), the ranks one under the other, filled up with zeros


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, whatever their dtype: gradients of fp32 masters are not rounded on the way."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _thin(plan: Plan, i: int, x: Tensor, seeds: Tensor | None, add_to: Tensor | None = None) -> Tensor:
    """x̃ of layer `i`; or `add_to` with it added."""
    if not plan.dropouts[i]:
        return x if add_to is None else add_to.add_(x)
    return thin_rows(x if x.stride(-1) == 1 else x.contiguous(), plan.dropouts[i], seeds[i], add_to)


# Forward --------------------------------------------------------------------------------------------------------------


def waists(plan: Plan, inputs: Tensor, a: Tensor, seeds: Tensor | None) -> Tensor:
    """x̃ Aᵀ (N, W) of all layers side by side, for A (W, in)."""
    if not plan.thins:
        return inputs @ a.T
    found = inputs.new_empty(len(inputs), plan.waist)
    found[:, sum(plan.ranks) :] = 0
    for i, _, columns in plan.pairs():
        torch.mm(_thin(plan, i, inputs, seeds), a[columns].T, out=found[:, columns])
    return found


def waist_weight(plan: Plan, a: Sequence[Tensor | None], width: int, like: Tensor) -> Tensor:
    """A (W, in), in `like`'s dtype."""
    weight = like.new_zeros(plan.waist, width)
    for i, _, columns in plan.pairs():
        weight[columns].copy_(a[i])
    return weight


def turned(
    plan: Plan, y: Tensor, start: Tensor | None, inputs: Tensor, waist: Tensor, stacked: Stacked,
    dense: Sequence, a: Sequence, b: Sequence, magnitude: Sequence, seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What a group with learned lengths gives (N, Σ out); z; r and ‖V‖ (Σ out,) fp32.

    y      x Wᵀ + (x̃ Aᵀ) uᵀ, with `start` in it where something is dropped, and without it where nothing is
    start  what is added to the outputs: (N, Σ out), (Σ out,) or None
    """
    crossed = wide_product(stacked.weight, stacked.a.T)  # W Aᵀ, (Σ out, W)
    lengths, ratio = (torch.ones(sum(plan.outputs), dtype=torch.float32, device=y.device) for _ in range(2))
    for i, rows, columns in plan.pairs():
        if plan.decomposed[i]:
            own = row_lengths(dense[i] if plan.nf4[i] is None else plan.nf4[i])
            lengths[rows] = turned_lengths(own, crossed[rows, columns], a[i], b[i], plan.scales[i])
            torch.div(magnitude[i], lengths[rows], out=ratio[rows])
    if not plan.thins:
        return scale_rows(y, ratio, start), y, ratio, lengths
    z = torch.zeros_like(y)
    for i, rows, columns in plan.pairs():
        if plan.decomposed[i]:
            torch.mm(_thin(plan, i, inputs, seeds), stacked.weight[rows].T, out=z[:, rows])
            z[:, rows].addmm_(waist[:, columns], stacked.u[rows, columns].T)
    return scale_rows(z, ratio - 1, start=y, out=y), z, ratio, lengths


# Backward -------------------------------------------------------------------------------------------------------------


def turned_gradient(
    plan: Plan, grad: Tensor, z: Tensor | None, ratio: Tensor, lengths: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """r ∘ ∂y (N, Σ out), and ∂m of each layer; z is None where no length learns."""
    scaled, sums = scale_gradient(grad, z, ratio)
    grad_magnitude: list[Tensor | None] = [None] * len(plan.outputs)
    for i, rows, _ in plan.pairs():
        if plan.decomposed[i] and sums is not None:
            grad_magnitude[i] = sums[rows] / lengths[rows]
    return scaled, grad_magnitude


def grad_inputs(
    plan: Plan, grad: Tensor, scaled: Tensor, grad_waist: Tensor | None, stacked: Stacked, ratio: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:  # fmt: skip
    """∂x (N, in) for ∂y, r ∘ ∂y and ∂xa; None for a ∂xa that is not there, or whose ∂xa A the caller adds."""
    if plan.fp8 is not None:
        found = fp8_gradient(grad, plan.fp8)
        if grad_waist is not None and not plan.thins:
            found.addmm_(grad_waist, stacked.a)
    elif grad_waist is None or plan.thins:
        found = product(grad if plan.thins else scaled, stacked.weight)
    else:
        return add_product(grad_waist @ stacked.a, scaled, stacked.weight)
    if not plan.thins:
        return found
    for i, rows, columns in plan.pairs():
        part = grad_waist[:, columns] @ stacked.a[columns]
        if plan.decomposed[i]:
            part.addmm_(scale_rows(grad[:, rows], ratio[rows] - 1), stacked.weight[rows])
        _thin(plan, i, part, seeds, add_to=found)
    return found


def grad_a(
    plan: Plan, grad_waist: Tensor, inputs: Tensor, seeds: Tensor | None, norm: Tensor | None, root: Tensor | None
) -> list[Tensor | None]:
    """∂A of each layer, from one product that reads the input once where nothing is dropped.

    inputs  what the layers read; where the products are fused, what is normed on its way into this one
    """
    if plan.fused:
        return of_ranks(plan, normed_product(grad_waist, inputs, norm, root, plan.plus_one))
    if not plan.thins:
        return of_ranks(plan, wide_product(grad_waist.T, inputs))
    found: list[Tensor | None] = [None] * len(plan.outputs)
    for i, _, columns in plan.pairs():
        found[i] = wide_product(grad_waist[:, columns].T, _thin(plan, i, inputs, seeds))
    return found


def of_ranks(plan: Plan, product: Tensor | None) -> list[Tensor | None]:
    """The rows of `product` (W, in), ∂A of all pairs, that are each layer's."""
    found: list[Tensor | None] = [None] * len(plan.outputs)
    for i, _, columns in plan.pairs():
        found[i] = product[columns]
    return found


def outward_gradients(plan: Plan, scaled: Tensor, u: Tensor, waist: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """∂xa (N, W), and ∂B of each layer: its own columns of the product."""
    found: list[Tensor | None] = [None] * len(plan.outputs)
    if plan.fused:
        grad_waist, product = waist_gradients(scaled, u, waist, plan.outputs, plan.ranks)
    else:
        grad_waist, product = scaled @ u, wide_product(scaled.T, waist)  # (Σ out, W)
    for i, rows, columns in plan.pairs():
        own = slice(plan.ranks[i]) if plan.fused else columns
        found[i] = product[rows, own] * plan.scales[i]
    return grad_waist, found


def grad_dense(
    plan: Plan, grad: Tensor, scaled: Tensor, inputs: Tensor, dense: Sequence[Tensor | None], needs: Sequence[bool],
    ratio: Tensor | None, seeds: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """∂W of each layer that learns whole."""
    pieces = (grad if plan.thins else scaled).split(plan.outputs, dim=1)
    found = [wide_product(piece.T, inputs) if need else None for piece, need in zip(pieces, needs, strict=True)]
    for i, rows, _ in plan.pairs():
        if plan.thins and plan.decomposed[i] and needs[i]:
            found[i] += wide_product(scale_rows(grad[:, rows], ratio[rows] - 1).T, _thin(plan, i, inputs, seeds))
    return [None if part is None else part.to(w.dtype) for part, w in zip(found, dense, strict=True)]
