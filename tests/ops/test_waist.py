"""The skinny products that share a pass: kernels against their references, and against products of their own."""

import pytest
import torch
from kernels import TOLERANCE, needs_triton, random, relative_error

from lumen.ops import waist as waist_module
from lumen.ops.rms_norm import norm_forward, rms_norm_reference
from lumen.ops.waist import (
    Tile,
    normed_product,
    normed_product_reference,
    waist_gradients,
    waist_gradients_reference,
)

pytestmark = needs_triton

# sums are fp32 in both; the interpreter cuts bf16 off where a GPU rounds to the nearest, up to 2⁻⁷ of each value
CUT_OFF = 2**-7
SMALL = Tile(rows=16, columns=32, stages=2, warps=4, together=1)


def apart(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows that lie apart, as in a slice of columns."""
    return random(rows, columns + 24, seed=seed, learns=False).to(dtype)[:, 8 : 8 + columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "waists"), [(37, 70, 16), (1, 33, 5), (150, 600, 24), (20, 16, 64)])
def test_gradients_at_the_waist_match_their_reference(rows, outputs, waists, dtype):
    grad, u, waist = apart(rows, outputs, dtype), apart(outputs, waists, dtype, 1), apart(rows, waists, dtype, 2)
    of_waist, product = waist_gradients(grad, u, waist)
    assert (of_waist.dtype, product.dtype) == (dtype, torch.float32)
    assert relative_error(product, grad.double().T @ waist.double()) <= TOLERANCE
    tolerance = TOLERANCE if dtype == torch.float32 else CUT_OFF
    assert relative_error(of_waist, grad.double() @ u.double()) <= tolerance
    wanted = waist_gradients_reference(grad, u, waist)
    assert relative_error(of_waist, wanted[0]) <= tolerance and relative_error(product, wanted[1]) <= TOLERANCE


@pytest.mark.parametrize("ranks", [(16, 16, 16), (4, 7, 5), (16, 0, 16), (0, 3, 0), (0, 9), (8, 24), (5,), (40, 8, 30)])
def test_layers_meet_their_own_columns_of_the_waist_alone(ranks, monkeypatch):
    monkeypatch.setattr(waist_module, "_gradients_tile", lambda grad, size: SMALL)
    rows, outputs = 41, (70, 33, 64)[: len(ranks)]
    waists = -(-sum(ranks) // 8) * 8  # filled up with columns of no layer
    grad, u, waist = random(rows, sum(outputs)), random(sum(outputs), waists), random(rows, waists)
    with torch.no_grad():
        found = waist_gradients(grad, u, waist, outputs, ranks)
        wanted = waist_gradients_reference(grad, u, waist, outputs, ranks)
    assert relative_error(found[0], wanted[0]) <= TOLERANCE
    assert torch.equal(found[0][:, sum(ranks) :], torch.zeros(rows, waists - sum(ranks)))
    own = torch.cat([torch.full((out,), rank) for out, rank in zip(outputs, ranks, strict=True)])
    written = torch.arange(max(ranks)) < own[:, None]
    assert relative_error(found[1][written], wanted[1][written]) <= TOLERANCE


def test_a_block_diagonal_u_gives_the_same_with_and_without_its_layers():
    outputs, ranks, rows = (40, 24), (8, 16), 19
    grad, waist = random(rows, 64, learns=False), random(rows, 24, learns=False)
    u = torch.block_diag(random(40, 8, learns=False), random(24, 16, learns=False))
    whole, product = waist_gradients(grad, u, waist)
    of_waist, own = waist_gradients(grad, u, waist, outputs, ranks)
    assert relative_error(of_waist, whole) <= TOLERANCE
    assert relative_error(own[:40, :8], product[:40, :8]) <= TOLERANCE
    assert relative_error(own[40:, :16], product[40:, 8:]) <= TOLERANCE


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(("rows", "width", "waists"), [(37, 70, 16), (1, 33, 5), (150, 200, 24)])
def test_the_product_with_a_norm_matches_its_reference(rows, width, waists, plus_one):
    x, left, weight = apart(rows, width, torch.float32), apart(rows, waists, torch.float32, 1), random(width)
    with torch.no_grad():
        root = norm_forward(x, weight, 1e-5, plus_one)[1]
        found = normed_product(left, x, weight, root, plus_one)
    assert (found.shape, found.dtype) == ((waists, width), torch.float32)
    assert relative_error(found, normed_product_reference(left, x, weight, root, plus_one)) <= TOLERANCE
    assert relative_error(found, left.T @ rms_norm_reference(x, weight, 1e-5, plus_one)) <= TOLERANCE


@pytest.mark.parametrize("plus_one", [False, True])
def test_the_product_with_a_norm_rounds_as_the_norm_does(plus_one):
    x, weight, left = (random(*size, learns=False).bfloat16() for size in ((20, 70), (70,), (20, 16)))
    y, root = norm_forward(x, weight, 1e-5, plus_one)
    found = normed_product(left, x, weight, root, plus_one)
    assert relative_error(found, left.double().T @ y.double()) <= TOLERANCE
    # not rounded on the way, it would be further off than that
    assert relative_error(found, left.double().T @ rms_norm_reference(x.double(), weight, 1e-5, plus_one)) > TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_without_a_norm_matches_its_reference(dtype):
    left, x = apart(75, 48, dtype), apart(75, 130, dtype, 1)
    assert relative_error(normed_product(left, x), normed_product_reference(left, x)) <= TOLERANCE


def test_no_rows_give_no_gradient_at_the_waist_and_products_of_zeros():
    of_waist, product = waist_gradients(torch.zeros(0, 70), torch.ones(70, 8), torch.zeros(0, 8))
    assert of_waist.shape == (0, 8) and torch.equal(product, torch.zeros(70, 8))
    assert torch.equal(normed_product(torch.zeros(0, 8), torch.zeros(0, 70)), torch.zeros(8, 70))
