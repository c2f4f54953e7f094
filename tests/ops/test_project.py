"""Linear layers that share an input: the fused group against its reference, for every way to make that input."""

import itertools
import sys
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random, relative_error

from lumen import ops
from lumen.errors import KernelError
from lumen.nn.recompute import recomputed, recomputing
from lumen.ops.dropout import draw_seeds, kept
from lumen.ops.fp8 import fp8_weights
from lumen.ops.nf4 import dequantize_nf4, quantize_nf4
from lumen.ops.nf4_matvec import nf4_matvec
from lumen.ops.project import Left, Projection, hold_unpacked, project, project_reference

pytestmark = needs_triton
WIDTH = 64


def layers(kind, adapted, bias, outputs, dropout=0.0, turned=False):
    """Projections and their leaves; the middle one of three has no pair. `turned`: rows have lengths of their own."""
    made, leaves = [], []
    for i, out in enumerate(outputs):
        weight = random(out, WIDTH, seed=i, learns=kind == "learned")
        if kind == "learned":
            leaves.append(weight)
        parts = {"weight": quantize_nf4(weight) if kind == "nf4" else weight}
        if bias and i == 0:
            parts["bias"] = random(out, seed=20)
            leaves.append(parts["bias"])
        if adapted and i != 1:
            parts |= {"a": random(4 + i, WIDTH, seed=i), "b": random(out, 4 + i, seed=i), "scale": 0.7}
            leaves += [parts["a"], parts["b"]]
            parts["dropout"] = dropout * (i + 1) / 3  # each its own share
            if turned:
                parts["magnitude"] = random(out, seed=i + 40)
                leaves.append(parts["magnitude"])
        made.append(Projection(**parts))
    return made, leaves


def with_source(source, residual, outputs, leaves):
    """The input, and what `project` is told of it; what learns is added to `leaves`."""
    joined, options = random(2, 9, 2 * WIDTH), {}
    if source == "norm":
        options = {"norm": random(WIDTH, seed=30), "eps": 1e-5}
        leaves.append(options["norm"])
    if residual:
        options["residual"] = random(2, 9, outputs[0], seed=31)
        leaves.append(options["residual"])
    return joined, options


def run(made, joined, options, source):
    """What the layers give, with the same elements dropped at every call."""
    torch.manual_seed(11)
    x, up = (joined * 1).split(WIDTH, dim=-1)
    return project(made, x, **options, **({"up": up, "kind": "silu"} if source == "gated" else {}))


@pytest.mark.parametrize("source", ["plain", "norm", "gated"])
@pytest.mark.parametrize("kind", ["nf4", "frozen", "learned"])
@pytest.mark.parametrize("adapted", [False, True])
def test_values_and_all_gradients_match_the_reference(source, kind, adapted):
    for bias, (residual, outputs) in itertools.product(
        [False, True], [(False, (32, 16, 16)), (True, (48,)), (False, (144,))]
    ):
        made, leaves = layers(kind, adapted, bias, outputs)
        joined, options = with_source(source, residual, outputs, leaves)
        assert_kernel_equals_reference(partial(run, made, joined, options, source), [joined, *leaves])


@pytest.mark.parametrize("source", ["plain", "norm", "gated"])
@pytest.mark.parametrize("kind", ["nf4", "learned"])
@pytest.mark.parametrize("dropout, turned", [(0.6, False), (0.0, True), (0.6, True)])
def test_dropout_and_learned_lengths_match_the_reference(source, kind, dropout, turned):
    for bias, residual, outputs in ((False, False, (32, 16, 16)), (True, True, (48,)), (True, False, (144,))):
        made, leaves = layers(kind, True, bias, outputs, dropout, turned)
        joined, options = with_source(source, residual, outputs, leaves)
        function = partial(run, made, joined, options, source)
        assert_kernel_equals_reference(function, [joined, *leaves])


def test_one_layer_of_a_group_may_drop_and_another_turn():
    made, leaves = layers("nf4", True, True, (32, 16, 16))
    joined, _ = with_source("plain", False, (), leaves)
    made[0] = replace(made[0], dropout=0.5)
    made[2] = replace(made[2], magnitude=random(16, seed=50))
    assert_kernel_equals_reference(partial(run, made, joined, {}, "plain"), [joined, *leaves, made[2].magnitude])


class Thin(torch.nn.Module):
    """In the place of PEFT's dropout: the same, of elements that are known."""

    def __init__(self, p, seed):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        keep = kept(x.numel() // x.shape[-1], x.shape[-1], self.p, self.seed).view(x.shape)
        return x * keep / (1 - self.p)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_means_what_it_means_in_peft(implementation, dora):
    """Values and all gradients of three layers that read one input, PEFT being told which elements are dropped."""
    names, outputs = ("q", "k", "v"), (32, 16, 16)
    base = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, n) for name, n in zip(names, outputs, strict=True)})
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(names), "lora_dropout": 0.3, "use_dora": dora}
    peft.get_peft_model(torch.nn.Sequential(base), peft.LoraConfig(**config))
    torch.manual_seed(15)
    seeds = draw_seeds(3, torch.device("cpu"))
    x, made, theirs, leaves = random(5, WIDTH), [], [], []
    for name, seed in zip(names, seeds, strict=True):
        layer = base[name].train()
        assert layer.lora_dropout["default"].p == 0.3
        layer.lora_dropout["default"] = Thin(0.3, seed)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        own = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight, "scale": 1.5, "dropout": 0.3}
        if dora:
            own["magnitude"] = torch.nn.init.normal_(layer.lora_magnitude_vector["default"].weight)
        leaves += [part for part in own.values() if isinstance(part, torch.nn.Parameter)]
        made.append(Projection(weight=layer.base_layer.weight, bias=layer.base_layer.bias, **own))
        theirs.append(layer(x))
    with ops.use(implementation):
        torch.manual_seed(15)
        ours = project(made, x)
        incoming = [random(*y.shape, seed=8, learns=False) for y in ours]
        found = [*ours, *torch.autograd.grad(ours, [x, *leaves], incoming)]
    wanted = [*theirs, *torch.autograd.grad(theirs, [x, *leaves], incoming)]
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert relative_error(one, other) <= 2e-6, index


def test_dropout_beside_products_in_8_bits_matches_the_reference():
    made, leaves = layers("frozen", True, False, (32, 16, 16), 0.6)
    weights = fp8_weights([layer.weight.detach() for layer in made])
    made = [replace(layer, fp8=weight) for layer, weight in zip(made, weights, strict=True)]
    joined, _ = with_source("plain", False, (), leaves)
    # what is rounded to bfloat16 is rounded at other places of the sum
    assert_kernel_equals_reference(partial(run, made, joined, {}, "plain"), [joined, *leaves], 2**-8)


@pytest.mark.parametrize("dropout, turned", [(0.6, False), (0.0, True), (0.6, True)])
def test_a_recomputed_group_drops_the_same_elements(dropout, turned):
    """`dead`, as a block's last group is run again for its backward pass."""
    made, leaves = layers("nf4", True, True, (48,), dropout, turned)
    gate, up = (random(2, 9, WIDTH, seed=i) for i in (1, 2))

    def part(gate, up, residual):
        options = {"up": up, "kind": "silu", "residual": residual, "dead": recomputing()}
        return project(made, gate * 1, **options | {"up": up * 1})[0]

    residual = random(2, 9, 48, seed=3)
    found = []
    for again in (True, False):
        with ops.use("triton"):
            torch.manual_seed(12)
            arguments = (gate, up, residual)
            y = recomputed(part, *arguments, random=True) if again else part(*arguments)
            torch.manual_seed(13)  # what is drawn meanwhile does not matter
            found.append([y, *torch.autograd.grad(y, [*arguments, *leaves], random(2, 9, 48, learns=False))])
    assert all(map(torch.equal, *found))


def test_frozen_dropout_without_a_gradient_is_dropout_too():
    """One row in training mode: not the way of decoding, which drops nothing."""
    made, _ = layers("nf4", True, False, (48,), 0.9)
    x = random(1, WIDTH, learns=False)
    found = []
    for implementation in ("triton", "reference"):
        with torch.no_grad(), ops.use(implementation):
            torch.manual_seed(14)
            found.append(project(made, x)[0])
    assert relative_error(*found) <= 2e-6
    assert relative_error(project([replace(made[0], dropout=0.0)], x)[0], found[1]) > 0.1


@pytest.mark.parametrize("source", ["plain", "norm"])
def test_few_rows_have_learned_lengths_too(source):
    made, _ = layers("nf4", True, True, (32, 16), 0.0, True)
    x, options = random(1, WIDTH, learns=False), {}
    if source == "norm":
        options = {"norm": random(WIDTH, learns=False), "eps": 1e-5}
    with torch.no_grad(), ops.use("triton"):
        found = project(made, x, **options)
    for one, other in zip(found, project_reference(made, x, **options), strict=True):
        assert relative_error(one, other) <= 2e-6


@pytest.mark.parametrize("view", ["turned", "one number"])
def test_inputs_and_gradients_of_any_strides_match_the_reference(view):
    """A sum's gradient is one number for all; what is turned has its rows' numbers apart."""
    made, _ = layers("nf4", True, False, (32, 16, 16))
    x, norm = random(*((WIDTH, 9) if view == "turned" else (9, 1))), random(WIDTH)
    found = []
    for implementation in ("triton", "reference"):
        with ops.use(implementation):
            y = project(made, x.T if view == "turned" else x.expand(9, WIDTH), norm=norm, eps=1e-5)
            found.append([*y, *torch.autograd.grad(sum(part.sum() for part in y), [x, norm])])
    for index, (one, other) in enumerate(zip(*found, strict=True)):
        assert relative_error(one, other) <= 2e-6, index


def test_a_residual_may_be_a_part_of_a_wider_tensor():
    made, _ = layers("nf4", True, False, (48,))
    x, residual = random(9, WIDTH), random(9, 80, learns=False)[:, :48]
    with ops.use("triton"):
        found = project(made, x, residual=residual)[0]
    assert relative_error(found, project_reference(made, x, residual=residual)[0]) <= 2e-6


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_what_is_left_to_layers_that_cannot_add_it_is_refused(implementation):
    made, _ = layers("nf4", True, False, (32,), 0.5)
    gate, up = random(3, WIDTH), random(3, WIDTH, seed=1)
    left = Left(random(3, 8), (random(WIDTH, 4), random(WIDTH, 4)), (1.0, 1.0))
    with ops.use(implementation), pytest.raises(AssertionError, match="left out"):
        project(made, gate, up=up, kind="silu", left=left)


def test_an_activation_serves_one_backward_pass():
    made, _ = layers("nf4", True, False, (32,))
    gate, up = (random(3, 2 * WIDTH) * 1).split(WIDTH, dim=1)
    with ops.use("triton"):
        total = project(made, gate, up=up, kind="silu")[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(KernelError, match="one backward pass"):
        total.backward()


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_are_multiplied_with_the_packed_weight(rows):
    packed, x, start = quantize_nf4(random(38, 320)), random(rows, 320, learns=False), random(rows, 38, learns=False)
    wanted = x @ dequantize_nf4(packed).T
    assert relative_error(nf4_matvec(x, packed), wanted) <= 2e-6
    assert relative_error(nf4_matvec(x, packed, start), wanted + start) <= 2e-6


@pytest.mark.parametrize("source", ["plain", "norm", "gated"])
def test_few_rows_without_a_gradient_match_the_reference(source):
    made, _ = layers("nf4", True, True, (32, 16) if source == "norm" else (64,))
    x, residual = random(2, 1, WIDTH, learns=False), random(2, 1, 64, learns=False)
    options = {
        "plain": {"residual": residual},
        "norm": {"norm": random(WIDTH, learns=False), "eps": 1e-5},
        "gated": {"up": random(2, 1, WIDTH, seed=9, learns=False), "kind": "silu", "residual": residual},
    }[source]
    with torch.no_grad(), ops.use("triton"):
        found = project(made, x, **options)
    for one, other in zip(found, project_reference(made, x, **options), strict=True):
        assert relative_error(one, other) <= 2e-6


def test_what_is_unpacked_for_a_group_does_not_serve_one_of_its_layers_or_another_dtype():
    made, _ = layers("nf4", False, False, (24, 40))
    x = random(40, WIDTH, learns=False)
    with ops.use("triton", "project"):
        wanted = project(made[:1], x)[0]
        hold_unpacked([layer.weight for layer in made], torch.float32)
        assert project(made[:1], x)[0].equal(wanted)
        assert project(made, x.bfloat16())[0].dtype == torch.bfloat16


def test_what_is_evaluated_in_inference_mode_can_be_trained_later(monkeypatch):
    monkeypatch.setattr(sys.modules["lumen.ops.project"], "_workspaces", {})
    made, leaves = layers("frozen", True, False, (24, 40))
    x = random(3, WIDTH)
    with ops.use("triton", "project"):
        with torch.inference_mode():
            project(made, x)
        sum(y.sum() for y in project(made, x)).backward()
    assert all(leaf.grad is not None for leaf in leaves)
