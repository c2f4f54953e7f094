"""The GGML types of 32 numbers to a block with one scale, named `qN_0`.

q8_0 is 34 bytes: the scale d as f16, then 32 signed bytes q; a number is q * d. The bytes equal those of ggml's
`quantize_row_q8_0_ref`, which fixes the order of the roundings: d = max|x| / 127 in fp32, q = round(x * (1 / d)) with
that d and halves away from zero, and only then is d rounded to f16.
"""

import torch
from torch import Tensor

BLOCK = 32


def encode_q8_0(rows: Tensor) -> Tensor:
    """(rows, columns) floating -> (rows, columns / 32 * 34) uint8."""
    blocks = rows.to(torch.float32).reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127  # (blocks, 1)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    codes = _round_half_away(blocks * inverse).to(torch.int8)
    encoded = torch.cat([scale.to(torch.float16).view(torch.uint8), codes.view(torch.uint8)], dim=1)
    return encoded.view(rows.shape[0], -1)


def decode_q8_0(data: Tensor) -> Tensor:
    """(rows, columns / 32 * 34) uint8 -> (rows, columns) fp32."""
    blocks = data.reshape(-1, 2 + BLOCK)
    scale = blocks[:, :2].contiguous().view(torch.float16).to(torch.float32)
    return (blocks[:, 2:].view(torch.int8) * scale).view(data.shape[0], -1)


def error_bound_q8_0(rows: Tensor) -> Tensor:
    """Half a step for the code, and 127 times what the scale lost in becoming an f16."""
    largest = rows.reshape(-1, BLOCK).abs().amax(dim=1, keepdim=True)
    bound = largest * (0.5 / 127 + 2.0**-11) * 1.001 + 127 * 2.0**-25  # 1.001: the fp32 roundings on the way
    return bound.expand(-1, BLOCK).reshape(rows.shape)


def _round_half_away(x: Tensor) -> Tensor:
    """C's `roundf`; torch.round sends halves to the even neighbour. x - trunc(x) is exact, x + 0.5 would not be."""
    whole = x.trunc()
    return torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)
