"""The module in the place of an MLP: routing in fp32, stacks that fill up, packing, pairs of every expert."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lumen.errors import CheckpointError
from lumen.expert_spec import ExpertsSpec
from lumen.nn.experts import ExpertLinear, ExpertLoraPairs, Experts
from lumen.nn.linear import LoraPair
from lumen.ops.nf4 import dequantize_nf4, quantize_nf4
from lumen.spec import Family, ModelSpec

X, D, WIDTH, SHARED = 6, 64, 32, 48


def make_spec(**experts) -> ModelSpec:
    page = Family.load("qwen2-moe")
    sizes = {"depth": 1, "dim": D, "heads": 4, "mlp_dim": 96, "vocab": 50, "experts": X, "experts_per_token": 3,
             "expert_dim": WIDTH, "shared_dim": SHARED}  # fmt: skip
    config = {page.size_keys[name]: size for name, size in sizes.items()}
    rest = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "norm_topk_prob": True}
    spec = page.bind(config | rest | {"rope_scaling": {"rope_type": "default"}})
    return replace(spec, experts=replace(spec.experts, **experts))


def make_module(spec: ModelSpec) -> Experts:
    torch.manual_seed(0)
    module = Experts(spec)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    return module


def one_expert(module: Experts, e: int, x: Tensor) -> Tensor:
    gate, up, down = (layer.weight[e] for layer in (module.experts.gate, module.experts.up, module.experts.down))
    return down @ (F.silu(gate @ x) * (up @ x))


@pytest.mark.parametrize(
    "own", [{}, {"normalize": False}, {"per_token": 1}, {"shared": 0, "shared_gate": "none"}, {"shared_gate": "none"}]
)
def test_the_module_is_its_equation_token_by_token(own):
    spec = make_spec(**own)
    module, x = make_module(spec), torch.randn(2, 9, D)
    found = module.outputs(x)
    for token, y in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        shares = (module.router.weight @ token).softmax(0)
        chosen = shares.argsort(descending=True)[: spec.experts.per_token].tolist()
        total = shares[chosen].sum() if spec.experts.normalize else 1.0
        wanted = sum(shares[e] / total * one_expert(module, e, token) for e in chosen)
        if spec.experts.shared:
            gate = (module.shared_gate.weight @ token).sigmoid() if module.shared_gate else 1.0
            wanted = wanted + gate * module.shared.outputs(token)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_scores_are_fp32_and_decide_as_in_fp32_beside_bf16_activations():
    module = make_module(make_spec())
    x = torch.randn(500, D).bfloat16()
    scores = module.router(x)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, F.linear(x.float(), module.router.weight))
    rounded = F.linear(x, module.router.weight.bfloat16())
    assert not torch.equal(scores.topk(3).indices, rounded.topk(3).indices)  # what the rounding would have done
    assert module.outputs(x).dtype == torch.bfloat16


def test_a_token_has_the_same_answer_in_any_company():
    module, x = make_module(make_spec()), torch.randn(1, 40, D)
    together = module.outputs(x)
    for t in (0, 17, 39):
        torch.testing.assert_close(module.outputs(x[:, t : t + 1]), together[:, t : t + 1])


def test_every_weight_has_a_gradient_and_that_of_an_idle_expert_is_zero():
    module = make_module(make_spec(per_token=1))
    x = torch.randn(1, 2, D)
    chosen = module.router(x[0]).argmax(-1).tolist()
    module.outputs(x).square().sum().backward()
    for layer in (module.experts.gate, module.experts.up, module.experts.down):
        assert {e for e in range(X) if layer.weight.grad[e].any()} == set(chosen)
    assert all(parameter.grad is not None for parameter in module.parameters())


# --- stacks -----------------------------------------------------------------------------------------------------------


def filled(packed: bool, dtype: torch.dtype = torch.float32) -> tuple[ExpertLinear, Tensor]:
    torch.manual_seed(1)
    with torch.device("meta"):
        layer = ExpertLinear(X, D, WIDTH)
    weights = torch.randn(X, WIDTH, D)
    for e, weight in enumerate(weights):
        layer.place_packed(e, quantize_nf4(weight)) if packed else layer.place(e, weight, dtype)
    return layer, weights


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(11, D), torch.tensor([3, 3, 4, 8, 10, 11], dtype=torch.int32)


def test_a_stack_fills_expert_by_expert_in_the_dtype_asked_for():
    layer, weights = filled(False, torch.bfloat16)
    assert torch.equal(layer.weight, weights.bfloat16()) and not layer.weight.requires_grad
    assert layer.device == torch.device("cpu")


def test_a_packed_stack_answers_like_its_dequantized_experts_and_holds_nothing_else():
    layer, weights = filled(True)
    x, ends = rows()
    dense, _ = filled(False)
    dense.weight.data = torch.stack([dequantize_nf4(quantize_nf4(weight)) for weight in weights])
    torch.testing.assert_close(layer(x, ends), dense(x, ends))
    assert layer.weight is None and not list(layer.parameters())


@pytest.mark.parametrize("packed_first", [True, False])
def test_experts_of_one_layer_are_all_packed_or_none(packed_first):
    layer, weights = filled(packed_first)
    with pytest.raises(CheckpointError, match="all in 4 bits or all dense"):
        layer.place(0, weights[0], torch.float32) if packed_first else layer.place_packed(0, quantize_nf4(weights[0]))


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_each_expert_has_a_pair_that_acts_on_its_rows_alone(packed):
    layer, _ = filled(packed)
    x, ends = rows()
    base = layer(x, ends)
    layer.lora = ExpertLoraPairs(X, D, WIDTH, 4, 0.5, 0.0, layer.device)
    assert torch.equal(layer(x, ends), base)  # B is zero
    torch.nn.init.normal_(layer.lora.b)
    y = layer(x, ends)
    for e, (own, before, after) in enumerate(
        zip(*(part.split(ends.diff(prepend=ends.new_zeros(1)).tolist()) for part in (x, base, y)), strict=True)
    ):
        a, b, scale = layer.lora[e]
        torch.testing.assert_close(after, before + own @ a.T @ b.T * scale, rtol=1e-4, atol=1e-4)
    layer.lora.enabled = False
    assert torch.equal(layer(x, ends), base)


def test_the_first_values_of_a_pair_are_drawn_expert_by_expert_as_for_a_single_layer():
    torch.manual_seed(5)
    stack = ExpertLoraPairs(X, D, WIDTH, 4, 0.5, 0.0, torch.device("cpu"))
    torch.manual_seed(5)
    for e in range(X):
        assert torch.equal(stack.a[e], LoraPair(D, WIDTH, 4, 0.5, 0.0, torch.device("cpu")).a)
    assert not stack.b.any() and {stack.a.dtype, stack.b.dtype} == {torch.float32}


def test_shapes_of_the_spec_are_those_of_the_module():
    spec = make_spec()
    shapes = {f"mlp.{name.removesuffix('.weight')}": tuple(p.shape) for name, p in Experts(spec).named_parameters()}
    assert shapes == spec.experts.shapes(D)
    assert isinstance(spec.experts, ExpertsSpec)
