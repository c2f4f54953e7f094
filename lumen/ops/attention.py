"""Causal attention over packed rows, with grouped heads: softmax(scale · q kᵀ, masked) v.

A query at index i sees a key at index j when j ≤ i, both belong to the same document, and, with a window w, i − j < w.
Rows hold documents one after another, so index distance is position distance inside a document. With a cache the S keys
end where the T queries end: query t has index S − T + t.

Padding is a document of its own (−1): its rows are never read, and see one another so that no softmax is empty.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.ops._choose import choice


def visible(T: int, S: int, document: Tensor | None, window: int, device: torch.device) -> Tensor:
    """Which keys each query sees: bool (B, T, S), or (1, T, S) without documents. Arguments as in `attention`."""
    query = torch.arange(S - T, S, device=device).unsqueeze(1)
    key = torch.arange(S, device=device)
    mask = key <= query
    if window:
        mask &= query - key < window
    mask = mask.unsqueeze(0)
    if document is not None:
        mask = mask & (document[:, -T:].unsqueeze(2) == document.unsqueeze(1))
    return mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """The definition: scores and softmax in fp32. Shapes as in `attention`."""
    B, T, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    grouped = q.float().view(B, T, K, H // K, E)
    scores = torch.einsum("btkge,bske->bkgts", grouped, k.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible(T, S, document, window, q.device)
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    out = torch.einsum("bkgts,bske->btkge", scores.softmax(-1), v.float())
    return out.reshape(B, T, H, E).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention output (B, T, H, E) in q's dtype.

    q         (B, T, H, E)
    k, v      (B, S, K, E), S ≥ T, K divides H: query head h reads key head h // (H/K)
    document  (B, S) int, the document of every key; None means one document a row
    window    keys that a query sees, itself included; 0 = all
    softcap   scores become softcap · tanh(scores / softcap); 0 leaves them

    Runs PyTorch's fused attention, but the reference where there is a soft cap, which PyTorch's lacks.
    """
    available = {"reference": "a soft cap, which PyTorch's fused attention lacks"}
    if not softcap:
        available = {"torch": "PyTorch's fused attention is exact here", "reference": "the definition"}
    if choice("attention", available) == "reference":
        return attention_reference(q, k, v, scale=scale, document=document, window=window, softcap=softcap)
    return _torch_attention(q, k, v, scale, document, window)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, document: Tensor | None, window: int) -> Tensor:
    T, H, S, K = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    causal = document is None and T == S and (not window or window >= S)
    everything = document is None and T == 1 and (not window or window >= S)  # one new token sees all that is cached
    mask = None if causal or everything else visible(T, S, document, window, q.device).unsqueeze(1)
    if H != K:  # query heads of a group lie side by side; views of the key heads, copied only where the kernel must
        k, v = k.repeat_interleave(H // K, dim=2), v.repeat_interleave(H // K, dim=2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)
