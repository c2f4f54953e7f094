"""Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split: component i turns with component i + W/2.

(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin),   angle of pair i at position p: p · frequency[i]

W, twice the width of the tables, is the part of a head that turns; what lies behind it stays. The gradient turns the
other way, so nothing is kept for the backward pass but the tables.

A token may have a position of three parts, time, height and width (Wang et al. 2024, arXiv 2409.12191, where it is
called M-RoPE). Each pair of components then turns by one of the three: which one is a matter of the tables, and the
kernel, which reads its tables by token, knows nothing of it. A token of a text has three equal parts, and turns as by
the one position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumen.errors import KernelError
from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations, jit, power_of_two, tl


def rotary_parts(sections: Sequence[int], interleaved: bool = False) -> Tensor:
    """(W/2,) int64: by which part of a position, 0 time, 1 height, 2 width, each pair of components turns.

    sections     how many pairs turn by each of the three
    interleaved  the parts take turns, t h w t h w …, until one has all its pairs, and time has what is left, as in
                 Qwen3-VL; otherwise they lie behind each other, as in Qwen2-VL and 2.5-VL

    Raises KernelError where that is impossible.
    """
    if len(sections) != 3 or min(sections) < 0 or not sum(sections):
        raise KernelError(f"sections wants three numbers of pairs, of time, height and width, found {list(sections)}.")
    if not interleaved:
        return torch.arange(3, device="cpu").repeat_interleave(torch.tensor(sections, device="cpu"))
    parts = torch.zeros(sum(sections), dtype=torch.int64, device="cpu")
    for part in (1, 2):
        parts[part : 3 * sections[part] : 3] = part
    if (found := parts.bincount(minlength=3).tolist()) != list(sections):
        raise KernelError(
            f"sections {list(sections)} cannot take turns: height and width would get {found[1]} and {found[2]} pairs. "
            f"Each may have a third of all, or less."
        )
    return parts


def rotary_angles(positions: Tensor, frequencies: Tensor, parts: Tensor | None = None) -> Tensor:
    """Angles (B, T, W/2) fp32, of which the tables are the cosine and the sine.

    positions    (B, T), or with `parts` (3, B, T)
    frequencies  fp32, (W/2,), or (B, T, W/2) where tokens differ in them
    parts        (W/2,) of `rotary_parts`, on the device of `positions`: each pair turns by its own part of a position

    Raises KernelError where the shape of `positions` is another.
    """
    wanted = 2 if parts is None else 3
    if positions.ndim != wanted or (parts is not None and len(positions) != 3):
        raise KernelError(
            f"positions want the shape {'(B, T)' if parts is None else '(3, B, T)'}, found {tuple(positions.shape)}."
        )
    own = positions.unsqueeze(-1) if parts is None else positions[parts].movedim(0, -1)  # (B, T, 1 or W/2)
    return own.float() * frequencies


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
        x, y, cos, sin, _step(x), x.stride(2), _step(y), y.stride(2), half, heads, head_dim,
        inverse, rest > 0 and y is not x, power_of_two(half), power_of_two(heads), power_of_two(rest or 1),
    )  # fmt: skip
    return y


def _even(x: Tensor) -> Tensor:
    """`x` (B, T, H, E) itself where one stride leads from each token to the next, else a copy."""
    B, T, *_ = x.shape
    even = x.stride(3) == 1 and (B == 1 or T == 1 or x.stride(0) == T * x.stride(1))
    return x if even else x.contiguous()


def _step(x: Tensor) -> int:
    """How far `x` (B, T, H, E), whose tokens lie at even distances, goes from one token to the next."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


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


@uncompiled
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, T, H, E) turned by its positions; a new tensor of x's dtype.

    cos, sin  (B, T, W/2) fp32, rounded to x's dtype before they multiply, as the families were trained; where W is
              less than E, the rest of a head stays as it is
    """
    if choice("rotary", implementations(x)) == "reference":
        return rotary_reference(x, cos, sin)
    return _Rotary.apply(x, cos.contiguous(), sin.contiguous())


FEW_TOKENS = 8  # of so few, a launch takes longer than what it does


def _heads_of_both(q: Tensor, k: Tensor) -> Tensor | None:
    """q and k as the heads of one tensor (B, T, H + K, E): few tokens whose k lies right behind q; None otherwise."""
    B, T, H, E = q.shape
    if B * T > FEW_TOKENS or q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return None
    if q.data_ptr() + H * q.stride(2) * q.element_size() != k.data_ptr():
        return None
    if q.stride(2) != k.stride(2) or (B * T > 1 and _step(q) != _step(k)):
        return None
    return q.as_strided((B, T, H + k.shape[2], E), q.stride())


class _RotateQK(torch.autograd.Function):
    """Turns q and k where they lie. The gradients of all three come out side by side, (B, T, (H + 2K)·E)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        if (both := _heads_of_both(q, k)) is not None:
            _turn(both, both, cos, sin, False)
            return q, k, v
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
        _turn(_even(grad_v), out_v, cos[..., :0], sin[..., :0], True)  # by nothing: a copy, at twice PyTorch's speed
        return out_q, out_k, out_v, None, None


@uncompiled
def rotate_qk(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, E), k and v (B, T, K, E): q and k turned as by `rotary`, v as it is.

    Overwrites q and k where a kernel serves: they must be no leaf, and nothing may have saved them for its backward
    pass. A linear layer's outputs are such.
    """
    if choice("rotary", implementations(q)) == "reference":
        return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin), v
    return _RotateQK.apply(_even(q), _even(k), v, cos.contiguous(), sin.contiguous())
