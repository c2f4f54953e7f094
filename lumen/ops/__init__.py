"""Pure functions on tensors: the equation, a reference that defines what is correct, faster ways that agree with it."""

from lumen.ops._choose import explain, use
from lumen.ops.attention import attention, attention_mask
from lumen.ops.gated import gated
from lumen.ops.linear_loss import linear_cross_entropy
from lumen.ops.lora import lora_update
from lumen.ops.nf4 import NF4, dequantize_nf4, nf4_linear, quantize_nf4
from lumen.ops.rms_norm import rms_norm
from lumen.ops.rotary import rotary

__all__ = [
    "NF4",
    "attention",
    "attention_mask",
    "dequantize_nf4",
    "explain",
    "gated",
    "linear_cross_entropy",
    "lora_update",
    "nf4_linear",
    "quantize_nf4",
    "rms_norm",
    "rotary",
    "use",
]
