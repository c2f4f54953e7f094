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

Other programs' weights may come without double quantization: then the scales themselves are stored, in fp32.

`nf4_linear` keeps no dequantized weight for the backward pass: the weight is unpacked once more there.
"""

import math
import struct
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen.errors import KernelError
from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations, jit, tl

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
    """A quantized weight of n values; its tensors lie on one device and bear the names of bitsandbytes.

    `quantize_nf4` always quantizes the scales too. Where a weight was stored without that, `absmax` is the fp32 scales
    and the two tensors that would unpack them are None.
    """

    codes: Tensor  # uint8 (ceil(n / 2),), the first of two values in the high nibble
    absmax: Tensor  # (ceil(n / 64),): uint8, codes of the scales; or fp32, the scales
    nested_absmax: Tensor | None  # fp32 (ceil(n / 64 / 256),), the scales' own scales
    offset: Tensor | None  # fp32 (), the mean scale
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before, and of the dequantized one unless another is asked for

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors it is made of, by the names of the fields: four, or two where the scales are not quantized."""
        found = {name: getattr(self, name) for name in ("codes", "absmax", "nested_absmax", "offset")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "NF4":
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def rows(self, first: int, count: int) -> "NF4":
        """Rows `first` to `first + count`, to the bit: of a fused weight, one of the weights in it.

        The scales come out unquantized where the cut goes through a block of them. KernelError where it goes through a
        block of values.
        """
        width = math.prod(self.shape[1:])
        start, end = first * width, (first + count) * width
        if start % BLOCK or (end % BLOCK and end < math.prod(self.shape)):
            raise KernelError(
                f"NF4 wants rows cut between blocks of {BLOCK} values, found a cut at rows {first} to {first + count} "
                f"of shape {self.shape}. Load the 16-bit checkpoint and have it quantized here."
            )
        blocks = slice(start // BLOCK, -(-end // BLOCK))
        cut = replace(self, codes=self.codes[start // 2 : -(-end // 2)], shape=(count, *self.shape[1:]))
        if self.nested_absmax is None:
            return replace(cut, absmax=self.absmax[blocks])
        if blocks.start % NESTED_BLOCK:
            return replace(cut, absmax=nf4_scales(self)[blocks], nested_absmax=None, offset=None)
        nested = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
        return replace(cut, absmax=self.absmax[blocks], nested_absmax=self.nested_absmax[nested])


@uncompiled
@torch.no_grad()
def quantize_nf4(weight: Tensor, *, check: bool = True) -> NF4:
    """The weight (any shape, fp32 / bf16 / fp16) in NF4 with double quantization, on the weight's device.

    Takes about 12 bytes a value while it runs; on a GPU no more than the result, to the same bits. NaN or infinity is
    refused with a KernelError, for which one waits for the GPU; without `check`, `offset` is not finite then.
    """
    values = weight.flatten().contiguous()
    if choice("quantize_nf4", implementations(values)) == "reference":
        codes, scales = _pack_reference(values.float())
    else:
        codes, scales = _pack(values)
    offset = scales.mean()
    if check and not offset.isfinite():
        raise KernelError(f"NF4 wants finite values, found NaN or infinity in {tuple(weight.shape)}. Is it damaged?")
    nested = _blocks(scales - offset, NESTED_BLOCK)
    nested_scales = nested.abs().amax(dim=1)
    return NF4(
        codes=codes,
        absmax=_dynamic_codes(nested, nested_scales).flatten()[: scales.numel()],
        nested_absmax=nested_scales,
        offset=offset,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def _pack_reference(values: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of correct for `_pack`."""
    scaled, scales = _scale(values)
    codes = torch.bucketize(scaled, _midpoints(_nf4(values.device)), out_int32=True).to(torch.uint8).flatten()
    codes = codes[: values.numel() + values.numel() % 2]
    return codes[0::2] << 4 | codes[1::2], scales


@jit
def _pack_kernel(
    values_ptr, midpoints_ptr, codes_ptr, scales_ptr, numel,
    LEAST: tl.constexpr, WHOLE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GROUPS blocks of 64 values become 32 bytes each and a scale; the values are read once.

    LEAST  the bits of the least scale: as integers magnitudes keep their order, and NaN is above all numbers
    WHOLE  there is no incomplete block
    """
    first = tl.program_id(0).to(tl.int64) * GROUPS
    lane = tl.arange(0, GROUPS)
    value = lane[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    byte = lane[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    left = numel - first * BLOCK
    x = tl.load(values_ptr + first * BLOCK + value, mask=value < left, other=0.0).to(tl.float32)
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = top.to(tl.float32, bitcast=True)
    clamped = tl.maximum(top, LEAST).to(tl.float32, bitcast=True)
    scaled = x * tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), clamped)[:, None]
    if not WHOLE:
        filled = (lane + 1) * BLOCK <= left
        scale = tl.where(filled, scale, clamped)
        divided = tl.div_rn(x, tl.broadcast_to(clamped[:, None], (GROUPS, BLOCK)))
        scaled = tl.where(filled[:, None], scaled, divided)
    tl.store(scales_ptr + first + lane, scale, mask=lane * BLOCK < left)
    code = tl.zeros((GROUPS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        code += (scaled > tl.load(midpoints_ptr + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (GROUPS, BLOCK // 2, 2)))
    tl.store(codes_ptr + first * (BLOCK // 2) + byte, (high << 4 | low).to(tl.uint8), mask=byte * 2 < left)


def _pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) -> codes, uint8 (ceil(n / 2),), two to a byte, and the scales, fp32 (ceil(n / 64),)."""
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        values = values.float()
    numel, groups = values.numel(), 32
    codes = torch.empty(-(-numel // 2), dtype=torch.uint8, device=values.device)
    scales = torch.empty(-(-numel // BLOCK), dtype=torch.float32, device=values.device)
    least = struct.unpack("i", struct.pack("f", LEAST_SCALE))[0]
    _pack_kernel[(-(-numel // (BLOCK * groups)),)](
        values, _midpoints(_nf4(values.device)), codes, scales, numel,
        least, numel % BLOCK == 0, groups, BLOCK, num_warps=4,
    )  # fmt: skip
    return codes, scales


@uncompiled
def dequantize_nf4(nf4: NF4, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight, `nf4.shape`, in `dtype` (None: the dtype it had), on the device of `nf4`.

    out  of that shape and dtype, rows may lie apart: is written and returned; None makes a new tensor
    """
    dtype = dtype or nf4.dtype
    if choice("dequantize_nf4", implementations(nf4.codes)) == "reference":
        weight = dequantize_nf4_reference(nf4, dtype)
        return weight if out is None else out.copy_(weight)
    out = torch.empty(nf4.shape, dtype=dtype, device=nf4.codes.device) if out is None else out
    if out.ndim == 2 and out.stride(0) != out.shape[1] and out.shape[1] % BLOCK:
        return out.copy_(dequantize_nf4(nf4, dtype))  # blocks that run over the end of a row
    return _unpack(nf4, out)


def dequantize_nf4_reference(nf4: NF4, dtype: torch.dtype) -> Tensor:
    """The definition of correct for `dequantize_nf4`."""
    # Measured on a CPU: one look-up of a pair for each byte takes a third of the time of shifts and two look-ups.
    pairs = _byte_values(nf4.codes.device).index_select(0, nf4.codes.int())
    values = _blocks(pairs.view(torch.float32), BLOCK).mul_(nf4_scales(nf4)[:, None])
    return values.flatten()[: math.prod(nf4.shape)].view(nf4.shape).to(dtype)


@jit
def _unpack_kernel(
    codes_ptr, absmax_ptr, nested_ptr, offset_ptr, values_ptr, dynamic_ptr, out_ptr, numel, width, out_row,
    NESTED: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GROUPS blocks of 64 values: 32 bytes each become 64 values in their order.

    NESTED the scales are codes themselves; else `absmax` is the scales
    WHOLE  the programs come out even, no value is missing
    APART  the rows of `out` lie `out_row` apart, and hold whole blocks
    """
    first = tl.program_id(0).to(tl.int64) * GROUPS
    lane = tl.arange(0, GROUPS)
    byte = lane[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    value = lane[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes_at = codes_ptr + first * (BLOCK // 2) + byte
    nested_at = nested_ptr + (first + lane) // 256
    # the 16 values lie across the lanes of a warp, and are fetched from there
    values = tl.broadcast_to(tl.load(values_ptr + tl.arange(0, 16))[None, :], (GROUPS, 16))
    if WHOLE:
        pair = tl.load(codes_at).to(tl.int32)
        scale = tl.load(absmax_ptr + first + lane)
    else:
        left = numel - first * BLOCK
        pair = tl.load(codes_at, mask=byte * 2 < left, other=119).to(tl.int32)
        scale = tl.load(absmax_ptr + first + lane, mask=lane * BLOCK < left, other=0)
    if NESTED:
        nested = tl.load(nested_at, mask=(first + lane) * BLOCK < numel, other=0.0)
        scale = tl.load(dynamic_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    high = tl.gather(values, pair >> 4, 1) * scale[:, None]
    low = tl.gather(values, pair & 15, 1) * scale[:, None]
    out = tl.reshape(tl.join(high, low), (GROUPS, BLOCK)).to(out_ptr.dtype.element_ty)
    if APART:
        start = (first + lane) * BLOCK
        row = start // width
        out_at = out_ptr + (row * out_row + (start - row * width))[:, None] + tl.arange(0, BLOCK)[None, :]
    else:
        out_at = out_ptr + first * BLOCK + value
    if WHOLE:
        tl.store(out_at, out)
    else:
        tl.store(out_at, out, mask=value < left)


def _kernel_tensors(nf4: NF4) -> tuple[Tensor, ...]:
    """Codes, absmax, nested absmax, offset and both tables, as the kernels take them; what is not there is not read."""
    nested = nf4.absmax if nf4.nested_absmax is None else nf4.nested_absmax
    offset = nf4.absmax if nf4.offset is None else nf4.offset
    device = nf4.codes.device
    return nf4.codes, nf4.absmax, nested, offset, _nf4(device), _dynamic(device)


def _unpack(nf4: NF4, out: Tensor) -> Tensor:
    """Writes the values into `out`: as many bytes are moved as the packed and the unpacked weight have."""
    numel = math.prod(nf4.shape)
    apart = out.ndim == 2 and out.stride(0) != out.shape[1]
    width, row = (out.shape[1], out.stride(0)) if apart else (numel, numel)
    groups = 128  # 82 % of an H200's copy bandwidth; 64 gives 76, table look-ups in memory 58
    _unpack_kernel[(-(-numel // (BLOCK * groups)),)](
        *_kernel_tensors(nf4), out, numel, width, row,
        nf4.nested_absmax is not None, numel % (BLOCK * groups) == 0, apart, groups, BLOCK,
        num_warps=4, enable_fp_fusion=False,  # a fused multiply and add would round a scale otherwise
    )  # fmt: skip
    return out


def nf4_scales(nf4: NF4) -> Tensor:
    """The scales of the blocks of 64 values (ceil(n / 64),), fp32."""
    if nf4.nested_absmax is None:
        return nf4.absmax
    values = _blocks(_dynamic(nf4.absmax.device).index_select(0, nf4.absmax.int()), NESTED_BLOCK)
    return (values * nf4.nested_absmax[:, None] + nf4.offset).flatten()[: nf4.absmax.numel()]


@uncompiled
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


def nested_values() -> Tensor:
    """(256,) fp32 on the CPU, ascending: what the codes of the scales stand for; a checkpoint stores its own copy."""
    return _dynamic(torch.device("cpu"))


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
