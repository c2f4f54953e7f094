"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean(x²) + eps) · w.

Where the result returns to the input's dtype is part of a family: Llama rounds x̂ before the weight multiplies it, Gemma
(`plus_one`, y = x̂ · (1 + w)) multiplies in fp32 and rounds once.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """`x` (…, D) normed over its last axis, in x's dtype; the mean and the root are fp32.

    weight  (D,), any float dtype
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight.to(x.dtype) * normed.to(x.dtype)
