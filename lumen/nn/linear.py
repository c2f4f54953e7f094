"""The linear layer that everything learned passes through: dense or NF4 base, bias, and a low-rank pair beside it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.ops.lora import lora_update
from lumen.ops.nf4 import NF4, nf4_linear, quantize_nf4


class LoraPair(nn.Module):
    """A and B of one adapted layer, always fp32; `enabled` turns the update off without taking it out."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, device: torch.device):
        """A is Kaiming-uniform as in PEFT, from torch's global random state; B is zero: training starts at the base."""
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.scale = scale
        self.dropout = dropout
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return lora_update(F.dropout(x, self.dropout, self.training), self.a, self.b, self.scale)


class Linear(nn.Module):
    """y = W x + bias + LoRA(x). W is `weight` (dense) or `nf4` (packed, frozen), never both.

    `nf4` is no parameter and does not follow `.to(device)`: a layer is quantized where it will stay.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.nf4: NF4 | None = None
        self.lora: LoraPair | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.nf4 is None else self.nf4.codes.device

    def quantize(self, weight: Tensor) -> None:
        """Puts NF4(`weight`) (outputs, inputs) in the place of the dense weight."""
        self.nf4 = quantize_nf4(weight)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) if self.nf4 is None else nf4_linear(x, self.nf4)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        if self.lora is not None and self.lora.enabled:
            y = y + self.lora(x)
        return y
