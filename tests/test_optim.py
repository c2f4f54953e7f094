"""The optimizer against torch's, clipping against torch's, schedules against transformers'."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lumen import ops
from lumen.config import load_config
from lumen.errors import CheckpointError, ConfigError
from lumen.optim import AdamW, clip_factor, gradient_norm, learning_rate
from lumen.trainable import make_optimizer

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def network(seed=0, dtype=torch.float32):
    """Two linear layers with biases and a norm: matrices that decay, vectors that do not."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 3)).to(dtype)


def backward(model, step):
    """Gradients of a batch that depends on `step` alone."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
    model(x.to(next(model.parameters()).dtype)).float().pow(2).sum().backward()


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step(lr=1e-2 / (step + 1))
        optimizer.zero_grad()


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_twenty_steps_equal_torch_adamw():
    ours, theirs = network(), network()
    optimizer = AdamW(ours.named_parameters(), **SETTINGS)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    wanted = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        backward(ours, step)
        backward(theirs, step)
        for group in wanted.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step(1e-2 / (step + 1))
        wanted.step()
        optimizer.zero_grad()
        wanted.zero_grad()
        assert (flat(ours) - flat(theirs)).abs().max() <= 1e-7


def test_a_rate_of_its_own_is_a_group_of_torch_adamw():
    ours, theirs = network(), network()
    optimizer = AdamW(ours.named_parameters(), **SETTINGS, rates={"0.weight": 0.25, "0.bias": 0.25})
    groups = [
        {
            "params": [p for p in layer.parameters() if (p.ndim >= 2) == matrices],
            "factor": 0.25 if layer is theirs[0] else 1.0,
            "weight_decay": 0.1 * matrices,
        }
        for layer in (theirs[0], theirs[1], theirs[3])
        for matrices in (True, False)
    ]
    wanted = torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        for group in wanted.param_groups:
            group["lr"] = 1e-2 * group["factor"]
        optimizer.step(1e-2)
        wanted.step()
        optimizer.zero_grad()
        wanted.zero_grad()
        assert (flat(ours) - flat(theirs)).abs().max() <= 1e-7


def test_decay_shrinks_matrices_and_leaves_norms_and_biases():
    model = network()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(model.named_parameters(), **SETTINGS).step(lr=0.5)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cut", [0, 1, 6])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(cut):
    whole, first = network(), network()
    train(whole, AdamW(whole.named_parameters(), **SETTINGS), range(10))
    optimizer = AdamW(first.named_parameters(), **SETTINGS)
    train(first, optimizer, range(cut))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    second = network(seed=1)
    second.load_state_dict(first.state_dict())
    resumed = AdamW(second.named_parameters(), **SETTINGS)
    resumed.load_state_tensors(saved)
    train(second, resumed, range(cut, 10))
    assert torch.equal(flat(whole), flat(second))


def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state():
    ours, theirs = network(), network()
    optimizer = AdamW(ours.named_parameters(), **SETTINGS | {"weight_decay": 0.0})
    wanted = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(6):
        for model in (ours, theirs):
            backward(model, step)
            if step < 4:
                model[0].weight.grad = None
        optimizer.step(1e-2)
        wanted.step()
        optimizer.zero_grad()
        wanted.zero_grad()
        if step == 3:
            assert torch.equal(ours[0].weight, network()[0].weight)
    assert optimizer.updates["0.weight"] == 2
    assert (flat(ours) - flat(theirs)).abs().max() <= 1e-7


def test_frozen_parameters_have_no_state():
    model = network()
    model[0].requires_grad_(False)
    state = AdamW(model.named_parameters(), **SETTINGS).state_tensors()
    assert {name.partition(".")[2] for name in state} == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_state_is_fp32_for_bf16_parameters_and_steps_move_them():
    model = network(dtype=torch.bfloat16)
    before = flat(model)
    optimizer = AdamW(model.named_parameters(), **SETTINGS)
    train(model, optimizer, range(3))
    averages = [tensor for name, tensor in optimizer.state_tensors().items() if not name.startswith("updates.")]
    assert {tensor.dtype for tensor in averages} == {torch.float32}
    assert flat(model).dtype == torch.bfloat16 and not torch.equal(before, flat(model))


def test_nothing_that_learns_is_refused():
    with pytest.raises(ConfigError, match=r"no parameter that learns.*lora\.targets"):
        AdamW(network().requires_grad_(False).named_parameters(), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mean.0.bias"), r"lacks 'mean\.0\.bias'"),
        (lambda state: state.update(extra=torch.zeros(1)), "does not know, 'extra'"),
        (
            lambda state: state.update({"square.0.bias": torch.zeros(4)}),
            r"'square\.0\.bias' wants.*\(11,\).*\(4,\)",
        ),
    ],
)
def test_state_of_another_model_is_refused_by_name(change, message):
    optimizer = AdamW(network().named_parameters(), **SETTINGS)
    state = optimizer.state_tensors()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_tensors(state)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_equals_torch(max_norm):
    ours, theirs = network(), network()
    backward(ours, 0)
    backward(theirs, 0)
    norm = gradient_norm(ours.parameters())
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm), rtol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad * clip_factor(norm, max_norm), b.grad, rtol=1e-6, atol=0)


def test_a_maximum_of_zero_clips_nothing():
    model = network()
    backward(model, 0)
    assert clip_factor(gradient_norm(model.parameters()), 0.0) == 1


def test_a_factor_is_as_good_as_scaled_gradients():
    ours, theirs = network(), network()
    for model, factor in ((ours, torch.tensor(0.25)), (theirs, None)):
        optimizer = AdamW(model.named_parameters(), **SETTINGS)
        for step in range(3):
            backward(model, step)
            if factor is None:
                for parameter in model.parameters():
                    parameter.grad *= 0.25
            optimizer.step(1e-2, factor)
            optimizer.zero_grad()
    assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bits", [8, 32])
def test_nothing_moves_under_a_norm_that_is_not_finite(norm, max_norm, bits):
    model = network()
    optimizer = AdamW(model.named_parameters(), **SETTINGS, bits=bits)
    train(model, optimizer, range(2))
    before, state = flat(model), {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    backward(model, 2)
    optimizer.step(1e-2, clip_factor(torch.tensor(norm), max_norm))
    assert torch.equal(before, flat(model))
    after = optimizer.state_tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items() if not name.startswith("updates."))


def wide_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 900), nn.Tanh(), nn.Linear(900, 11))


def test_averages_of_8_bits_take_a_quarter_and_learn_as_well():
    losses = {}
    for bits in (32, 8):
        model = wide_network()
        optimizer = AdamW(model.named_parameters(), **SETTINGS, bits=bits)
        x = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
        for _ in range(200):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step(3e-3)
            optimizer.zero_grad()
        losses[bits] = loss.item(), optimizer.state_bytes
    assert losses[8][1] < 0.35 * losses[32][1]  # biases stay in fp32
    assert losses[32][0] < 0.05 and losses[8][0] < 2 * losses[32][0] + 1e-3


def test_a_resumed_run_with_averages_of_8_bits_is_bit_equal():
    def advance(model, optimizer, steps):
        for step in steps:
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()

    whole, first = wide_network(), wide_network()
    advance(whole, AdamW(whole.named_parameters(), **SETTINGS, bits=8), range(6))
    optimizer = AdamW(first.named_parameters(), **SETTINGS, bits=8)
    advance(first, optimizer, range(3))
    second = wide_network()
    second.load_state_dict(first.state_dict())
    resumed = AdamW(second.named_parameters(), **SETTINGS, bits=8)
    resumed.load_state_tensors(optimizer.state_tensors())
    advance(second, resumed, range(3, 6))
    assert torch.equal(flat(whole), flat(second))


def advance_wide(device: str, paged: bool, bits: int, steps: range, start: dict | None = None) -> tuple:
    """(parameters, optimizer) after `steps`, from what an earlier call left, where `start` holds it."""
    model = wide_network().to(device)
    optimizer = AdamW(model.named_parameters(), **SETTINGS, bits=bits, paged=paged)
    if start:
        model.load_state_dict(start["weights"])
        optimizer.load_state_tensors(start["optimizer"])
    for step in steps:
        source = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source).to(device)
        optimizer.step(1e-2)
    return flat(model), optimizer, model


@pytest.mark.parametrize("bits", [8, 32])
def test_paged_averages_change_nothing_on_a_cpu(bits):
    (wanted, plain, _), (found, paged, _) = (advance_wide("cpu", paged, bits, range(3)) for paged in (False, True))
    assert torch.equal(wanted, found)
    assert paged.state_bytes == plain.state_bytes
    assert not any(tensor.is_pinned() for tensor in paged.state_tensors().values())


@pytest.mark.parametrize("told", [[], ["train.optimizer_paged=true"]])
def test_a_run_file_asks_for_paged_averages(tmp_path, told):
    (tmp_path / "run.toml").write_text('[model]\npath = "lumen-demo"\n[data]\ntrain = "lumen-demo"\n')
    model = wide_network()
    model.device = torch.device("cpu")
    assert make_optimizer(model, load_config(tmp_path / "run.toml", told)).paged == bool(told)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("bits", [8, 32])
def test_paged_averages_lie_in_pinned_host_memory_and_give_the_same_bits(bits, implementation):
    with ops.use(implementation, "adamw"):
        wanted, plain, _ = advance_wide("cuda", False, bits, range(6))
        _, half, model = advance_wide("cuda", True, bits, range(3))
        saved = {name: tensor.clone() for name, tensor in half.state_tensors().items()}
        start = {"weights": model.state_dict(), "optimizer": saved}
        found, paged, _ = advance_wide("cuda", True, bits, range(3, 6), start)
    assert torch.equal(wanted, found)
    states = {name: tensor for name, tensor in paged.state_tensors().items() if not name.startswith("updates.")}
    assert all(tensor.is_pinned() for tensor in states.values())
    assert all(torch.equal(tensor, plain.state_tensors()[name].cpu()) for name, tensor in states.items())


def test_the_norm_of_bf16_gradients_is_summed_in_fp32():
    parameter = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.01)
    norm = gradient_norm([parameter])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(
        parameter.grad[0].item() * math.sqrt(100_000), rel=5e-4
    )  # bf16 would be 2e-3 off


THEIRS = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", THEIRS)
def test_schedules_equal_transformers(schedule, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = THEIRS[schedule](optimizer, warmup, 30)
    for step in range(30):
        ours = learning_rate(step, 30, lr=0.3, schedule=schedule, warmup_steps=warmup, warmup_fraction=0.0)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_the_warm_up_is_a_fraction_rounded_up_unless_its_steps_are_given():
    def rate(**warmup):
        return [learning_rate(step, 40, lr=1.0, schedule="constant", **warmup) for step in range(5)]

    assert rate(warmup_steps=0, warmup_fraction=0.03) == [0, 0.5, 1, 1, 1]  # 1.2 steps are two
    assert rate(warmup_steps=4, warmup_fraction=0.03) == [0, 0.25, 0.5, 0.75, 1]


def test_a_misspelt_schedule_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'cosin'.*Did you mean 'cosine'"):
        learning_rate(0, 10, lr=1.0, schedule="cosin", warmup_steps=0, warmup_fraction=0.0)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_run_learns_after_its_warm_up(total):
    told = {"lr": 1.0, "schedule": "linear", "warmup_steps": 0, "warmup_fraction": 0.03}
    rates = [learning_rate(step, total, **told) for step in range(total)]
    assert max(rates) == 1.0 and rates[0] == (total == 1)
