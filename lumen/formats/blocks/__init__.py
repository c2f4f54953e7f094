"""How a row of numbers becomes the bytes of a GGML type, and back: one codec for each type, in one table.

A GGML type cuts every row into blocks of `block` numbers and stores each block in `size_bytes` bytes; a row whose
length is no multiple of `block` cannot be stored in it. A new type is three functions in a file of this folder and a
row here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumen.formats.blocks import legacy, plain


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One GGML type.

    encode       (rows, columns) floating point -> (rows, bytes of a row) uint8
    decode       the way back, to fp32
    error_bound  (rows, columns) fp32 -> how far `decode(encode(x))` may lie from each x
    exact_for    the dtypes whose every value survives unchanged
    largest      the largest magnitude that does not overflow
    """

    name: str
    number: int  # as it stands in a GGUF file
    block: int  # numbers in a block
    size_bytes: int  # bytes of a block
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    error_bound: Callable[[Tensor], Tensor]
    exact_for: tuple[torch.dtype, ...] = ()
    largest: float = math.inf

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` numbers; `columns` must be a multiple of `block`."""
        assert columns % self.block == 0, (self.name, columns)
        return columns // self.block * self.size_bytes


CODECS = {
    codec.name: codec
    for codec in (
        Codec(
            name="f32",
            number=0,
            block=1,
            size_bytes=4,
            encode=plain.encode_f32,
            decode=plain.decode_f32,
            error_bound=torch.zeros_like,
            exact_for=(torch.float32, torch.float16, torch.bfloat16),
        ),
        Codec(
            name="f16",
            number=1,
            block=1,
            size_bytes=2,
            encode=plain.encode_f16,
            decode=plain.decode_f16,
            error_bound=plain.error_bound_f16,
            exact_for=(torch.float16,),
            largest=plain.LARGEST_F16,
        ),
        Codec(
            name="bf16",
            number=30,
            block=1,
            size_bytes=2,
            encode=plain.encode_bf16,
            decode=plain.decode_bf16,
            error_bound=plain.error_bound_bf16,
            exact_for=(torch.bfloat16,),
        ),
        Codec(
            name="q8_0",
            number=8,
            block=legacy.BLOCK,
            size_bytes=2 + legacy.BLOCK,
            encode=legacy.encode_q8_0,
            decode=legacy.decode_q8_0,
            error_bound=legacy.error_bound_q8_0,
            largest=127 * plain.LARGEST_F16,
        ),
    )
}
