"""Gated activations (Shazeer 2020, arXiv 2002.05202): h = f(gate) · up, with f = SiLU or a form of GELU.

    ∂up = ∂h · f(gate)        ∂gate = ∂h · up · f'(gate)

The kernels compute in fp32 and round once, and keep neither f(gate) nor h for the backward pass. `gated_gradient`
writes the gradients where gate and up were, or beside them, and can give h back on the way, for who needs it there.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import INTERPRETED, implementations, jit, rounded, sigmoid, tl

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def gated_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The definition of correct for `gated`."""
    return ACTIVATIONS[kind](gate) * up


@jit
def _tanh(x):
    """tanh from the exponential of what cannot overflow."""
    power = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - power) / (1.0 + power)
    return tl.where(x < 0, -size, size)


@jit
def _activation(x, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    """f(x) and f'(x) in fp32."""
    if KIND == "silu":
        gate = sigmoid(x, INTERPRET)
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    elif KIND == "gelu":
        half = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * half, half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * x * (1.0 + inner), 0.5 * (1.0 + inner) + 0.5 * x * (1.0 - inner * inner) * slope


@jit
def _gated_forward_kernel(gate_ptr, up_ptr, h_ptr, gate_row, up_row, h_row, width,
                          KIND: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(gate, KIND, INTERPRET)
    # PyTorch rounds f(gate) before it multiplies: the same here, so that both give the same model
    dtype = h_ptr.dtype.element_ty
    value = rounded(value, dtype, INTERPRET).to(tl.float32)
    tl.store(h_ptr + row * h_row + column, rounded(value * up, dtype, INTERPRET), mask=inside)


@jit
def _gated_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, h_ptr, gate_row, up_row, grad_gate_row, grad_up_row, width,
    KIND: tl.constexpr, WANT_H: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(gate, KIND, INTERPRET)
    dtype = grad_gate_ptr.dtype.element_ty
    value = rounded(value, dtype, INTERPRET).to(tl.float32)
    to = row * grad_gate_row + column
    tl.store(grad_gate_ptr + to, rounded(grad * up * slope, dtype, INTERPRET), mask=inside)
    tl.store(grad_up_ptr + row * grad_up_row + column, rounded(grad * value, dtype, INTERPRET), mask=inside)
    if WANT_H:
        tl.store(h_ptr + row * width + column, rounded(value * up, dtype, INTERPRET), mask=inside)


def _grid(rows: int, width: int) -> tuple[tuple[int, int], int]:
    block = 1024 if width >= 1024 else 256
    return (rows, -(-width // block)), block


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The kernel's h (N, F) for gate and up (N, F) with any row strides."""
    h = gate.new_empty(gate.shape)
    grid, block = _grid(*gate.shape)
    _gated_forward_kernel[grid](
        gate, up, h, gate.stride(0), up.stride(0), h.stride(0), gate.shape[1], kind, INTERPRETED, block
    )
    return h


def gated_gradient(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str, out: tuple[Tensor, Tensor] | None = None, want_h: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(∂gate, ∂up, h or None), all (N, F).

    grad  (N, F) contiguous; where `want_h`, h is written in its place
    out   where the gradients go; gate and up themselves may be named
    """
    grad_gate, grad_up = out or (torch.empty_like(grad), torch.empty_like(grad))
    grid, block = _grid(*gate.shape)
    _gated_backward_kernel[grid](
        grad, gate, up, grad_gate, grad_up, grad,
        gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0), gate.shape[1],
        kind, want_h, INTERPRETED, block,
    )  # fmt: skip
    return grad_gate, grad_up, grad if want_h else None


class _Gated(torch.autograd.Function):
    """Saves gate and up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_forward(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_gate, grad_up, _ = gated_gradient(grad.contiguous(), *ctx.saved_tensors, ctx.kind)
        return grad_gate, grad_up, None


@uncompiled
def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`f(gate) * up`, both (…, F); `kind` is a key of ACTIVATIONS."""
    if choice("gated", implementations(gate)) == "reference" or gate.numel() == 0:
        return gated_reference(gate, up, kind)
    width = gate.shape[-1]
    rows = [part.reshape(-1, width) for part in (gate, up)]
    rows = [part if part.stride(-1) == 1 else part.contiguous() for part in rows]
    return _Gated.apply(*rows, kind).view(gate.shape)
