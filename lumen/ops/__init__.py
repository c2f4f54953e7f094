"""Pure functions on tensors: the equation, a reference that defines what is correct, faster ways that agree with it."""

from lumen.ops._choose import explain, uncompiled, use
from lumen.ops.adamw import adamw
from lumen.ops.attention import Reach, attention, reach
from lumen.ops.decode_attention import decode_attention
from lumen.ops.experts import NF4Stack, Route, grouped_linear, nf4_grouped_linear, top_experts
from lumen.ops.gated import gated
from lumen.ops.linear_loss import linear_cross_entropy, linear_logprobs
from lumen.ops.lora import lora_update
from lumen.ops.nf4 import NF4, dequantize_nf4, nf4_linear, quantize_nf4
from lumen.ops.project import Projection, project
from lumen.ops.rms_norm import rms_norm
from lumen.ops.rotary import rotary, rotate_qk

__all__ = [
    "NF4",
    "NF4Stack",
    "Projection",
    "Reach",
    "Route",
    "adamw",
    "attention",
    "decode_attention",
    "dequantize_nf4",
    "explain",
    "gated",
    "grouped_linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_update",
    "nf4_grouped_linear",
    "nf4_linear",
    "project",
    "quantize_nf4",
    "reach",
    "rms_norm",
    "rotary",
    "rotate_qk",
    "top_experts",
    "uncompiled",
    "use",
]
