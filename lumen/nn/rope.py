"""Rotary frequencies: one function for each kind that a page may name, and the table of angles for given positions.

plain     f[i] = theta^(−2i/E), i < E/2
linear    f[i] / factor: positions are squeezed into the trained range
llama3    low frequencies are divided by `factor`, high ones kept, those between mixed linearly in
          trained_length / wavelength (Llama 3.1's published configuration)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lumen.spec import ModelSpec, RopeSpec


def _plain(rope: RopeSpec, head_dim: int) -> Tensor:
    # the reciprocal last: checkpoints were trained with frequencies rounded in this order
    return 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def _linear(rope: RopeSpec, head_dim: int) -> Tensor:
    return _plain(rope, head_dim) / rope.factor


def _llama3(rope: RopeSpec, head_dim: int) -> Tensor:
    return _plain(rope, head_dim) / llama3_divisors(rope, head_dim)


def llama3_divisors(rope: RopeSpec, head_dim: int) -> Tensor:
    """What each of the E/2 plain frequencies is divided by: 1 for short wavelengths, `factor` for long ones; fp32."""
    wavelength = 2 * math.pi / _plain(rope, head_dim)
    keep = ((rope.trained_length / wavelength - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return 1 / ((1 - keep) / rope.factor + keep)


FREQUENCIES: dict[str, Callable[[RopeSpec, int], Tensor]] = {"plain": _plain, "linear": _linear, "llama3": _llama3}


class Rotation:
    """cos and sin of every position, for each rope that the layers of a model use."""

    def __init__(self, spec: ModelSpec):
        self.ropes = {layer.kind: layer.rope for layer in spec.layers}
        self._frequencies = {kind: FREQUENCIES[rope.kind](rope, spec.head_dim) for kind, rope in self.ropes.items()}

    def tables(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer kind → (cos, sin), both (B, T, E/2) fp32, for `positions` (B, T)."""
        tables = {}
        for kind, frequencies in self._frequencies.items():
            if frequencies.device != positions.device:  # moved once, to where the model lives
                frequencies = self._frequencies[kind] = frequencies.to(positions.device)
            angles = positions.unsqueeze(-1).float() * frequencies
            tables[kind] = (angles.cos(), angles.sin())
        return tables
