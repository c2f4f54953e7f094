"""Cross-entropy of a linear head, chunk by chunk, so that training never holds a row of logits for every token.

    z = x Wᵀ                      logits; with a soft cap c, z = c · tanh(x Wᵀ / c)
    loss = Σ logsumexp(z) - z[target]                      over the positions that count
    ∂z = softmax(z) - onehot(target)                       times 1 - (z / c)² under a soft cap
    ∂x = ∂z W        ∂W = ∂zᵀ x

Positions that do not count are left out before the head: they cost no multiplication. The loss is a sum, so its
gradient with respect to the logits does not depend on anything that comes later; it is computed while a chunk of logits
is at hand, in the forward pass, and the backward pass only multiplies by the incoming scalar. Logits are built once and
the (N, V) matrix, 33 GB in fp32 for 65,536 tokens of Llama 3, never exists.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumen.errors import KernelError
from lumen.ops._choose import choice, uncompiled
from lumen.ops._triton import implementations, jit, tl

UNCOUNTED = -100  # target of a position that does not count


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, target: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition of correct for `linear_cross_entropy`: all logits at once, in fp32 (float64 for float64 `x`)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weight.to(x.dtype).to(dtype).T  # (N, V)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = torch.nn.functional.cross_entropy(logits, target, ignore_index=UNCOUNTED, reduction="sum")
    return total, (target != UNCOUNTED).sum().float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` that is not rounded to bf16 or fp16 on the way out: (m, k) @ (k, n) -> (m, n) in fp32, or float64."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the CPU has no product that returns more than it is given


def _chunk_loss(logits: Tensor, target: Tensor, softcap: float, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The losses (n,) of one chunk of raw `logits` (n, V) and their gradient with respect to them.

    Overwrites `logits`: probabilities and then the gradient take their place. Only a soft cap needs a second buffer.
    """
    slope, absent = None, target == UNCOUNTED
    target = target.clamp(min=0)
    if softcap:
        logits.div_(softcap).tanh_()
        slope = 1 - logits * logits if need_gradient else None
        logits.mul_(softcap)
    picked = logits.gather(1, target[:, None])  # (n, 1)
    top = logits.amax(1, keepdim=True)
    exponential = logits.sub_(top).exp_()
    partition = exponential.sum(1, keepdim=True)
    loss = (partition.log() + top - picked).masked_fill(absent[:, None], 0.0).squeeze(1)
    if not need_gradient:
        return loss, None
    gradient = exponential.div_(partition)
    gradient[torch.arange(len(target), device=target.device), target] -= 1
    gradient.masked_fill_(absent[:, None], 0.0)
    return loss, gradient if slope is None else gradient.mul_(slope)


@jit
def _cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, grad_ptr, logits_row, grad_row, vocab, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits (fp32): its loss, and its gradient, which may take the place of the logits, in a narrower type.

    A row is read twice. In the second pass the block written never reaches beyond the block just read: it lies at half
    its distance from the row's start, or at the same where the type is fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counted = target >= 0
    base = logits_ptr + row * logits_row
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocab, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        z = tl.load(base + column, mask=column < vocab, other=float("-inf"))
        if SOFTCAP:
            power = tl.exp(-2.0 * tl.abs(z / softcap))
            size = softcap * (1.0 - power) / (1.0 + power)
            z = tl.where(column < vocab, tl.where(z < 0, -size, size), float("-inf"))
        higher = tl.maximum(top, z)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
        picked += tl.where(column == target, z, 0.0)
    highest = tl.max(top, 0)
    partition = tl.sum(total * tl.exp(top - highest), 0)
    loss = tl.log(partition) + highest - tl.sum(picked, 0)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    if GRADIENT:
        factor = tl.where(counted, 1.0 / partition, 0.0)
        for begin in range(0, vocab, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            z = tl.load(base + column, mask=column < vocab, other=float("-inf"))
            slope = 1.0
            if SOFTCAP:
                power = tl.exp(-2.0 * tl.abs(z / softcap))
                size = softcap * (1.0 - power) / (1.0 + power)
                z = tl.where(z < 0, -size, size)
                slope = 1.0 - (z / softcap) * (z / softcap)
            grad = tl.exp(z - highest) * factor
            grad = tl.where(column == target, grad - 1.0, grad) * slope
            tl.debug_barrier()  # every thread has read its logits before another's gradient takes their place
            tl.store(grad_ptr + row * grad_row + column, grad.to(grad_ptr.dtype.element_ty), mask=column < vocab)


def _fused_chunk_loss(
    logits: Tensor, target: Tensor, softcap: float, dtype: torch.dtype, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_chunk_loss`, with the gradient in `dtype`, in the memory of `logits`; a target of -100 costs nothing."""
    n, vocab = logits.shape
    loss = logits.new_empty(n)
    grad = logits.view(dtype)[:, :vocab] if need_gradient else logits
    _cross_entropy_kernel[(n,)](
        logits, target, loss, grad, logits.stride(0), grad.stride(0), vocab, softcap or 1.0,
        softcap != 0, need_gradient, 4096, num_warps=16,
    )  # fmt: skip
    return loss, grad if need_gradient else None


def _is_fused(x: Tensor) -> bool:
    return choice("linear_cross_entropy", implementations(x)) == "triton" and x.dtype != torch.float64


def _losses(
    logits: Tensor, target: Tensor, softcap: float, dtype: torch.dtype, need_gradient: bool, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses (n,) of one chunk of logits and, if asked for, their gradient in `dtype`; overwrites `logits`."""
    if fused:
        return _fused_chunk_loss(logits, target, softcap, dtype, need_gradient)
    loss, gradient = _chunk_loss(logits, target, softcap, need_gradient)
    return loss, None if gradient is None else gradient.to(dtype)


def _chunked(
    x: Tensor, weight: Tensor, target: Tensor, counted: Tensor, softcap: float, chunk: int, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss over the positions `counted` (M,), and its gradients as far as `need` = (x, weight) asks.

    The gradient of `x` holds the rows looked at alone, (M, D) in x's dtype; the gradient of `weight` is (V, D) in fp32.
    """
    head = weight.to(x.dtype)
    fused = _is_fused(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=x.device)
    grad_rows = x.new_empty(len(counted), x.shape[1]) if need[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if need[1] else None
    for start in range(0, len(counted), chunk):
        where = counted[start : start + chunk]
        rows = x[where]  # (n, D)
        loss, gradient = _losses(_product(rows, head.T), target[where], softcap, x.dtype, any(need), fused)
        total += loss.sum()
        if grad_rows is not None:
            torch.mm(gradient, head, out=grad_rows[start : start + chunk])
        if grad_weight is not None:
            grad_weight += _product(gradient.T, rows)
        del gradient  # before the next chunk's logits are made
    return total, grad_rows, grad_weight


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the finished gradients for an incoming gradient of one, (M, D) and (V, D), and nothing of the logits."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, counted: Tensor, softcap: float, chunk: int) -> Tensor:
        total, grad_rows, grad_weight = _chunked(x, weight, target, counted, softcap, chunk, ctx.needs_input_grad[:2])
        ctx.save_for_backward(grad_rows, grad_weight, counted)
        ctx.rows, ctx.weight_dtype = len(x), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight, counted = ctx.saved_tensors
        grad_x = None
        if grad_rows is not None:
            grad_x = grad_rows.new_zeros(ctx.rows, grad_rows.shape[1])
            grad_x.index_copy_(0, counted, grad_rows * grad_total)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None


@uncompiled
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float = 0.0,
    chunk: int = 1024,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `x @ weight.T`, without ever holding the (N, V) logits.

    x       (N, D) bf16, fp16 or fp32, hidden states after the last norm; its dtype is that of the products
    weight  (V, D); another dtype than x's is cast. Frozen weights get no gradient buffer
    target  (N,) int64; -100 marks a position that does not count, every other value must be a row of `weight`
    softcap logits become softcap * tanh(logits / softcap); 0 leaves them
    chunk   how many counted positions have logits at the same time
    counted (M,) int64, positions among which all are that count, for a caller who knows them; None: they are looked
            for, which waits for the device once

    Returns (sum of losses, number of counted positions), both fp32 scalars on x's device (float64 for float64 `x`, so
    that gradients can be checked numerically). Dividing is the caller's work: only the caller knows how many tokens the
    other ranks and micro-batches hold. Nothing counted is a loss of zero with gradients of zero.
    Peak extra memory is one chunk of logits, `chunk * V * 4` bytes, and again as much under a soft cap; an `x` in half
    precision adds a copy of that chunk, a weight that learns adds (V, D) in fp32 twice.
    Refuses shapes that disagree with a KernelError.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or target.shape != x.shape[:1]:
        raise KernelError(
            "linear_cross_entropy wants x (N, D), weight (V, D) and target (N,), "
            f"found {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}."
        )
    count = (target != UNCOUNTED).sum().float()
    if counted is None:
        counted = (target != UNCOUNTED).nonzero().squeeze(1)
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x, weight, target, counted, softcap, chunk), count
    # needs_input_grad does not know about no_grad: an evaluation would pay for gradients that nobody collects.
    return _chunked(x, weight, target, counted, softcap, chunk, (False, False))[0], count


class _LinearLogprobs(torch.autograd.Function):
    """Saves x and the weight; logits are built once more for the backward pass, which knows what each row is worth."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, softcap: float, chunk: int) -> Tensor:
        ctx.save_for_backward(x, weight, target)
        ctx.softcap, ctx.chunk = softcap, chunk
        head, fused = weight.to(x.dtype), _is_fused(x)
        parts = [
            -_losses(_product(rows, head.T), wanted, softcap, x.dtype, False, fused)[0]
            for rows, wanted in zip(x.split(chunk), target.split(chunk), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target = ctx.saved_tensors
        head, fused = weight.to(x.dtype), _is_fused(x)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(x), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _product(x[part], head.T)
            _, gradient = _losses(logits, target[part], ctx.softcap, x.dtype, True, fused)
            gradient = gradient * -grad[part, None].to(x.dtype)
            if grad_x is not None:
                torch.mm(gradient, head, out=grad_x[part])
            if grad_weight is not None:
                grad_weight += _product(gradient.T, x[part])
            del logits, gradient  # before the next chunk's logits are made
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


@uncompiled
def linear_logprobs(x: Tensor, weight: Tensor, target: Tensor, softcap: float = 0.0, chunk: int = 1024) -> Tensor:
    """log p(target) of each position, (N,) fp32, without ever holding the (N, V) logits: what preference and
    reinforcement objectives compare.

    Arguments as in `linear_cross_entropy`; a position whose target is -100 gets 0. The loss of such an objective is
    known only when all log-probs are, so the logits of a chunk are built a second time in the backward pass.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or target.shape != x.shape[:1]:
        raise KernelError(
            "linear_logprobs wants x (N, D), weight (V, D) and target (N,), "
            f"found {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}."
        )
    return _LinearLogprobs.apply(x, weight, target, softcap, chunk)
