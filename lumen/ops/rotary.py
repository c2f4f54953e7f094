"""Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split: component i turns with component i + E/2.

(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin),   angle of pair i at position p: p · frequency[i]
"""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, T, H, E) turned by its positions; a new tensor of x's dtype.

    cos, sin  (B, T, E/2) fp32, rounded to x's dtype before they multiply, as the families were trained
    """
    cos, sin = cos.to(x.dtype).unsqueeze(2), sin.to(x.dtype).unsqueeze(2)  # (B, T, 1, E/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
