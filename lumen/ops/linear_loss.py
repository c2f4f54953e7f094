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
    """The summed loss of one chunk of raw `logits` (n, V) and its gradient with respect to them.

    Overwrites `logits`: probabilities and then the gradient take their place. Only a soft cap needs a second buffer.
    """
    slope = None
    if softcap:
        logits.div_(softcap).tanh_()
        slope = 1 - logits * logits if need_gradient else None
        logits.mul_(softcap)
    picked = logits.gather(1, target[:, None])  # (n, 1)
    top = logits.amax(1, keepdim=True)
    exponential = logits.sub_(top).exp_()
    partition = exponential.sum(1, keepdim=True)
    loss = (partition.log() + top - picked).sum()
    if not need_gradient:
        return loss, None
    gradient = exponential.div_(partition)
    gradient[torch.arange(len(target), device=target.device), target] -= 1
    return loss, gradient if slope is None else gradient.mul_(slope)


def _chunked(
    x: Tensor, weight: Tensor, target: Tensor, counted: Tensor, softcap: float, chunk: int, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss over the positions `counted` (M,), and its gradients as far as `need` = (x, weight) asks.

    The gradient of `x` holds the counted rows alone, (M, D) in x's dtype; the gradient of `weight` is (V, D) in fp32.
    """
    head = weight.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=x.device)
    grad_rows = x.new_empty(len(counted), x.shape[1]) if need[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if need[1] else None
    for start in range(0, len(counted), chunk):
        where = counted[start : start + chunk]
        rows = x[where]  # (n, D)
        loss, gradient = _chunk_loss(_product(rows, head.T), target[where], softcap, any(need))
        total += loss
        if gradient is not None:
            gradient = gradient.to(x.dtype)
        if grad_rows is not None:
            torch.mm(gradient, head, out=grad_rows[start : start + chunk])
        if grad_weight is not None:
            grad_weight += _product(gradient.T, rows)
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


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, softcap: float = 0.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `x @ weight.T`, without ever holding the (N, V) logits.

    x       (N, D) bf16, fp16 or fp32, hidden states after the last norm; its dtype is that of the products
    weight  (V, D); another dtype than x's is cast. Frozen weights get no gradient buffer
    target  (N,) int64; -100 marks a position that does not count, every other value must be a row of `weight`
    softcap logits become softcap * tanh(logits / softcap); 0 leaves them
    chunk   how many counted positions have logits at the same time

    Returns (sum of losses, number of counted positions), both fp32 scalars on x's device (float64 for float64 `x`, so
    that gradients can be checked numerically). Dividing is the caller's work: only the caller knows how many tokens the
    other ranks and micro-batches hold. Nothing counted is a loss of zero with gradients of zero.
    Peak extra memory is one chunk of logits, `chunk * V * 4` bytes, and again as much under a soft cap; an `x` in half
    precision adds a copy of that chunk, a weight that learns adds (V, D) in fp32 twice.
    Waits for the device once, to learn how many positions count. Refuses shapes that disagree with a KernelError.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or target.shape != x.shape[:1]:
        raise KernelError(
            "linear_cross_entropy wants x (N, D), weight (V, D) and target (N,), "
            f"found {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}."
        )
    counted = (target != UNCOUNTED).nonzero().squeeze(1)  # (M,)
    count = torch.full((), len(counted), dtype=torch.float32, device=x.device)
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x, weight, target, counted, softcap, chunk), count
    # needs_input_grad does not know about no_grad: an evaluation would pay for gradients that nobody collects.
    return _chunked(x, weight, target, counted, softcap, chunk, (False, False))[0], count
