"""The skinny products of the low-rank pairs (`ops/project.py` has the equations) from fewer passes over what is wide.

    ∂waist = ∂y u (N, W)        product = ∂yᵀ waist (out, R)        both from one pass over ∂y (N, out)
    product = leftᵀ norm(x) (W, D)                                  norm(x) made on the way, rounded, never written

A program owns some columns of the wide tensor and goes down a share of its rows, with the columns' part of the product
in registers; what they add to ∂waist goes out in fp32. A second kernel adds up the parts, in the same order each time,
and rounds once.

Layers that share their input have a waist each, side by side, and u is block-diagonal: a program's columns belong to
one layer, so that nothing is computed off the diagonal, and the parts are as thin as one layer's rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lumen.ops._triton import INTERPRETED, dot, jit, memory, power_of_two, processors, tl

MOST_WAIST = 64  # columns of a waist, or of one layer's: the tiles hold all of them
MOST_LAYERS = 3  # that share an input: q, k, v


def waist_gradients_reference(
    grad: Tensor, u: Tensor, waist: Tensor, outputs: Sequence[int] = (), ranks: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The definition of correct for `waist_gradients`."""
    outputs, ranks = outputs or (grad.shape[1],), ranks or (waist.shape[1],)
    grad_waist = torch.zeros_like(waist, dtype=torch.float32)
    product = torch.zeros(grad.shape[1], max(ranks), dtype=torch.float32, device=grad.device)
    row = column = 0
    for width, rank in zip(outputs, ranks, strict=True):
        rows, columns = slice(row, row + width), slice(column, column + rank)
        grad_waist[:, columns] = grad[:, rows].float() @ u[rows, columns].float()
        product[rows, :rank] = grad[:, rows].float().T @ waist[:, columns].float()
        row, column = row + width, column + rank
    return grad_waist.to(grad.dtype), product


def normed_product_reference(
    left: Tensor, x: Tensor, weight: Tensor | None = None, root: Tensor | None = None, plus_one: bool = False
) -> Tensor:
    """The definition of correct for `normed_product`."""
    if weight is None:
        y = x
    elif plus_one:
        y = (x.float() * root[:, None] * (1.0 + weight.float())).to(x.dtype)
    else:
        y = (x.float() * root[:, None]).to(x.dtype) * weight.to(x.dtype)
    return left.float().T @ y.float()


@jit
def _waist_gradients_kernel(
    grad_ptr, u_ptr, waist_ptr, product_ptr, shares_ptr, grad_row, u_row, waist_row, rows, rows_each, outputs, widest,
    block1, block2, start0, start1, start2, end0, end1, end2, rank0, rank1, rank2,
    R: tl.constexpr, INTERPRET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one layer and one share of the rows; layer i has the blocks from block_i on."""
    block, part = tl.program_id(0), tl.program_id(1)
    begins = tl.where(block < block1, 0, tl.where(block < block2, block1, block2))
    start = tl.where(block < block1, start0, tl.where(block < block2, start1, start2))
    end = tl.where(block < block1, end0, tl.where(block < block2, end1, end2))
    at_waist = tl.where(block < block1, 0, tl.where(block < block2, rank0, rank0 + rank1))
    rank = tl.where(block < block1, rank0, tl.where(block < block2, rank1, rank2))
    column = start + (block - begins) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, R)
    inside = column[:, None] < end
    u_at = u_ptr + column[:, None].to(tl.int64) * u_row + at_waist + r[None, :]
    u = tl.load(u_at, mask=inside & (r[None, :] < rank), other=0.0)
    product = tl.zeros((COLUMNS, R), tl.float32)
    for begin in range(part * rows_each, min((part + 1) * rows_each, rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        row_64 = row[:, None].to(tl.int64)
        there = row[:, None] < rows
        grad = tl.load(grad_ptr + row_64 * grad_row + column[None, :], mask=there & (column[None, :] < end), other=0.0)
        held = there & (r[None, :] < rank)
        waist = tl.load(waist_ptr + row_64 * waist_row + at_waist + r[None, :], mask=held, other=0.0)
        share = dot(grad, u, tl.zeros((ROWS, R), tl.float32), INTERPRET)
        tl.store(shares_ptr + (block.to(tl.int64) * rows + row_64) * widest + r[None, :], share, mask=held)
        product = dot(tl.trans(grad), waist, product, INTERPRET)
    to = product_ptr + (part.to(tl.int64) * outputs + column[:, None]) * widest + r[None, :]
    tl.store(to, product, mask=inside & (r[None, :] < widest))


@jit
def _normed_product_kernel(
    left_ptr, x_ptr, weight_ptr, root_ptr, product_ptr, left_row, x_row, rows, rows_each, width, rank,
    NORM: tl.constexpr, PLUS_ONE: tl.constexpr, R: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns and one share of the rows; the rounding is that of `ops/rms_norm.py`."""
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, R)[:, None]
    dtype = x_ptr.dtype.element_ty
    if NORM:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
        weight = 1.0 + weight.to(tl.float32) if PLUS_ONE else weight.to(dtype).to(tl.float32)
    product = tl.zeros((R, COLUMNS), tl.float32)
    for begin in range(part * rows_each, min((part + 1) * rows_each, rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        row_64 = row[:, None].to(tl.int64)
        there = row[:, None] < rows
        y = tl.load(x_ptr + row_64 * x_row + column[None, :], mask=there & (column[None, :] < width), other=0.0)
        left_at = left_ptr + row[None, :].to(tl.int64) * left_row + r
        left = tl.load(left_at, mask=(row[None, :] < rows) & (r < rank), other=0.0)
        if NORM:
            normed = y.to(tl.float32) * tl.load(root_ptr + row, mask=row < rows, other=0.0)[:, None]
            normed = normed if PLUS_ONE else normed.to(dtype).to(tl.float32)
            y = (normed * weight[None, :]).to(dtype)
        product = dot(left, y, product, INTERPRET)
    to = product_ptr + (part.to(tl.int64) * rank + r) * width + column[None, :]
    tl.store(to, product, mask=(column[None, :] < width) & (r < rank))


@jit
def _sum_parts_kernel(
    parts_ptr, out_ptr, size, width, out_row, part1, part2, part3, rank0, rank1, rank2,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up parts of `size` values in rows of `width`: those from part_i on are layer i's, and go to its columns."""
    layer = tl.program_id(1)
    first = tl.where(layer == 0, 0, tl.where(layer == 1, part1, part2))
    last = tl.where(layer == 0, part1, tl.where(layer == 1, part2, part3))
    rank = tl.where(layer == 0, rank0, tl.where(layer == 1, rank1, rank2))
    to = tl.where(layer == 0, 0, tl.where(layer == 1, rank0, rank0 + rank1))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // width, at % width
    inside = (at < size) & (column < rank)
    part = tl.arange(0, PARTS)
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for begin in range(first, last, PARTS):
        held = inside[None, :] & (begin + part < last)[:, None]
        total += tl.load(parts_ptr + (begin + part)[:, None].to(tl.int64) * size + at[None, :], mask=held, other=0.0)
    out_at = out_ptr + row.to(tl.int64) * out_row + to + column
    tl.store(out_at, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=inside)


def _sum_parts(parts: Tensor, out: Tensor, bounds: Sequence[int], ranks: Sequence[int], layers: int = 1) -> None:
    """`out` (rows, …) from `parts` (P, rows, width): layer i's ranks[i] columns are the sum of its parts, which end at
    bounds[i]; the columns and the parts of the next layer lie behind.
    """
    size, block = parts[0].numel(), 256
    _sum_parts_kernel[(-(-size // block), layers)](
        parts, out, size, parts.shape[2], out.stride(0), *bounds, *ranks,
        min(power_of_two(max(len(parts), 1)), 8), block, num_warps=4,
    )  # fmt: skip


def sum_parts(parts: Tensor, out: Tensor, rank: int) -> Tensor:
    """The first `rank` columns of `out` (rows, …) become the sum of `parts` (P, rows, rank) fp32, rounded; `out`."""
    _sum_parts(parts, out, [len(parts)] * 3, [rank, 0, 0])
    return out


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program works on at a time, and how."""

    rows: int
    columns: int
    stages: int  # tiles that are on their way or worked on
    warps: int
    together: int  # programs that one multiprocessor runs at a time


HOPPER = 200 * 1024  # bytes of shared memory


def _gradients_tile(grad: Tensor, size: int) -> Tile:
    """The wider, the fewer parts of ∂waist: writing them costs 2 · R / columns of the pass over ∂y, and so does reading
    them, which finds most in the cache.
    """
    if grad.element_size() == 4:
        return Tile(rows=32, columns=64, stages=2, warps=4, together=2)
    if memory(grad.device) < HOPPER:
        return Tile(rows=32, columns=128, stages=3, warps=4, together=2)
    if size == 16:
        return Tile(rows=64, columns=512, stages=3, warps=8, together=1)
    if size == 32:
        return Tile(rows=64, columns=512, stages=2, warps=8, together=1)
    return Tile(rows=64, columns=256, stages=3, warps=8, together=1)


def _product_tile(x: Tensor, size: int) -> Tile:
    if x.element_size() == 4:
        return Tile(rows=16, columns=64, stages=2, warps=4, together=2)
    if memory(x.device) < HOPPER:
        return Tile(rows=32, columns=128, stages=3, warps=4, together=2)
    return Tile(rows=64, columns=128, stages=4, warps=4, together=2)


@lru_cache(maxsize=256)
def _rows_each(rows: int, step: int, blocks: int, at_once: int, share_cost: float) -> int:
    """How many rows a program goes down, whole steps: so that all programs end at about the same time.

    share_cost  time of one more share of the rows, to write and add up its product, relative to the whole
    """
    steps = max(-(-rows // step), 1)
    shares = min(
        range(1, min(steps, 64) + 1), key=lambda n: -(-blocks * n // at_once) * -(-steps // n) * (1 + share_cost * n)
    )
    return -(-steps // shares) * step


def waist_gradients(
    grad: Tensor, u: Tensor, waist: Tensor, outputs: Sequence[int] = (), ranks: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The kernel's `grad @ u` (N, W) in grad's dtype, and `grad.T @ waist` (out, R) fp32, from one pass over `grad`.

    grad            (N, out), u (out, W) and waist (N, W): one dtype, any row strides
    outputs, ranks  of each layer, Σ = out and ≤ W: u is block-diagonal. Row i of the product then is grad's column i by
                    the waist of its own layer, R is the widest rank, and what lies behind a layer's rank is not to be
                    read. Without them all is one layer, R = W. R ≤ MOST_WAIST
    """
    (rows, width), wide = grad.shape, waist.shape[1]
    outputs, ranks = outputs or (width,), ranks or (wide,)
    widest = max(ranks)
    assert (
        sum(outputs) == width and sum(ranks) <= wide and widest <= MOST_WAIST and grad.dtype == u.dtype == waist.dtype
    )
    assert grad.stride(1) == u.stride(1) == waist.stride(1) == 1, "columns lie side by side"
    size = max(power_of_two(widest), 16)
    tile = _gradients_tile(grad, size)
    starts, ends, bounds, own, at = [], [], [], [], 0
    for out, rank in zip(outputs, ranks, strict=True):
        if rank:
            starts, ends, own = [*starts, at], [*ends, at + out], [*own, rank]
            bounds.append((bounds[-1] if bounds else 0) + -(-out // tile.columns))
        at += out
    layers, blocks = len(own), bounds[-1]
    assert layers <= MOST_LAYERS, "layers of one block share an input"
    for part, missing in ((starts, width), (ends, width), (own, 0), (bounds, blocks)):
        part += [missing] * (MOST_LAYERS - layers)
    each = _rows_each(rows, tile.rows, blocks, processors(grad.device) * tile.together, 4 * size / max(rows, 1))
    shares = max(-(-rows // each), 1)
    products = grad.new_empty(shares, width, widest, dtype=torch.float32)
    parts = grad.new_empty(blocks, rows, widest, dtype=torch.float32)
    _waist_gradients_kernel[(blocks, shares)](
        grad, u, waist, products, parts, grad.stride(0), u.stride(0), waist.stride(0), rows, each, width, widest,
        *bounds[:2], *starts, *ends, *own, size, INTERPRETED, tile.rows, tile.columns,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    grad_waist = grad.new_empty(rows, wide) if sum(ranks) == wide else grad.new_zeros(rows, wide)
    if rows:
        _sum_parts(parts, grad_waist, bounds, own, layers)
    return grad_waist, _summed(products)


def _summed(products: Tensor) -> Tensor:
    """(shares, rows, width) fp32 added up."""
    shares, rows, width = products.shape
    if shares == 1:
        return products[0]
    return sum_parts(products, products.new_empty(rows, width), width)


def normed_product(
    left: Tensor, x: Tensor, weight: Tensor | None = None, root: Tensor | None = None, plus_one: bool = False
) -> Tensor:
    """The kernel's `left.T @ y` (W, D) fp32, for y = x, or x normed as `ops/rms_norm.py` norms and rounds it.

    left    (N, W) in x's dtype, W ≤ MOST_WAIST, any row stride
    x       (N, D), any row stride
    weight  (D,), of the norm; root (N,) fp32, the inverse root mean square of each row
    """
    (rows, width), rank = x.shape, left.shape[1]
    assert rank <= MOST_WAIST and left.dtype == x.dtype and left.stride(1) == x.stride(1) == 1
    size = max(power_of_two(rank), 16)
    tile = _product_tile(x, size)
    blocks = -(-width // tile.columns)
    each = _rows_each(rows, tile.rows, blocks, processors(x.device) * tile.together, 4 * size / max(rows, 1))
    shares = max(-(-rows // each), 1)
    products = x.new_empty(shares, rank, width, dtype=torch.float32)
    _normed_product_kernel[(blocks, shares)](
        left, x, x if weight is None else weight, x if root is None else root, products, left.stride(0), x.stride(0),
        rows, each, width, rank, weight is not None, plus_one, size, INTERPRETED, tile.rows, tile.columns,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _summed(products)
