"""Dropout (Srivastava et al. 2014) that stores nothing: y = x ∘ k / (1 − p), with k = 1 where an element is kept.

    ∂x = ∂y ∘ k / (1 − p)

k is a function of a seed and of the element's place, so that the backward pass makes it again. 32 bits are mixed for
each element, and it is kept where they are not below p · 2³²:

    row's key = mix(mix(row ⊕ low half of the seed) ⊕ high half)        bits = mix(key ⊕ column · 2654435761 mod 2³²)

`mix` is a bijection of 32-bit words of which each bit of the result depends on all (the shifts and factors are from the
"hash prospector" search, 16 21f0aaad 15 735a2d97 15). So no two rows of a call have one key, and no two elements of a
row the same bits. It is whole-number arithmetic: the reference and the kernel, CPU and GPU drop the same elements.

The seed is a number on the device, drawn from torch's generator: the same after the same `manual_seed`, and another at
every replay of a CUDA graph. What runs again for its backward pass takes the seeds that it drew before (`seeds_noted`,
`seeds_repeated`): putting the generator back is no way inside a graph, where its state is not known yet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations, jit, tl

_WORD = 0xFFFFFFFF
_SPREAD = 2654435761  # 2³² over the golden ratio: neighbouring columns differ in many bits


_noted: ContextVar[list[Tensor] | None] = ContextVar("noted", default=None)
_repeated: ContextVar[Iterator[Tensor] | None] = ContextVar("repeated", default=None)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """(count,) int64 on `device`, below 2⁶³ each: from torch's generator of that device, or as drawn before."""
    before, notes = _repeated.get(), _noted.get()
    if before is None:
        seeds = torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)
    else:
        seeds = next(before)
        assert seeds.shape == (count,), (seeds.shape, count)
    if notes is not None:
        notes.append(seeds)
    return seeds


@contextmanager
def seeds_noted(notes: list[Tensor]) -> Iterator[None]:
    """Inside the `with`, every result of `draw_seeds` is appended to `notes`."""
    token = _noted.set(notes)
    try:
        yield
    finally:
        _noted.reset(token)


@contextmanager
def seeds_repeated(notes: list[Tensor]) -> Iterator[None]:
    """Inside the `with`, `draw_seeds` gives what `notes` holds, in the order in which it was drawn."""
    token = _repeated.set(iter(notes))
    try:
        yield
    finally:
        _repeated.reset(token)


def kept(rows: int, width: int, p: float, seed: Tensor) -> Tensor:
    """k (rows, width), bool; `seed` is one int64 on the device where k shall be."""
    row, column = (torch.arange(size, dtype=torch.int64, device=seed.device) for size in (rows, width))
    key = _mix_reference(_mix_reference(row ^ (seed & _WORD)) ^ (seed >> 32))
    bits = _mix_reference(key[:, None] ^ (column * _SPREAD & _WORD))
    return (bits >> 1) >= _threshold(p)


def _mix_reference(x: Tensor) -> Tensor:
    """`_mix` of 32-bit words in int64: the factors are below 2³¹, so that no product leaves it."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD & _WORD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


def _threshold(p: float) -> int:
    """Of 31 of the bits, which fit an int32."""
    assert 0 <= p < 1, p
    return round(p * 2**31)


def thinned_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition of correct for `thinned`."""
    width = x.shape[-1]
    keep = kept(x.numel() // max(width, 1), width, p, seed).view(x.shape)
    return torch.where(keep, x * (1 / (1 - p)), 0)


@jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@jit
def _thinned_kernel(
    x_ptr, seed_ptr, y_ptr, x_row, y_row, rows, width, threshold, factor,
    ADD: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """M rows a program, some columns of them; ADD adds to what `y` holds."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    seed = tl.load(seed_ptr)
    key = _mix(_mix(row.to(tl.uint32) ^ seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    bits = _mix(key[:, None] ^ (column.to(tl.uint32) * 2654435761)[None, :])
    keep = (bits >> 1).to(tl.int32) >= threshold
    at = row[:, None].to(tl.int64)
    x = tl.load(x_ptr + at * x_row + column[None, :], mask=inside & keep, other=0.0).to(tl.float32)
    y = x * factor
    y_at = y_ptr + at * y_row + column[None, :]
    if ADD:
        y += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


def thin_rows(x: Tensor, p: float, seed: Tensor, add_to: Tensor | None = None) -> Tensor:
    """The kernel's y for rows (N, width) with any row stride; or `add_to` (N, width), to which y is added in place."""
    rows, width = x.shape
    y = x.new_empty(rows, width) if add_to is None else add_to
    M, block = 8, 512 if width >= 512 else 64
    _thinned_kernel[(-(-rows // M), -(-width // block))](
        x, seed, y, x.stride(0), y.stride(0), rows, width, _threshold(p), 1 / (1 - p),
        add_to is not None, M, block, num_warps=4,
    )  # fmt: skip
    return y


class _Thinned(torch.autograd.Function):
    """Saves the seed."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return thin_rows(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return thin_rows(grad if grad.stride(-1) == 1 else grad.contiguous(), ctx.p, *ctx.saved_tensors), None, None


@uncompiled
def thinned(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x (…, in) with the share p of its elements dropped, the others divided by 1 − p; 0 ≤ p < 1.

    seed  one int64 on x's device, as `draw_seeds` gives it; the same seed drops the same elements of a matrix that has
          as many columns, whatever its dtype and device
    """
    if not p or choice("thinned", implementations(x)) == "reference" or x.numel() == 0:
        return thinned_reference(x, p, seed) if p else x
    rows = x.reshape(-1, x.shape[-1])
    return _Thinned.apply(rows if rows.stride(-1) == 1 else rows.contiguous(), p, seed).view(x.shape)
