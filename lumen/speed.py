"""How fast a run is: operations a token, and what share of the GPU's peak they come to.

Convention (MFU, model FLOPs utilisation). Counted is what learning needs, each operation once: a linear layer of n
weights costs 2n operations a token forward, 2n for the gradient of its input, and 2n for its own gradient where it
learns. Attention costs 4·H·E operations for each pair of a query and a key that it sees, forward, and 2.5 times as much
backward. Only learned positions meet the head. What is computed again in the backward pass does not count, nor does
what an adapter adds. So a share can fall when a run computes more, never rise.

    share of peak = operations a token · tokens a second / peak

The peak is the vendor's own figure for products of dense matrices (no 2:4 sparsity) at the GPU's boost clock: of 8-bit
products with `model.fp8`, else of the dtype that is computed in; for products in 16 bits the one that sums in fp32. No
GPU holds that clock under such a load: large products alone reach about 690 of an H200's 989 TFLOP/s. Of a GPU that is
not in the table no share is told.
"""

import re
from dataclasses import dataclass

import torch

from lumen.data.packing import Packed
from lumen.models.decoder import Decoder
from lumen.spec import ModelSpec

TERA = 1e12
DTYPES = ("float8", "float16", "bfloat16", "tf32", "float32")  # the columns of PEAKS
PEAKS = {  # TFLOP/s, dense, by the words of the device's name; 0 = cannot. A datasheet's sparse figures are halved.
    # NVIDIA HGX B200 datasheet, an eighth of it
    "B200": (4500, 2250, 2250, 1120, 75),
    # NVIDIA H100, H200 and GH200 datasheets; the modules on a board of their own are slower than those of HGX
    "GH200": (1979, 989.4, 989.4, 494.7, 67),
    "H200 NVL": (1671, 835.5, 835.5, 417.5, 60),
    "H200": (1979, 989.4, 989.4, 494.7, 67),
    "H100 NVL": (1671, 835.5, 835.5, 417.5, 60),
    "H100 PCIe": (1513, 756, 756, 378, 51),
    "H100": (1979, 989.4, 989.4, 494.7, 67),
    # NVIDIA datasheets of these; no 8 bits before 2022, no bf16 before 2020
    "L40S": (733, 362, 362, 183, 91.6),
    "L40": (362, 181, 181, 90.5, 90.5),
    "L4": (242, 121, 121, 60, 30.3),
    "A100": (0, 312, 312, 156, 19.5),
    "A40": (0, 149.7, 149.7, 74.8, 37.4),
    "A30": (0, 165, 165, 82, 10.3),
    "A10": (0, 125, 125, 62.5, 31.2),
    "T4": (0, 65, 0, 0, 8.1),
    # NVIDIA's architecture white papers (GB202, AD102, GA102), sums in fp32
    "RTX 5090": (419, 209.5, 209.5, 104.8, 104.8),
    "RTX 4090": (330.3, 165.2, 165.2, 82.6, 82.6),
    "RTX 3090": (0, 71, 71, 35.6, 35.6),
    "RTX 6000 Ada": (728.5, 364.2, 364.2, 182.1, 91.1),
    "RTX A6000": (0, 154.8, 154.8, 77.4, 38.7),
}
SLOWER = ("Laptop", "Max-Q", "D", "Ti", "MIG")  # words after which a name is another device's


def dense_peak(device: str, dtype: str) -> float | None:
    """Operations a second of a GPU by its name, as "NVIDIA H100 80GB HBM3", in one of DTYPES; None if unknown."""
    for name, rates in PEAKS.items():
        if found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device):
            rate = rates[DTYPES.index(dtype)]
            rest = device[found.end() :].split()
            return None if not rate or set(SLOWER) & set(rest) else rate * TERA
    return None


def product_dtype(dtype: torch.dtype, *, fp8: bool) -> str:
    """In which of DTYPES products are computed."""
    if fp8:
        return "float8"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def active_weights(spec: ModelSpec) -> int:
    """Weights that a token meets on its way through all blocks."""
    experts = spec.experts
    attention = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    dense = attention + 3 * spec.dim * spec.mlp_dim
    sparse = attention + 3 * spec.dim * (experts.per_token * experts.width + experts.shared) if experts else 0
    return sum(sparse if layer.sparse else dense for layer in spec.layers)


def context(packed: Packed) -> float:
    """How many keys a token's document has, on average over tokens."""
    lengths = [len(example.ids) for row in packed.rows for example in row]
    return sum(n * n for n in lengths) / sum(lengths)


def flops_per_token(spec: ModelSpec, packed: Packed, *, learns_base: bool) -> float:
    """Operations a token of `packed` in one forward and backward pass, as the module says."""
    passes = 6 if learns_base else 4
    head = spec.vocab * spec.dim * packed.counted / packed.tokens
    seen = context(packed)
    pairs = sum(min(seen / 2, layer.window) if layer.window else seen / 2 for layer in spec.layers)
    return passes * (active_weights(spec) + head) + 3.5 * 4 * spec.heads * spec.head_dim * pairs


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What tokens a second mean on the device of a run."""

    device: str  # name of the GPU; empty on a CPU, of which nothing is told
    dtype: str  # of DTYPES
    flops_per_token: float

    @classmethod
    def of(cls, model: Decoder, packed: Packed, *, learns_base: bool, fp8: bool) -> "Speed":
        on_gpu = model.device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(model.device) if on_gpu else "",
            dtype=product_dtype(model.dtype, fp8=fp8),
            flops_per_token=flops_per_token(model.spec, packed, learns_base=learns_base),
        )

    @property
    def peak(self) -> float | None:
        return dense_peak(self.device, self.dtype)

    def figures(self, tokens_per_s: float) -> dict[str, float]:
        """`tflops` on a GPU, and `peak_share`, 0 … 1, where its peak is known: for metrics.jsonl."""
        if not self.device:
            return {}
        flops = self.flops_per_token * tokens_per_s
        return {"tflops": flops / TERA} | ({"peak_share": flops / self.peak} if self.peak else {})

    @property
    def line(self) -> str:
        """What `figures` are measured against, for the first lines of a run; nothing on a CPU."""
        if not self.device:
            return ""
        if not self.peak:
            return f"peak     of {self.device} in {self.dtype} unknown: no share of it is told\n"
        return (
            f"peak     {self.peak / TERA:,.0f} TFLOP/s, {self.device}, dense products in {self.dtype}; TFLOP/s counts "
            "the model's own operations, not those done again\n"
        )
