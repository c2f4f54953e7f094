"""Rotary frequencies: one function for each kind that a page may name, and the table of angles for given positions.

Of a head's components the first W turn (all E of them, unless the family turns a part), in W/2 pairs:

plain     f[i] = theta^(−2i/W), i < W/2
linear    f[i] / factor: positions are squeezed into the trained range
llama3    low frequencies are divided by `factor`, high ones kept, those between mixed linearly in
          trained_length / wavelength (Llama 3.1's published configuration)
yarn      the same idea, mixed linearly in i, between the pairs that turn beta_fast and beta_slow times over the trained
          length (Peng et al. 2023, arXiv 2309.00071); `truncate` widens that range to whole pairs
longrope  f[i] / short[i] for a sequence of up to trained_length tokens, f[i] / long[i] for all of a longer one
          (Ding et al. 2024, arXiv 2402.13753)
mrope     f[i] as plain; a position has three parts, time, height and width, and pair i turns by the one in whose
          section it lies, or whose turn it is (Wang et al. 2024, arXiv 2409.12191; `ops/rotary.py` has the two orders).
          In a text the three are equal: then it is plain

yarn and longrope also multiply cos and sin by `attention_factor`.

Which of longrope's lists holds is a property of the whole sequence, not of a position: q·k then depends on nothing but
the distance of two tokens, as the model was trained with either list. transformers asks for the longest sequence of a
call. Here every document of a packed row is asked for itself, which is the same where it stands alone, so that what
else lies in a row or a batch changes nothing. While a sequence grows it may cross the border; what was computed before
is then of no use, and `sampling.py` reads the sequence again.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.ops.rotary import rotary_angles, rotary_parts
from lumen.spec import ModelSpec, RopeSpec


def _powers(rope: RopeSpec) -> Tensor:
    """theta^(2i/W), (W/2,) fp32."""
    return rope.theta ** (torch.arange(0, rope.turned, 2, dtype=torch.float32, device="cpu") / rope.turned)


def _plain(rope: RopeSpec) -> Tensor:
    # the reciprocal last: checkpoints were trained with frequencies rounded in this order
    return 1.0 / _powers(rope)


def _linear(rope: RopeSpec) -> Tensor:
    return _plain(rope) / rope.factor


def _llama3(rope: RopeSpec) -> Tensor:
    return _plain(rope) / llama3_divisors(rope)


def llama3_divisors(rope: RopeSpec) -> Tensor:
    """What each of the W/2 plain frequencies is divided by: 1 for short wavelengths, `factor` for long ones; fp32."""
    wavelength = 2 * math.pi / _plain(rope)
    keep = ((rope.trained_length / wavelength - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return 1 / ((1 - keep) / rope.factor + keep)


def _yarn(rope: RopeSpec) -> Tensor:
    def pair_that_turns(times: float) -> float:
        return rope.turned * math.log(rope.trained_length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.turned - 1)
    if first == last:
        last += 0.001  # a step instead of a slope
    slow = ((torch.arange(rope.turned // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    powers, keep = _powers(rope), 1 - slow
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _divided(rope: RopeSpec, divisors: tuple[float, ...]) -> Tensor:
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * _powers(rope))


FREQUENCIES: dict[str, Callable[[RopeSpec], Tensor]] = {  # of a sequence that is not longer than it was trained for
    "plain": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": lambda rope: _divided(rope, rope.short),
    "mrope": _plain,
}


class Rotation:
    """cos and sin of every position, for each rope that the layers of a model use."""

    def __init__(self, spec: ModelSpec):
        self.ropes = {layer.kind: layer.rope for layer in spec.layers}
        self._frequencies = {kind: FREQUENCIES[rope.kind](rope) for kind, rope in self.ropes.items()}
        self._long_frequencies = {
            kind: _divided(rope, rope.long) for kind, rope in self.ropes.items() if rope.kind == "longrope"
        }
        self._parts = {
            kind: rotary_parts(rope.sections, rope.interleaved)
            for kind, rope in self.ropes.items()
            if rope.kind == "mrope"
        }

    def tables(self, positions: Tensor, reach: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer kind → (cos, sin), both (B, T, W/2) fp32, for `positions` (B, T), or (3, B, T) where the rope is mrope.

        reach  (B, 1) int64, a position that each row is known to come to, when it is given in pieces; None: what is
               given is whole
        """
        return {kind: self._table(kind, positions, reach) for kind in self.ropes}

    def _table(self, kind: str, positions: Tensor, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        rope, frequencies = self.ropes[kind], self._on_device(self._frequencies, kind, positions.device)
        if kind in self._long_frequencies:
            ends = document_ends(positions) if reach is None else torch.maximum(document_ends(positions), reach)
            long = self._on_device(self._long_frequencies, kind, positions.device)
            is_long = (ends + 1 > rope.trained_length).unsqueeze(-1)  # (B, T, 1)
            frequencies = torch.where(is_long, long, frequencies)  # (B, T, W/2)
        three = positions.ndim == 3 and kind in self._parts
        parts = self._on_device(self._parts, kind, positions.device) if three else None
        angles = rotary_angles(positions, frequencies, parts)
        return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor

    @staticmethod
    def _on_device(tensors: dict[str, Tensor], kind: str, device: torch.device) -> Tensor:
        if tensors[kind].device != device:  # moved once, to where the model lives
            tensors[kind] = tensors[kind].to(device)
        return tensors[kind]


def document_ends(positions: Tensor) -> Tensor:
    """(B, T) int64: for each token the last position of its document, a run of `positions` that counts up by one."""
    ends = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (0, 1), value=True)
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    own_end = torch.where(ends, columns, positions.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return positions.gather(1, own_end)
