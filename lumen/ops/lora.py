"""The low-rank update (Hu et al. 2021, arXiv 2106.09685): y = W x + scale · B A x, with A (R, in) and B (out, R).

The kernels serve `ops/project.py`: one puts pairs beside the weight they belong to, so that one product takes both,
another adds an update to what is there already. Of a few rows, `ops/nf4_matvec.py` makes update and product in one.
"""

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
    a_ptr, b_ptr, a_out_ptr, b_out_ptr, rank_at, rank, outputs, inputs, scale, waist,
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
    to = at[:, None].to(tl.int64) * waist + column[None, :]
    tl.store(b_out_ptr + to, b.to(dtype), mask=(at[:, None] < outputs) & (column[None, :] < waist))
    held = (column[:, None] < rank) & (at[None, :] < inputs)
    to = column[:, None].to(tl.int64) * inputs + at[None, :]
    tl.store(a_out_ptr + to, tl.load(a_ptr + to, mask=held, other=0.0).to(dtype), mask=held)


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
    """Writes one layer's pair where a product over all layers' waists reads it.

    beside  (out, W) contiguous: `scale · b` goes to its columns from `column` on, zeros to the others; all zeros
            without a pair
    below   (≥ R, in) contiguous: `a` goes to its first rows
    """
    rank, outputs, inputs = 0 if a is None else len(a), *(len(beside), below.shape[1])
    _pair_kernel[(-(-max(outputs, inputs) // 128),)](
        beside if a is None else a, beside if b is None else b, below, beside, column, rank,
        outputs, inputs, scale, beside.shape[1], power_of_two(beside.shape[1]), 128,
    )  # fmt: skip
