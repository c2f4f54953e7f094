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

Dropout before A, and DoRA, are part of the same products: `ops/pairs.py` says how.

A frozen weight in NF4 is unpacked for the product into a buffer that all layers share; one that comes in 8 bits too is
multiplied by those (`ops/fp8.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lumen.errors import KernelError
from lumen.ops._choose import choice
from lumen.ops._triton import implementations
from lumen.ops.dora import dora_norm, dora_update
from lumen.ops.dropout import draw_seeds, thinned
from lumen.ops.fp8 import Fp8Weight, add_to, fp8_group, fp8_linear, fp8_product
from lumen.ops.gated import gated, gated_forward, gated_gradient
from lumen.ops.lora import add_update, few_updates, lora_update, write_pair
from lumen.ops.nf4 import BLOCK, MOST_VECTORS, NF4, dequantize_nf4, nf4_linear, nf4_matvec
from lumen.ops.pairs import (
    Plan,
    grad_a,
    grad_b,
    grad_dense,
    grad_inputs,
    turned,
    turned_gradient,
    waist_weight,
    waists,
)
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


_workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_outgrown: list[Tensor] = []


def _workspace(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) of `like`'s dtype, the same memory at every call: who writes a weight there uses it at once."""
    key, numel = (like.device, like.dtype), rows * columns
    if key not in _workspaces or _workspaces[key].numel() < numel:
        if key in _workspaces:
            _outgrown.append(_workspaces[key])  # a captured graph may still write there
        _workspaces[key] = like.new_empty(numel)
    return _workspaces[key][:numel].view(rows, columns)


_held: WeakKeyDictionary[NF4, Tensor] = WeakKeyDictionary()


def hold_unpacked(weights: Sequence[NF4], waist: int, dtype: torch.dtype) -> int:
    """Unpacks the weights of one group for good, for as long as the first of them lives; the bytes this takes.

    waist  the widest sum of ranks that the group will have, as `project` sees it
    """
    inputs, outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
    waist = -(-waist // 8) * 8
    held = torch.empty(outputs + waist, inputs + waist, dtype=dtype, device=weights[0].codes.device)
    for weight, part in zip(weights, held.split([w.shape[0] for w in weights] + [waist])[:-1], strict=True):
        dequantize_nf4(weight, dtype, out=part[:, :inputs])
    _held[weights[0]] = held
    return held.nbytes


def _stacked(plan: Plan, dense: Sequence, a: Sequence, b: Sequence, inputs: int, like: Tensor) -> Tensor:
    """The weights of the group one under the other, in `like`'s dtype, with u beside them and A below:

    W  u        (Σ out + W, in + W), W = plan.waist: the ranks side by side, filled up with zeros
    A  ·        the corner is not written; W neither, where its products are in 8 bits
    """
    outputs = sum(plan.outputs)
    if len(dense) == 1 and dense[0] is not None and not plan.waist and plan.fp8 is None:
        return dense[0].to(like.dtype)
    held = None if plan.nf4[0] is None else _held.get(plan.nf4[0])
    size = outputs + plan.waist, inputs + plan.waist
    stacked = _workspace(*size, like) if held is None else held[: size[0], : size[1]]
    row = rank_at = 0
    for out, nf4, weight, pair_a, pair_b, rank, scale in zip(
        plan.outputs, plan.nf4, dense, a, b, plan.ranks, plan.scales, strict=True
    ):
        part = stacked[row : row + out, :inputs]
        if plan.fp8 is None and nf4 is None:
            part.copy_(weight)
        elif plan.fp8 is None and held is None:
            dequantize_nf4(nf4, like.dtype, out=part)
        if plan.waist:
            beside, below = stacked[row : row + out, inputs:], stacked[outputs + rank_at :, :inputs]
            write_pair(pair_a, pair_b, scale, beside, below, rank_at)
        row, rank_at = row + out, rank_at + rank
    if plan.waist > rank_at:
        stacked[outputs + rank_at :, :inputs].zero_()
    return stacked


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
    """Saves what its input is made from, x Aᵀ (N, ΣR), seeds, what learned lengths want, references to parameters."""

    @staticmethod
    def forward(ctx, plan: Plan, x: Tensor, second: Tensor | None, norm: Tensor | None, residual: Tensor | None,
                seeds: Tensor | None, *parameters: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
        layers, waist, turning = len(plan.outputs), None, (None, None, None)
        dense, bias, a, b, magnitude = (parameters[i * layers : (i + 1) * layers] for i in range(5))
        ctx.plan, ctx.has_residual = plan, residual is not None
        if plan.dead:
            ctx.save_for_backward(x, second, norm, None, x.new_empty(0), seeds, *turning, *parameters)
            return (x.new_empty(1).expand(len(x), plan.outputs[0]),)
        width, outputs = x.shape[1], sum(plan.outputs)
        # measured on an H200: a product over in + ΣR is dearer than one over in unless its output is much wider
        wide = residual is None and outputs > 2 * width and plan.fp8 is None
        inputs, root = _inputs(plan, x, second, norm, plan.waist if wide else 0)
        stacked = _stacked(plan, dense, a, b, width, x)
        start = residual
        if any(t is not None for t in bias):
            flat = [x.new_zeros(n) if t is None else t.to(x.dtype) for t, n in zip(bias, plan.outputs, strict=True)]
            start = torch.cat(flat) if start is None else start + torch.cat(flat)
        late = start  # added once the rows have their lengths
        if plan.turns and not plan.thins:
            start = None
        if plan.fp8 is not None:
            y = fp8_product(inputs, plan.fp8)
            if plan.waist:
                waist, u = waists(plan, inputs, stacked[outputs:, :width], seeds), stacked[:outputs, width:]
            if plan.waist and residual is not None and start is residual:
                add_to(y, residual, waist, u)
            else:
                y = y if start is None else y.add_(start)
                y = y.addmm_(waist, u.T) if plan.waist else y
        elif plan.waist and inputs.shape[1] > width:  # one product over in + ΣR: the update costs no pass of its own
            waist = waists(plan, inputs[:, :width], stacked[outputs:, :width], seeds, out=inputs[:, width:]).clone()
            y = inputs @ stacked[:outputs].T if start is None else torch.addmm(start, inputs, stacked[:outputs].T)
        elif plan.waist:
            waist, u = waists(plan, inputs, stacked[outputs:, :width], seeds), stacked[:outputs, width:]
            if residual is not None and start is residual:
                y = add_update(residual, waist, u)
            else:
                y = waist @ u.T if start is None else torch.addmm(start, waist, u.T)
            y.addmm_(inputs, stacked[:outputs, :width].T)
        else:
            y = inputs @ stacked.T if start is None else torch.addmm(start, inputs, stacked.T)
        if plan.turns:
            y, *turning = turned(plan, y, late, inputs[:, :width], waist, stacked, dense, a, b, magnitude, seeds)
            turning[0] = turning[0] if any(ctx.needs_input_grad[-layers:]) else None
        ctx.save_for_backward(x, second, norm, root, waist, seeds, *turning, *parameters)
        out = y.split(plan.outputs, dim=1) if layers > 1 else (y,)
        return (*out, x.view_as(x)) if plan.source == "norm" else tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        if getattr(ctx, "spent", False):
            raise KernelError("The activations of a fused MLP serve one backward pass; run the forward pass again.")
        layers, outputs = len(plan.outputs), sum(plan.outputs)
        x, second, norm, root, waist, seeds, z, ratio, lengths, *parameters = ctx.saved_tensors
        width = x.shape[1]
        dense, bias, a, b, _ = (parameters[i * layers : (i + 1) * layers] for i in range(5))
        needs = ctx.needs_input_grad
        need_dense, need_bias = needs[6 : 6 + layers], needs[6 + layers : 6 + 2 * layers]
        need_input = any(needs[1:4])
        grad = scaled = _joined(grads[:layers])
        of_a = of_b = of_magnitude = [None] * layers
        of_inputs = grad_waist = None
        if plan.turns:
            scaled, of_magnitude = turned_gradient(plan, grad, z, ratio, lengths)
        if need_input or plan.waist:
            stacked = _stacked(plan, dense, a, b, width, x)
        if plan.waist:
            grad_waist = scaled @ stacked[:outputs, width:]  # (N, ΣR)
        if need_input:
            of_inputs = grad_inputs(plan, grad, scaled, grad_waist, stacked, width, ratio, seeds)
        grad_x, grad_second, grad_norm, inputs = of_inputs, None, None, x
        want_inputs = bool(plan.waist) or any(need_dense)
        if plan.source == "norm":
            if need_input:
                passed = grads[layers]
                grad_x, grad_norm, inputs = norm_backward(
                    of_inputs, x, norm, root, plan.plus_one, needs[3], passed, want_inputs
                )
            elif want_inputs:
                inputs = norm_forward(x, norm, plan.eps, plan.plus_one)[0]
        elif plan.source == "gated":
            # the gradients take the place of gate and up, which nobody else reads: there is no second backward pass
            ctx.spent = True
            grad_x, grad_second, inputs = gated_gradient(of_inputs, x, second, plan.kind, (x, second), want_inputs)
        if plan.waist:
            waist = waist if waist.numel() else waists(plan, inputs, waist_weight(plan, a, width, x), seeds)
            of_b = grad_b(plan, scaled, waist)
            of_a = grad_a(plan, grad_waist, inputs, seeds)
        of_dense = grad_dense(plan, grad, scaled, inputs, dense, need_dense, ratio, seeds)
        of_bias = [
            piece.sum(0, dtype=torch.float32).to(t.dtype) if need else None
            for piece, t, need in zip(grad.split(plan.outputs, dim=1), bias, need_bias, strict=True)
        ]
        residual = grad if ctx.has_residual else None
        return None, grad_x, grad_second, grad_norm, residual, None, *of_dense, *of_bias, *of_a, *of_b, *of_magnitude


def _inputs(
    plan: Plan, x: Tensor, second: Tensor | None, norm: Tensor | None, room: int
) -> tuple[Tensor, Tensor | None]:
    """What the layers read, and each row's inverse root where it is a norm. What is made here has `room` behind it."""
    if plan.source == "norm":
        return norm_forward(x, norm, plan.eps, plan.plus_one, room)
    if plan.source == "gated":
        return gated_forward(x, second, plan.kind, room), None
    return x, None


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


def project(
    layers: Sequence[Projection],
    x: Tensor,
    *,
    up: Tensor | None = None,
    kind: str = "",
    norm: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    residual: Tensor | None = None,
    dead: bool = False,
) -> tuple[Tensor, ...]:
    """The outputs (…, out) of layers that read the same input: x (…, in), or norm(x), or f(x) · up.

    up, kind             the input is the gated activation `kind` of x and `up`, both (…, in)
    norm, eps, plus_one  the input is x normed as by `rms_norm`; x itself is returned behind the outputs, and what goes
                         on from there instead of from x has its gradient added inside the norm's kernel
    residual             (…, out), added to the output of a single layer
    dead                 nobody reads the outputs, which need not be computed: a recomputation for the backward pass
    """
    options = {"up": up, "kind": kind, "norm": norm, "eps": eps, "plus_one": plus_one, "residual": residual}
    if choice("project", _available(layers, x)) == "reference":
        return project_reference(layers, x, **options)
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
    )
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, up, residual)]
    few = len(rows[0]) <= MOST_VECTORS and not x.shape[-1] % BLOCK and all(nf4 is not None for nf4 in plan.nf4)
    if few and not torch.is_grad_enabled() and not plan.thins and not plan.turns:
        return tuple(y.view(*x.shape[:-1], -1) for y in _few(plan, layers, rows[0], rows[1], norm, rows[2]))
    found = _Project.apply(
        plan, rows[0], rows[1], norm, rows[2], _seeds(layers, x),
        *(None if isinstance(n.weight, NF4) else n.weight for n in layers),
        *(layer.bias for layer in layers), *(layer.a for layer in layers), *(layer.b for layer in layers),
        *(layer.magnitude for layer in layers),
    )  # fmt: skip
    return tuple(y.view(*x.shape[:-1], -1) for y in found)


def _few(
    plan: Plan,
    layers: Sequence[Projection],
    x: Tensor,
    up: Tensor | None,
    norm: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, ...]:
    """Outputs for so few rows that the packed weights are read as they lie; the update stays in fp32."""
    inputs, _ = _inputs(plan, x, up, norm, 0)
    inputs = inputs.contiguous()
    bias = [layer.bias for layer in layers]
    if plan.waist:
        pairs = [layer.a for layer in layers], [layer.b for layer in layers]
        starts = few_updates(inputs, *pairs, plan.scales, plan.outputs, bias, residual)
    else:
        starts = [residual if own is None else own.float().expand(len(x), -1) for own in bias]
        if residual is not None and bias[0] is not None:
            starts = [starts[0] + residual]
    outputs = [
        nf4_matvec(inputs, layer.weight, None if start is None else start.contiguous())
        for layer, start in zip(layers, starts, strict=True)
    ]
    return (*outputs, x) if norm is not None else tuple(outputs)


def _available(layers: Sequence[Projection], x: Tensor) -> dict[str, str]:
    available = implementations(x)
    if any(layer.fp8 is not None and layer.a is not None and layer.magnitude is not None for layer in layers):
        available.pop("triton", None)  # the length of a row is taken from the 16-bit weight, which 8 bits leave packed
    return available
