"""Causal attention over packed rows, with grouped heads: softmax(scale · q kᵀ + mask) v.

A query at index i sees a key at index j when j ≤ i, both belong to the same document, and, with a window w, i − j < w.
Rows hold documents one after another, so index distance is position distance inside a document. With a cache the S keys
end where the T queries end: query t has index S − T + t.

Padding is a document of its own (−1): its rows are never read, and see one another so that no softmax is empty.

So what a query sees is one unbroken stretch of keys, from its `first` to itself, and what sees a key is one unbroken
stretch of queries: a `Reach` holds both borders. They are the same in every layer of a kind, made once a forward pass
and shared; a dense mask is made from them only for an implementation that needs one.

The kernels are FlashAttention-2 (Dao 2023, arXiv 2307.08691): scores live in a tile, only the log-sum-exp of each row
is kept, the backward pass computes them again. A tile outside the stretch is never visited, so a row of many short
documents costs what the documents cost.

    s = scale · q k, under a soft cap c: c · tanh(s / c)        p = exp(s − lse)
    ∂s = p · (∂o vᵀ − Σ ∂o · o), times 1 − (s / c)² under a soft cap
    ∂v = pᵀ ∂o        ∂q = scale · ∂s k        ∂k = scale · ∂sᵀ q
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import INTERPRETED, dot, implementations, jit, memory, power_of_two, tl


@dataclass(frozen=True, eq=False)
class Reach:
    """The keys that each of T queries sees, of S that end with them: from `first` to its own.

    first  (B, S) int32, nondecreasing along a row, the first key that the query *at index i* sees; B = 1 stands for all
    """

    first: Tensor
    queries: int  # T

    @cached_property
    def last(self) -> Tensor:
        """(B, S) int32: the last query, as an index among the S, that sees each key."""
        S = self.first.shape[1]
        index = torch.arange(S, dtype=torch.int32, device=self.first.device).expand_as(self.first).contiguous()
        return torch.searchsorted(self.first.contiguous(), index, right=True, out_int32=True) - 1

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, S) bool: True where a query sees a key."""
        S, T = self.first.shape[1], self.queries
        key = torch.arange(S, device=self.first.device)
        query = key[S - T :, None]
        return ((key <= query) & (key >= self.first[:, S - T :, None])).unsqueeze(1)


def reach(T: int, S: int, document: Tensor | None, window: int, device: torch.device) -> Reach | None:
    """What each query sees, or None where that is every key up to its own.

    T, S      queries, and the keys that end with them
    document  (B, S) int, the document of every key, each one unbroken; None means one document a row
    window    keys that a query sees, itself included; 0 = all
    """
    windowed = bool(window) and window < S
    if document is None and not windowed:
        return None
    index = torch.arange(S, dtype=torch.int32, device=device)
    first = torch.zeros((1, S), dtype=torch.int32, device=device)
    if document is not None:
        starts = document[:, 1:] != document[:, :-1]
        first = F.pad(torch.where(starts, index[1:], 0), (1, 0)).cummax(1).values.to(torch.int32)
    if windowed:
        first = torch.maximum(first, index - (window - 1))
    return Reach(first=first, queries=T)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, reach: Reach | None = None, softcap: float = 0.0
) -> Tensor:
    """The definition: scores and softmax in fp32. Arguments as in `attention`."""
    B, T, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    grouped = q.float().view(B, T, K, H // K, E)
    scores = torch.einsum("btkge,bske->bkgts", grouped, k.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if reach is None:
        key = torch.arange(S, device=q.device)
        seen = key <= key[S - T :, None]
    else:
        seen = reach.mask.unsqueeze(1)  # (B, 1, 1, T, S)
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("bkgts,bske->btkge", scores.softmax(-1), v.float())
    return out.reshape(B, T, H, E).to(q.dtype)


@jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr):
    """scale · q kᵀ of two tiles, (M, N) fp32, under the soft cap where there is one."""
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), INTERPRET) * scale
    if SOFTCAP:
        power = tl.exp(-2.0 * tl.abs(scores / softcap))
        size = softcap * (1.0 - power) / (1.0 + power)
        scores = tl.where(scores < 0, -size, size)
    return scores


@jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, first_row,
    T, S, heads, group, head_dim, scale, softcap,
    REACH: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """M queries of one head; `out` (B, T, H, E) and `lse` (B, H, T) are contiguous."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query = block * M + tl.arange(0, M)
    e = tl.arange(0, E)
    index = query + (S - T)  # among the keys
    q_at = q_ptr + row * q_row + query[:, None].to(tl.int64) * q_token + head * q_head + e[None, :]
    q = tl.load(q_at, mask=(query[:, None] < T) & (e[None, :] < head_dim), other=0.0)
    if REACH:
        first = tl.load(first_ptr + row * first_row + index, mask=query < T, other=S)
        start = tl.min(first, 0) // N * N
    else:
        start = 0
    stop = tl.minimum(S, block * M + M + S - T)
    k_base = k_ptr + row * k_row + (head // group) * k_head
    v_base = v_ptr + row * v_row + (head // group) * v_head
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, E), tl.float32)
    for begin in range(start, stop, N):
        key = begin + tl.arange(0, N)
        inside = (key[:, None] < S) & (e[None, :] < head_dim)
        k = tl.load(k_base + key[:, None].to(tl.int64) * k_token + e[None, :], mask=inside, other=0.0)
        v = tl.load(v_base + key[:, None].to(tl.int64) * v_token + e[None, :], mask=inside, other=0.0)
        scores = _scores(q, k, scale, softcap, SOFTCAP, INTERPRET)
        seen = (key[None, :] <= index[:, None]) & (key[None, :] < S)
        if REACH:
            seen = seen & (key[None, :] >= first[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        p = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 1)
        out = dot(p.to(v.dtype), v, out * shrink[:, None], INTERPRET)
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # rows behind the last query
    out = out / total[:, None]
    inside = (query[:, None] < T) & (e[None, :] < head_dim)
    out_at = out_ptr + ((row * T + query[:, None]) * heads + head) * head_dim + e[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (row * heads + head) * T + query, top + tl.log(total), mask=query < T)


@jit
def _attention_delta_kernel(out_ptr, grad_ptr, delta_ptr, grad_row, grad_token, grad_head, T, heads, head_dim,
                            M: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """delta (B, H, T) = Σ ∂o · o over the width of a head."""
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query = tl.program_id(0) * M + tl.arange(0, M)
    e = tl.arange(0, E)
    inside = (query[:, None] < T) & (e[None, :] < head_dim)
    out = tl.load(out_ptr + ((row * T + query[:, None]) * heads + head) * head_dim + e[None, :], mask=inside, other=0.0)
    at = grad_ptr + row * grad_row + query[:, None].to(tl.int64) * grad_token + head * grad_head + e[None, :]
    grad = tl.load(at, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + (row * heads + head) * T + query, delta, mask=query < T)


@jit
def _slope(scores, softcap, SOFTCAP: tl.constexpr):
    """∂(capped score) / ∂(score)."""
    if SOFTCAP:
        return 1.0 - (scores / softcap) * (scores / softcap)
    else:
        return tl.full(scores.shape, 1.0, tl.float32)


@jit
def _attention_grad_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, first_ptr, last_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, grad_row, grad_token, grad_head, first_row,
    T, S, heads, group, head_dim, scale, softcap,
    REACH: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys and values of one key head, from all query heads of its group. T = S."""
    kv_heads = heads // group
    row, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads
    key = tl.program_id(0) * N + tl.arange(0, N)
    e = tl.arange(0, E)
    inside = (key[:, None] < S) & (e[None, :] < head_dim)
    k_at = k_ptr + row * k_row + key[:, None].to(tl.int64) * k_token + kv_head * k_head + e[None, :]
    v_at = v_ptr + row * v_row + key[:, None].to(tl.int64) * v_token + kv_head * v_head + e[None, :]
    k = tl.load(k_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    stop = T
    if REACH:
        stop = tl.max(tl.load(last_ptr + row * first_row + key, mask=key < S, other=0), 0) + 1
    grad_k = tl.zeros((N, E), tl.float32)
    grad_v = tl.zeros((N, E), tl.float32)
    start = tl.program_id(0) * N // M * M
    steps = tl.cdiv(stop - start, M)
    for step in range(0, steps * group):
        head = kv_head * group + step // steps
        query = start + (step % steps) * M + tl.arange(0, M)
        q_at = q_ptr + row * q_row + query[:, None].to(tl.int64) * q_token + head * q_head + e[None, :]
        within = (query[:, None] < T) & (e[None, :] < head_dim)
        q = tl.load(q_at, mask=within, other=0.0)
        grad_at = grad_ptr + row * grad_row + query[:, None].to(tl.int64) * grad_token + head * grad_head + e[None, :]
        grad = tl.load(grad_at, mask=within, other=0.0)
        lse = tl.load(lse_ptr + (row * heads + head) * T + query, mask=query < T, other=0.0)
        delta = tl.load(delta_ptr + (row * heads + head) * T + query, mask=query < T, other=0.0)
        scores = _scores(k, q, scale, softcap, SOFTCAP, INTERPRET)  # (N, M), transposed
        seen = (key[:, None] <= query[None, :]) & (query[None, :] < T)
        if REACH:
            first = tl.load(first_ptr + row * first_row + query, mask=query < T, other=S)
            seen = seen & (key[:, None] >= first[None, :])
        p = tl.where(seen, tl.exp(scores - lse[None, :]), 0.0)
        grad_v = dot(p.to(grad.dtype), grad, grad_v, INTERPRET)
        grad_p = dot(v, tl.trans(grad), tl.zeros((N, M), tl.float32), INTERPRET)
        grad_s = p * (grad_p - delta[None, :]) * _slope(scores, softcap, SOFTCAP)
        grad_k = dot(grad_s.to(q.dtype), q, grad_k, INTERPRET)
    at = ((row * S + key[:, None]) * kv_heads + kv_head) * head_dim + e[None, :]
    tl.store(grad_k_ptr + at, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_v_ptr + at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)


@jit
def _attention_grad_q_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, first_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, grad_row, grad_token, grad_head, first_row,
    T, S, heads, group, head_dim, scale, softcap,
    REACH: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradient of M queries of one head. T = S."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query = block * M + tl.arange(0, M)
    e = tl.arange(0, E)
    inside = (query[:, None] < T) & (e[None, :] < head_dim)
    q_at = q_ptr + row * q_row + query[:, None].to(tl.int64) * q_token + head * q_head + e[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    grad_at = grad_ptr + row * grad_row + query[:, None].to(tl.int64) * grad_token + head * grad_head + e[None, :]
    grad = tl.load(grad_at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + (row * heads + head) * T + query, mask=query < T, other=0.0)
    delta = tl.load(delta_ptr + (row * heads + head) * T + query, mask=query < T, other=0.0)
    if REACH:
        first = tl.load(first_ptr + row * first_row + query, mask=query < T, other=S)
        start = tl.min(first, 0) // N * N
    else:
        start = 0
    stop = tl.minimum(S, block * M + M)
    k_base = k_ptr + row * k_row + (head // group) * k_head
    v_base = v_ptr + row * v_row + (head // group) * v_head
    grad_q = tl.zeros((M, E), tl.float32)
    for begin in range(start, stop, N):
        key = begin + tl.arange(0, N)
        within = (key[:, None] < S) & (e[None, :] < head_dim)
        k = tl.load(k_base + key[:, None].to(tl.int64) * k_token + e[None, :], mask=within, other=0.0)
        v = tl.load(v_base + key[:, None].to(tl.int64) * v_token + e[None, :], mask=within, other=0.0)
        scores = _scores(q, k, scale, softcap, SOFTCAP, INTERPRET)
        seen = (key[None, :] <= query[:, None]) & (key[None, :] < S)
        if REACH:
            seen = seen & (key[None, :] >= first[:, None])
        p = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
        grad_p = dot(grad, tl.trans(v), tl.zeros((M, N), tl.float32), INTERPRET)
        grad_s = p * (grad_p - delta[:, None]) * _slope(scores, softcap, SOFTCAP)
        grad_q = dot(grad_s.to(k.dtype), k, grad_q, INTERPRET)
    at = ((row * T + query[:, None]) * heads + head) * head_dim + e[None, :]
    tl.store(grad_q_ptr + at, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=inside)


HOPPER = 200_000  # bytes of shared memory: as many as Hopper and its successors have


def _tiles(head_dim: int, half: bool, device: torch.device) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a forward tile; measured on an H100 and H200 for bf16, small for fp32.

    Elsewhere by what spills no registers and fits 99 KB.
    """
    if not half:
        return 32, 32, 4, 1
    if memory(device) >= HOPPER:
        return {64: (128, 64, 4, 3), 128: (128, 64, 8, 3)}.get(power_of_two(head_dim), (64, 64, 8, 2))
    return {64: (128, 64, 8, 3), 128: (128, 64, 8, 3)}.get(power_of_two(head_dim), (64, 32, 8, 2))


def _backward_tiles(head_dim: int, half: bool, device: torch.device) -> tuple[int, int, int, int]:
    """The same of the backward kernels."""
    if not half:
        return 32, 32, 4, 1
    if memory(device) >= HOPPER:
        return {64: (64, 128, 8, 2), 128: (64, 128, 8, 2)}.get(power_of_two(head_dim), (32, 64, 8, 1))
    return {64: (64, 128, 8, 2), 128: (64, 64, 8, 2)}.get(power_of_two(head_dim), (32, 32, 8, 1))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, reach: Reach | None
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, E), lse (B, H, T) fp32)."""
    B, T, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    out, lse = q.new_empty(B, T, H, E), q.new_empty(B, H, T, dtype=torch.float32)
    M, N, warps, stages = _tiles(E, q.element_size() == 2, q.device)
    first = q if reach is None else reach.first
    _attention_forward_kernel[(-(-T // M), B * H)](
        q, k, v, out, lse, first, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], _row(reach),
        T, S, H, H // K, E, scale, softcap or 1.0, reach is not None, softcap != 0, INTERPRETED,
        M, N, max(power_of_two(E), 16), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _row(reach: Reach | None) -> int:
    """The stride from one row's borders to the next's; 0 where all rows have the same."""
    return 0 if reach is None or reach.first.shape[0] == 1 else reach.first.stride(0)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, the output and the log-sum-exp of each query's scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, reach: Reach | None) -> Tensor:
        out, lse = _forward(q, k, v, scale, softcap, reach)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.softcap, ctx.reach = scale, softcap, reach
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        scale, softcap, reach = ctx.scale, ctx.softcap, ctx.reach
        B, T, H, E = q.shape
        S, K = k.shape[1], k.shape[2]
        assert T == S, "a gradient through a cache is never asked for"
        M, N, warps, stages = _backward_tiles(E, q.element_size() == 2, q.device)
        width = max(power_of_two(E), 16)
        delta = torch.empty_like(lse)
        _attention_delta_kernel[(-(-T // M), B * H)](out, grad, delta, *grad.stride()[:3], T, H, E, M, width)
        first, last = (q, q) if reach is None else (reach.first, reach.last)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], _row(reach))
        sizes = (T, S, H, H // K, E, scale, softcap or 1.0, reach is not None, softcap != 0, INTERPRETED)
        options = {"num_warps": warps, "num_stages": stages}
        grad_k, grad_v = (torch.empty(B, S, K, E, dtype=q.dtype, device=q.device) for _ in range(2))
        _attention_grad_kv_kernel[(-(-S // N), B * K)](
            q, k, v, grad, lse, delta, grad_k, grad_v, first, last, *strides, *sizes, M, N, width, **options
        )
        grad_q = torch.empty(B, T, H, E, dtype=q.dtype, device=q.device)
        _attention_grad_q_kernel[(-(-T // N), B * H)](
            q, k, v, grad, lse, delta, grad_q, first, *strides, *sizes, N, M, width, **options
        )
        return grad_q, grad_k, grad_v, None, None, None


@uncompiled
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, reach: Reach | None = None, softcap: float = 0.0
) -> Tensor:
    """Attention output (B, T, H, E) in q's dtype.

    q        (B, T, H, E)
    k, v     (B, S, K, E), S ≥ T, K divides H: query head h reads key head h // (H/K)
    reach    from the function `reach`; None: every query sees all keys up to its own
    softcap  scores become softcap · tanh(scores / softcap); 0 leaves them

    On a GPU, whole rows in half precision go to cuDNN's kernel where that is exact, everything else to ours; on the
    CPU to PyTorch's, but a soft cap, which PyTorch's lacks, to the reference.
    """
    chosen = choice("attention", _available(q, k, reach, softcap))
    if chosen == "reference":
        return attention_reference(q, k, v, scale=scale, reach=reach, softcap=softcap)
    if chosen == "triton":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return _Attention.apply(q, k, v, scale, softcap, reach)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if chosen == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    causal = reach is None and q.shape[2] > 1
    if causal and q.shape[2] != k.shape[2]:  # PyTorch's causal rule is for as many keys as queries
        reach, causal = (
            Reach(first=torch.zeros((1, k.shape[2]), dtype=torch.int32, device=q.device), queries=q.shape[2]),
            False,
        )
    mask = None if reach is None else reach.mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _available(q: Tensor, k: Tensor, reach: Reach | None, softcap: float) -> dict[str, str]:
    """The implementations that are exact for this call, best first, with the reason for taking each."""
    available = implementations(q)
    if q.is_cuda and "triton" in available:
        whole = reach is None and not softcap and q.shape[1] == k.shape[1] and q.shape[3] in (64, 128)
        # cuDNN refuses a single key, and GPUs before Ampere
        whole = whole and k.shape[1] > 1 and torch.cuda.get_device_capability(q.device) >= (8, 0)
        if whole and q.element_size() == 2:
            cudnn = "one causal document a row, half precision: cuDNN's kernel is exact and fastest"
            return {"cudnn": cudnn} | available
        return available | {"triton": "documents, a window, a soft cap, a cache or fp32: what is not seen is skipped"}
    if softcap:
        return available | {"reference": "a soft cap, which PyTorch's fused attention lacks"}
    return {"torch": "PyTorch's fused attention is exact here"} | available
