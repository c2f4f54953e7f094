"""The operations of a mixture of experts against a loop over tokens, and grouped products against their reference."""

import pytest
import torch
from torch import Tensor

from lumen import ops
from lumen.errors import KernelError
from lumen.ops.experts import (
    NF4Stack,
    Route,
    grouped_linear,
    grouped_linear_reference,
    nf4_grouped_linear,
    nf4_grouped_linear_reference,
    top_experts,
    unpack_experts,
    unpack_experts_reference,
)
from lumen.ops.nf4 import NF4, dequantize_nf4, nf4_scales, quantize_nf4

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of the whole tensor: a few roundings of the dtype
ROUTES = {  # what is special → the experts of each token
    "several": [[0, 3], [3, 1], [4, 0], [1, 3], [3, 4]],  # none for expert 2
    "all to one": [[3], [3], [3]],
    "one each": [[2], [0], [4], [1], [3]],
    "one token": [[4, 1, 0]],
    "every expert": [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]],
}
EXPERTS = 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def stack_of(weights: Tensor) -> NF4Stack:
    stack = NF4Stack(len(weights))
    for expert, weight in enumerate(weights):
        stack.put(expert, quantize_nf4(weight))
    return stack


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [1, 2, EXPERTS])
def test_the_highest_scores_are_chosen_and_weighed_by_their_probabilities(count, normalize):
    scores = torch.randn(37, EXPERTS)
    weights, chosen = top_experts(scores, count, normalize)
    for row, own, places in zip(scores.double(), weights, chosen, strict=True):
        ranked = sorted(range(EXPERTS), key=lambda expert: -row[expert].item())[:count]
        assert places.tolist() == ranked
        probabilities = row.exp()[ranked] / row.exp().sum()
        wanted = probabilities / probabilities.sum() if normalize else probabilities
        torch.testing.assert_close(own.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_the_scores_are_those_of_finite_differences(normalize):
    scores = torch.randn(3, EXPERTS, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: (top_experts(s, 2, normalize)[0] * mix).sum(), scores)


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_rows_are_sorted_by_expert_and_every_pair_has_one(route):
    chosen = torch.tensor(ROUTES[route])
    found = Route.of(chosen, EXPERTS)
    groups = found.order.tensor_split(found.ends[:-1].long())
    assert len(groups) == EXPERTS and found.ends.dtype == torch.int32
    for expert, pairs in enumerate(groups):
        assert pairs.tolist() == [pair for pair, own in enumerate(chosen.flatten().tolist()) if own == expert]
    assert torch.equal(found.order[found.place], torch.arange(chosen.numel()))


@pytest.mark.parametrize("route", ROUTES)
def test_a_layer_of_experts_equals_a_loop_over_tokens_and_so_do_its_gradients(route):
    """y[n] = Σ_k weight[n, k] W[chosen[n, k]] x[n], in float64 against autograd through the loop."""
    chosen = torch.tensor(ROUTES[route])
    inputs = [torch.randn(len(chosen), 7), torch.randn(EXPERTS, 6, 7), torch.rand(chosen.shape)]
    x, weight, share = (tensor.double().requires_grad_() for tensor in inputs)
    found_route = Route.of(chosen, EXPERTS)
    found = found_route.from_experts(grouped_linear(found_route.to_experts(x), weight, found_route.ends), share)
    loop = [
        sum(share[n, k] * (weight[expert] @ x[n]) for k, expert in enumerate(own))
        for n, own in enumerate(ROUTES[route])
    ]
    wanted = torch.stack(loop)
    torch.testing.assert_close(found, wanted)
    mix = torch.randn_like(wanted)
    ours = torch.autograd.grad((found * mix).sum(), (x, weight, share))
    theirs = torch.autograd.grad((wanted * mix).sum(), (x, weight, share))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)
    idle = sorted(set(range(EXPERTS)) - set(chosen.flatten().tolist()))
    assert not ours[1][idle].any()


def test_masters_are_rounded_to_the_dtype_of_the_rows_and_their_gradients_come_back_wide():
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    x = torch.randn(7, 16, dtype=torch.bfloat16)
    weight = torch.randn(3, 8, 16, requires_grad=True)
    y = grouped_linear(x, weight, ends)
    assert torch.equal(y, grouped_linear(x, weight.detach().bfloat16(), ends)) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


# --- NF4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 32), (96, 40), (7, 9), (5, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_expert_of_a_stack_is_the_weight_packed_alone(shape, dtype):
    weights = torch.randn(3, *shape) * torch.tensor([1.0, 0.01, 30.0])[:, None, None]
    stack = stack_of(weights.to(dtype))
    for expert, weight in enumerate(weights.to(dtype)):
        alone = quantize_nf4(weight)
        assert all(torch.equal(stack[expert].tensors[name], one) for name, one in alone.tensors.items())
        assert torch.equal(dequantize_nf4(stack[expert]), dequantize_nf4(alone))
    assert stack.nbytes == 3 * alone.nbytes


@pytest.mark.parametrize("shape", [(64, 32), (192, 100), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2 * 64 * 32, 2**25])
def test_unpacking_all_at_once_is_unpacking_each_to_the_bit(shape, dtype, chunk, monkeypatch):
    monkeypatch.setattr("lumen.ops.experts.CHUNK_ELEMENTS", chunk)
    stack = stack_of(torch.randn(EXPERTS, *shape) * torch.rand(EXPERTS, 1, 1))
    assert torch.equal(unpack_experts(stack, dtype), unpack_experts_reference(stack, dtype))


def test_experts_whose_scales_are_not_packed_unpack_too():
    packed = [quantize_nf4(weight) for weight in torch.randn(2, 32, 64)]
    plain = [NF4(codes=one.codes, absmax=nf4_scales(one), nested_absmax=None, offset=None, shape=one.shape,
                 dtype=one.dtype) for one in packed]  # fmt: skip
    stack = NF4Stack(2)
    for expert, one in enumerate(plain):
        stack.put(expert, one)
    wanted = torch.stack([dequantize_nf4(one) for one in packed])
    assert torch.equal(unpack_experts(stack, torch.float32), wanted)
    with pytest.raises(KernelError, match="one kind of scales"):
        stack.put(0, packed[0])
    with pytest.raises(KernelError, match="one shape"):
        stack.put(0, quantize_nf4(torch.randn(64, 32)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_the_dense_product_of_what_is_packed(route, dtype):
    found_route = Route.of(torch.tensor(ROUTES[route]), EXPERTS)
    stack = stack_of(torch.randn(EXPERTS, 24, 64))
    x = torch.randn(len(found_route.order), 64, dtype=dtype, requires_grad=True)
    found = nf4_grouped_linear(x, stack, found_route.ends)
    wanted = grouped_linear(x, unpack_experts(stack, dtype), found_route.ends)
    assert relative_error(found, wanted) <= TOLERANCE[dtype] and found.dtype == dtype
    mix = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * mix).sum(), x)[0] for y in (found, wanted))
    assert relative_error(ours, theirs) <= TOLERANCE[dtype]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def gpu_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, in), weight (X, out, in), ends, and a gradient (M, out); 60 experts, some without rows, in bf16."""
    chosen = torch.randint(0, 40, (301, 4)) + torch.randint(0, 20, (301, 4))
    ends = Route.of(chosen, 60).ends.cuda()
    x, weight = torch.randn(1204, 136), torch.randn(60, 72, 136) / 12
    return x.cuda().bfloat16(), weight.cuda(), ends, torch.randn(1204, 72).cuda().bfloat16()


@needs_gpu
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_the_grouped_product_of_a_gpu_equals_the_reference(master):
    x, weight, ends, grad = gpu_problem()
    weight = weight.to(master)
    results = []
    for product in (grouped_linear, grouped_linear_reference):
        own = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(*own, ends)
        results.append((y, *torch.autograd.grad(y, own, grad)))
    assert ops.explain()["grouped_linear"].startswith("grouped")
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == wanted.dtype
        assert relative_error(ours, wanted) <= TOLERANCE[torch.bfloat16]
    idle = ends.diff(prepend=ends.new_zeros(1)) == 0
    assert idle.any() and not results[0][2][idle].any()


@needs_gpu
def test_the_packed_grouped_product_of_a_gpu_equals_the_reference():
    x, weight, ends, grad = gpu_problem()
    weight = weight[:, :64, :128].contiguous()
    stack, x, grad = stack_of(weight), x[:, :128].contiguous(), grad[:, :64].contiguous()
    results = []
    for product in (nf4_grouped_linear, nf4_grouped_linear_reference):
        own = x.clone().requires_grad_()
        y = product(own, stack, ends)
        results.append((y, *torch.autograd.grad(y, own, grad)))
    assert ops.explain()["nf4_grouped_linear"].startswith("grouped")
    for ours, wanted in zip(*results, strict=True):
        assert relative_error(ours, wanted) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(unpack_experts(stack, torch.bfloat16), unpack_experts_reference(stack, torch.bfloat16))


@needs_gpu
def test_rows_that_are_no_whole_steps_of_16_bytes_take_the_reference_on_a_gpu():
    x, ends = torch.randn(5, 12, device="cuda").bfloat16(), torch.tensor([2, 5], dtype=torch.int32, device="cuda")
    grouped_linear(x, torch.randn(2, 8, 12, device="cuda"), ends)
    assert ops.explain()["grouped_linear"].startswith("reference")
