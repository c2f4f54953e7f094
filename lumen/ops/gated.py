"""Gated activations (Shazeer 2020, arXiv 2002.05202): f(gate) · up, with f = SiLU or the tanh form of GELU."""

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`f(gate) * up`, both (…, F); `kind` is a key of ACTIVATIONS."""
    return ACTIVATIONS[kind](gate) * up
