"""One AdamW update (Loshchilov and Hutter, arXiv 1711.05101) of all parameters at once; averages are kept in fp32, or
in 8 bits (Dettmers et al., arXiv 2110.02861, "8-bit optimizers via block-wise quantization").

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    p ← (1 − decay) p − rate · m / (√v / correction + ε)

In 8 bits, m and v are stored in blocks of 256: the largest magnitude of a block in fp32, and for each value the index
of the nearest of 256 numbers between −1 and 1 (m) or 0 and 1 (v), dense near zero. 2.03 bytes a parameter instead of 8.
Reading, update and rounding are one pass; a block's scale is that of the new values. Everything else is fp32.

All parameters are updated by one launch: a table holds the address of each one's tensors, and every program finds its
own parameter there. Nothing here waits for the device.

Averages of a parameter on a GPU may be *paged*: they lie in pinned host memory, which has one address on both sides,
and the same kernel reads and writes them there, over the bus. There is no copy of them on the device and the values are
the same, bit for bit. An update then brings 2.03 bytes a value over the bus and takes as many back (8 and 8 in fp32),
both ways at the same time, after the last gradient and beside nothing else: at 50 GB/s, 42 million values of an adapter
take 2 ms in 8 bits, and 8 billion that all learn 1.3 s in fp32. PyTorch rounds each pinned tensor up to a power of two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations, jit, tl

BLOCK = 256
PER_PROGRAM = 8  # blocks


@dataclass(frozen=True, eq=False)
class Moments:
    """Both averages of one parameter of n values; changed in place by an update."""

    mean: Tensor  # uint8 (n,)
    square: Tensor  # uint8 (n,)
    mean_scale: Tensor  # fp32 (ceil(n / 256),)
    square_scale: Tensor  # fp32 (ceil(n / 256),)

    @classmethod
    def zeros(cls, like: Tensor, *, paged: bool = False) -> "Moments":
        """The averages of a parameter before its first update; `paged`, those of one on a GPU lie in pinned memory."""
        place = _place(like, paged)
        codes = {"dtype": torch.uint8, **place}
        scales = torch.zeros(2, -(-like.numel() // BLOCK), **place)
        zero = int(_signed(torch.device("cpu")).abs().argmin())
        return cls(
            mean=torch.full((like.numel(),), zero, **codes),
            square=torch.zeros(like.numel(), **codes),
            mean_scale=scales[0],
            square_scale=scales[1],
        )


def _place(like: Tensor, paged: bool) -> dict:
    """Where the averages of a parameter lie, as arguments of `torch.zeros`."""
    return {"device": "cpu", "pin_memory": True} if paged and like.is_cuda else {"device": like.device}


@cache
def _signed(device: torch.device) -> Tensor:
    """(256,) fp32 ascending, the signed dynamic type: 2^e fractions at 10^(e − 6), e in 0 … 6; 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    values = torch.cat([(edge[1:] + edge[:-1]) / 2 * 10.0 ** (e - 6) for e, edge in enumerate(edges)])
    return torch.cat([-values, torch.tensor([0.0, 1.0]), values]).sort().values.to(device)


@cache
def _unsigned(device: torch.device) -> Tensor:
    """(256,) fp32 ascending, the unsigned one: the bit of the sign goes to the fraction, 2^(e + 1) of them."""
    edges = [torch.linspace(0.1, 1, 2 ** (e + 1) + 1) for e in range(7)]
    values = torch.cat([(edge[1:] + edge[:-1]) / 2 * 10.0 ** (e - 6) for e, edge in enumerate(edges)])
    return torch.cat([torch.tensor([0.0, 1.0]), values]).sort().values.to(device)


def _read(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    return values[codes.int()] * scale.repeat_interleave(BLOCK)[: codes.numel()]


def _write(new: Tensor, codes: Tensor, scale: Tensor, values: Tensor) -> None:
    blocks = torch.nn.functional.pad(new, (0, -new.numel() % BLOCK)).view(-1, BLOCK)
    scale.copy_(blocks.abs().amax(1))
    scaled = blocks / scale.clamp(min=1e-38)[:, None]
    midpoints = (values[1:] + values[:-1]) / 2
    codes.copy_(torch.bucketize(scaled.flatten()[: new.numel()], midpoints).to(torch.uint8))


def adamw_8bit_reference(
    parameter: Tensor, grad: Tensor, moments: Moments, *, beta1: float, beta2: float, eps: float, rate: float,
    correction: float, decay: float, factor: Tensor,
) -> None:  # fmt: skip
    """The definition of correct for one parameter; arguments as in `adamw`, of which it takes one each."""
    signed, unsigned = _signed(parameter.device), _unsigned(parameter.device)
    if not bool(torch.isfinite(factor)):
        return
    g = grad.flatten().float() * factor
    m = beta1 * _read(moments.mean, moments.mean_scale, signed) + (1 - beta1) * g
    v = beta2 * _read(moments.square, moments.square_scale, unsigned) + (1 - beta2) * g * g
    step = rate * m / (v.sqrt() / correction + eps)
    parameter.copy_(((1 - decay) * parameter.flatten().float() - step).view(parameter.shape))
    _write(m, moments.mean, moments.mean_scale, signed)
    _write(v, moments.square, moments.square_scale, unsigned)


@jit
def _nearest(x, values_ptr):
    """Index of the value nearest to x, 0 … 255: eight halvings over the midpoints of an ascending table."""
    low = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        middle = low + step  # the midpoint between the values before and at `middle`
        border = (tl.load(values_ptr + middle - 1) + tl.load(values_ptr + middle)) * 0.5
        low = tl.where(x > border, middle, low)
    return low


@jit
def _adamw_kernel(
    table_ptr, numbers_ptr, owner_ptr, start_ptr, factor_ptr, count, beta1, beta2, eps, WIDTH: tl.constexpr
):  # fmt: skip
    """WIDTH values of one parameter, averages in fp32.

    table    int64, one row a kind of address: parameter, gradient, mean, square; number of values
    numbers  fp32, rate, correction and 1 − decay of each parameter
    """
    program = tl.program_id(0)
    owner = tl.load(owner_ptr + program)
    at = tl.load(start_ptr + program) + tl.arange(0, WIDTH)
    factor = tl.load(factor_ptr)
    if tl.abs(factor) < float("inf"):  # false for NaN too: then nothing moves
        p_ptr = tl.load(table_ptr + owner).to(tl.pointer_type(tl.float32))
        g_ptr = tl.load(table_ptr + count + owner).to(tl.pointer_type(tl.float32))
        m_ptr = tl.load(table_ptr + 2 * count + owner).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(table_ptr + 3 * count + owner).to(tl.pointer_type(tl.float32))
        inside = at < tl.load(table_ptr + 4 * count + owner)
        rate = tl.load(numbers_ptr + owner)
        correction = tl.load(numbers_ptr + count + owner)
        kept = tl.load(numbers_ptr + 2 * count + owner)
        g = tl.load(g_ptr + at, mask=inside, other=0.0) * factor
        m = beta1 * tl.load(m_ptr + at, mask=inside, other=0.0) + (1.0 - beta1) * g
        v = beta2 * tl.load(v_ptr + at, mask=inside, other=0.0) + (1.0 - beta2) * g * g
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        tl.store(p_ptr + at, kept * p - rate * m / (tl.sqrt(v) / correction + eps), mask=inside)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)


@jit
def _adamw_8bit_kernel(
    table_ptr, numbers_ptr, owner_ptr, start_ptr, factor_ptr, signed_ptr, unsigned_ptr, count, beta1, beta2, eps,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one parameter.

    table    int64, one row a kind of address: parameter, gradient, mean, square, their scales; number of values
    numbers  as above
    """
    program = tl.program_id(0)
    owner = tl.load(owner_ptr + program)
    start = tl.load(start_ptr + program)
    factor = tl.load(factor_ptr)
    if tl.abs(factor) < float("inf"):  # false for NaN too: then nothing moves
        p_ptr = tl.load(table_ptr + owner).to(tl.pointer_type(tl.float32))
        g_ptr = tl.load(table_ptr + count + owner).to(tl.pointer_type(tl.float32))
        m_ptr = tl.load(table_ptr + 2 * count + owner).to(tl.pointer_type(tl.uint8))
        v_ptr = tl.load(table_ptr + 3 * count + owner).to(tl.pointer_type(tl.uint8))
        m_scale_ptr = tl.load(table_ptr + 4 * count + owner).to(tl.pointer_type(tl.float32))
        v_scale_ptr = tl.load(table_ptr + 5 * count + owner).to(tl.pointer_type(tl.float32))
        numel = tl.load(table_ptr + 6 * count + owner)
        rate = tl.load(numbers_ptr + owner)
        correction = tl.load(numbers_ptr + count + owner)
        kept = tl.load(numbers_ptr + 2 * count + owner)
        block = start // WIDTH + tl.arange(0, BLOCKS)
        at = start + tl.arange(0, BLOCKS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = at < numel
        held = block * WIDTH < numel
        g = tl.load(g_ptr + at, mask=inside, other=0.0) * factor
        m_scale = tl.load(m_scale_ptr + block, mask=held, other=0.0)
        v_scale = tl.load(v_scale_ptr + block, mask=held, other=0.0)
        m = tl.load(signed_ptr + tl.load(m_ptr + at, mask=inside, other=0).to(tl.int32)) * m_scale[:, None]
        v = tl.load(unsigned_ptr + tl.load(v_ptr + at, mask=inside, other=0).to(tl.int32)) * v_scale[:, None]
        m = tl.where(inside, beta1 * m + (1.0 - beta1) * g, 0.0)
        v = tl.where(inside, beta2 * v + (1.0 - beta2) * g * g, 0.0)
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        tl.store(p_ptr + at, kept * p - rate * m / (tl.sqrt(v) / correction + eps), mask=inside)
        m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(m_scale_ptr + block, m_scale, mask=held)
        tl.store(v_scale_ptr + block, v_scale, mask=held)
        m_code = _nearest(m / tl.maximum(m_scale, 1e-38)[:, None], signed_ptr)
        v_code = _nearest(v / tl.maximum(v_scale, 1e-38)[:, None], unsigned_ptr)
        tl.store(m_ptr + at, m_code.to(tl.uint8), mask=inside)
        tl.store(v_ptr + at, v_code.to(tl.uint8), mask=inside)


@dataclass(frozen=True, eq=False)
class Averages:
    """Both averages of one parameter in fp32, of its shape; changed in place by an update."""

    mean: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, like: Tensor, *, paged: bool = False) -> "Averages":
        """As those of `Moments`."""
        place = {"dtype": torch.float32, **_place(like, paged)}
        return cls(mean=torch.zeros(like.shape, **place), square=torch.zeros(like.shape, **place))


def adamw_reference(
    parameter: Tensor, grad: Tensor, averages: Averages, *, beta1: float, beta2: float, eps: float, rate: float,
    correction: float, decay: float, factor: Tensor,
) -> None:  # fmt: skip
    """The definition of correct for one parameter; arguments as in `adamw`, of which it takes one each."""
    if not bool(torch.isfinite(factor)):
        return
    g = grad.float() * factor
    averages.mean.lerp_(g, 1 - beta1)
    averages.square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    spread = averages.square.sqrt().div_(correction).add_(eps)
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))  # rounded once, if at all
    parameter.copy_(wide.mul_(1 - decay).addcdiv_(averages.mean, spread, value=-rate))


@contextmanager
def _beside(parameter: Tensor, state: Averages | Moments) -> Iterator[Averages | Moments]:
    """The state on the parameter's device; what becomes of it inside the `with` is written back to where it lies."""
    if state.mean.device == parameter.device:
        yield state
        return
    near = type(state)(**{name: tensor.to(parameter.device) for name, tensor in vars(state).items()})
    yield near
    for name, tensor in vars(near).items():
        getattr(state, name).copy_(tensor)


@uncompiled
@torch.no_grad()
def adamw(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[Averages] | list[Moments],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    rates: list[float],
    corrections: list[float],
    decays: list[float],
    factor: Tensor,
) -> None:
    """One update of all `parameters` and their `states`, all of one kind, paged or not, in place; fp32 arithmetic.

    rates        lr / (1 − β₁ᵗ) of each parameter
    corrections  √(1 − β₂ᵗ)
    decays       lr · weight decay
    factor       fp32 scalar that multiplies every gradient; where it is not finite, nothing changes
    """
    packed = isinstance(states[0], Moments)
    betas = {"beta1": beta1, "beta2": beta2, "eps": eps}
    available = implementations(parameters[0])
    if any(parameter.dtype != torch.float32 or not parameter.is_contiguous() for parameter in parameters):
        available = {"reference": "a parameter that is not fp32, or not in one piece"}
    if choice("adamw", available) == "reference":
        update = adamw_8bit_reference if packed else adamw_reference
        for parameter, grad, state, rate, correction, decay in zip(
            parameters, grads, states, rates, corrections, decays, strict=True
        ):
            numbers = {"rate": rate, "correction": correction, "decay": decay, "factor": factor}
            with _beside(parameter, state) as near:
                update(parameter, grad, near, **betas, **numbers)
        return
    device, count = parameters[0].device, len(parameters)
    names = ("mean", "square", "mean_scale", "square_scale") if packed else ("mean", "square")
    columns = [parameters, [grad.float().contiguous() for grad in grads]]
    columns += [[getattr(state, name) for state in states] for name in names]
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
    addresses.append([parameter.numel() for parameter in parameters])
    owner, start = _programs(tuple(addresses[-1]), device)
    table = torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
    kept = [1 - decay for decay in decays]
    numbers = torch.tensor([rates, corrections, kept], dtype=torch.float32).to(device, non_blocking=True)
    if packed:
        _adamw_8bit_kernel[(len(owner),)](
            table, numbers, owner, start, factor, _signed(device), _unsigned(device), count, beta1, beta2, eps,
            PER_PROGRAM, BLOCK, num_warps=8,
        )  # fmt: skip
    else:
        _adamw_kernel[(len(owner),)](
            table, numbers, owner, start, factor, count, beta1, beta2, eps, BLOCK * PER_PROGRAM, num_warps=8
        )


@cache
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which parameter each program works on, and from which of its values on: int32 and int64 (programs,)."""
    step = BLOCK * PER_PROGRAM
    owner = [index for index, size in enumerate(sizes) for _ in range(0, size, step)]
    start = [begin for size in sizes for begin in range(0, size, step)]
    return torch.tensor(owner, dtype=torch.int32, device=device), torch.tensor(start, device=device)
