"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x̂ · w with x̂ = x / sqrt(mean(x²) + eps).

    ∂x = (g − x̂ · mean(g · x̂)) / sqrt(mean(x²) + eps)      with g = ∂y · w
    ∂w = Σ ∂y · x̂                                           over the rows

Where the result returns to the input's dtype is part of a family: Llama rounds x̂ before the weight multiplies it, Gemma
(`plus_one`, y = x̂ · (1 + w)) multiplies in fp32 and rounds once.

The kernels read and write each value once; the backward pass keeps x and one fp32 number a row. Rows may be heads of
tokens that lie apart, as those of q in what q, k and v are parts of: they are read, and kept, where they are.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations, jit, power_of_two, processors, tl


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """The definition of correct for `rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight.to(x.dtype) * normed.to(x.dtype)


@jit
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, root_ptr, x_row, x_head, heads, width, eps, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program; `root` receives 1 / sqrt(mean(x²) + eps)."""
    program = tl.program_id(0)
    row = program.to(tl.int64)
    token, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + token * x_row + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    root = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    if PLUS_ONE:
        y = x * root * (1.0 + weight.to(tl.float32))
    else:  # x̂ and the weight are rounded to the row's dtype before they meet
        dtype = y_ptr.dtype.element_ty
        y = (x * root).to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(root_ptr + row, root)


@jit
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, root_ptr, residual_ptr, grad_x_ptr, y_ptr, grad_weight_ptr,
    grad_row, grad_head, x_row, x_head, heads, rows, width,
    PLUS_ONE: tl.constexpr, RESIDUAL: tl.constexpr, AGAIN: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every P-th row, and leaves its part of the weight's gradient in row p of (P, width)."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    stored = tl.load(weight_ptr + column, mask=inside, other=0.0)
    weight = stored.to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        token, head = at // heads, at % heads
        x = tl.load(x_ptr + token * x_row + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + token * grad_row + head * grad_head + column, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(root_ptr + at)
        normed = x * root
        if AGAIN:  # the output once more, rounded as it was
            dtype = y_ptr.dtype.element_ty
            y = normed * weight if PLUS_ONE else normed.to(dtype).to(tl.float32) * stored.to(dtype).to(tl.float32)
            tl.store(y_ptr + at * width + column, y.to(dtype), mask=inside)
        if WEIGHT:
            total += grad * normed
        grad = grad * weight
        grad_x = (grad - normed * (tl.sum(grad * normed, 0) / width)) * root
        if RESIDUAL:
            grad_x += tl.load(residual_ptr + at * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at * width + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(grad_weight_ptr + program.to(tl.int64) * width + column, total, mask=inside)


def _heads(x: Tensor) -> tuple[int, int, int]:
    """(from one row to the next, from one head of a row to the next, heads) for x (N, D), or (N, H, D)."""
    return (x.stride(0), 0, 1) if x.ndim == 2 else (x.stride(0), x.stride(1), x.shape[1])


def norm_forward(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Rows (N, D), or heads of rows (N, H, D), with any strides but the last, normed by the kernel: y of that shape,
    1 / root mean square (N · H,) fp32.
    """
    width = x.shape[-1]
    rows, block = x.numel() // width, power_of_two(width)
    y, root = x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)
    _rms_norm_forward_kernel[(rows,)](
        x, weight, y, root, *_heads(x), width, eps, plus_one, block, num_warps=_warps(block)
    )
    return y, root


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    root: Tensor,
    plus_one: bool,
    need_weight: bool,
    residual: Tensor | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(∂x like x, ∂w (D,) fp32 or None, y as it was, where `again` asks for it, or None).

    grad, x   of one shape, as in `norm_forward`
    residual  contiguous, the gradient that x gets elsewhere: is added to ∂x
    """
    width = x.shape[-1]
    rows, block = x.numel() // width, power_of_two(width)
    # a program for each row hides most of the wait for memory; for ∂w each would leave a row of parts
    programs = min(rows, processors(x.device) * (4 if width > 2048 else 8)) if need_weight else rows
    grad_x = grad.new_empty(x.shape)
    y = torch.empty_like(grad_x) if again else None
    parts = x.new_empty(programs, width, dtype=torch.float32) if need_weight else x
    _rms_norm_backward_kernel[(programs,)](
        grad, x, weight, root, grad if residual is None else residual, grad_x, grad_x if y is None else y, parts,
        *_heads(grad)[:2], *_heads(x), rows, width,
        plus_one, residual is not None, again, need_weight, block, num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, parts.sum(0) if need_weight else None, y


def _warps(block: int) -> int:
    """Measured on an H200 for rows of 4096: 98 to 104 % of a copy's rate with 4 or 8, 79 to 90 with 16."""
    return min(max(block // 512, 4), 16)


def _rows(x: Tensor) -> Tensor:
    """x (…, D) as rows, or as heads of rows, whichever is no copy of it; a copy where both are."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1]) if x.ndim < 3 or x.is_contiguous() else x.flatten(0, -3)


class _RMSNorm(torch.autograd.Function):
    """Saves x (which the residual stream, or what v is a part of, holds anyway) and the inverse root of each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        y, root = norm_forward(x, weight, eps, plus_one)
        ctx.save_for_backward(x, weight, root)
        ctx.plus_one = plus_one
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_x, grad_weight, _ = norm_backward(grad, x, weight, root, ctx.plus_one, ctx.needs_input_grad[1])
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


@uncompiled
def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """`x` (…, D) normed over its last axis, in x's dtype; the mean and the root are fp32.

    weight  (D,), any float dtype
    """
    if choice("rms_norm", implementations(x)) == "reference" or x.numel() == 0:
        return rms_norm_reference(x, weight, eps, plus_one)
    # rows are made out here: what is saved has a history then, by which it is told from weights (`nn/recompute.py`)
    return _RMSNorm.apply(_rows(x), weight, eps, plus_one).view(x.shape)
