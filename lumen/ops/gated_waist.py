"""A gated MLP's low-rank pairs on the way past: all that they want of the (N, F) tensors between gate, up and down, in
the pass that makes these (`ops/gated.py`; `ops/project.py` has the equations of the pairs).

    forward     h = f(gate) · up                              waist of down   h Aᵀ
    backward    ∂gate = ∂h · up · f'(gate)                    ∂B of gate, up  ∂gateᵀ (x A_gateᵀ), ∂upᵀ (x A_upᵀ)
                ∂up = ∂h · f(gate)                            ∂waist of both  ∂gate u_gate, ∂up u_up
                h, made again and not written                 ∂A of down      ∂waistᵀ h

Products of their own would read h once more in each direction, where backward it is written for nothing else, and ∂gate
and ∂up twice: of the 11 passes over (N, F) of such a backward pass 5 are left, and what the sums below cost.

Forward, a program has some rows and goes along F, with their waist in registers. Backward, a program has some columns
and goes down N, with the columns' ∂B and ∂A in registers; what the columns add to ∂waist goes out in fp32, and a second
kernel adds it up, as it does where a side was split among programs: always in the same order.

What a pair adds to gate, up or ∂h is summed onto them in fp32, where the product that makes it begins its sum. The
loops are told their stages: Triton fetches ahead by itself what a product multiplies, and not what it begins with.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lumen.ops._triton import INTERPRETED, dot, jit, memory, power_of_two, processors, rounded, tl
from lumen.ops.gated import ACTIVATIONS, _activation
from lumen.ops.waist import HOPPER, MOST_WAIST, Tile, sum_parts

MOST_SHARES = 2**30  # bytes of ∂waist's parts at a time: of 37,440 rows of 28,672 columns, for pairs of rank 16


class Taken(NamedTuple):
    """The updates that gate and up lack: waist · uᵀ of each, for the kernels to add."""

    waist: Tensor  # (N, W): the waists of gate and up side by side, W ≥ R_gate + R_up, with any row stride
    gate: Tensor | None  # u (F, R_gate) contiguous, scale · B; None without a pair
    up: Tensor | None  # u (F, R_up)


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedGradients:
    """What `gated_waist_gradient` gives; None where a pair is missing."""

    gate: Tensor  # (N, F)
    up: Tensor  # (N, F)
    product_gate: Tensor | None  # (F, R_gate) fp32: ∂gateᵀ waist
    product_up: Tensor | None  # (F, R_up) fp32
    a_down: Tensor | None  # (R_down, F) fp32
    waist: Tensor | None  # as the waist of gate and up; zeros behind their ranks


def _completed(gate: Tensor, up: Tensor, taken: Taken | None) -> list[Tensor]:
    """Gate and up with their updates, in fp32."""
    found, at = [gate.float(), up.float()], 0
    for i, u in enumerate(() if taken is None else taken[1:]):
        if u is not None:
            found[i] = found[i] + taken.waist[:, at : at + u.shape[1]].float() @ u.float().T
            at += u.shape[1]
    return found


def gated_waist_forward_reference(
    gate: Tensor, up: Tensor, kind: str, a: Tensor, taken: Taken | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of correct for `gated_waist_forward`."""
    dtype = gate.dtype
    gate, up = _completed(gate, up, taken)
    h = (ACTIVATIONS[kind](gate).to(dtype).float() * up).to(dtype)
    return h, (h.float() @ a.float().T).to(dtype)


def gated_waist_gradient_reference(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str, taken: Taken | None, pair: tuple[Tensor, Tensor] | None
) -> GatedGradients:
    """The definition of correct for `gated_waist_gradient`."""
    dtype, grad = gate.dtype, grad.float()
    gate, up = _completed(gate, up, taken)
    if pair is not None:
        grad = grad + pair[0].float() @ pair[1].float()
    gate = gate.detach().requires_grad_()
    with torch.enable_grad():
        value = ACTIVATIONS[kind](gate)
        slope = torch.autograd.grad(value.sum(), gate)[0]
    value = value.detach().to(dtype).float()
    grad_gate, grad_up, h = (grad * up * slope).to(dtype), (grad * value).to(dtype), (value * up).to(dtype)
    products, of_waist, at = [None, None], None, 0
    if taken is not None:
        of_waist = torch.zeros_like(taken.waist)
        for i, (part, u) in enumerate(zip((grad_gate, grad_up), taken[1:], strict=True)):
            if u is not None:
                columns = slice(at, at + u.shape[1])
                products[i] = part.float().T @ taken.waist[:, columns].float()
                of_waist[:, columns] = (part.float() @ u.float()).to(dtype)
                at += u.shape[1]
    a_down = None if pair is None else pair[0].float().T @ h.float()
    return GatedGradients(
        gate=grad_gate, up=grad_up, product_gate=products[0], product_up=products[1], a_down=a_down, waist=of_waist
    )


@jit
def _first(one, _):
    return one


@jit
def _settled(x, INTERPRET: tl.constexpr):
    """x, as a result that stays in the registers where it was computed.

    Without it the compiler computes the activation anew from the loaded tiles for each product that reads a result of
    it, in the order of registers that the product wants, up to ten times: a reduction, even over one value, is where it
    must stop, and moves the rounded result instead.
    """
    return x if INTERPRET else tl.reduce(tl.reshape(x, (x.shape[0], x.shape[1], 1)), 2, _first)


@jit
def _columns(ptr, column, step, width, RANK: tl.constexpr, R: tl.constexpr):
    """Some columns of uᵀ, (R, COLUMNS), zeros behind its rank."""
    r = tl.arange(0, R)
    held = (column[None, :] < width) & (r[:, None] < RANK)
    return tl.load(ptr + column[None, :].to(tl.int64) * step + r[:, None], mask=held, other=0.0)


@jit
def _rows(ptr, row, step, rows, RANK: tl.constexpr, R: tl.constexpr):
    """Some rows of a waist, turned: (R, ROWS), zeros behind its rank."""
    r = tl.arange(0, R)
    held = (row[None, :] < rows) & (r[:, None] < RANK)
    return tl.load(ptr + row[None, :].to(tl.int64) * step + r[:, None], mask=held, other=0.0)


@jit
def _gated_waist_forward_kernel(
    gate_ptr, up_ptr, left_ptr, u_gate_ptr, u_up_ptr, a_ptr, h_ptr, waist_ptr, gate_row, up_row, left_row, a_row,
    rows, width, width_each, KIND: tl.constexpr,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK: tl.constexpr,
    R_GATE: tl.constexpr, R_UP: tl.constexpr, R: tl.constexpr, WRITE: tl.constexpr,
    INTERPRET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of ROWS rows, from one share of the columns, and what these add to the waist; R_… is 0 without a pair."""
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_64 = row[:, None].to(tl.int64)
    gate_at, up_at, h_at = gate_ptr + row_64 * gate_row, up_ptr + row_64 * up_row, h_ptr + row_64 * width
    dtype = gate_ptr.dtype.element_ty
    if R_GATE:
        left_gate = _rows(left_ptr, row, left_row, rows, RANK_GATE, R_GATE)
    if R_UP:
        left_up = _rows(left_ptr + RANK_GATE, row, left_row, rows, RANK_UP, R_UP)
    if R:
        r = tl.arange(0, R)
        a_at = a_ptr + r[:, None].to(tl.int64) * a_row
        waist = tl.zeros((R, ROWS), tl.float32)  # turned: of (ROWS, R) each warp would compute most
    for begin in tl.range(part * width_each, min((part + 1) * width_each, width), COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        gate = tl.load(gate_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if R_GATE:
            u_gate = _columns(u_gate_ptr, column, RANK_GATE, width, RANK_GATE, R_GATE)
            gate = dot(tl.trans(left_gate), u_gate, gate, INTERPRET)
        if R_UP:
            u_up = _columns(u_up_ptr, column, RANK_UP, width, RANK_UP, R_UP)
            up = dot(tl.trans(left_up), u_up, up, INTERPRET)
        value, _ = _activation(gate, KIND, INTERPRET)
        value = rounded(value, dtype, INTERPRET).to(tl.float32)
        h = _settled(rounded(value * up, dtype, INTERPRET), INTERPRET)
        if WRITE:
            tl.store(h_at + column[None, :], h, mask=inside)
        if R:
            a = tl.load(a_at + column[None, :], mask=(column[None, :] < width) & (r[:, None] < RANK), other=0.0)
            waist = dot(a, tl.trans(h), waist, INTERPRET)
    if R:
        to = waist_ptr + (part.to(tl.int64) * rows + row[None, :]) * RANK + r[:, None]
        tl.store(to, waist.to(waist_ptr.dtype.element_ty), mask=(row[None, :] < rows) & (r[:, None] < RANK))


@jit
def _store_share(ptr, u, x, row, step, rows, RANK: tl.constexpr, R: tl.constexpr, INTERPRET: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """What some columns x (ROWS, COLUMNS) add to x u, to its place in rows of `step` numbers."""
    r = tl.arange(0, R)
    share = tl.trans(dot(u, tl.trans(x), tl.zeros((R, ROWS), tl.float32), INTERPRET))
    held = (row[:, None] < rows) & (r[None, :] < RANK)
    tl.store(ptr + row[:, None].to(tl.int64) * step + r[None, :], share, mask=held)


@jit
def _store_product(ptr, product, at, first, width, rank, R: tl.constexpr, TURNED: tl.constexpr, COLUMNS: tl.constexpr):
    """product (R, COLUMNS) to its place in (F, R), or in (R, F) where TURNED."""
    column = first + tl.arange(0, COLUMNS)
    r = tl.arange(0, R)
    to = r[:, None] * width + column[None, :] if TURNED else column[None, :] * rank + r[:, None]
    tl.store(ptr + at + to, product, mask=(r[:, None] < rank) & (column[None, :] < width))


@jit
def _gated_waist_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, waist_ptr, u_gate_ptr, u_up_ptr, grad_waist_ptr, a_ptr,
    product_ptr, shares_ptr, gate_row, up_row, grad_gate_row, grad_up_row, a_row, rows, width, rows_each,
    waist_row: tl.constexpr, grad_waist_row: tl.constexpr, KIND: tl.constexpr,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr,
    R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    INTERPRET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of COLUMNS columns, from one share of the rows; R_… is 0 where there is no pair."""
    block, part = tl.program_id(0), tl.program_id(1)
    first = block * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    dtype = grad_gate_ptr.dtype.element_ty
    both: tl.constexpr = RANK_GATE + RANK_UP
    shares_ptr += block.to(tl.int64) * rows * both
    if R_GATE:
        u_gate = _columns(u_gate_ptr, column, RANK_GATE, width, RANK_GATE, R_GATE)
        product_gate = tl.zeros((R_GATE, COLUMNS), tl.float32)
    if R_UP:
        u_up = _columns(u_up_ptr, column, RANK_UP, width, RANK_UP, R_UP)
        product_up = tl.zeros((R_UP, COLUMNS), tl.float32)
    if R_DOWN:
        r = tl.arange(0, R_DOWN)
        held = (r[:, None] < RANK_DOWN) & (column[None, :] < width)
        a = tl.load(a_ptr + r[:, None].to(tl.int64) * a_row + column[None, :], mask=held, other=0.0)
        product_down = tl.zeros((R_DOWN, COLUMNS), tl.float32)
    for begin in tl.range(part * rows_each, min((part + 1) * rows_each, rows), ROWS, num_stages=STAGES):
        row = begin + tl.arange(0, ROWS)
        row_64 = row[:, None].to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        grad = tl.load(grad_ptr + row_64 * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row_64 * gate_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row_64 * up_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if R_GATE:
            waist_gate = _rows(waist_ptr, row, waist_row, rows, RANK_GATE, R_GATE)
            gate = dot(tl.trans(waist_gate), u_gate, gate, INTERPRET)
        if R_UP:
            waist_up = _rows(waist_ptr + RANK_GATE, row, waist_row, rows, RANK_UP, R_UP)
            up = dot(tl.trans(waist_up), u_up, up, INTERPRET)
        if R_DOWN:
            grad_waist = _rows(grad_waist_ptr, row, grad_waist_row, rows, RANK_DOWN, R_DOWN)
            grad = dot(tl.trans(grad_waist), a, grad, INTERPRET)
        value, slope = _activation(gate, KIND, INTERPRET)
        value = rounded(value, dtype, INTERPRET).to(tl.float32)
        grad_gate = _settled(rounded(grad * up * slope, dtype, INTERPRET), INTERPRET)
        grad_up = _settled(rounded(grad * value, dtype, INTERPRET), INTERPRET)
        tl.store(grad_gate_ptr + row_64 * grad_gate_row + column[None, :], grad_gate, mask=inside)
        tl.store(grad_up_ptr + row_64 * grad_up_row + column[None, :], grad_up, mask=inside)
        # each narrow product stands turned, and before a wide one: Triton 3.6 divides all products of a loop among the
        # warps as it does the last, and of (ROWS, R) each warp computed most; so it is a fourth, and nothing spills
        if R_GATE:
            _store_share(shares_ptr, u_gate, grad_gate, row, both, rows, RANK_GATE, R_GATE, INTERPRET, ROWS)
            product_gate = dot(waist_gate, grad_gate, product_gate, INTERPRET)
        if R_UP:
            _store_share(shares_ptr + RANK_GATE, u_up, grad_up, row, both, rows, RANK_UP, R_UP, INTERPRET, ROWS)
            product_up = dot(waist_up, grad_up, product_up, INTERPRET)
        if R_DOWN:
            h = _settled(rounded(value * up, dtype, INTERPRET), INTERPRET)
            product_down = dot(grad_waist, h, product_down, INTERPRET)
    at = part.to(tl.int64) * width * (both + RANK_DOWN)
    if R_GATE:
        _store_product(product_ptr, product_gate, at, first, width, RANK_GATE, R_GATE, False, COLUMNS)
    if R_UP:
        at_up = at + width * RANK_GATE
        _store_product(product_ptr, product_up, at_up, first, width, RANK_UP, R_UP, False, COLUMNS)
    if R_DOWN:
        at_down = at + width * both
        _store_product(product_ptr, product_down, at_down, first, width, RANK_DOWN, R_DOWN, True, COLUMNS)


def _forward_tile(gate: Tensor, ranks: int) -> Tile:
    """`ranks` is the sum of the three, padded. Measured on an H200 that products keep at its power limit."""
    if memory(gate.device) < HOPPER or gate.element_size() == 4:
        return Tile(rows=32, columns=64, stages=3, warps=4, together=2)
    return Tile(rows=32, columns=64, stages=3, warps=4, together=5 if ranks <= 48 else 3)


def _backward_tile(gate: Tensor, ranks: int) -> Tile:
    """The same; as many fp32 sums as `ranks` stay in registers beside each column."""
    if gate.element_size() == 4:
        return Tile(rows=32, columns=64, stages=2, warps=8, together=1)
    if memory(gate.device) < HOPPER:
        return Tile(rows=32 if ranks <= 96 else 16, columns=128, stages=2, warps=8, together=1)
    if ranks <= 48:
        return Tile(rows=32, columns=128, stages=3, warps=4, together=2)
    return Tile(rows=32, columns=64, stages=3, warps=4 if ranks <= 96 else 8, together=2 if ranks <= 96 else 1)


def _share(length: int, step: int, blocks: int, tile: Tile, device: torch.device) -> int:
    """How much of `length` one program takes, whole steps: so that `blocks` times the shares fill the GPU evenly."""
    steps, at_once = max(-(-length // step), 1), processors(device) * tile.together
    # each further share costs a sum to write and to read: one is taken only if it saves more than 2 % of the time
    shares = min(range(1, min(steps, 16) + 1), key=lambda n: -(-blocks * n // at_once) / n * (1 + 0.02 * n))
    return -(-steps // shares) * step


def _padded(rank: int) -> int:
    """The width of a tile that holds the columns of a waist; 0 for none."""
    assert rank <= MOST_WAIST, f"a pair of rank {rank} has no kernel here, {MOST_WAIST} is the most"
    return max(power_of_two(rank), 16) if rank else 0


def gated_waist_forward(
    gate: Tensor, up: Tensor, kind: str, a: Tensor, taken: Taken | None = None, dead: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The kernel's h (N, F), None where it is `dead`, and its waist h Aᵀ (N, R), None where R is 0.

    gate, up  (N, F) with any row strides
    a         (R, F) in their dtype, R ≤ MOST_WAIST, with any row stride
    taken     the updates that gate and up still lack
    """
    (rows, width), rank = gate.shape, len(a)
    if dead and not rank:
        return None, None
    left, u_gate, u_up, *ranks = _parts(taken, gate)
    tile = _forward_tile(gate, sum(map(_padded, (*ranks, rank))))
    h, waist = None if dead else gate.new_empty(rows, width), gate.new_empty(rows, rank)
    blocks = -(-rows // tile.rows)
    each = _share(width, tile.columns, blocks, tile, gate.device)
    shares = -(-width // each)
    to = waist if shares == 1 else gate.new_empty(shares, rows, rank, dtype=torch.float32)
    _gated_waist_forward_kernel[(blocks, shares)](
        gate, up, left, u_gate, u_up, a, gate if dead else h, to, gate.stride(0), up.stride(0), left.stride(0),
        a.stride(0), rows, width, each, kind, *ranks, rank, *map(_padded, ranks), _padded(rank), not dead, INTERPRETED,
        tile.rows, tile.columns, tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not rank:
        return h, None
    if shares > 1:
        sum_parts(to, waist, rank)
    return h, waist


def _parts(taken: Taken | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Waist, u of gate, u of up, and their ranks; in the place of what is missing `like`, which is not read."""
    left, *halves = (like, None, None) if taken is None else taken
    ranks = [0 if u is None else u.shape[1] for u in halves]
    return left, *(like if u is None else u for u in halves), *ranks


def _lot(rows: int, columns: int) -> int:
    """How many of `rows` have their parts of ∂waist, `columns` fp32 each, at a time: all, or a multiple of 64."""
    return min(max(rows, 1), max(MOST_SHARES // max(4 * columns, 1) // 64, 1) * 64)


def gated_waist_gradient(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str, taken: Taken | None, pair: tuple[Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> GatedGradients:  # fmt: skip
    """The kernel's gradients of a gated MLP's middle, from one pass over ∂h, gate and up.

    grad      (N, F) contiguous: ∂h without what down's pair adds to it
    gate, up  (N, F) with any row strides
    taken     the updates that gate and up still lack; None if neither has a pair
    pair      of down: the gradient at its waist (N, R), and A (R, F), both with any row stride; None without one
    out       where ∂gate and ∂up go; gate and up themselves may be named

    All in one dtype, each R ≤ MOST_WAIST. Extra memory: (R_gate + R_up) · 4 bytes for each row and block of columns, at
    most MOST_SHARES; more rows than that are taken one lot after the other.
    """
    rows, width = gate.shape
    waist, u_gate, u_up, *ranks = _parts(taken, grad)
    grad_waist, a = pair or (grad, grad)
    thin, ranks = sum(ranks), [*ranks, 0 if pair is None else len(a)]
    grad_gate, grad_up = out or (torch.empty_like(grad), torch.empty_like(grad))
    sizes = [_padded(rank) for rank in ranks]
    tile = _backward_tile(gate, sum(sizes))
    blocks = -(-width // tile.columns)
    most = _lot(rows, blocks * thin)
    lots = [slice(at, min(at + most, rows)) for at in range(0, max(rows, 1), most)]
    each = _share(most, tile.rows, blocks, tile, gate.device)
    parts = max(-(-most // each), 1)
    products = gate.new_empty(len(lots) * parts, width * sum(ranks), dtype=torch.float32)
    shares = gate.new_empty(blocks * most * thin, dtype=torch.float32)
    of_waist = None if taken is None else torch.zeros_like(waist)
    for lot, product in zip(lots, products.split(parts), strict=True):
        count = lot.stop - lot.start
        _gated_waist_backward_kernel[(blocks, parts)](
            grad[lot], gate[lot], up[lot], grad_gate[lot], grad_up[lot], waist[lot], u_gate, u_up, grad_waist[lot], a,
            product, shares, gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0), a.stride(0),
            count, width, each, waist.stride(0), grad_waist.stride(0), kind, *ranks, *sizes, INTERPRETED,
            tile.rows, tile.columns, tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if taken is not None:
            sum_parts(shares[: blocks * count * thin].view(blocks, count, thin), of_waist[lot], thin)
    if len(products) > 1:
        products = sum_parts(products[:, :, None], products.new_empty(products.shape[1], 1), 1)
    product_gate, product_up, a_down = products.view(-1).split([width * rank for rank in ranks])
    return GatedGradients(
        gate=grad_gate,
        up=grad_up,
        product_gate=product_gate.view(width, -1) if ranks[0] else None,
        product_up=product_up.view(width, -1) if ranks[1] else None,
        a_down=a_down.view(-1, width) if ranks[2] else None,
        waist=of_waist,
    )
