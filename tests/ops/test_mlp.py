"""The gated MLP as two groups, one leaving its updates to the other: against the same without kernels."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random, relative_error

from lumen import ops
from lumen.nn.recompute import recomputed, recomputing
from lumen.ops.fp8 import fp8_weights
from lumen.ops.mlp import mlp
from lumen.ops.nf4 import quantize_nf4
from lumen.ops.project import Projection

pytestmark = needs_triton
D, F, N = 64, 128, 37


def layer(outputs, inputs, rank, seed, leaves, **options):
    parts = {"weight": quantize_nf4(random(outputs, inputs, seed=seed, learns=False) * 0.1)}
    if rank:
        parts |= {"a": random(rank, inputs, seed=seed + 1), "b": random(outputs, rank, seed=seed + 2), "scale": 0.3}
        leaves += [parts["a"], parts["b"]]
    return Projection(**parts, **options)


def block(ranks, dropout=0.0):
    """gate, up and down with these ranks, 0 for no pair, and what learns of them and of the norm."""
    leaves = [random(D, seed=90)]
    share = {"dropout": dropout} if dropout else {}
    gate, up = (layer(F, D, rank, 10 * i, leaves, **share) for i, rank in enumerate(ranks[:2]))
    return [gate, up], layer(D, F, ranks[2], 40, leaves, **share), leaves


def run(inward, down, norm, x, **options):
    torch.manual_seed(3)
    return mlp(inward, down, x * 1, "silu", norm=norm, eps=1e-5, **options)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (16, 3, 5), (0, 4, 4), (4, 0, 0), (0, 0, 4), (40, 40, 4), (4, 4, 80)])
@pytest.mark.parametrize("add", [True, False])
def test_values_and_gradients_match_the_reference(ranks, add):
    inward, down, leaves = block(ranks)
    x = random(N, D, seed=5)
    function = partial(run, inward, down, leaves[0], x, add=add)
    assert_kernel_equals_reference(function, [x, *leaves], 4e-6)  # three products deep


@pytest.mark.parametrize("which", ["dropout", "length of the rows", "length of down's", "bias", "dense", "learned"])
def test_layers_of_every_kind_match_the_reference(which):
    inward, down, leaves = block((4, 4, 4), 0.5 if which == "dropout" else 0.0)
    if which == "length of down's":  # the others leave their updates to it
        down = replace(down, magnitude=random(D, seed=7))
        leaves.append(down.magnitude)
    if which == "length of the rows":
        down, inward[1] = (replace(part, magnitude=random(part.outputs, seed=7)) for part in (down, inward[1]))
        leaves += [down.magnitude, inward[1].magnitude]
    elif which == "bias":
        inward[0] = replace(inward[0], bias=random(F, seed=8))
        leaves.append(inward[0].bias)
    elif which in ("dense", "learned"):
        down = replace(down, weight=random(D, F, seed=9, learns=which == "learned"))
        leaves += [down.weight] if which == "learned" else []
    x = random(N, D, seed=5)
    assert_kernel_equals_reference(partial(run, inward, down, leaves[0], x, add=True), [x, *leaves], 4e-6)


def test_products_in_8_bits_match_the_reference():
    inward, down, leaves = block((4, 4, 4))
    dense = [random(part.outputs, part.weight.shape[1], seed=i, learns=False) for i, part in enumerate([*inward, down])]
    eight = [*fp8_weights(dense[:2]), *fp8_weights(dense[2:])]
    inward = [replace(part, fp8=weight) for part, weight in zip(inward, eight, strict=False)]
    x = random(N, D, seed=5)
    function = partial(run, inward, replace(down, fp8=eight[2]), leaves[0], x, add=True)
    # what is rounded to 8 bits differs by the order of the sums before it: some numbers fall on the other side
    assert_kernel_equals_reference(function, [x, *leaves], 2e-2)


def test_what_the_reference_alone_can_serve_is_left_nothing(monkeypatch):
    """Learned lengths beside products in 8 bits: down goes to the reference on its own, gate and up do not."""
    monkeypatch.setattr(sys.modules["lumen.ops.project"], "implementations", lambda x: {"triton": "", "reference": ""})
    inward, down, leaves = block((4, 4, 4))
    eight = fp8_weights([random(D, F, seed=9, learns=False)])[0]
    down = replace(down, fp8=eight, magnitude=random(D, seed=7))
    x = random(N, D, seed=5)
    found = run(inward, down, leaves[0], x, add=True)[0]
    with ops.use("reference"):
        wanted = run(inward, down, leaves[0], x, add=True)[0]
    assert relative_error(found, wanted) <= 4e-6


@pytest.mark.parametrize("which", ["fused", "dropout", "learned"])
def test_down_may_learn_behind_what_is_frozen(which):
    """As in a model's first block, where nothing before it has a gradient."""
    inward, down, leaves = block((0, 0, 4), 0.5 if which == "dropout" else 0.0)
    norm, *leaves = leaves
    if which == "learned":
        down = replace(down, weight=random(D, F, seed=9))
        leaves.append(down.weight)
    x = random(N, D, seed=5, learns=False)
    assert_kernel_equals_reference(lambda: run(inward, down, norm.detach(), x, add=True)[0], leaves, 4e-6)


def test_no_rows_have_gradients_of_zeros():
    inward, down, leaves = block((4, 4, 4))
    x = random(0, D, seed=5)
    with ops.use("triton"):
        y = run(inward, down, leaves[0], x, add=True)[0]
        found = torch.autograd.grad(y.sum(), [x, *leaves])
    assert y.shape == x.shape and not any(part.any() for part in found)


def test_updates_are_left_to_the_kernels_between(monkeypatch):
    """Gate and up come without them: what makes the second group's input adds them."""
    seen = []
    module = sys.modules["lumen.ops.project"]  # the name of the module is a function's too
    taken = module.gated_waist_forward
    monkeypatch.setattr(module, "gated_waist_forward", lambda *a, **k: seen.append(a[4]) or taken(*a, **k))
    inward, down, leaves = block((4, 3, 5))
    with ops.use("triton"):
        run(inward, down, leaves[0], random(N, D, seed=5), add=True)
    assert [t.shape[1] for t in (seen[0].waist, seen[0].gate, seen[0].up)] == [8, 4, 3]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 4, 0), (0, 0, 4)])
def test_what_is_recomputed_has_the_same_gradients(ranks):
    """The second time nobody reads what comes out: `dead`."""
    inward, down, leaves = block(ranks)
    x = random(N, D, seed=5)

    def part(x):
        return run(inward, down, leaves[0], x, add=True, dead=recomputing())[0]

    found = []
    with ops.use("triton"):
        for again in (True, False):
            y = recomputed(part, x) if again else part(x)
            found.append([y, *torch.autograd.grad(y, [x, *leaves], random(N, D, seed=6, learns=False))])
    assert all(map(torch.equal, *found))


def test_without_a_gradient_the_values_are_the_same():
    inward, down, leaves = block((4, 4, 4))
    x = random(N, D, seed=5)
    with torch.no_grad(), ops.use("triton"):
        found = run(inward, down, leaves[0], x, add=True)[0]
        one = run(inward, down, leaves[0], x[:1], add=True)[0]
    with ops.use("reference"):
        wanted = run(inward, down, leaves[0], x, add=True)[0]
    assert relative_error(found, wanted) <= 4e-6 and relative_error(one, wanted[:1]) <= 4e-6
