"""A few rows times weights that stay packed: two kernels against what they stand for, and the look-up bit by bit."""

import random as chance
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels import needs_triton, random, relative_error

from lumen.ops import nf4_matvec as module
from lumen.ops.nf4 import NF4_VALUES, dequantize_nf4, nf4_scales, quantize_nf4
from lumen.ops.nf4_matvec import (
    few_inputs,
    few_inputs_reference,
    nf4_matvec,
    nf4_products,
    nf4_products_reference,
)

SOURCES = {
    "plain": lambda rows, width: {},
    "norm": lambda rows, width: {"norm": random(width, learns=False), "eps": 1e-5},
    "plus one": lambda rows, width: {"norm": random(width, learns=False), "eps": 1e-5, "plus_one": True},
    # up is a part of a wider tensor, as the product before leaves it
    **{
        kind: lambda rows, width, kind=kind: {"up": random(rows, 2 * width, learns=False)[:, width:], "kind": kind}
        for kind in ("silu", "gelu", "gelu_tanh")
    },
}


def pairs(inputs, outputs, ranks):
    a = [random(rank, inputs, seed=i, learns=False) if rank else None for i, rank in enumerate(ranks)]
    b = [
        random(out, rank, seed=i, learns=False) if rank else None
        for i, (out, rank) in enumerate(zip(outputs, ranks, strict=True))
    ]
    return a, b


@needs_triton
@pytest.mark.parametrize("ranks", [(4,), (0, 5, 3), (2, 0, 1), (0, 2), (0,), (0, 0, 0)], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "source"), [
    (1, 4160, "plain"), (3, 320, "norm"), (1, 64, "plus one"), (1, 4160, "silu"), (2, 64, "gelu"), (2, 64, "gelu_tanh"),
])  # fmt: skip
def test_few_inputs_match_their_reference(rows, inputs, source, ranks):
    x, options = random(rows, 2 * inputs, learns=False)[:, :inputs], SOURCES[source](rows, inputs)
    a, _ = pairs(inputs, [1] * len(ranks), ranks)
    for one, other in zip(few_inputs(x, a, **options), few_inputs_reference(x, a, **options), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert relative_error(one, other) <= 2e-6


@needs_triton
@pytest.mark.parametrize("ranks", [(4,), (16, 16, 16), (0, 5, 3), (7, 0, 1), (2, 0), (40,), (0, 0, 0)], ids=str)
def test_products_match_their_reference(ranks):
    """More than one tile of inputs and no whole one, outputs that no program comes out even with."""
    assert_products_match(1, 1088, [19, 8, 3][: len(ranks)], ranks)


@needs_triton
@pytest.mark.parametrize(("rows", "ranks"), [(2, (0, 5, 3)), (3, (7,)), (4, (1, 2)), (7, (3,)), (8, (2, 0, 9))])
def test_products_of_several_rows_match_their_reference(rows, ranks):
    assert_products_match(rows, 64, [5, 2, 1][: len(ranks)], ranks)


def assert_products_match(rows, inputs, outputs, ranks):
    weights = [quantize_nf4(random(out, inputs, seed=i, learns=False)) for i, out in enumerate(outputs)]
    a, b = pairs(inputs, outputs, ranks)
    x = random(rows, inputs, learns=False)
    planes, waist = few_inputs_reference(x, a)
    bias = [random(out, learns=False) if ranks[0] else None for out in outputs]
    residual = random(rows, outputs[0], learns=False) if len(ranks) == 1 else None
    rest = weights, b, [0.7, 2.0, 1.0][: len(ranks)], bias, residual
    found, wanted = nf4_products(planes, waist, *rest), nf4_products_reference(x, waist, *rest)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and relative_error(one, other) <= 2e-6


@needs_triton
def test_layers_that_are_stored_differently_share_an_input_all_the_same():
    """Scales of one weight quantized, of the next not; a bias here and none there."""
    outputs, inputs = [19, 8, 3], 192
    weights = [quantize_nf4(random(out, inputs, seed=i, learns=False)) for i, out in enumerate(outputs)]
    weights[1] = replace(weights[1], absmax=nf4_scales(weights[1]), nested_absmax=None, offset=None)
    a, b = pairs(inputs, outputs, (3, 2, 5))
    x, bias = random(2, inputs, learns=False), [random(19, learns=False), None, None]
    planes, waist = few_inputs(x, a)
    rest = weights, b, [0.7, 2.0, 1.0], bias
    found, wanted = nf4_products(planes, waist, *rest), nf4_products_reference(x, waist, *rest)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) <= 2e-6


@needs_triton
def test_what_lies_apart_in_memory_is_read_as_what_it_is():
    """Inputs whose columns are not neighbours, a residual that is a part of a wider tensor."""
    weight = quantize_nf4(random(19, 128, learns=False))
    x, up = (random(128, 3, seed=seed, learns=False).T for seed in (1, 2))
    residual = random(3, 40, learns=False)[:, 5:24]
    planes, _ = few_inputs(x, [None], up=up, kind="silu")
    assert relative_error(planes, few_inputs_reference(x, [None], up=up, kind="silu")[0]) <= 2e-6
    wanted = x @ dequantize_nf4(weight, torch.float32).T + residual
    assert relative_error(nf4_matvec(x, weight, residual), wanted) <= 2e-6


@needs_triton
def test_bf16_is_rounded_once():
    """The interpreter cuts a result off to bf16 where a GPU rounds: at most 2⁻⁷ of it, on average half of that."""
    weight, (a, b) = quantize_nf4(random(40, 320, learns=False)), pairs(320, [40], (4,))
    x, residual = random(2, 320, learns=False).bfloat16(), random(2, 40, learns=False).bfloat16()
    planes, waist = few_inputs(x, a)
    assert relative_error(waist, few_inputs_reference(x, a)[1]) <= 2e-6
    [found] = nf4_products(planes, waist, [weight], b, [2.0], [None], residual)
    [wanted] = nf4_products_reference(x, waist, [weight], b, [2.0], [None], residual)
    assert found.dtype == torch.bfloat16 and relative_error(found, wanted) <= 2**-7


def every_byte(rows):
    """A weight (rows, 256), of which each two rows hold all bytes."""
    nf4 = quantize_nf4(torch.ones(rows, 256))
    codes = torch.arange(rows * 128).to(torch.uint8)  # 128 bytes a row
    return replace(nf4, codes=codes, absmax=torch.ones(4 * rows), nested_absmax=None, offset=None)


def assert_codes_are_looked_up_exactly(device, rows, columns):
    nf4 = every_byte(rows).to(device)
    weight = dequantize_nf4(nf4, torch.float32)
    picked = torch.eye(256, device=device)
    for begin in range(0, columns, 8):
        assert torch.equal(nf4_matvec(picked[begin : begin + 8], nf4), weight[:, begin : begin + 8].T)


@needs_triton
def test_codes_are_looked_up_exactly_and_in_their_order():
    assert_codes_are_looked_up_exactly("cpu", 2, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_looks_up_all_256_bytes_exactly():
    assert_codes_are_looked_up_exactly("cuda", 256, 256)


def machine(words: list[int], values: list[float]) -> list[list[float]]:
    """What the lanes of a warp, each with a word, make of the code that a GPU runs, by the book: PTX ISA 8, `shfl`."""
    source = Path(module.__file__).read_text("utf-8").split("def _look_up")[1].split("\n@jit")[0]
    steps = re.findall(r"^ +(shr\.u32|shfl\.sync\.idx\.b32) (.*);$", source, re.MULTILINE)
    lanes = [{"$8": word, "$9": value} for word, value in zip(words, values, strict=True)]
    for step, operands in steps:
        target, source_, b, *more = operands.split(", ")
        if step == "shr.u32":
            made = [lane[source_] >> int(b) for lane in lanes]
        else:
            clamp, mask = int(more[0]) & 31, int(more[0]) >> 8 & 31
            made = []
            for number, lane in enumerate(lanes):
                read = number & mask | lane[b] & 31 & ~mask
                made.append(lanes[read if read <= (number & mask | clamp & ~mask) else number][source_])
        for lane, result in zip(lanes, made, strict=True):
            lane[target] = result
    return [[lane[f"${place}"] for place in range(8)] for lane in lanes]


def test_the_code_of_the_look_up_finds_both_values_of_every_byte_in_every_place():
    source = chance.Random(0)
    values = [NF4_VALUES[lane % 16] for lane in range(32)]  # as `_own_value` deals them out
    for byte in range(256):
        rows = [[source.randrange(256) for _ in range(4)] for _ in range(32)]
        for lane, row in enumerate(rows):
            row[lane % 4] = byte
        wanted = [[NF4_VALUES[code] for one in row for code in (one >> 4, one & 15)] for row in rows]
        assert machine([int.from_bytes(bytes(row), "little") for row in rows], values) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("inputs", "outputs", "source"), [
    (4096, (1024, 256, 260), "norm"), (14336, (520,), "silu"), (2112, (33, 70), "plain"),
])  # fmt: skip
def test_a_gpu_matches_the_references(inputs, outputs, source, rows, dtype):
    """fp32 sums in another order; in bf16 a rounding of the inputs or the result may fall to the other side."""
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    options = {
        name: option.to("cuda", dtype) if isinstance(option, torch.Tensor) else option
        for name, option in SOURCES[source](rows, inputs).items()
    }
    x = random(rows, inputs, learns=False).to("cuda", dtype)
    weights = [quantize_nf4(random(out, inputs, seed=i, learns=False)).to("cuda") for i, out in enumerate(outputs)]
    a, b = ([part.cuda() for part in group] for group in pairs(inputs, outputs, (16,) * len(outputs)))
    planes, waist = few_inputs(x, a, **options)
    for one, other in zip((planes, waist), few_inputs_reference(x, a, **options), strict=True):
        assert relative_error(one, other) <= tolerance
    residual = random(rows, outputs[0], seed=3, learns=False).to("cuda", dtype) if len(outputs) == 1 else None
    rest = weights, b, [2.0] * len(outputs), [None] * len(outputs), residual
    laid_back = planes.transpose(1, 2).reshape(rows, inputs)
    found, wanted = nf4_products(planes, waist, *rest), nf4_products_reference(laid_back, waist, *rest)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype and relative_error(one, other) <= tolerance
