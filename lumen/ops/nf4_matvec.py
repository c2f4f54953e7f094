"""Linear layers of a few rows over NF4 weights that stay packed: the case of decoding, where reading W is all the work.

    y = W x + scale · B A x + bias + residual        with x plain, norm(x), or f(gate) · up

Layers that read the same input (q, k, v; gate, up) take two launches between them: one makes the input and A x, one
reads all the weights. Nothing is unpacked in memory. A word of 32 bits is eight codes, so the input is stored in eight
planes, `planes[j, w] = x[8 w + j]`: what a lane multiplies by its four words then lies side by side, eight times.

W is exact: a code becomes the fp32 value that it stands for, products are summed in fp32, and the scale multiplies the
sum of its half block, 32 codes. Only the result is rounded to x's dtype. (A training step in bf16 multiplies by W
rounded to bf16, which is up to 2⁻⁹ of each weight away.)

*Decision* · look a code up by a shuffle between the lanes of a warp, each of which holds one of the 16 values · because
a weight then takes a shift, a shuffle and a multiplication, 4.2 instructions on sm_90 with all that is around them, and
is exact; with bytes permuted (PRMT) into fp16 it takes 6.9, with `tl.gather` 8.3 and a way through shared memory ·
revisit when a multiprocessor shuffles more or less than the 32 values a cycle of sm_90.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.ops._triton import INTERPRETED, jit, power_of_two, tl
from lumen.ops.gated import _activation, gated_reference
from lumen.ops.nf4 import BLOCK, NF4, _kernel_tensors, dequantize_nf4_reference
from lumen.ops.rms_norm import rms_norm_reference

MOST_VECTORS = 8  # rows of x up to which the packed weight is multiplied as it lies
MOST_LAYERS = 3  # that share an input: q, k, v


def few_inputs_reference(
    x: Tensor, a: Sequence[Tensor | None], *, up: Tensor | None = None, kind: str = "", norm: Tensor | None = None,
    eps: float = 0.0, plus_one: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of correct for `few_inputs`."""
    if norm is not None:
        x = rms_norm_reference(x, norm, eps, plus_one)
    elif up is not None:
        x = gated_reference(x, up, kind)
    waists = [F.linear(x.float(), pair) for pair in a if pair is not None]
    planes = x.view(len(x), -1, 8).transpose(1, 2).contiguous()
    return planes, torch.cat(waists, dim=1) if waists else x.new_zeros(len(x), 0, dtype=torch.float32)


@jit
def _pick(index, first, second, third):
    """One of three of a kind, by its number."""
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@jit
def _few_inputs_kernel(
    x_ptr, up_ptr, norm_ptr, a0_ptr, a1_ptr, a2_ptr, planes_ptr, waist_ptr,
    x_row, up_row, inputs, waist, rank0, rank1, eps,
    SOURCE: tl.constexpr, KIND: tl.constexpr, PLUS_ONE: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One rank of one layer, for one row. Every program makes the whole input, and each writes a share of it.

    Under a norm BLOCK holds the whole row.
    """
    column, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    layer = (column >= rank0).to(tl.int32) + (column >= rank0 + rank1).to(tl.int32)
    a_at = _pick(layer, a0_ptr, a1_ptr, a2_ptr)
    a_at += (column - _pick(layer, 0, rank0, rank0 + rank1)).to(tl.int64) * inputs
    dtype = planes_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, inputs, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < inputs
        a = tl.load(a_at + at, mask=inside & (column < waist), other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
        if SOURCE == "norm":
            weight = tl.load(norm_ptr + at, mask=inside, other=0.0)
            x = x * tl.rsqrt(tl.sum(x * x, 0) / inputs + eps)
            if PLUS_ONE:
                x = x * (1.0 + weight.to(tl.float32))
            else:  # rounded before they meet, as in `rms_norm`
                x = x.to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)
        if SOURCE == "gated":
            up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
            value, _ = _activation(x, KIND, INTERPRET)
            x = value.to(dtype).to(tl.float32) * up
        x = x.to(dtype)
        if begin // BLOCK % tl.num_programs(0) == column:
            tl.store(planes_ptr + row * inputs + at % 8 * (inputs // 8) + at // 8, x, mask=inside)
        total += x.to(tl.float32) * a
    tl.store(waist_ptr + row * waist + column, tl.sum(total, 0), mask=column < waist)


def few_inputs(
    x: Tensor,
    a: Sequence[Tensor | None],
    *,
    up: Tensor | None = None,
    kind: str = "",
    norm: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """What layers read, in planes (N, 8, in / 8) of x's dtype, and A x of each, side by side (N, ΣR) fp32; no gradient.

    x         (N, in), `in` a multiple of 64; it is what is read, or what `norm` norms, or `up` multiplies when gated
    a         (R, in) fp32 of up to three layers, None where one has no pair
    up, kind  (N, in), the gated activation; as in `project`, like norm, eps, plus_one

    Runs on a GPU, or in the interpreter.
    """
    assert len(a) <= MOST_LAYERS and x.shape[1] % BLOCK == 0, "layers of one block share an input"
    rows, inputs = x.shape
    x, up = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (x, up))
    a = [*a, *[None] * (MOST_LAYERS - len(a))]
    ranks = [0 if pair is None else len(pair) for pair in a]
    planes, waist = x.new_empty(rows, 8, inputs // 8), x.new_empty(rows, sum(ranks), dtype=torch.float32)
    pairs = [waist if pair is None else pair for pair in a]  # what is not there is not read
    source = "norm" if norm is not None else "gated" if up is not None else "plain"
    block = power_of_two(inputs) if norm is not None else min(power_of_two(inputs), 4096)
    _few_inputs_kernel[(max(sum(ranks), 1), rows)](
        x, x if up is None else up, x if norm is None else norm, *pairs, planes, waist,
        x.stride(0), x.stride(0) if up is None else up.stride(0), inputs, sum(ranks), *ranks[:2], eps,
        source, kind, plus_one, INTERPRETED, block, num_warps=min(max(block // 512, 4), 16),
    )  # fmt: skip
    return planes, waist


def nf4_products_reference(
    x: Tensor, waist: Tensor, weights: Sequence[NF4], b: Sequence[Tensor | None], scales: Sequence[float],
    bias: Sequence[Tensor | None], residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The definition of correct for `nf4_products`; x (N, in) as it was before it was laid in planes."""
    outputs, column = [], 0
    for weight, b_, scale, bias_ in zip(weights, b, scales, bias, strict=True):
        y = x.float() @ dequantize_nf4_reference(weight, torch.float32).T
        if b_ is not None:
            y += F.linear(waist[:, column : column + b_.shape[1]], b_) * scale
            column += b_.shape[1]
        y += 0 if bias_ is None else bias_.float()
        outputs.append((y if residual is None else y + residual.float()).to(x.dtype))
    return outputs


@jit
def _own_value(values_ptr):
    """One of the 16 values in each lane of a warp, lane l holding the (l mod 16)-th: no number to Triton's mind, but
    what `_look_up` hands on.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane;
        .reg .u64 at;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mad.wide.u32 at, lane, 4, $1;
        ld.global.nc.f32 $0, [at];
        }""",
        "=f,l", [values_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _look_up(words, values_ptr, own, INTERPRET: tl.constexpr):
    """The values of the eight codes of each word, in order: in a byte the first code is the high half.

    A shuffle reads the lane that the lowest five bits name. The four of a code and one of its neighbour name the lane
    that holds the value or the one 16 above or below it, which holds it too. All lanes of a warp must come here.
    """
    if INTERPRET:  # there are no lanes
        return (
            tl.load(values_ptr + ((words >> 4) & 15)), tl.load(values_ptr + (words & 15)),
            tl.load(values_ptr + ((words >> 12) & 15)), tl.load(values_ptr + ((words >> 8) & 15)),
            tl.load(values_ptr + ((words >> 20) & 15)), tl.load(values_ptr + ((words >> 16) & 15)),
            tl.load(values_ptr + ((words >> 28) & 15)), tl.load(values_ptr + ((words >> 24) & 15)),
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 code;
        shr.u32 code, $8, 4;
        shfl.sync.idx.b32 $0, $9, code, 31, -1;
        shfl.sync.idx.b32 $1, $9, $8, 31, -1;
        shr.u32 code, $8, 12;
        shfl.sync.idx.b32 $2, $9, code, 31, -1;
        shr.u32 code, $8, 8;
        shfl.sync.idx.b32 $3, $9, code, 31, -1;
        shr.u32 code, $8, 20;
        shfl.sync.idx.b32 $4, $9, code, 31, -1;
        shr.u32 code, $8, 16;
        shfl.sync.idx.b32 $5, $9, code, 31, -1;
        shr.u32 code, $8, 28;
        shfl.sync.idx.b32 $6, $9, code, 31, -1;
        shr.u32 code, $8, 24;
        shfl.sync.idx.b32 $7, $9, code, 31, -1;
        }""",
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f", [words, own],
        dtype=(tl.float32,) * 8, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _matvec_kernel(
    planes_ptr, waist_ptr, residual_ptr, y_ptr,
    codes0_ptr, codes1_ptr, codes2_ptr, absmax0_ptr, absmax1_ptr, absmax2_ptr,
    nested0_ptr, nested1_ptr, nested2_ptr, offset0_ptr, offset1_ptr, offset2_ptr,
    b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, values_ptr, dynamic_ptr,
    outputs0, outputs1, outputs2, rank0, rank1, rank2, scale0, scale1, scale2, inputs, rows, width, waist,
    NESTED: tl.constexpr, UPDATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, INTERPRET: tl.constexpr,
    RANK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one of the layers, for N inputs. A lane takes a half block, 32 codes in 16 bytes, of every row,
    and sums what it multiplies, to the end. Tiles begin with the halves, so that Triton lays these along the lanes.
    """
    FOUR: tl.constexpr = BLOCK // 16
    program = tl.program_id(0)
    end0 = tl.cdiv(outputs0, ROWS)
    end1 = end0 + tl.cdiv(outputs1, ROWS)
    layer = (program >= end0).to(tl.int32) + (program >= end1).to(tl.int32)
    outputs = _pick(layer, outputs0, outputs1, outputs2)
    row = (program - _pick(layer, 0, end0, end1)) * ROWS + tl.arange(0, ROWS)
    to = _pick(layer, 0, outputs0, outputs0 + outputs1) + row
    codes_ptr = _pick(layer, codes0_ptr, codes1_ptr, codes2_ptr)
    absmax_ptr = _pick(layer, absmax0_ptr, absmax1_ptr, absmax2_ptr)
    nested_ptr = _pick(layer, nested0_ptr, nested1_ptr, nested2_ptr)
    if NESTED:
        offset = tl.load(_pick(layer, offset0_ptr, offset1_ptr, offset2_ptr))
    n, half, word = tl.arange(0, N), tl.arange(0, HALVES), tl.arange(0, FOUR)
    own = values_ptr if INTERPRET else _own_value(values_ptr)
    per_row = inputs // BLOCK  # blocks; fewer than 2^31 in a weight
    total = tl.zeros((HALVES, ROWS, N), tl.float32)
    for begin in range(0, 2 * per_row, HALVES):
        inside = begin + half < 2 * per_row
        held = (row[None, :] < outputs) & inside[:, None]
        place = begin * FOUR + half[:, None] * FOUR + word[None, :]
        words_at = codes_ptr + (row * per_row * (2 * FOUR))[None, :, None] + place[:, None, :]
        value = _look_up(tl.load(words_at, mask=held[:, :, None], other=0), values_ptr, own, INTERPRET)
        index = (row * per_row)[None, :] + ((begin + half) // 2)[:, None]
        scale = tl.load(absmax_ptr + index, mask=held, other=0)
        if NESTED:
            nested = tl.load(nested_ptr + index // 256, mask=held, other=0.0)
            scale = tl.where(held, tl.load(dynamic_ptr + scale.to(tl.int32)) * nested + offset, 0.0)
        for i in tl.static_range(N):
            sums = tl.zeros((HALVES, ROWS, FOUR), tl.float32)
            for j in tl.static_range(8):
                x_at = planes_ptr + i * inputs + j * (per_row * 2 * FOUR) + place
                x = tl.load(x_at, mask=inside[:, None] & (i < rows), other=0.0).to(tl.float32)
                sums += value[j] * x[:, None, :]
            more = total + (tl.sum(sums, 2) * scale)[:, :, None]
            total = tl.where((n == i)[None, None, :], more, total)  # the choice is made when this is compiled
    y = tl.trans(tl.sum(total, 0))
    if UPDATE:
        rank, r = _pick(layer, rank0, rank1, rank2), tl.arange(0, RANK)
        first = _pick(layer, 0, rank0, rank0 + rank1)
        b_at = _pick(layer, b0_ptr, b1_ptr, b2_ptr) + row[:, None] * rank + r[None, :]
        b = tl.load(b_at, mask=(row[:, None] < outputs) & (r[None, :] < rank), other=0.0).to(tl.float32)
        thin_at = waist_ptr + n[:, None] * waist + first + r[None, :]
        thin = tl.load(thin_at, mask=(n[:, None] < rows) & (r[None, :] < rank), other=0.0)
        y += tl.sum(thin[:, None, :] * b[None, :, :], 2) * _pick(layer, scale0, scale1, scale2)
    if BIAS:
        bias = tl.load(_pick(layer, bias0_ptr, bias1_ptr, bias2_ptr) + row, mask=row < outputs, other=0.0)
        y += bias.to(tl.float32)[None, :]
    inside = (n[:, None] < rows) & (row[None, :] < outputs)
    if RESIDUAL:
        y += tl.load(residual_ptr + n[:, None] * width + to[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + n[:, None] * width + to[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def _tile(inputs: int, rows: int) -> tuple[int, int]:
    """(outputs of a program, warps) for a power of two of rows. A warp reads 1024 values of each output at a time."""
    outputs = {1: 8, 2: 4, 4: 4, 8: 2}[rows]  # more of them, and registers leave a multiprocessor too few warps
    return outputs, next((warps for warps in (4, 2) if inputs % (1024 * warps) == 0), 1)


def nf4_products(
    planes: Tensor,
    waist: Tensor,
    weights: Sequence[NF4],
    b: Sequence[Tensor | None],
    scales: Sequence[float],
    bias: Sequence[Tensor | None],
    residual: Tensor | None = None,
) -> list[Tensor]:
    """x Wᵀ + scale · waist Bᵀ + bias + residual of up to three layers, (N, out) each, in x's dtype; no gradient.

    planes, waist  the input of `few_inputs`, N ≤ MOST_VECTORS, and A x of those layers that have a pair
    b              (out, R) fp32, None where a layer has no pair
    bias           (out,), None where a layer has none
    residual       (N, out), with a single layer

    The outputs are parts of one tensor (N, Σ out), in order. Runs on a GPU, or in the interpreter.
    """
    rows, outputs = len(planes), [weight.shape[0] for weight in weights]
    assert residual is None or len(weights) == 1, "a residual belongs to a single layer"
    y = planes.new_empty(rows, sum(outputs))
    found = list(y.split(outputs, dim=1))
    kinds = [(w.absmax.dtype, None if t is None else t.dtype) for w, t in zip(weights, bias, strict=True)]
    if len(set(kinds)) > 1:  # of another kind: what one launch takes is alike
        column = 0
        for part, weight, b_, scale, bias_ in zip(found, weights, b, scales, bias, strict=True):
            rank = 0 if b_ is None else b_.shape[1]
            own = waist[:, column : column + rank].contiguous()
            part.copy_(nf4_products(planes, own, [weight], [b_], [scale], [bias_])[0])
            column += rank
        return found
    residual = None if residual is None else residual.contiguous()  # the kernel reads it with the strides of y
    inputs, missing = 8 * planes.shape[2], MOST_LAYERS - len(weights)
    ranks = [0 if pair is None else pair.shape[1] for pair in b] + [0] * missing
    tensors = [_kernel_tensors(weight) for weight in weights] + [_kernel_tensors(weights[0])] * missing
    codes, absmax, nested, offset = zip(*(four[:4] for four in tensors), strict=True)
    pairs = [waist if pair is None else pair for pair in (*b, *[None] * missing)]  # what is not there is not read
    added = [waist if part is None else part for part in (*bias, *[None] * missing)]
    added[len(weights) :] = added[:1] * missing
    size = power_of_two(rows)
    per_program, warps = _tile(inputs, size)
    _matvec_kernel[(sum(-(-out // per_program) for out in outputs),)](
        planes, waist, y if residual is None else residual, y,
        *(part.view(torch.int32) for part in codes), *absmax, *nested, *offset, *pairs, *added, *tensors[0][4:],
        *outputs, *[0] * missing, *ranks, *map(float, scales), *[0.0] * missing, inputs, rows, y.shape[1], sum(ranks),
        weights[0].nested_absmax is not None, any(ranks), bias[0] is not None, residual is not None, INTERPRETED,
        max(power_of_two(max(ranks)), 1), size, per_program, 32 * warps, BLOCK, num_warps=warps,
    )  # fmt: skip
    return found


def nf4_matvec(x: Tensor, nf4: NF4, start: Tensor | None = None) -> Tensor:
    """start + x @ W.T for a few rows, read from the packed weight: x (N, in) -> (N, out) in x's dtype; no gradient.

    N ≤ MOST_VECTORS and `in` a multiple of 64; runs on a GPU, or in the interpreter.
    """
    planes, waist = few_inputs(x, [None])
    return nf4_products(planes, waist, [nf4], [None], [1.0], [None], start)[0]
