"""NF4 (QLoRA, Dettmers et al., arXiv 2305.14314): a frozen weight in 4 bits a value, a scale for every 64 values.

The weight is read row by row as one list of n values, cut into blocks of 64. In a block with largest magnitude s:

    code   = index of the NF4 value nearest to w / s            4 bits; two codes in a byte, the first one high
    w      ~ NF4[code] * s

The scales are stored the same way ("double quantization"), in blocks of 256 and with a data type of 256 values.
In a block with largest |s - offset| t:

    offset = mean of all s
    code   = index of the DYNAMIC value nearest to (s - offset) / t                                        8 bits
    s      ~ DYNAMIC[code] * t + offset

That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits a value. Codes, scales and dequantized values are bit-equal to those of
bitsandbytes 0.50 on the CPU, so a weight quantized here is the weight that other programs see. All is computed in
fp32; only the dequantized weight is rounded to the asked dtype.

`nf4_linear` keeps no dequantized weight for the backward pass: the weight is unpacked once more there.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen.errors import KernelError

BLOCK = 64
NESTED_BLOCK = 256
LEAST_SCALE = 1e-38  # its inverse is finite; a block of zeros gets the code of zero, 7

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, eq=False)
class NF4:
    """A quantized weight of n values; its tensors lie on one device and bear the names of bitsandbytes."""

    codes: Tensor  # uint8 (ceil(n / 2),), the first of two values in the high nibble
    absmax: Tensor  # uint8 (ceil(n / 64),), codes of the scales
    nested_absmax: Tensor  # fp32 (ceil(n / 64 / 256),), the scales' own scales
    offset: Tensor  # fp32 (), the mean scale
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before, and of the dequantized one unless another is asked for

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.absmax, self.nested_absmax, self.offset))

    def to(self, device: torch.device | str) -> "NF4":
        tensors = ("codes", "absmax", "nested_absmax", "offset")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> NF4:
    """The weight (any shape, fp32 / bf16 / fp16) in NF4 with double quantization, on the weight's device.

    Takes about 12 bytes a value while it runs. A weight that holds NaN or infinity is refused with a KernelError.
    """
    scaled, scales = _scale(weight.flatten().float())
    offset = scales.mean()
    if not offset.isfinite():
        raise KernelError(f"NF4 wants finite values, found NaN or infinity in {tuple(weight.shape)}. Is it damaged?")
    codes = torch.bucketize(scaled, _midpoints(_nf4(weight.device)), out_int32=True).to(torch.uint8).flatten()
    codes = codes[: weight.numel() + weight.numel() % 2]
    nested = _blocks(scales - offset, NESTED_BLOCK)
    nested_scales = nested.abs().amax(dim=1)
    return NF4(
        codes=codes[0::2] << 4 | codes[1::2],
        absmax=_dynamic_codes(nested, nested_scales).flatten()[: scales.numel()],
        nested_absmax=nested_scales,
        offset=offset,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def dequantize_nf4(nf4: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """The weight, `nf4.shape`, in `dtype` (None: the dtype it had), on the device of `nf4`."""
    # Measured on a CPU: one look-up of a pair for each byte takes a third of the time of shifts and two look-ups.
    pairs = _byte_values(nf4.codes.device).index_select(0, nf4.codes.int())
    values = _blocks(pairs.view(torch.float32), BLOCK).mul_(_scales(nf4)[:, None])
    return values.flatten()[: math.prod(nf4.shape)].view(nf4.shape).to(dtype or nf4.dtype)


def nf4_linear(x: Tensor, nf4: NF4) -> Tensor:
    """x @ W.T for a frozen W of shape (out, in): (…, in) -> (…, out), in x's dtype. Saves neither x nor W."""
    return _NF4Linear.apply(x, nf4)


class _NF4Linear(torch.autograd.Function):
    """y = x @ W.T, grad_x = grad_y @ W; W is unpacked in each direction and freed at once."""

    @staticmethod
    def forward(ctx, x: Tensor, nf4: NF4) -> Tensor:
        ctx.nf4 = nf4
        return F.linear(x, dequantize_nf4(nf4, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantize_nf4(ctx.nf4, grad.dtype), None


def _blocks(values: Tensor, size: int) -> Tensor:
    """(n,) -> (blocks, size), the last block filled up with zeros; a view when there is nothing to fill."""
    missing = -values.numel() % size
    return (F.pad(values, (0, missing)) if missing else values).view(-1, size)


def _scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) -> values in [-1, 1] (blocks, 64), the last block filled up with zeros, and the scales (blocks,)."""
    blocks = _blocks(values, BLOCK)
    scales = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / scales.clamp(min=LEAST_SCALE))[:, None]
    if values.numel() % BLOCK:  # bitsandbytes treats the block it has to fill up a little differently
        scales[-1].clamp_(min=LEAST_SCALE)
        scaled[-1] = blocks[-1] / scales[-1]
    return scaled, scales


def _dynamic_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """Nearest DYNAMIC values, uint8, to the nearest of 65536 even steps over [-1, 1]; a block of zeros has code 0.

    The steps and the zeros are what bitsandbytes' CPU code does: it looks the codes up in a table.
    """
    scaled = (blocks * (1 / scales)[:, None]).nan_to_num(nan=-1.0)
    steps = torch.floor((scaled + 1) * 32767.5 + 0.5)
    midpoints = _midpoints(_dynamic(blocks.device))
    return torch.bucketize(steps * (2 / 65535) - 1, midpoints, out_int32=True).to(torch.uint8)


def _scales(nf4: NF4) -> Tensor:
    """The blocks' scales (blocks,), fp32."""
    values = _blocks(_dynamic(nf4.absmax.device).index_select(0, nf4.absmax.int()), NESTED_BLOCK)
    return (values * nf4.nested_absmax[:, None] + nf4.offset).flatten()[: nf4.absmax.numel()]


def _midpoints(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


@cache
def _nf4(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, device=device)


@cache
def _byte_values(device: torch.device) -> Tensor:
    """(256,) int64, each the two fp32 values of one byte side by side: copying one word is copying both."""
    byte = torch.arange(256, device=device)
    pairs = torch.stack([_nf4(device)[byte >> 4], _nf4(device)[byte & 15]], dim=1)
    return pairs.contiguous().view(torch.int64).flatten()


@cache
def _dynamic(device: torch.device) -> Tensor:
    """(256,) fp32 ascending: the signed 8-bit dynamic data type (Dettmers et al., arXiv 2110.02861, section 2.1).

    The fewer bits the exponent takes, the more are left for the fraction: at 10^(e - 6), e in 0 … 6, there are 2^e
    fractions, the middles of as many equal parts of [0.1, 1]. Both signs of these, zero and one make 256.
    """
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    fractions = torch.cat([(edge[1:] + edge[:-1]) / 2 * 10.0 ** (e - 6) for e, edge in enumerate(edges)])
    return torch.cat([-fractions, torch.tensor([0.0, 1.0]), fractions]).sort().values.to(device)
