"""Triton where there is one: a guarded import; without it every file of `ops` imports, and every reference runs.

A kernel runs on a GPU, or on the CPU in Triton's interpreter where `TRITON_INTERPRET=1` was set before the first
import: that is how its arithmetic is tested without a GPU. The interpreter cannot round to bfloat16 and multiplies
bfloat16 tiles as integers, so kernels widen what they load to fp32, and `dot` widens the tiles of a product there.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit: Callable = triton.jit
except ImportError:  # the CPU build of PyTorch comes without: the references serve

    class _Absent:
        """Stands in the place of `triton.language` in annotations and in the bodies that nobody runs."""

        def __getattr__(self, name: str) -> object:
            return None

    triton, tl = None, _Absent()

    def jit(function: Callable) -> Callable:
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def implementations(tensor: Tensor) -> dict[str, str]:
    """What `choice` is asked with where the kernel is exact for every call; the interpreter runs only if forced."""
    reference = {"reference": "the definition, in plain PyTorch"}
    if triton is None or not (tensor.is_cuda or INTERPRETED):
        return reference
    kernel = {"triton": "a fused kernel, exact for every call"}
    return kernel | reference if tensor.is_cuda else reference | kernel


def power_of_two(width: int) -> int:
    """The least power of two that is not below `width`: the shape of a tile that holds a row."""
    return 1 << max(width - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a few where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take: 227 KB on an H100, 163 on an A100, 99 on an RTX 4090."""
    return 2**20 if device.type == "cpu" else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b with fp32 sums; fp32 tiles are multiplied in full precision."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 numbers in `dtype`, two at a time where it is bfloat16.

    Triton rounds one at a time, which is done by the unit for transcendental functions: 16 a cycle and multiprocessor,
    and kernels that round and take exponentials wait for it.
    """
    if INTERPRET:
        return x.to(dtype)
    elif dtype == tl.bfloat16:
        pair: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(pair, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return x.to(dtype)


@jit
def sigmoid(x, INTERPRET: tl.constexpr):
    """1 / (1 + exp(−x)) of fp32 numbers, to 2⁻²²; exp and reciprocal without what serves numbers below 2⁻¹²⁶."""
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        code: tl.constexpr = (
            "{ .reg .f32 e; mul.ftz.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; "  # −log₂ e
            "add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }"
        )
        return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
