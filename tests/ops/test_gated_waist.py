"""The kernels that serve a gated MLP's pairs on the way past, against their references, and these against autograd."""

from dataclasses import fields

import pytest
import torch
from kernels import needs_triton, random, relative_error
from torch import Tensor

from lumen.ops import gated_waist
from lumen.ops.gated import ACTIVATIONS
from lumen.ops.gated_waist import (
    GatedGradients,
    Taken,
    gated_waist_forward,
    gated_waist_forward_reference,
    gated_waist_gradient,
    gated_waist_gradient_reference,
)

# relative, of the whole tensor: sums in another order; for bfloat16 three roundings, where the interpreter cuts off
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
N, F = 75, 300


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, seed=seed, learns=False).to(dtype)


def gate_and_up(rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Side by side, as a product over both puts them out."""
    return list((3 * numbers(rows, 2 * width, seed=1, dtype=dtype)).split(width, dim=1))


def updates(rows: int, width: int, ranks: tuple[int, int], dtype: torch.dtype = torch.float32) -> Taken | None:
    """What gate and up lack; the waist has columns behind those that count."""
    both = sum(ranks)
    u = numbers(width, both, seed=2, dtype=dtype) * 0.3
    halves = [part.contiguous() if part.shape[1] else None for part in u.split(ranks, dim=1)]
    return Taken(numbers(rows, -(-both // 8) * 8, seed=3, dtype=dtype), *halves) if both else None


def gradient_inputs(rows: int, width: int, ranks: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of `gated_waist_gradient`: the pair of down is a part of larger matrices; 0 is no pair."""
    gate, up = gate_and_up(rows, width, dtype)
    grad_waist = numbers(rows, ranks[2] + 3, seed=4, dtype=dtype)[:, : ranks[2]]
    a = 0.3 * numbers(ranks[2], width + 5, seed=8, dtype=dtype)[:, :width]
    return {
        "grad": numbers(rows, width, seed=5, dtype=dtype), "gate": gate, "up": up, "kind": "silu",
        "taken": updates(rows, width, ranks[:2], dtype), "pair": (grad_waist, a) if ranks[2] else None,
    }  # fmt: skip


def assert_equal_gradients(found: GatedGradients, wanted: GatedGradients, tolerance: float) -> None:
    for field in fields(GatedGradients):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert one.shape == other.shape and one.dtype == other.dtype, field.name
            assert relative_error(one, other) <= tolerance, field.name


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_references_are_what_autograd_finds_for_the_whole_mlp(kind):
    """y = h Wᵀ + (h A_downᵀ) u_downᵀ of gate = … + (x A_gateᵀ) u_gateᵀ, up likewise; fp64, small."""
    arguments = gradient_inputs(5, 12, (3, 2, 4)) | {"kind": kind}
    waist, *halves = (part.double().requires_grad_() for part in arguments["taken"])
    grad_waist, a = (part.double() for part in arguments["pair"])
    a.requires_grad_()
    bare = [arguments[key].double().requires_grad_() for key in ("gate", "up")]
    gate, up = bare[0] + waist[:, :3] @ halves[0].T, bare[1] + waist[:, 3:5] @ halves[1].T
    h = ACTIVATIONS[kind](gate) * up
    total = (h * arguments["grad"]).sum() + ((h @ a.T) * grad_waist).sum()
    wanted = torch.autograd.grad(total, [*bare, *halves, a, waist])
    found = gated_waist_gradient_reference(**arguments)
    for field, other in zip(fields(GatedGradients), wanted, strict=True):
        assert relative_error(getattr(found, field.name), other) <= 2e-6, field.name
    found = gated_waist_forward_reference(
        *(arguments[key] for key in ("gate", "up")), kind, a.float(), arguments["taken"]
    )
    for one, other in zip(found, (h, h @ a.T), strict=True):
        assert relative_error(one, other) <= 2e-6


@needs_triton
@pytest.mark.parametrize(
    ("rows", "rank", "kind", "dtype"),
    [
        (N, 16, "silu", torch.float32),
        (N, 5, "gelu_tanh", torch.float32),
        (3, 24, "gelu", torch.float32),
        (N, 16, "silu", torch.bfloat16),
        (31, 24, "silu", torch.bfloat16),
    ],
)
def test_forward_matches_the_reference(rows, rank, kind, dtype):
    gate, up = gate_and_up(rows, F, dtype)
    a = numbers(rank + 2, F + 7, seed=6, dtype=dtype)[2:, :F]
    for taken in (None, updates(rows, F, (rank, 4), dtype), updates(rows, F, (0, rank), dtype)):
        wanted = gated_waist_forward_reference(gate, up, kind, a, taken)
        h, waist = gated_waist_forward(gate, up, kind, a, taken)
        assert h.shape == (rows, F) and h.dtype == waist.dtype == dtype
        assert relative_error(h, wanted[0]) <= TOLERANCE[dtype]
        assert relative_error(waist, wanted[1]) <= TOLERANCE[dtype]
        nothing, waist = gated_waist_forward(gate, up, kind, a, taken, dead=True)
        assert nothing is None and relative_error(waist, wanted[1]) <= TOLERANCE[dtype]
        h, nothing = gated_waist_forward(gate, up, kind, a[:0], taken)
        assert nothing is None and relative_error(h, wanted[0]) <= TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize(
    ("ranks", "kind", "dtype"),
    [
        ((16, 16, 16), "silu", torch.float32),
        ((8, 3, 5), "gelu_tanh", torch.float32),
        ((20, 4, 0), "gelu", torch.float32),
        ((0, 8, 4), "silu", torch.float32),
        ((8, 0, 0), "silu", torch.float32),
        ((0, 0, 16), "silu", torch.float32),
        ((16, 16, 16), "silu", torch.bfloat16),
        ((20, 8, 24), "silu", torch.bfloat16),
    ],
)
def test_gradients_match_the_reference(ranks, kind, dtype):
    arguments = gradient_inputs(N, F, ranks, dtype) | {"kind": kind}
    wanted = gated_waist_gradient_reference(**arguments)
    assert_equal_gradients(gated_waist_gradient(**arguments), wanted, TOLERANCE[dtype])


@needs_triton
def test_gradients_may_take_the_place_of_gate_and_up():
    arguments = gradient_inputs(N, F, (8, 8, 8))
    wanted = gated_waist_gradient_reference(**arguments)
    found = gated_waist_gradient(**arguments, out=(arguments["gate"], arguments["up"]))
    assert found.gate is arguments["gate"] and found.up is arguments["up"]
    assert_equal_gradients(found, wanted, TOLERANCE[torch.float32])


@needs_triton
@pytest.mark.parametrize(
    ("each", "sums"),
    [(lambda length, step, *_: -(-length // step) * step, 1), (lambda length, step, *_: step, 3)],
    ids=["one program for a side", "one for each tile"],
)
def test_however_the_work_is_shared_the_sums_are_whole(monkeypatch, each, sums):
    added, add = [], gated_waist.sum_parts
    monkeypatch.setattr(gated_waist, "_share", each)
    monkeypatch.setattr(gated_waist, "sum_parts", lambda *shares: added.append(len(shares[0])) or add(*shares))
    gate, up = gate_and_up(N, F)
    a = numbers(16, F, seed=6)
    found, wanted = gated_waist_forward(gate, up, "silu", a), gated_waist_forward_reference(gate, up, "silu", a)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) <= TOLERANCE[torch.float32]
    arguments = gradient_inputs(N, F, (8, 8, 8))
    found = gated_waist_gradient(**arguments)
    assert_equal_gradients(found, gated_waist_gradient_reference(**arguments), TOLERANCE[torch.float32])
    assert len(added) == sums  # that of the waist's gradient is there in any case


@needs_triton
@pytest.mark.parametrize("rows", [2 * 64, 3 * 64 + 9])
def test_rows_that_are_taken_in_lots_have_the_same_gradients(monkeypatch, rows):
    """As many rows as a few hundred thousand tokens have would hold parts of the waist's gradient like another ∂h."""
    monkeypatch.setattr(gated_waist, "MOST_SHARES", 1)
    held, add = [], gated_waist.sum_parts
    monkeypatch.setattr(gated_waist, "sum_parts", lambda *shares: held.append(shares[0].shape) or add(*shares))
    arguments = gradient_inputs(rows, 70, (4, 3, 5))
    wanted = gated_waist_gradient_reference(**arguments)
    found = gated_waist_gradient(**arguments, out=(arguments["gate"], arguments["up"]))
    assert_equal_gradients(found, wanted, TOLERANCE[torch.float32])
    assert [size[1] for size in held if size[2] == 7] == [64] * (rows // 64) + [rows % 64] * (rows % 64 > 0)


@needs_triton
def test_no_rows_give_products_of_zeros():
    found = gated_waist_gradient(**gradient_inputs(0, 70, (8, 3, 5)))
    assert found.gate.shape == found.up.shape == (0, 70) and found.waist.shape == (0, 16)
    for product, size in ((found.product_gate, (70, 8)), (found.product_up, (70, 3)), (found.a_down, (5, 70))):
        assert torch.equal(product, torch.zeros(size))
    h, waist = gated_waist_forward(*gate_and_up(0, 70), "silu", numbers(5, 70, seed=6))
    assert h.shape == (0, 70) and waist.shape == (0, 5)


def test_a_rank_without_a_kernel_is_refused():
    gate, up = gate_and_up(2, 8)
    with pytest.raises(AssertionError, match="rank 65"):
        gated_waist_forward(gate, up, "silu", numbers(65, 8, seed=6))
