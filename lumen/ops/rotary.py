"""Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split: component i turns with component i + W/2.

(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin),   angle of pair i at position p: p · frequency[i]

W, twice the width of the tables, is the part of a head that turns; what lies behind it stays. The gradient turns the
other way, so nothing is kept for the backward pass but the tables.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumen.ops._choose import choice
from lumen.ops._triton import implementations, jit, power_of_two, tl


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of correct: `x` (B, T, H, E) turned by tables (B, T, W/2); a new tensor of x's dtype."""
    cos, sin = cos.to(x.dtype).unsqueeze(2), sin.to(x.dtype).unsqueeze(2)  # (B, T, 1, W/2)
    width = 2 * cos.shape[-1]
    first, second = x[..., :width].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, x[..., width:]) if width < x.shape[-1] else turned, dim=-1)


@jit
def _rotary_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, x_token, x_head, y_token, y_head, half, heads, head_dim,
    INVERSE: tl.constexpr, COPY: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token; `y` may be `x`. COPY carries what does not turn over, which in place is not needed."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    dtype = y_ptr.dtype.element_ty
    # the tables are rounded to the activations' dtype before they multiply, as the families were trained
    cos = tl.load(cos_ptr + token * half + pair, mask=pair < half, other=0.0).to(dtype).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + pair, mask=pair < half, other=0.0).to(dtype).to(tl.float32)
    if INVERSE:
        sin = -sin
    inside = (pair < half) & (head < heads)
    at = x_ptr + token * x_token + head * x_head + pair
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    to = y_ptr + token * y_token + head * y_head + pair
    tl.store(to, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(to + half, (second * cos + first * sin).to(dtype), mask=inside)
    if COPY:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        inside = (rest < head_dim) & (head < heads)
        still = tl.load(x_ptr + token * x_token + head * x_head + rest, mask=inside, other=0.0)
        tl.store(y_ptr + token * y_token + head * y_head + rest, still, mask=inside)


def _turn(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Writes `x` (B, T, H, E), turned, into `y`, which may be `x` itself. Tokens must lie at even distances."""
    B, T, heads, head_dim = x.shape
    half = cos.shape[-1]
    rest = head_dim - 2 * half
    _rotary_kernel[(B * T,)](
        x, y, cos, sin, x.stride(1), x.stride(2), y.stride(1), y.stride(2), half, heads, head_dim,
        inverse, rest > 0 and y is not x, power_of_two(half), power_of_two(heads), power_of_two(rest or 1),
    )  # fmt: skip
    return y


def _even(x: Tensor) -> Tensor:
    """`x` (B, T, H, E) itself where one stride leads from each token to the next, else a copy."""
    even = x.stride(3) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if even else x.contiguous()


class _Rotary(torch.autograd.Function):
    """Saves the tables."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(_even(x), torch.empty_like(x, memory_format=torch.contiguous_format), cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (cos, sin), grad = ctx.saved_tensors, _even(grad)
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        return _turn(grad, out, cos, sin, True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, T, H, E) turned by its positions; a new tensor of x's dtype.

    cos, sin  (B, T, W/2) fp32, rounded to x's dtype before they multiply, as the families were trained; where W is
              less than E, the rest of a head stays as it is
    """
    if choice("rotary", implementations(x)) == "reference":
        return rotary_reference(x, cos, sin)
    return _Rotary.apply(x, cos.contiguous(), sin.contiguous())


class _RotateQK(torch.autograd.Function):
    """Turns q and k where they lie. The gradients of all three come out side by side, (B, T, (H + 2K)·E)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, q, cos, sin, False), _turn(k, k, cos, sin, False), v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        B, T, H, E = grad_q.shape
        K = grad_k.shape[2]
        joined = grad_q.new_empty(B, T, H + 2 * K, E)
        out_q, out_k, out_v = joined.split([H, K, K], dim=2)
        cos, sin = ctx.saved_tensors
        _turn(_even(grad_q), out_q, cos, sin, True)
        _turn(_even(grad_k), out_k, cos, sin, True)
        return out_q, out_k, out_v.copy_(grad_v), None, None


def rotate_qk(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, E), k and v (B, T, K, E): q and k turned as by `rotary`, v as it is.

    Overwrites q and k where a kernel serves: they must be no leaf, and nothing may have saved them for its backward
    pass. A linear layer's outputs are such.
    """
    if choice("rotary", implementations(q)) == "reference":
        return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin), v
    return _RotateQK.apply(_even(q), _even(k), v, cos.contiguous(), sin.contiguous())
