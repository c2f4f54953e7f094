"""Attention of one new token in each row over a cache: the case of decoding, where reading the cache is all the work.

The keys of a row are cut into stretches that different programs read; each leaves the highest score, the sum of the
exponentials and the weighted values of its stretch, and a second kernel puts them together. How many keys are filled
stands in device memory, so that the same launches serve every step: a step can be a CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import INTERPRETED, dot, implementations, jit, power_of_two, tl


@dataclass(frozen=True, eq=False)
class Filled:
    """The keys that the one query of each row sees: from its `first` to the last that is filled, its own."""

    length: Tensor  # int32 scalar on the device, how many keys are filled
    first: Tensor  # (B,) int32


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, first: Tensor, *, scale: float, softcap: float = 0.0
) -> Tensor:
    """The definition of correct for `decode_attention`: scores and softmax in fp32."""
    B, _, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    scores = torch.einsum("bkge,bske->bkgs", q.float().view(B, K, H // K, E), k.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(S, device=q.device)
    seen = (key < length) & (key >= first[:, None])
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    # what lies behind the filled part may be anything: it must not meet a weight of zero
    values = v.float().masked_fill(~seen[:, :, None, None], 0.0)
    return torch.einsum("bkgs,bske->bkge", weights, values).reshape(B, 1, H, E).to(q.dtype)


@jit
def _stretch_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, first_ptr, part_ptr, top_ptr, total_ptr,
    q_row, q_head, k_row, k_token, k_head, v_row, v_token, v_head, kv_heads, group, head_dim, scale, softcap,
    SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr, PARTS: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One stretch of one key head, for the query heads of its group; parts lie (B, K, PARTS, group, E)."""
    row, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    part = tl.program_id(1)
    length, first = tl.load(length_ptr), tl.load(first_ptr + row)
    stretch = tl.cdiv(tl.cdiv(length - first, PARTS), N) * N
    start = first + part * stretch
    stop = tl.minimum(start + stretch, length)
    g, e = tl.arange(0, G), tl.arange(0, E)
    q_at = q_ptr + row * q_row + (kv_head * group + g[:, None]) * q_head + e[None, :]
    q = tl.load(q_at, mask=(g[:, None] < group) & (e[None, :] < head_dim), other=0.0)
    top = tl.full((G,), float("-inf"), tl.float32)
    total = tl.zeros((G,), tl.float32)
    out = tl.zeros((G, E), tl.float32)
    for begin in range(start, stop, N):
        key = begin + tl.arange(0, N)
        inside = (key[:, None] < stop) & (e[None, :] < head_dim)
        k = tl.load(k_ptr + row * k_row + key[:, None].to(tl.int64) * k_token + kv_head * k_head + e[None, :],
                    mask=inside, other=0.0)  # fmt: skip
        v = tl.load(v_ptr + row * v_row + key[:, None].to(tl.int64) * v_token + kv_head * v_head + e[None, :],
                    mask=inside, other=0.0)  # fmt: skip
        scores = dot(q, tl.trans(k), tl.zeros((G, N), tl.float32), INTERPRET) * scale
        if SOFTCAP:
            power = tl.exp(-2.0 * tl.abs(scores / softcap))
            size = softcap * (1.0 - power) / (1.0 + power)
            scores = tl.where(scores < 0, -size, size)
        scores = tl.where(key[None, :] < stop, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, 1)
        out = dot(p.to(v.dtype), v, out * shrink[:, None], INTERPRET)
        top = higher
    at = (tl.program_id(0).to(tl.int64) * PARTS + part) * group + g
    tl.store(part_ptr + at[:, None] * head_dim + e[None, :], out, mask=(g[:, None] < group) & (e[None, :] < head_dim))
    tl.store(top_ptr + at, top, mask=g < group)
    tl.store(total_ptr + at, total, mask=g < group)


@jit
def _join_kernel(part_ptr, top_ptr, total_ptr, out_ptr, group, head_dim, PARTS: tl.constexpr, E: tl.constexpr):
    """The output of one query head from its stretches."""
    head = tl.program_id(0).to(tl.int64)  # b · H + h = (b · K + k) · group + g
    part, e = tl.arange(0, PARTS), tl.arange(0, E)
    at = ((head // group) * PARTS + part) * group + head % group
    top = tl.load(top_ptr + at)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(tl.load(total_ptr + at) * weight, 0)
    values = tl.load(part_ptr + at[:, None] * head_dim + e[None, :], mask=e[None, :] < head_dim, other=0.0)
    out = tl.sum(values * weight[:, None], 0) / total
    tl.store(out_ptr + head * head_dim + e, out.to(out_ptr.dtype.element_ty), mask=e < head_dim)


@uncompiled
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, first: Tensor, *, scale: float, softcap: float = 0.0
) -> Tensor:
    """Attention output (B, 1, H, E) of one token a row, in q's dtype; no gradient.

    q       (B, 1, H, E)
    k, v    (B, S, K, E), room for S keys, the token's own the last of those that are filled
    length  int32 scalar on the device: how many keys are filled
    first   (B,) int32, the first key that each row sees
    """
    if choice("decode_attention", implementations(q)) == "reference":
        return decode_attention_reference(q, k, v, length, first, scale=scale, softcap=softcap)
    B, _, H, E = q.shape
    K = k.shape[2]
    group, parts = H // K, 16
    part = q.new_empty(B * K * parts * group, E, dtype=torch.float32)
    top, total = (q.new_empty(B * K * parts * group, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(B, 1, H, E)
    width = max(power_of_two(E), 16)
    _stretch_kernel[(B * K, parts)](
        q, k, v, length, first, part, top, total, q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        K, group, E, scale, softcap or 1.0, softcap != 0, INTERPRETED, parts, max(power_of_two(group), 16), 32, width,
    )  # fmt: skip
    _join_kernel[(B * H,)](part, top, total, out, group, E, parts, width)
    return out


def append_column_reference(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
    """The definition of correct for `append_column`."""
    column = (length - 1).long().view(1)
    keys.index_copy_(1, column, k)
    values.index_copy_(1, column, v)


@jit
def _append_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, length_ptr, k_row, v_row, row_stride, width, BLOCK: tl.constexpr
):  # fmt: skip
    """A part of one row: keys and values into their column, `width` numbers each."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    to = row * row_stride + (tl.load(length_ptr) - 1).to(tl.int64) * width + at
    tl.store(keys_ptr + to, tl.load(k_ptr + row * k_row + at, mask=inside), mask=inside)
    tl.store(values_ptr + to, tl.load(v_ptr + row * v_row + at, mask=inside), mask=inside)


@uncompiled
def append_column(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
    """Writes k, v (B, 1, K, E) into the last filled column of keys, values (B, S, K, E), in place.

    keys, values  contiguous
    length        int32 scalar on the device: how many columns are filled, this one included
    """
    if choice("append_column", implementations(k)) == "reference":
        return append_column_reference(keys, values, k, v, length)
    assert keys.is_contiguous() and values.is_contiguous(), "a column is one stretch of memory"
    rows, width = k.shape[0], k.shape[2] * k.shape[3]
    k, v = k.reshape(rows, width), v.reshape(rows, width)
    block = 1024
    _append_kernel[(rows, -(-width // block))](
        k, v, keys, values, length, k.stride(0), v.stride(0), keys.stride(0), width, block
    )
