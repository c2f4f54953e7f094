"""The unquantized GGML types: every number for itself, little endian, rounded to nearest even.

All three take (rows, columns) in any floating dtype and give (rows, columns * width) uint8.
"""

import sys

import torch
from torch import Tensor

LARGEST_F16 = torch.finfo(torch.float16).max

# `Tensor.view` reinterprets bytes in the machine's order, and GGUF is little endian.
assert sys.byteorder == "little", "lumen writes GGUF on little-endian machines only"


def encode_f32(rows: Tensor) -> Tensor:
    return rows.to(torch.float32).contiguous().view(torch.uint8)


def decode_f32(data: Tensor) -> Tensor:
    return data.view(torch.float32)


def encode_f16(rows: Tensor) -> Tensor:
    return rows.to(torch.float16).contiguous().view(torch.uint8)


def decode_f16(data: Tensor) -> Tensor:
    return data.view(torch.float16).to(torch.float32)


def error_bound_f16(rows: Tensor) -> Tensor:
    """Half a unit in the last of 11 bits, or half the smallest number there is."""
    return rows.abs() * 2.0**-11 + 2.0**-25


def encode_bf16(rows: Tensor) -> Tensor:
    return rows.to(torch.bfloat16).contiguous().view(torch.uint8)


def decode_bf16(data: Tensor) -> Tensor:
    return data.view(torch.bfloat16).to(torch.float32)


def error_bound_bf16(rows: Tensor) -> Tensor:
    """Half a unit in the last of 8 bits, or half the smallest number there is."""
    return rows.abs() * 2.0**-8 + 2.0**-134
