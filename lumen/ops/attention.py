"""Causal attention over packed rows, with grouped heads: softmax(scale · q kᵀ + mask) v.

A query at index i sees a key at index j when j ≤ i, both belong to the same document, and, with a window w, i − j < w.
Rows hold documents one after another, so index distance is position distance inside a document. With a cache the S keys
end where the T queries end: query t has index S − T + t.

Padding is a document of its own (−1): its rows are never read, and see one another so that no softmax is empty.

What a query sees is the same in every layer of a kind, so the mask is made once a forward pass (`attention_mask`) and
shared; where the causal rule alone decides, there is none.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.ops._choose import choice


def attention_mask(
    T: int, S: int, document: Tensor | None, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What is added to the scores: 0 where a query sees a key, −inf elsewhere; (B or 1, 1, T, S) in `dtype`.

    T, S      queries, and the keys that end with them
    document  (B, S) int, the document of every key; None means one document a row
    window    keys that a query sees, itself included; 0 = all

    None where `attention` needs no mask: every query sees all keys up to its own.
    """
    if document is None and (not window or window >= S) and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device).unsqueeze(1)
    key = torch.arange(S, device=device)
    seen = key <= query
    if window:
        seen &= query - key < window
    seen = seen.unsqueeze(0)
    if document is not None:
        seen = seen & (document[:, -T:].unsqueeze(2) == document.unsqueeze(1))
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf")).unsqueeze(1)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """The definition: scores and softmax in fp32. Arguments as in `attention`."""
    B, T, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    grouped = q.float().view(B, T, K, H // K, E)
    scores = torch.einsum("btkge,bske->bkgts", grouped, k.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and T > 1:
        scores = scores + torch.full((T, S), float("-inf"), device=q.device).triu(1)
    elif mask is not None:
        scores = scores + mask.float().unsqueeze(1)  # (B, 1, 1, T, S)
    out = torch.einsum("bkgts,bske->btkge", scores.softmax(-1), v.float())
    return out.reshape(B, T, H, E).to(q.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """Attention output (B, T, H, E) in q's dtype.

    q        (B, T, H, E)
    k, v     (B, S, K, E), S ≥ T, K divides H: query head h reads key head h // (H/K)
    mask     from `attention_mask`; None with T = S is causal, with T = 1 sees every key
    softcap  scores become softcap · tanh(scores / softcap); 0 leaves them

    Runs PyTorch's fused attention, but the reference where there is a soft cap, which PyTorch's lacks.
    """
    available = {"reference": "a soft cap, which PyTorch's fused attention lacks"}
    if not softcap:
        available = {"torch": "PyTorch's fused attention is exact here", "reference": "the definition"}
    if choice("attention", available) == "reference":
        return attention_reference(q, k, v, scale=scale, mask=mask, softcap=softcap)
    group = q.shape[2] // k.shape[2]
    if group > 1:  # each key head is repeated for the query heads of its group, which lie side by side
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    causal = mask is None and q.shape[1] > 1
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)
