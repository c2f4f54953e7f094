"""Weight-decomposed adaptation (Liu et al. 2024, arXiv 2402.09353): LoRA turns a row, its length is learned apart.

    V = W + scale · B A            (out, in)
    y = m ∘ V x / ‖V‖              m (out,), the learned magnitude; ‖V‖ (out,), the length of each row

‖V‖ follows every step of A and B and gets no gradient itself: section 4.3 of the paper, and what PEFT does. It is taken
in fp32, whatever the activations are: m / ‖V‖ starts at exactly 1, and 1 in bf16 has neighbours 0.8 % away.

    ∂(V x) = m / ‖V‖ ∘ ∂y          ∂m = Σ ∂y ∘ V x / ‖V‖, over the rows of x

`ops/project.py` takes the length without holding V, from the length of W, which is computed once, and from W Aᵀ:

    ‖V‖² = ‖W‖² + 2 scale · Σ B ∘ (W Aᵀ) + scale² · Σ B ∘ (B (A Aᵀ))      sums over the rank, for each row

W and A meet rounded to the activations' dtype, with sums in fp32. In bf16, u = 2⁻⁸, this changes the length by a share
of at most 2u · scale · Σ |B| ‖A‖ · ‖W‖ / ‖V‖², with ‖A‖ of each of A's rows; and, since the errors of `in` elements
differ in sign, in fact of about u/√in times the update's part of the row: 10⁻⁵ and less where that is a tenth.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lumen.ops._triton import jit, processors, tl
from lumen.ops.lora import lora_weight
from lumen.ops.nf4 import NF4, dequantize_nf4


@torch.no_grad()
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale · B A‖ of each row, (out,) fp32, without a gradient. Holds one more matrix of W's shape in fp32."""
    return torch.linalg.vector_norm(lora_weight(a, b, scale).add_(weight), dim=1)


def dora_update(base: Tensor, update: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """What is added to W x so that it becomes m ∘ (W x + scale · B A x) / ‖V‖: (…, out) in x's dtype.

    base    W x (…, out), without a bias
    update  scale · B A x (…, out)
    """
    ratio = magnitude / norm
    return (ratio - 1).to(base.dtype) * base + ratio.to(base.dtype) * update


def dora_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """The weight (out, in) that merging leaves, m / ‖V‖ ∘ V, in fp32."""
    turned = weight.float() + lora_weight(a, b, scale)
    return (magnitude / torch.linalg.vector_norm(turned, dim=1))[:, None] * turned


# Lengths without V ----------------------------------------------------------------------------------------------------

_ROWS = 1024  # unpacked at a time
_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight → (what it was then, ‖W‖)


@torch.no_grad()
def row_lengths(weight: Tensor | NF4) -> Tensor:
    """‖W‖ of each row, (out,) fp32. Of a frozen weight it is computed once and held as long as the weight lives."""
    packed = isinstance(weight, NF4)
    # who writes a dense weight moves its version; a module that goes to another device keeps the object
    now = weight.codes.device if packed else (weight._version, weight.dtype, weight.data_ptr(), weight.device)
    then, found = _lengths.get(weight, (None, None))
    if now != then:
        rows, inputs = weight.shape
        step = _ROWS if inputs % 64 == 0 else rows  # a packed weight is cut between its blocks alone
        found = torch.cat(
            [
                torch.linalg.vector_norm(
                    dequantize_nf4(weight.rows(first, min(step, rows - first)), torch.float32)
                    if packed
                    else weight[first : first + step].float(),
                    dim=1,
                )
                for first in range(0, rows, step)
            ]
        )
        if packed or not weight.requires_grad:
            _lengths[weight] = (now, found)
    return found


@torch.no_grad()
def turned_lengths(lengths: Tensor, crossed: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale · B A‖ (out,) fp32 from ‖W‖ (out,) and `crossed` = W Aᵀ (out, R), both fp32."""
    a, b = a.float(), b.float()
    grown = scale * (b * torch.addmm(2 * crossed, b, a @ a.T, alpha=scale)).sum(1)
    # B begins at zero: the length is then W's to the bit, and m over it exactly 1
    return torch.where(grown == 0, lengths, (lengths.square() + grown).clamp(min=0).sqrt())


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _dora_forward_kernel(
    z_ptr, ratio_ptr, start_ptr, y_ptr, z_row, start_row, y_row, width, START: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    ratio = tl.load(ratio_ptr + column, mask=inside, other=0.0)
    y = ratio * tl.load(z_ptr + row * z_row + column, mask=inside, other=0.0).to(tl.float32)
    if START:
        y += tl.load(start_ptr + row * start_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _dora_backward_kernel(
    grad_ptr, z_ptr, ratio_ptr, scaled_ptr, parts_ptr, grad_row, z_row, rows, width,
    LEARNS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every P-th tile of rows, and leaves its part of Σ ∂y ∘ z in row p of (P, width)."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ratio = tl.load(ratio_ptr + column, mask=column < width, other=0.0)
    total = tl.zeros((M, BLOCK), tl.float32)
    for first in range(program * M, rows, tl.num_programs(0) * M):
        row = first + tl.arange(0, M)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        at = row[:, None].to(tl.int64)
        grad = tl.load(grad_ptr + at * grad_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if LEARNS:
            total += grad * tl.load(z_ptr + at * z_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scaled = (grad * ratio[None, :]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + at * width + column[None, :], scaled, mask=inside)
    if LEARNS:
        tl.store(parts_ptr + program.to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


def scale_rows(z: Tensor, ratio: Tensor, start: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`ratio ∘ z + start` for z (N, out) with any row stride and `ratio` (out,) fp32: (N, out), or written to `out`.

    start  (N, out), or (out,) for each row; `out` itself may be named
    """
    rows, width = z.shape
    y = z.new_empty(rows, width) if out is None else out
    block = 1024 if width >= 1024 else 128
    start_row = 0 if start is None or start.ndim == 1 else start.stride(0)
    _dora_forward_kernel[(rows, -(-width // block))](
        z, ratio, z if start is None else start, y, z.stride(0), start_row, y.stride(0), width, start is not None, block
    )
    return y


def scale_gradient(grad: Tensor, z: Tensor | None, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """(`ratio ∘ grad` (N, out), Σ grad ∘ z (out,) fp32 over the rows, or None without z)."""
    rows, width = grad.shape
    scaled = grad.new_empty(rows, width)
    M, block = 8, 256 if width >= 256 else 64
    columns = -(-width // block)
    programs = min(-(-rows // M), max(processors(grad.device) * 8 // columns, 1))
    parts = grad if z is None else grad.new_empty(programs, width, dtype=torch.float32)
    _dora_backward_kernel[(programs, columns)](
        grad, grad if z is None else z, ratio, scaled, parts, grad.stride(0), 0 if z is None else z.stride(0),
        rows, width, z is not None, M, block, num_warps=4,
    )  # fmt: skip
    return scaled, None if z is None else parts.sum(0)
