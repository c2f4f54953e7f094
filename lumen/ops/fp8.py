"""Products with a frozen weight in 8 bits: e4m3 numbers (1 sign, 4 exponent and 3 fraction bits, largest 448) and a
scale for every row of both factors. Twice the rate of a 16-bit product, and rounded: only on request.

    C = e4m3(W / s)      s (out,) the scales of W's rows              made once
    X = e4m3(x / r)      r (N, 1) the scales of x's rows              at every product
    y = r · (X Cᵀ) · s                                                          ~ x Wᵀ
    G = e4m3(∂y · s / t)      t (N, 1) the scales of the rows of ∂y · s
    ∂x = t · (G C)                                                              ~ ∂y W

The scales of W's rows lie on the axis that ∂y W sums over, where no product takes scales: they go into ∂y before it is
rounded, and C serves both ways. The matrix units want both factors with the summed axis contiguous, so C is held a
second time, transposed: 2 bytes a weight, beside the weight itself.

A scale is the least power of two that brings its row to 448 or below: dividing by it is exact, and so is s in 16 bits.
Rounded is each number, once, by at most 1/17 of itself (root mean square 1/38); the sums, as the matrix units do it
(`_scaled_product`); and the result, to bfloat16. A number below 2⁻⁶ of its scale loses relative precision, one below
2⁻¹⁰ becomes zero: that is at most 1/229,000 of the largest in its row. Nothing is cut off; a row of zeros stays one.
The scale of a row with infinity is infinite, so that what comes of it is not finite either.

`lumen.train` uses these products while it trains, for the frozen weights alone: the low-rank update, norms, attention
and the loss stay as they are, and evaluation, samples and all that is exported take the exact weight.

Measured: LoRA rank 16 on tinyshakespeare, 100 steps of 8 × 256 tokens at a rate of 3e-3, seeds 0 and 1; evaluation
loss in nats a token; torch 2.13 on a CPU, imitating, 2026-11-22. Stories260K's MLP, 172 wide, stays exact.

                              before    exact              in 8 bits
    lumen-demo's base, NF4    10.246    5.0240   5.0177    5.0277   5.0162    +0.07 %   −0.03 %
    stories260K                4.965    2.9077   2.9127    2.9118   2.9159    +0.14 %   +0.11 %
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumen.errors import KernelError
from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import INTERPRETED, dot, implementations, jit, power_of_two, tl

MULTIPLE = 16  # what the matrix units want both sizes of a weight to be a multiple of
LEAST_CAPABILITY = (8, 9)
INFINITE = 0x7F800000  # the bits of infinity in fp32; what is above is NaN
HELD = 16384  # numbers of a row up to which a program holds it whole; wider ones are read twice, then from the cache


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A frozen weight, or the weights of several layers that read the same input, one under the other."""

    codes: Tensor  # (out, in) e4m3
    across: Tensor  # (in, out), the same transposed
    scale: Tensor  # (out,) fp32, powers of two
    factor: Tensor  # (out,) the same in bfloat16, which holds them exactly: half as much to read
    ones: Tensor  # (in,) fp32, the scales of `across`, which has none of its own
    whole: "Fp8Weight | None" = None  # of which this is a part


def quantize_rows_reference(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of correct for `quantize_rows`."""
    wide = x.float() if factor is None else x.float() * factor.float()
    bits = wide.abs().amax(dim=-1, keepdim=True).view(torch.int32)
    # 448 is 1.75 · 2⁸: a fraction above .75 carries into the exponent. The least exponent keeps the inverse finite
    exponent = ((bits + 0x1FFFFF >> 23) - 8).clamp(min=1)
    scale = (torch.where(bits >= INFINITE, 255, exponent) << 23).view(torch.float32)
    inverse = (254 - exponent << 23).view(torch.float32)
    return (wide * inverse).to(torch.float8_e4m3fn), scale


@jit
def _e4m3(x, NATIVE: tl.constexpr):
    """The code, a byte, of each fp32 number of at most 448: nearest, ties to even."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # exponents begin 120 lower
    # below 2⁻⁶ codes count steps of 2⁻⁹, which is the last place of a number just above 2¹⁴
    steps = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, steps, normal)
    return (sign | tl.where(size > 0x7F800000, 0x7F, tl.minimum(code, 0x7E))).to(tl.uint8)


@jit
def _factored(x_ptr, factor_ptr, column, width, FACTOR: tl.constexpr):
    """Numbers of a row in fp32, times their columns' factors."""
    x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if FACTOR:
        x *= tl.load(factor_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return x


@jit
def _quantize_rows_kernel(
    x_ptr, factor_ptr, codes_ptr, scale_ptr, x_row, width,
    FACTOR: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; WHOLE: it fits into BLOCK, and is read once."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    x_ptr += row * x_row
    codes_ptr += row * width
    x = _factored(x_ptr, factor_ptr, lane, width, FACTOR)
    largest = tl.abs(x)
    if not WHOLE:
        for begin in range(BLOCK, width, BLOCK):
            largest = tl.maximum(largest, tl.abs(_factored(x_ptr, factor_ptr, begin + lane, width, FACTOR)))
    bits = tl.max(largest, 0).to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # infinity is rounded to 448, and NaN is no maximum: what they are is told by the scale and the code
    tl.store(scale_ptr + row, (tl.where(bits >= 0x7F800000, 255, exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(codes_ptr + lane, _e4m3(x * inverse, NATIVE), mask=lane < width)
    if not WHOLE:
        for begin in range(BLOCK, width, BLOCK):
            x = _factored(x_ptr, factor_ptr, begin + lane, width, FACTOR)
            tl.store(codes_ptr + begin + lane, _e4m3(x * inverse, NATIVE), mask=begin + lane < width)


@jit
def _add_kernel(
    y_ptr, residual_ptr, waist_ptr, u_ptr, rows, width, waist, u_row,
    WAIST: tl.constexpr, INTERPRET: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y += residual + waist uᵀ, reading and writing each value once."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, WAIST)
    held = (row[:, None] < rows) & (k[None, :] < waist)
    left = tl.load(waist_ptr + row[:, None] * waist + k[None, :], mask=held, other=0.0)
    held = (column[None, :] < width) & (k[:, None] < waist)
    right = tl.load(u_ptr + column[None, :] * u_row + k[:, None], mask=held, other=0.0)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    start = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    start += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, dot(left, right, start, INTERPRET).to(y_ptr.dtype.element_ty), mask=inside)


def add_to(y: Tensor, residual: Tensor, waist: Tensor, u: Tensor) -> Tensor:
    """`y + residual + waist @ u.T` in y's place: (N, out) twice, contiguous, (N, W) and (out, W), rounded once.

    A scaled product takes no start, as a plain one does.
    """
    (rows, width), (M, N) = y.shape, (64, 128)
    _add_kernel[(-(-rows // M), -(-width // N))](
        y, residual, waist, u, rows, width, waist.shape[1], u.stride(0),
        max(power_of_two(waist.shape[1]), 16), INTERPRETED, M, N, num_warps=4,
    )  # fmt: skip
    return y


def quantize_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes (N, in) e4m3, scales (N, 1) fp32) of x (N, in), rows any stride apart; exact powers of two as scales.

    factor  (in,), what each column is multiplied by first, in fp32
    """
    if choice("fp8", implementations(x)) == "reference":
        return quantize_rows_reference(x, factor)
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    whole = width <= HELD
    block = power_of_two(width) if whole else 4096
    x = x if x.stride(-1) == 1 else x.contiguous()
    _quantize_rows_kernel[(rows,)](
        x, x if factor is None else factor, codes.view(torch.uint8), scale, x.stride(0), width,
        factor is not None, whole, _native(x.device), block, num_warps=min(max(block // 512, 4), 16),
    )  # fmt: skip
    return codes, scale


def fits(outputs: int, inputs: int) -> bool:
    """Whether a weight (outputs, inputs) can be multiplied in 8 bits."""
    return outputs % MULTIPLE == 0 and inputs % MULTIPLE == 0


def refusal(device: torch.device) -> str:
    """Why products in 8 bits cannot run on `device`; empty if they can. The CPU imitates them."""
    if device.type == "cpu" or (device.type == "cuda" and _native(device)):
        return ""
    found = device.type
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} with {major}.{minor}"
    return f"wants a GPU of compute capability 8.9 or higher (RTX 4090, L4, H100), or the CPU; found {found}"


def fp8_weights(weights: Sequence[Tensor]) -> tuple[Fp8Weight, ...]:
    """The weights (out, in) of layers that read the same input, in 8 bits; they lie in one memory, and are one product.

    KernelError for a size that is no multiple of 16, and for NaN or infinity.
    """
    outputs, inputs = [len(weight) for weight in weights], weights[0].shape[1]
    if not all(fits(out, inputs) for out in outputs):
        raise KernelError(
            f"8-bit products want sizes that are multiples of {MULTIPLE}, found weights of {outputs} × {inputs}."
        )
    parts = [quantize_rows(weight.detach()) for weight in weights]
    for weight in weights:
        if not weight.isfinite().all():
            raise KernelError(f"8-bit products want finite weights, found NaN or infinity in {tuple(weight.shape)}.")
    codes = torch.cat([codes.view(torch.uint8) for codes, _ in parts])
    scale = torch.cat([scale for _, scale in parts]).flatten()
    across = codes.t().contiguous()
    whole = Fp8Weight(
        codes=codes.view(torch.float8_e4m3fn),
        across=across.view(torch.float8_e4m3fn),
        scale=scale,
        factor=scale.bfloat16(),
        ones=torch.ones(inputs, device=scale.device),
    )
    pieces = zip(
        whole.codes.split(outputs),
        whole.across.split(outputs, dim=1),
        whole.scale.split(outputs),
        whole.factor.split(outputs),
        strict=True,
    )
    return tuple(Fp8Weight(*piece, ones=whole.ones, whole=whole) for piece in pieces)


def fp8_group(parts: Sequence[Fp8Weight | None]) -> Fp8Weight | None:
    """The one weight that `parts` are the parts of; None where they have none. KernelError for parts of several."""
    if all(part is None for part in parts):
        return None
    whole = None if parts[0] is None else parts[0].whole
    covered = sum(0 if part is None else len(part.codes) for part in parts)
    if whole is None or any(part is None or part.whole is not whole for part in parts) or covered != len(whole.codes):
        raise KernelError("Layers that read the same input want one 8-bit weight for all: round them together.")
    return whole


def fp8_product(x: Tensor, weight: Fp8Weight) -> Tensor:
    """~ x @ W.T: (N, in) -> (N, out) in x's dtype; no gradient."""
    codes, scale = quantize_rows(x)
    return _scaled_product(codes, weight.codes, scale, weight.scale).to(x.dtype)


def fp8_gradient(grad: Tensor, weight: Fp8Weight) -> Tensor:
    """~ grad @ W: (N, out) -> (N, in) in grad's dtype."""
    codes, scale = quantize_rows(grad, weight.factor)
    return _scaled_product(codes, weight.across, scale, weight.ones).to(grad.dtype)


def _scaled_product(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows · (a bᵀ) · columns for codes a (N, K), b (M, K) and scales (N, 1), (M,): (N, M) bfloat16.

    On a GPU the units add with about 14 bits of fraction (`use_fast_accum`): 2⁻¹³ beside the 2⁻⁵ of what is added, and
    the slow way costs the speed that 8 bits are for.
    """
    if not a.is_cuda or choice("fp8", implementations(a)) == "reference":
        return ((a.float() @ b.float().T) * rows * columns).bfloat16()
    if not len(a):
        return a.new_empty(0, len(b), dtype=torch.bfloat16)
    b = b.contiguous()  # as a part of a group, its transposed rows lie apart: not every backend takes that
    return torch._scaled_mm(
        a, b.t(), scale_a=rows, scale_b=columns[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )


@uncompiled
def fp8_linear(x: Tensor, weight: Fp8Weight) -> Tensor:
    """~ x @ W.T for a frozen W: (…, in) -> (…, out), in x's dtype. Saves neither x nor W."""
    return _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Fp8Weight) -> Tensor:
        ctx.weight = weight
        return fp8_product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return fp8_gradient(grad, ctx.weight), None


def _native(device: torch.device) -> bool:
    """Whether the GPU rounds to e4m3 and multiplies it; the interpreter does neither, nor what came before 2022."""
    return device.type != "cpu" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
