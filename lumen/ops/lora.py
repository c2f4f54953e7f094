"""The low-rank update (Hu et al. 2021, arXiv 2106.09685): y = W x + scale · B A x, with A (R, in) and B (out, R)."""

from torch import Tensor
from torch.nn import functional as F


def lora_update(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · B A x` for `x` (…, in): (…, out) in x's dtype.

    a, b  fp32 masters, rounded to x's dtype for the two products; their gradients come back in fp32
    """
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def lora_weight(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What merging adds to the base weight: `scale · B A` (out, in), in fp32."""
    return scale * (b.float() @ a.float())
