"""Linear layers with a low-rank update, y = W x + b + scale · B A x with A (R, in) and B (out, R): several of them that
read the same input computed as one, and that input recomputed rather than kept.

    u = scale · B            y = x Wᵀ + (x Aᵀ) uᵀ                          ∂xa = ∂y u, the gradient at the waist (N, R)
    ∂x = ∂y W + ∂xa A        ∂A = ∂xaᵀ x        ∂B = scale · ∂yᵀ (x Aᵀ)    ∂W = ∂yᵀ x, where W learns

q, k, v (and gate, up) read the same x: their weights lie one under the other, so that each line above is one product
for all of them; their B stand on a block diagonal. The layers' input is a norm or a gated activation of what is kept
anyway, so the backward pass makes it again from there instead of keeping it:

    input        kept                       made again
    x            x                          –
    norm(x)      x, 1/rms (N,)              a read and a write
    f(g) · u     gate, up                   together with their gradients

Where nothing is dropped and no W learns, the skinny products with A and B are made on the way past what they read: ∂xa
and ∂B in one pass over ∂y, ∂A in one over x, normed on the way (`ops/waist.py`); those of a gated input in the passes
that make it and its gradients (`ops/gated_waist.py`). A group told to `leave` its update keeps it out of its outputs,
and the group that reads these, told what is `left`, adds it there, and finds its gradients (`ops/mlp.py`).

Dropout before A, and DoRA, are part of the same products: `ops/pairs.py` says how.

A frozen weight in NF4 is unpacked for the product into a buffer that all layers share; one that comes in 8 bits too is
multiplied by those (`ops/fp8.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lumen.errors import KernelError
from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations
from lumen.ops.dora import dora_norm, dora_update
from lumen.ops.dropout import draw_seeds, thinned
from lumen.ops.fp8 import Fp8Weight, add_to, fp8_group, fp8_linear, fp8_product
from lumen.ops.gated import gated, gated_forward, gated_gradient
from lumen.ops.gated_waist import GatedGradients, Taken, gated_waist_forward, gated_waist_gradient
from lumen.ops.lora import add_update, lora_update, write_pair
from lumen.ops.nf4 import BLOCK, NF4, dequantize_nf4, nf4_linear
from lumen.ops.nf4_matvec import MOST_VECTORS, few_inputs, nf4_products
from lumen.ops.pairs import (
    Plan,
    Stacked,
    grad_a,
    grad_dense,
    grad_inputs,
    of_ranks,
    outward_gradients,
    turned,
    turned_gradient,
    waist_weight,
    waists,
)
from lumen.ops.product import add_product, product
from lumen.ops.rms_norm import norm_backward, norm_forward, rms_norm


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear layer as the group sees it; tensors in any dtype, rounded to the input's for the products."""

    weight: Tensor | NF4  # (out, in)
    bias: Tensor | None = None  # (out,)
    a: Tensor | None = None  # (R, in) fp32
    b: Tensor | None = None  # (out, R) fp32
    scale: float = 1.0
    dropout: float = 0.0  # share of the update's inputs that is dropped; 0 when not training
    magnitude: Tensor | None = None  # (out,) fp32, the learned length of each row (`ops/dora.py`)
    fp8: Fp8Weight | None = None  # the frozen weight in 8 bits, if its products shall be of these

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class Left:
    """The updates of two layers that were left out of their outputs: waist · (scale B)ᵀ of each."""

    waist: Tensor  # (N, W), the first layer's columns before the second's
    b: tuple[Tensor | None, ...]  # (out, R) fp32 each; None without a pair
    scales: tuple[float, ...]


_workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_outgrown: list[Tensor] = []


def _workspace(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) of `like`'s dtype, the same memory at every call: who writes a weight there uses it at once."""
    key, numel = (like.device, like.dtype), rows * columns
    if key not in _workspaces or _workspaces[key].numel() < numel:
        if key in _workspaces:
            _outgrown.append(_workspaces[key])  # a captured graph may still write there
        with torch.inference_mode(False):  # where it is made for an evaluation, training writes there too
            _workspaces[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
    return _workspaces[key][:numel].view(rows, columns)


_held: WeakKeyDictionary[NF4, Tensor] = WeakKeyDictionary()


def hold_unpacked(weights: Sequence[NF4], dtype: torch.dtype) -> int:
    """Unpacks the weights of one group for good, for as long as the first of them lives; the bytes this takes."""
    outputs = [weight.shape[0] for weight in weights]
    with torch.inference_mode(False):
        held = torch.empty(sum(outputs), weights[0].shape[1], dtype=dtype, device=weights[0].codes.device)
    for weight, part in zip(weights, held.split(outputs), strict=True):
        dequantize_nf4(weight, dtype, out=part)
    _held[weights[0]] = held
    return held.nbytes


def _stacked(plan: Plan, dense: Sequence, a: Sequence, b: Sequence, inputs: int, like: Tensor) -> Stacked:
    """The weights and the pairs of the group, in `like`'s dtype."""
    outputs = sum(plan.outputs)
    held = None if plan.nf4[0] is None else _held.get(plan.nf4[0])
    u, below = like.new_empty(outputs, plan.waist), like.new_empty(plan.waist, inputs)
    if plan.fp8 is not None:
        weight = u  # which nobody reads
    elif held is not None and held.shape == (outputs, inputs) and held.dtype == like.dtype:  # else a layer alone
        weight = held
    elif len(dense) == 1 and dense[0] is not None:
        weight = dense[0].to(like.dtype)
    else:
        weight = _workspace(outputs, inputs, like)
        for part, nf4, own in zip(weight.split(plan.outputs), plan.nf4, dense, strict=True):
            part.copy_(own) if nf4 is None else dequantize_nf4(nf4, like.dtype, out=part)
    if plan.waist:
        rank_at = 0
        for part, pair_a, pair_b, rank, scale in zip(u.split(plan.outputs), a, b, plan.ranks, plan.scales, strict=True):
            write_pair(pair_a, pair_b, scale, part, below[rank_at:], rank_at)
            rank_at += rank
        below[rank_at:].zero_()
    return Stacked(weight, u, below)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Parts (N, out) side by side, (N, Σ out): where they already lie so, no copy is made."""
    first = parts[0]
    if len(parts) == 1:
        return first if first.stride(-1) == 1 else first.contiguous()
    place, row = first.data_ptr(), first.stride(0)
    for part in parts:
        if part.data_ptr() != place or part.stride() != (row, 1):
            return torch.cat(parts, dim=-1)
        place += part.shape[1] * part.element_size()
    width = sum(part.shape[1] for part in parts)
    return first.as_strided((len(first), width), (row, 1)) if row >= width else torch.cat(parts, dim=-1)


class _Project(torch.autograd.Function):
    """Saves what its input is made from and what was left out of that, x Aᵀ (N, ΣR), seeds, what learned lengths want,
    and references to parameters.
    """

    @staticmethod
    def forward(
        ctx, plan: Plan, x: Tensor, second: Tensor | None, norm: Tensor | None, residual: Tensor | None,
        seeds: Tensor | None, left: Tensor | None, *parameters: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        layers, turning = len(plan.outputs), (None, None, None)
        dense, bias, a, b, magnitude = (parameters[i * layers : (i + 1) * layers] for i in range(5))
        ctx.plan, ctx.has_residual = plan, residual is not None
        stacked = None if plan.dead else _stacked(plan, dense, a, b, x.shape[1], x)
        below = waist_weight(plan, a, x.shape[1], x) if plan.dead else stacked.a
        inputs, root, waist = _inputs(plan, x, second, norm, below, seeds, _taken(plan, left, parameters, x.dtype))
        if plan.dead:
            ctx.save_for_backward(x, second, norm, root, waist, seeds, left, *turning, *parameters)
            return x.new_empty(1).expand(len(x), plan.outputs[0]), None
        start = residual
        if any(t is not None for t in bias):
            flat = [x.new_zeros(n) if t is None else t.to(x.dtype) for t, n in zip(bias, plan.outputs, strict=True)]
            start = torch.cat(flat) if start is None else start + torch.cat(flat)
        # without dropout, what is added to rows of learned lengths is added once they have them
        y = _outputs(plan, inputs, waist, stacked, None if plan.turns and not plan.thins else start, residual)
        if plan.turns:
            y, *turning = turned(plan, y, start, inputs, waist, stacked, dense, a, b, magnitude, seeds)
            turning[0] = turning[0] if any(ctx.needs_input_grad[7 + 4 * layers : 7 + 5 * layers]) else None
        ctx.save_for_backward(x, second, norm, root, waist, seeds, left, *turning, *parameters)
        out = y.split(plan.outputs, dim=1) if layers > 1 else (y,)
        if plan.source == "norm":
            out = (*out, x.view_as(x))
        return *out, waist if plan.leaves else None

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        if getattr(ctx, "spent", False):
            raise KernelError("The activations of a fused MLP serve one backward pass; run the forward pass again.")
        layers = len(plan.outputs)
        x, second, norm, root, waist, seeds, left, z, ratio, lengths, *parameters = ctx.saved_tensors
        dense, bias, a, b, _ = (parameters[i * layers : (i + 1) * layers] for i in range(5))
        needs = ctx.needs_input_grad
        need_dense, need_bias = needs[7 : 7 + layers], needs[7 + layers : 7 + 2 * layers]
        need_input = any(needs[1:4]) or left is not None
        grad = scaled = _joined(grads[:layers])
        of_a = of_b = of_magnitude = [None] * layers
        of_left, of_left_b = None, [None] * len(plan.taken)
        of_inputs = grad_waist = None
        if plan.turns:
            scaled, of_magnitude = turned_gradient(plan, grad, z, ratio, lengths)
        if need_input or plan.waist:
            stacked = _stacked(plan, dense, a, b, x.shape[1], x)
        if plan.leaves:  # who added the updates has both from there
            grad_waist = grads[-1]
        elif plan.waist:
            grad_waist, of_b = outward_gradients(plan, scaled, stacked.u, waist)
        # by the kernel that reads ∂h, gate and up ∂xa A is added, and ∂A made
        passing = need_input and plan.source == "gated" and plan.fused
        if need_input:
            of_inputs = grad_inputs(plan, grad, scaled, None if passing else grad_waist, stacked, ratio, seeds)
        grad_x, grad_second, grad_norm, inputs = of_inputs, None, None, x
        want_inputs = any(need_dense) or (bool(plan.waist) and not plan.fused)
        if plan.source == "norm":
            if need_input:
                passed = grads[layers].contiguous()
                grad_x, grad_norm, inputs = norm_backward(
                    of_inputs, x, norm, root, plan.plus_one, needs[3], passed, want_inputs
                )
            elif want_inputs:
                inputs = norm_forward(x, norm, plan.eps, plan.plus_one)[0]
        elif plan.source == "gated" and not need_input:  # gate and up are frozen, and all that they are made from
            inputs = gated_forward(x, second, plan.kind)
        elif plan.source == "gated":
            # the gradients take the place of gate and up, which nobody else reads: there is no second backward pass
            ctx.spent = True
            if plan.fused or left is not None:
                taken = _taken(plan, left, parameters, x.dtype)
                pair = (grad_waist, stacked.a) if plan.waist else None
                found = gated_waist_gradient(of_inputs, x, second, plan.kind, taken, pair, out=(x, second))
                grad_x, grad_second, of_left = found.gate, found.up, found.waist
                of_a, of_left_b = of_ranks(plan, found.a_down), _of_taken(plan, found)
            else:
                grad_x, grad_second, inputs = gated_gradient(of_inputs, x, second, plan.kind, (x, second), want_inputs)
        if plan.waist and not passing:
            of_a = grad_a(plan, grad_waist, x if plan.source == "norm" and plan.fused else inputs, seeds, norm, root)
        of_dense = grad_dense(plan, grad, scaled, inputs, dense, need_dense, ratio, seeds)
        of_bias = [
            piece.sum(0, dtype=torch.float32).to(t.dtype) if need else None
            for piece, t, need in zip(grad.split(plan.outputs, dim=1), bias, need_bias, strict=True)
        ]
        residual = grad if ctx.has_residual else None
        rest = (*of_dense, *of_bias, *of_a, *of_b, *of_magnitude, *of_left_b)
        return None, grad_x, grad_second, grad_norm, residual, None, of_left, *rest


def _taken(plan: Plan, left: Tensor | None, parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Taken | None:
    """The updates that gate and up left to be added here."""
    if left is None:
        return None
    b = parameters[len(parameters) - len(plan.taken) :]
    halves = [None if own is None else (own * scale).to(dtype) for own, scale in zip(b, plan.taken, strict=True)]
    return Taken(left, *halves)


def _of_taken(plan: Plan, found: GatedGradients) -> list[Tensor | None]:
    """∂B of the updates that were left to be added here."""
    products = (found.product_gate, found.product_up)[: len(plan.taken)]
    return [None if product is None else product * scale for product, scale in zip(products, plan.taken, strict=True)]


def _inputs(
    plan: Plan, x: Tensor, second: Tensor | None, norm: Tensor | None, a: Tensor, seeds: Tensor | None,
    taken: Taken | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What the layers read (nothing where they are dead), each row's inverse root where it is a norm, and the waist."""
    inputs, root, waist = x, None, None
    if plan.source == "norm":
        inputs, root = norm_forward(x, norm, plan.eps, plan.plus_one)
    elif plan.source == "gated":
        if plan.fused or taken is not None:
            inputs, waist = gated_waist_forward(x, second, plan.kind, a, taken, dead=plan.dead)
            return inputs, None, waist
        inputs = gated_forward(x, second, plan.kind)
    waist = waists(plan, inputs, a, seeds) if plan.waist else None
    return inputs, root, waist


def _outputs(
    plan: Plan, inputs: Tensor, waist: Tensor | None, stacked: Stacked, start: Tensor | None, residual: Tensor | None
) -> Tensor:
    """start + x Wᵀ, and the update unless it is left to the reader: (N, Σ out)."""
    if waist is None or plan.leaves:
        if plan.fp8 is not None:
            y = fp8_product(inputs, plan.fp8)
            return y if start is None else y.add_(start)
        return product(inputs, stacked.weight.T) if start is None else torch.addmm(start, inputs, stacked.weight.T)
    alone = start is not None and start is residual
    if plan.fp8 is not None:
        y = fp8_product(inputs, plan.fp8)
        if alone:
            return add_to(y, residual, waist, stacked.u)
        return (y if start is None else y.add_(start)).addmm_(waist, stacked.u.T)
    if alone:
        y = add_update(residual, waist, stacked.u)
    else:
        y = waist @ stacked.u.T if start is None else torch.addmm(start, waist, stacked.u.T)
    return add_product(y, inputs, stacked.weight.T)


def project_reference(
    layers: Sequence[Projection],
    x: Tensor,
    *,
    up: Tensor | None = None,
    kind: str = "",
    norm: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The definition of correct for `project`."""
    inputs = x
    if norm is not None:
        inputs = rms_norm(x, norm, eps, plus_one)
    elif up is not None:
        inputs = gated(x, up, kind)
    fp8, bases = fp8_group([layer.fp8 for layer in layers]), [None] * len(layers)
    if fp8 is not None:
        bases = fp8_linear(inputs, fp8).split([layer.outputs for layer in layers], dim=-1)
    seeds = _seeds(layers, x)
    seeds = [None] * len(layers) if seeds is None else seeds
    outputs = [_layer(layer, inputs, base, seed) for layer, base, seed in zip(layers, bases, seeds, strict=True)]
    if residual is not None:
        outputs = [residual + outputs[0]]
    return (*outputs, x) if norm is not None else tuple(outputs)


def _seeds(layers: Sequence[Projection], x: Tensor) -> Tensor | None:
    """One for each layer, so that each drops elements of its own; None where nothing is dropped."""
    drops = any(layer.a is not None and layer.dropout for layer in layers)
    return draw_seeds(len(layers), x.device) if drops else None


def _layer(layer: Projection, x: Tensor, base: Tensor | None, seed: Tensor | None) -> Tensor:
    base = _product(layer, x) if base is None else base
    y = base if layer.bias is None else base + layer.bias.to(x.dtype)
    if layer.a is None:
        return y
    thin = thinned(x, layer.dropout, seed)
    update = lora_update(thin, layer.a, layer.b, layer.scale)
    if layer.magnitude is None:
        return y + update
    # dropout acts on all that DoRA adds, so that W meets the thinned x once more, as in PEFT
    base = _product(layer, thin) if layer.dropout else base
    weight = layer.weight
    weight = dequantize_nf4(weight, torch.float32) if isinstance(weight, NF4) else weight
    return y + dora_update(base, update, layer.magnitude, dora_norm(weight, layer.a, layer.b, layer.scale))


def _product(layer: Projection, x: Tensor) -> Tensor:
    if layer.fp8 is not None:
        return fp8_linear(x, layer.fp8)
    packed = isinstance(layer.weight, NF4)
    return nf4_linear(x, layer.weight) if packed else F.linear(x, layer.weight.to(x.dtype))


@uncompiled
def project(
    layers: Sequence[Projection], x: Tensor, *, up: Tensor | None = None, kind: str = "", norm: Tensor | None = None,
    eps: float = 0.0, plus_one: bool = False, residual: Tensor | None = None, dead: bool = False,
    leave: bool = False, left: Left | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs (…, out) of layers that read the same input: x (…, in), or norm(x), or f(x) · up.

    up, kind             the input is the gated activation `kind` of x and `up`, both (…, in), whose memory the backward
                         pass may take for their gradients: neither may be a leaf, nor read by anyone else later
    norm, eps, plus_one  the input is x normed as by `rms_norm`; x itself is returned behind the outputs, and what goes
                         on from there instead of from x has its gradient added inside the norm's kernel
    residual             (…, out), added to the output of a single layer
    dead                 nobody reads the outputs, which need not be computed: a recomputation for the backward pass
    leave                the update may be left out of the outputs, for who reads them to add: a `Left`, or None if it
                         is in them, stands behind all else that is returned
    left                 with `up`: what was left out of x and `up`; layers that drop inputs, whose W learns or whose
                         ranks are above MOST_WAIST cannot add it
    """
    options = {"up": up, "kind": kind, "norm": norm, "eps": eps, "plus_one": plus_one, "residual": residual}
    if choice("project", _available(layers, x)) == "reference" or x.numel() == 0:
        assert left is None, "the reference adds no update that was left out"
        return project_reference(layers, x, **options) + (None,) * leave
    plan = Plan(
        source="gated" if up is not None else "norm" if norm is not None else "plain",
        nf4=tuple(layer.weight if isinstance(layer.weight, NF4) else None for layer in layers),
        outputs=tuple(layer.outputs for layer in layers),
        ranks=tuple(0 if layer.a is None else layer.a.shape[0] for layer in layers),
        scales=tuple(layer.scale for layer in layers),
        dropouts=tuple(0.0 if layer.a is None else layer.dropout for layer in layers),
        decomposed=tuple(layer.a is not None and layer.magnitude is not None for layer in layers),
        eps=eps,
        plus_one=plus_one,
        kind=kind,
        # the length of a row that learns wants its output for its gradient
        dead=dead and all(layer.magnitude is None for layer in layers),
        fp8=fp8_group([layer.fp8 for layer in layers]),
        learns=any(isinstance(layer.weight, Tensor) and layer.weight.requires_grad for layer in layers),
        taken=() if left is None else left.scales,
    )
    plan = replace(plan, leaves=leave and plan.fused and not plan.turns)
    assert left is None or plan.fused or not (plan.waist or plan.learns), "these layers cannot add what was left out"
    rows = [_rows(x), _rows(up), None if residual is None else _rows(residual.contiguous())]
    few = len(rows[0]) <= MOST_VECTORS and not x.shape[-1] % BLOCK and all(nf4 is not None for nf4 in plan.nf4)
    if few and not torch.is_grad_enabled() and not plan.thins and not plan.turns and left is None:
        found = _few(plan, layers, rows[0], rows[1], norm, rows[2])
        return tuple(y.view(*x.shape[:-1], -1) for y in found) + (None,) * leave
    *found, waist = _Project.apply(
        plan, rows[0], rows[1], norm, rows[2], _seeds(layers, x), None if left is None else left.waist,
        *(None if isinstance(n.weight, NF4) else n.weight for n in layers),
        *(layer.bias for layer in layers), *(layer.a for layer in layers), *(layer.b for layer in layers),
        *(layer.magnitude for layer in layers), *(() if left is None else left.b),
    )  # fmt: skip
    left = Left(waist, tuple(layer.b for layer in layers), plan.scales) if plan.leaves else None
    return tuple(y.view(*x.shape[:-1], -1) for y in found) + (left,) * leave


def _rows(x: Tensor | None) -> Tensor | None:
    """(…, in) as (N, in), with the numbers of a row side by side."""
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    return rows if rows is None or rows.stride(1) == 1 else rows.contiguous()


def _few(
    plan: Plan, layers: Sequence[Projection], x: Tensor, up: Tensor | None, norm: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, ...]:
    """Outputs for so few rows that the packed weights are read as they lie; the update stays in fp32."""
    source = {"up": up, "kind": plan.kind, "norm": norm, "eps": plan.eps, "plus_one": plan.plus_one}
    planes, waist = few_inputs(x, [layer.a for layer in layers], **source)
    outputs = nf4_products(
        planes, waist, plan.nf4, [layer.b for layer in layers], plan.scales, [layer.bias for layer in layers], residual
    )
    return (*outputs, x) if norm is not None else tuple(outputs)


def _available(layers: Sequence[Projection], x: Tensor) -> dict[str, str]:
    available = implementations(x)
    if any(layer.fp8 is not None and layer.a is not None and layer.magnitude is not None for layer in layers):
        available.pop("triton", None)  # the length of a row is taken from the 16-bit weight, which 8 bits leave packed
    return available
