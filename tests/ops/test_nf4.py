"""NF4 against bitsandbytes on the CPU, bit for bit, and its linear layer against a dense one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels import needs_triton
from torch import Tensor

from lumen import ops
from lumen.errors import KernelError
from lumen.formats.safetensors import TensorFiles
from lumen.ops.nf4 import NF4, NF4_VALUES, dequantize_nf4, nested_values, nf4_linear, quantize_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (3, 5), (7, 9), (1, 64), (65,), (127,), (5, 13, 2), (129, 63), (256, 64), (257, 64), (96, 1000)]


@pytest.fixture(scope="module")
def bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):  # else it compiles for each shape, seconds at a time
        yield functional


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def differing_bits(bitsandbytes, weight: Tensor) -> dict[str, int]:
    """For each part of a quantized weight, how many elements differ from bitsandbytes'."""
    ours = quantize_nf4(weight)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    pairs = {
        "codes": (ours.codes, codes.flatten()),
        "absmax": (ours.absmax, state.absmax),
        "nested_absmax": (ours.nested_absmax, state.state2.absmax),
        "offset": (ours.offset, state.offset),
        "weight": (dequantize_nf4(ours).flatten(), bitsandbytes.dequantize_4bit(codes, state).flatten()),
    }
    for name, (our, their) in pairs.items():
        assert (our.shape, our.dtype) == (their.shape, their.dtype), name
    return {name: count for name, (our, their) in pairs.items() if (count := int((our != their).sum()))}


def beside_midpoints(blocks: int) -> Tensor:
    """(blocks, 64): a scale in the first place, then values that lie on a midpoint of two codes or two bits off it."""
    values = torch.tensor(NF4_VALUES)
    midpoints = (values[1:] + values[:-1]) / 2
    scales = torch.rand(blocks, 1) + 0.01
    exact = midpoints[torch.randint(15, (blocks, 63))] * scales
    beside = (exact.view(torch.int32) + torch.randint(-2, 3, exact.shape).int()).view(torch.float32)
    return torch.cat([scales, beside], dim=1)


# Against bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_part_equals_bitsandbytes(bitsandbytes, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert differing_bits(bitsandbytes, torch.randn(shape).to(dtype)) == {}


def test_forty_thousand_scales_equal_bitsandbytes(bitsandbytes) -> None:
    # Without the 65536 steps of its table, one code in a thousand would be its neighbour.
    assert differing_bits(bitsandbytes, torch.randn(40_000, 64) * torch.rand(40_000, 1)) == {}


@pytest.mark.parametrize("size", [1, 5, 600, 70_000])
def test_blocks_of_zeros_equal_bitsandbytes(bitsandbytes, size: int) -> None:
    assert differing_bits(bitsandbytes, torch.zeros(size)) == {}
    assert dequantize_nf4(quantize_nf4(torch.zeros(size))).count_nonzero() == 0


def test_zeros_among_other_blocks_equal_bitsandbytes(bitsandbytes) -> None:
    weight = torch.randn(900, 64)
    weight[::3] = 0  # some of the blocks
    weight[256:512] = 0  # all the scales of a nested block
    assert differing_bits(bitsandbytes, weight) == {}


def test_equal_scales_equal_bitsandbytes(bitsandbytes) -> None:
    assert differing_bits(bitsandbytes, torch.ones(600, 64)) == {}


@pytest.mark.parametrize("size", [1e35, 1e-6, 1e-37, 1e-38, 1e-39, 1e-44])
def test_scales_near_the_ends_of_fp32_equal_bitsandbytes(bitsandbytes, size: float) -> None:
    assert differing_bits(bitsandbytes, (torch.rand(300, 64) - 0.5) * size) == {}


@pytest.mark.parametrize("incomplete", [False, True])
def test_values_beside_a_midpoint_equal_bitsandbytes(bitsandbytes, incomplete: bool) -> None:
    weight = beside_midpoints(blocks=2000)
    for part in weight[:200, :61] if incomplete else [weight]:
        assert differing_bits(bitsandbytes, part) == {}


def test_real_weights_equal_bitsandbytes(bitsandbytes, shared_data: Path) -> None:
    with TensorFiles(shared_data / "models" / "stories260K") as files:
        for name in files.names():
            assert differing_bits(bitsandbytes, files.read(name)) == {}, name


def test_both_data_types_are_those_of_bitsandbytes(bitsandbytes) -> None:
    assert torch.equal(torch.tensor(NF4_VALUES), bitsandbytes.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nested_values(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("shape", [(7, 9), (129, 63), (257, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_not_quantized_dequantize_as_in_bitsandbytes(bitsandbytes, shape, dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    ours = NF4(codes.flatten(), state.absmax, None, None, shape, dtype)
    assert torch.equal(dequantize_nf4(ours), bitsandbytes.dequantize_4bit(codes, state))
    assert torch.equal(nf4_linear(torch.eye(shape[1]), ours).T, dequantize_nf4(ours, torch.float32))


# The kernel that packs


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 64), (2049,)], ids=str)
def test_the_packing_kernel_equals_bitsandbytes(bitsandbytes, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with ops.use("triton", "quantize_nf4"):
        assert differing_bits(bitsandbytes, torch.randn(shape).to(dtype)) == {}


@needs_triton
@pytest.mark.parametrize("count", [64 * 40, 64 * 40 + 61], ids=["whole blocks", "an incomplete block"])
@pytest.mark.parametrize("size", [0.0, 1e35, 1.0, 1e-37, 1e-38, 1e-39, 1e-44])
def test_the_packing_kernel_equals_bitsandbytes_at_the_ends_of_fp32(bitsandbytes, size: float, count: int) -> None:
    weight = (torch.rand(count) - 0.5) * size
    weight[640:704] = 0
    weight[-3:] = -0.0
    with ops.use("triton", "quantize_nf4"):
        assert differing_bits(bitsandbytes, weight) == {}


@needs_triton
@pytest.mark.parametrize("width", [64, 61])
def test_the_packing_kernel_equals_bitsandbytes_beside_a_midpoint(bitsandbytes, width: int) -> None:
    weight = beside_midpoints(blocks=100 if width == 64 else 12)[:, :width]
    with ops.use("triton", "quantize_nf4"):
        for part in weight if width < 64 else [weight]:  # rows of 61 values: an incomplete block each
            assert differing_bits(bitsandbytes, part) == {}


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_the_packing_kernel_finds_what_is_not_finite(value: float, at: int) -> None:
    weight = torch.randn(8, 100)
    weight.view(-1)[at] = value
    with ops.use("triton", "quantize_nf4"), pytest.raises(KernelError, match=r"found NaN or infinity in \(8, 100\)"):
        quantize_nf4(weight)


@needs_triton
def test_the_packing_kernel_takes_other_dtypes_and_strides_as_the_reference_does() -> None:
    for weight in (torch.randn(9, 70, dtype=torch.float64), torch.randn(70, 9).T, torch.randn(3, 200)[:, ::2]):
        with ops.use("triton", "quantize_nf4"):
            found = quantize_nf4(weight)
        wanted = quantize_nf4(weight)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in found.tensors.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_packs_to_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for weight in (torch.randn(96, 1000), torch.rand(257, 64) * 1e-38, beside_midpoints(300), torch.randn(3000, 4096)):
        values = weight.to(dtype)
        found = quantize_nf4(values.cuda())
        with ops.use("reference"):
            wanted, on_cpu = quantize_nf4(values.cuda()), quantize_nf4(values)
        assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in found.tensors.items())
        assert torch.equal(found.codes.cpu(), on_cpu.codes)  # the mean of the scales may differ in its last bit


# Rows of a fused weight


@pytest.mark.parametrize(
    ("first", "count", "quantized_scales"),
    [(0, 256, True), (0, 3, True), (256, 300, True), (256, 256, True), (1, 555, False), (555, 1, False)],
)
def test_rows_hold_the_same_values_as_the_whole(first: int, count: int, quantized_scales: bool) -> None:
    whole = quantize_nf4(torch.randn(556, 64))
    part = whole.rows(first, count)
    assert torch.equal(dequantize_nf4(part), dequantize_nf4(whole)[first : first + count])
    assert (part.absmax.dtype == torch.uint8, part.shape) == (quantized_scales, (count, 64))
    assert torch.equal(dequantize_nf4(part.rows(0, 1)), dequantize_nf4(whole)[first : first + 1])


def test_the_last_rows_may_end_within_a_block_and_no_cut_may_begin_in_one() -> None:
    whole = quantize_nf4(torch.randn(5, 96))
    assert torch.equal(dequantize_nf4(whole.rows(2, 3)), dequantize_nf4(whole)[2:])
    for first, count in [(1, 2), (2, 1)]:
        with pytest.raises(KernelError, match="wants rows cut between blocks of 64 values"):
            whole.rows(first, count)


# What is stored


def test_a_weight_takes_4_127_bits_a_value() -> None:
    nf4 = quantize_nf4(torch.randn(512, 4096))
    assert nf4.nbytes * 8 / (512 * 4096) == pytest.approx(4.127, abs=1e-3)
    assert (nf4.codes.shape, nf4.absmax.shape, nf4.nested_absmax.shape) == ((2**20,), (2**15,), (2**7,))


def test_the_first_value_is_in_the_high_nibble() -> None:
    nf4 = quantize_nf4(torch.tensor([-1.0, 1.0, 0.0]))
    assert nf4.codes.tolist() == [0x0F, 0x77]


def test_a_transposed_weight_is_quantized_by_value() -> None:
    weight = torch.randn(70, 30)
    assert torch.equal(quantize_nf4(weight.T).codes, quantize_nf4(weight.T.contiguous()).codes)
    assert quantize_nf4(weight.T).shape == (30, 70)


def test_a_parameter_leaves_no_graph_behind() -> None:
    nf4 = quantize_nf4(torch.nn.Parameter(torch.randn(8, 64)))
    assert not any(tensor.requires_grad for tensor in (nf4.codes, nf4.absmax, nf4.nested_absmax, nf4.offset))


def test_the_asked_dtype_is_one_rounding_from_fp32() -> None:
    nf4 = quantize_nf4(torch.randn(8, 100).bfloat16())
    assert dequantize_nf4(nf4).dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(nf4), dequantize_nf4(nf4, torch.float32).bfloat16())


def test_moving_moves_every_tensor() -> None:
    nf4 = quantize_nf4(torch.randn(8, 64)).to("meta")
    assert {tensor.device.type for tensor in nf4.tensors.values()} == {"meta"}
    assert list(nf4.tensors) == ["codes", "absmax", "nested_absmax", "offset"]
    plain = replace(nf4, absmax=torch.ones(8), nested_absmax=None, offset=None)
    assert list(plain.to("meta").tensors) == ["codes", "absmax"] and plain.nbytes == 256 + 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.randn(8, 100)
    weight[3, 7] = value
    with pytest.raises(KernelError, match=r"found NaN or infinity in \(8, 100\)"):
        quantize_nf4(weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_dequantizes_to_the_same_bits(dtype: torch.dtype) -> None:
    nf4 = quantize_nf4(torch.randn(96, 1000).to(dtype))
    assert torch.equal(dequantize_nf4(nf4.to("cuda")).cpu(), dequantize_nf4(nf4))


# The linear layer


@pytest.fixture
def nf4() -> NF4:
    return quantize_nf4(torch.randn(37, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradient_are_those_of_a_dense_layer(nf4: NF4, dtype: torch.dtype) -> None:
    x = torch.randn(2, 11, 50, dtype=dtype, requires_grad=True)
    dense_x = x.detach().clone().requires_grad_()
    y, dense_y = nf4_linear(x, nf4), torch.nn.functional.linear(dense_x, dequantize_nf4(nf4, dtype))
    assert torch.equal(y, dense_y)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense_y.backward(grad)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, dense_x.grad)


def test_the_gradient_is_the_derivative() -> None:
    nf4 = quantize_nf4(torch.randn(5, 7, dtype=torch.float64))
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nf4_linear(x, nf4), x)


def test_nothing_is_saved_for_the_backward_pass(nf4: NF4) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda tensor: tensor):
        nf4_linear(torch.randn(2, 50, requires_grad=True), nf4)
    assert saved == []


def test_training_works_after_a_first_use_in_inference_mode() -> None:
    from lumen.ops.nf4 import _byte_values, _dynamic, _nf4

    for table in (_byte_values, _dynamic, _nf4):
        table.cache_clear()
    with torch.inference_mode():
        nf4 = quantize_nf4(torch.randn(37, 50))
        nf4_linear(torch.randn(2, 50), nf4)
    x = torch.randn(2, 50, requires_grad=True)
    nf4_linear(x, nf4).sum().backward()
    torch.testing.assert_close(x.grad, dequantize_nf4(nf4).sum(0).expand(2, 50))
