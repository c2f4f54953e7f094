"""The linear layer that everything learned passes through: dense or NF4 base, bias, and a low-rank pair beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lumen.ops.dora import dora_norm
from lumen.ops.fp8 import Fp8Weight, fits, fp8_weights
from lumen.ops.nf4 import NF4, dequantize_nf4, quantize_nf4
from lumen.ops.project import Projection, project


class LoraPair(nn.Module):
    """A and B of one adapted layer, always fp32; `enabled` turns the update off without taking it out.

    `magnitude` (out,) is the learned length of the rows under DoRA, None without it; see `ops/dora.py`.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, device: torch.device):
        """A is Kaiming-uniform as in PEFT, from torch's global random state; B is zero: training starts at the base."""
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.magnitude: nn.Parameter | None = None
        self.scale = scale
        self.dropout = dropout
        self.enabled = True

    def norm(self, weight: Tensor) -> Tensor:
        """The length of each row of the adapted `weight` (out, in): (out,) fp32, without a gradient."""
        return dora_norm(weight, self.a, self.b, self.scale)

    def decompose(self, weight: Tensor) -> None:
        """Makes the pair a DoRA beside `weight`; the magnitude starts at the length that the rows have now."""
        self.magnitude = nn.Parameter(self.norm(weight))


class Linear(nn.Module):
    """y = W x + bias + LoRA(x). W is `weight` (dense) or `nf4` (packed, frozen), never both.

    `nf4` is no parameter and does not follow `.to(device)`: a layer is quantized where it will stay. `fp8` neither: it
    is W once more, rounded, and takes its place in the products while the layer trains and W does not learn.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.nf4: NF4 | None = None
        self.fp8: Fp8Weight | None = None
        self.lora: LoraPair | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.nf4 is None else self.nf4.codes.device

    def quantize(self, weight: Tensor) -> None:
        """Puts NF4(`weight`) (outputs, inputs) in the place of the dense weight."""
        self.nf4 = quantize_nf4(weight)
        self.weight = None

    def base_weight(self) -> Tensor:
        """W (outputs, inputs) as it takes part in the product: the dense weight, or fp32 values of the packed one."""
        return self.weight if self.nf4 is None else dequantize_nf4(self.nf4, torch.float32)

    def projection(self) -> Projection:
        """The layer as `ops.project` takes it, its pair included where it is on."""
        weight = self.weight if self.nf4 is None else self.nf4
        fp8 = self.fp8 if self.training and (self.weight is None or not self.weight.requires_grad) else None
        if self.lora is None or not self.lora.enabled:
            return Projection(weight=weight, bias=self.bias, fp8=fp8)
        pair = self.lora
        return Projection(
            weight=weight,
            bias=self.bias,
            a=pair.a,
            b=pair.b,
            scale=pair.scale,
            dropout=pair.dropout if pair.training else 0.0,
            magnitude=pair.magnitude,
            fp8=fp8,
        )

    def forward(self, x: Tensor) -> Tensor:
        return project([self.projection()], x)[0]


def round_to_fp8(layers: Sequence[Linear]) -> bool:
    """Gives layers that read the same input their weights in 8 bits; False, and nothing, where a size does not fit."""
    if not all(fits(layer.outputs, layer.inputs) for layer in layers):
        return False
    for layer, fp8 in zip(layers, fp8_weights([layer.base_weight() for layer in layers]), strict=True):
        layer.fp8 = fp8
    return True
