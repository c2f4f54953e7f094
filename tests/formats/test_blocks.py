"""The GGML codecs against ggml itself, and against the `gguf` package's independent decoder."""

import gguf
import numpy as np
import pytest
import torch
from llama_cpp import quantize_chunk

from lumen.formats.blocks import CODECS

TYPES = list(CODECS)


def _hard_rows() -> dict[str, torch.Tensor]:
    """(rows, 64) fp32 whose codes sit where rounding goes wrong."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 64, generator=generator)
    halves = torch.arange(64, dtype=torch.float32).repeat(4, 1) - 31.5
    halves[:, ::32] = 127.0  # the scale becomes 1, so every code lies halfway between two whole numbers
    halves[1], halves[2] = -halves[0], halves[0].nextafter(torch.tensor(0.0))
    spike = normal[:8] * 1e-3
    spike[:, 5] = 900.0
    return {
        "normal": normal,
        "bf16": normal.to(torch.bfloat16).float(),
        "tiny": normal * 1e-6,
        "huge": normal * 1e4,
        "halves": halves,
        "one outlier": spike,
        "zeros": torch.zeros(2, 64),
        "one value": torch.full((2, 64), -0.3),
        "subnormal scale": normal[:4] * 1e-5,
    }


ROWS = _hard_rows()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_those_of_ggml(name, rows):
    codec = CODECS[name]
    assert codec.encode(rows).numpy().tobytes() == quantize_chunk(codec.number, rows)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", TYPES)
def test_decoded_values_equal_those_of_the_gguf_package(name, rows):
    codec = CODECS[name]
    encoded = codec.encode(rows)
    kind = gguf.GGMLQuantizationType(codec.number)
    assert np.array_equal(codec.decode(encoded).numpy(), gguf.dequantize(encoded.numpy(), kind))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", TYPES)
def test_decoded_values_lie_within_the_error_bound(name, rows):
    codec = CODECS[name]
    error = (codec.decode(codec.encode(rows)) - rows).abs()
    assert (error <= codec.error_bound(rows)).all()


@pytest.mark.parametrize("name", TYPES)
def test_error_bound_is_no_larger_than_four_times_the_error_seen(name):
    codec = CODECS[name]
    rows = ROWS["normal"]
    error = (codec.decode(codec.encode(rows)) - rows).abs().max()
    assert codec.error_bound(rows).max() <= 4 * error


@pytest.mark.parametrize("name", TYPES)
def test_dtypes_called_exact_come_back_bit_for_bit(name):
    codec = CODECS[name]
    for dtype in codec.exact_for:
        rows = ROWS["normal"].to(dtype)
        assert torch.equal(codec.decode(codec.encode(rows)).to(dtype), rows)


@pytest.mark.parametrize("name", TYPES)
def test_block_and_byte_sizes_are_those_of_the_gguf_package(name):
    codec = CODECS[name]
    assert (codec.block, codec.size_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(codec.number)]


@pytest.mark.parametrize("name", ["f16", "q8_0"])
def test_largest_value_stays_finite_and_twice_that_does_not(name):
    codec = CODECS[name]
    rows = torch.full((1, 32), codec.largest)
    assert codec.decode(codec.encode(rows)).isfinite().all()
    assert not codec.decode(codec.encode(rows * 2)).isfinite().all()
