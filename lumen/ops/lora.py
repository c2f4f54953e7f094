"""The low-rank update (Hu et al. 2021, arXiv 2106.09685): y = W x + scale · B A x, with A (R, in) and B (out, R).

The kernels serve `ops/project.py`. Of many rows, one puts pairs beside the weight they belong to, so that one product
takes both, another adds an update to what is there already. Of a few rows, where each launch costs more than what it
computes, two launches make the updates of all layers that read the same input: x Aᵀ, and what the products start from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.ops._triton import INTERPRETED, dot, jit, power_of_two, tl


def lora_update(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · B A x` for `x` (…, in): (…, out) in x's dtype.

    a, b  fp32 masters, rounded to x's dtype for the two products; their gradients come back in fp32
    """
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def lora_weight(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What merging adds to the base weight: `scale · B A` (out, in), in fp32."""
    return scale * (b.float() @ a.float())


@jit
def _pair_kernel(
    a_ptr, b_ptr, a_out_ptr, b_out_ptr, row, rank_at, rank, outputs, inputs, scale, waist,
    WAIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A into its rows, u = scale · B into its columns; the columns of other layers, beside it, become zero."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WAIST)
    dtype = b_out_ptr.dtype.element_ty
    own = column - rank_at
    held = (at[:, None] < outputs) & (own[None, :] >= 0) & (own[None, :] < rank)
    b = tl.load(b_ptr + at[:, None] * rank + own[None, :], mask=held, other=0.0).to(tl.float32) * scale
    to = at[:, None].to(tl.int64) * row + column[None, :]
    tl.store(b_out_ptr + to, b.to(dtype), mask=(at[:, None] < outputs) & (column[None, :] < waist))
    held = (column[:, None] < rank) & (at[None, :] < inputs)
    a = tl.load(a_ptr + column[:, None].to(tl.int64) * inputs + at[None, :], mask=held, other=0.0)
    tl.store(a_out_ptr + column[:, None].to(tl.int64) * row + at[None, :], a.to(dtype), mask=held)


@jit
def _update_kernel(
    residual_ptr, waist_ptr, u_ptr, y_ptr, rows, width, waist, u_row,
    WAIST: tl.constexpr, INTERPRET: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y = residual + waist uᵀ, reading and writing each value once."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, WAIST)
    left = tl.load(
        waist_ptr + row[:, None] * waist + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < waist), other=0.0
    )
    right = tl.load(
        u_ptr + column[None, :] * u_row + k[:, None], mask=(column[None, :] < width) & (k[:, None] < waist), other=0.0
    )
    at = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    start = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, dot(left, right, start, INTERPRET).to(y_ptr.dtype.element_ty), mask=inside)


def add_update(residual: Tensor, waist: Tensor, u: Tensor) -> Tensor:
    """`residual + waist @ u.T`: (N, out) contiguous, (N, W) and (out, W) give (N, out)."""
    rows, width = residual.shape
    y = torch.empty_like(residual)
    M, N = 64, 128
    grid = (-(-rows // M), -(-width // N))
    size = max(power_of_two(waist.shape[1]), 16)
    _update_kernel[grid](
        residual, waist, u, y, rows, width, waist.shape[1], u.stride(0), size, INTERPRETED, M, N, num_warps=4
    )
    return y


def write_pair(a: Tensor | None, b: Tensor | None, scale: float, beside: Tensor, below: Tensor, column: int) -> None:
    """Writes one layer's pair where a product over all layers' waists reads it: rows and columns of a larger matrix.

    beside  (out, W): `scale · b` goes to its columns from `column` on, zeros to the others; all zeros without a pair
    below   (≥ R, in): `a` goes to its first rows
    """
    rank, outputs, inputs = 0 if a is None else len(a), *(len(beside), below.shape[1])
    _pair_kernel[(-(-max(outputs, inputs) // 128),)](
        beside if a is None else a, beside if b is None else b, below, beside, beside.stride(0), column, rank,
        outputs, inputs, scale, beside.shape[1], power_of_two(beside.shape[1]), 128,
    )  # fmt: skip


MOST_LAYERS = 3  # that share an input: q, k, v


def few_updates_reference(
    x: Tensor,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scales: Sequence[float],
    outputs: Sequence[int],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
) -> list[Tensor]:
    """The definition of correct for `few_updates`."""
    starts = []
    for a_, b_, scale, width, bias_ in zip(a, b, scales, outputs, bias, strict=True):
        start = torch.zeros(len(x), width, dtype=torch.float32, device=x.device)
        if a_ is not None:
            start += lora_update(x.float(), a_, b_, scale)
        start += 0 if bias_ is None else bias_.float()
        starts.append(start if residual is None else start + residual.float())
    return starts


@jit
def _waist_column(x_ptr, a_ptr, waist_ptr, rank, column, rows, inputs, waist, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """waist[:, column] = x · A[rank]"""
    n, at = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, inputs, BLOCK):
        inside = begin + at < inputs
        a = tl.load(a_ptr + rank.to(tl.int64) * inputs + begin + at, mask=inside, other=0.0).to(tl.float32)
        x_at = x_ptr + n[:, None] * inputs + (begin + at)[None, :]
        x = tl.load(x_at, mask=(n[:, None] < rows) & inside[None, :], other=0.0).to(tl.float32)
        total += x * a[None, :]
    tl.store(waist_ptr + n * waist + column, tl.sum(total, 1), mask=n < rows)


@jit
def _waist_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, waist_ptr, rank0, rank1, rows, inputs, waist,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One rank of one of the layers: what all rows are at the waist there."""
    column = tl.program_id(0)
    if column < rank0:
        _waist_column(x_ptr, a0_ptr, waist_ptr, column, column, rows, inputs, waist, ROWS, BLOCK)
    elif column < rank0 + rank1:
        _waist_column(x_ptr, a1_ptr, waist_ptr, column - rank0, column, rows, inputs, waist, ROWS, BLOCK)
    else:
        _waist_column(x_ptr, a2_ptr, waist_ptr, column - rank0 - rank1, column, rows, inputs, waist, ROWS, BLOCK)


@jit
def _start_block(
    waist_ptr, b_ptr, bias_ptr, residual_ptr, y_ptr, column, rank, outputs, rows, waist, scale,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of one layer: scale · B waist + bias + residual."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK)
    held = (out[:, None] < outputs) & (r[None, :] < rank)
    b = tl.load(b_ptr + out[:, None] * rank + r[None, :], mask=held, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        inside = (out < outputs) & (i < rows)
        thin = tl.load(waist_ptr + i * waist + column + r, mask=(r < rank) & (i < rows), other=0.0)
        y = tl.sum(b * thin[None, :], 1) * scale
        if BIAS:
            y += tl.load(bias_ptr + out, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            y += tl.load(residual_ptr + i * outputs + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + i * outputs + out, y, mask=inside)


@jit
def _start_kernel(
    waist_ptr, residual_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
    rank0, rank1, rank2, outputs0, outputs1, outputs2, rows, waist, scale0, scale1, scale2,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of outputs of one of the layers."""
    layer = tl.program_id(1)
    if layer == 0:
        _start_block(waist_ptr, b0_ptr, bias0_ptr, residual_ptr, y0_ptr, 0, rank0, outputs0, rows, waist, scale0,
                     BIAS0, RESIDUAL, ROWS, RANK, BLOCK)  # fmt: skip
    elif layer == 1:
        _start_block(waist_ptr, b1_ptr, bias1_ptr, residual_ptr, y1_ptr, rank0, rank1, outputs1, rows, waist, scale1,
                     BIAS1, RESIDUAL, ROWS, RANK, BLOCK)  # fmt: skip
    else:
        _start_block(waist_ptr, b2_ptr, bias2_ptr, residual_ptr, y2_ptr, rank0 + rank1, rank2, outputs2, rows, waist,
                     scale2, BIAS2, RESIDUAL, ROWS, RANK, BLOCK)  # fmt: skip


def few_updates(
    x: Tensor,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scales: Sequence[float],
    outputs: Sequence[int],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
) -> list[Tensor]:
    """What the products of layers that read the same few rows start from: scale · B A x + bias + residual of each,
    (N, out) fp32; no gradient.

    x         (N, in) contiguous, N small; runs on a GPU, or in the interpreter
    a, b      of up to three layers, at least one of which has a pair
    outputs   `out` of each layer
    residual  (N, out), with a single layer
    """
    assert len(a) <= MOST_LAYERS and (residual is None or len(a) == 1), "layers of one block share an input"
    rows, inputs = x.shape
    missing = [None] * (MOST_LAYERS - len(a))
    ranks = [0 if pair is None else len(pair) for pair in (*a, *missing)]
    waist = x.new_empty(rows, sum(ranks), dtype=torch.float32)
    a = [waist if pair is None else pair for pair in (*a, *missing)]  # what is not there is not read
    size = power_of_two(rows)
    block = min(power_of_two(inputs), 4096 // size)
    _waist_kernel[(sum(ranks),)](x, *a, waist, *ranks[:2], rows, inputs, waist.shape[1], size, block, num_warps=8)
    starts = [x.new_empty(rows, width, dtype=torch.float32) for width in outputs]
    residual = None if residual is None else residual.contiguous()
    rank = power_of_two(max(ranks))
    block = max(min(128, 4096 // rank), 16)
    _start_kernel[(-(-max(outputs) // block), len(outputs))](
        waist, waist if residual is None else residual, *(waist if pair is None else pair for pair in (*b, *missing)),
        *(waist if part is None else part for part in (*bias, *missing)), *starts, *[waist] * len(missing),
        *ranks, *outputs, *[0] * len(missing), rows, waist.shape[1], *map(float, scales), *[0.0] * len(missing),
        *(part is not None for part in (*bias, *missing)), residual is not None, size, rank, block, num_warps=4,
    )  # fmt: skip
    return starts
