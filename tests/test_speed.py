"""Operations a token, and the share of the vendor's peak that a run tells."""

import pytest
import torch
from tiny_models import llama

from lumen.checkpoint import load_model
from lumen.data.packing import pack
from lumen.speed import PEAKS, Speed, dense_peak, flops_per_token, product_dtype
from lumen.text.conversation import Encoded

NAMES = {  # as drivers report them → TFLOP/s in bf16
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_the_name_that_its_driver_reports(name):
    assert dense_peak(name, "bfloat16") == NAMES[name] * 1e12


@pytest.mark.parametrize(
    "name",
    ["", "NVIDIA A10G", "NVIDIA GB200", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce GTX 1080",
     "NVIDIA GeForce RTX 3090 with Max-Q Design"],
)  # fmt: skip
def test_of_another_device_no_peak_is_told(name):
    assert dense_peak(name, "bfloat16") is None


def test_the_dtype_of_the_products_chooses_the_peak():
    assert product_dtype(torch.bfloat16, fp8=True) == "float8"
    assert product_dtype(torch.float16, fp8=False) == "float16"
    assert product_dtype(torch.float32, fp8=False) == "float32"
    assert dense_peak("NVIDIA H200", "float8") == 2 * dense_peak("NVIDIA H200", "bfloat16") * (1979 / 1978.8)
    assert dense_peak("NVIDIA H200", "float32") == 67e12
    assert dense_peak("NVIDIA A100-SXM4-80GB", "float8") is None
    assert dense_peak("Tesla T4", "bfloat16") is None


def test_no_figure_of_the_table_is_a_sparse_one():
    for name, (float8, float16, bfloat16, tf32, float32) in PEAKS.items():
        assert not bfloat16 or (float16 == bfloat16 and tf32 == pytest.approx(bfloat16 / 2, rel=0.02)), name
        assert not float8 or float8 == pytest.approx(2 * bfloat16, rel=0.02), name
        assert float32 <= max(tf32, 9), name


def test_operations_of_a_token_are_those_of_the_equation(tmp_path):
    llama(tmp_path)
    spec = load_model(tmp_path).spec
    packed = pack([Encoded([1] * 9, [False] * 5 + [True] * 4), Encoded([2] * 5, [True] * 5)], 16)
    layer = spec.dim * spec.head_dim * 2 * (spec.heads + spec.kv_heads) + 3 * spec.dim * spec.mlp_dim
    learned, pairs = 8 / 14, (81 + 25) / 14 / 2
    weights = len(spec.layers) * layer + learned * spec.vocab * spec.dim
    attention = len(spec.layers) * 14 * spec.heads * spec.head_dim * pairs
    assert flops_per_token(spec, packed, learns_base=False) == pytest.approx(4 * weights + attention)
    assert flops_per_token(spec, packed, learns_base=True) == pytest.approx(6 * weights + attention)


def test_the_share_is_operations_over_the_peak_and_stays_unsaid_where_it_is_unknown():
    speed = Speed(device="NVIDIA H200", dtype="bfloat16", flops_per_token=4e10)
    assert speed.figures(10_000) == {"tflops": 400, "peak_share": pytest.approx(400 / 989.4)}
    assert "989 TFLOP/s, NVIDIA H200" in speed.line
    unknown = Speed(device="NVIDIA A10G", dtype="bfloat16", flops_per_token=4e10)
    assert unknown.figures(10_000) == {"tflops": 400} and "unknown" in unknown.line
    assert Speed(device="", dtype="float32", flops_per_token=1.0).figures(10_000) == {}
