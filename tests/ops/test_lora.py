"""The low-rank update: what merging adds is what the layer computes, and two kernels against what they stand for."""

import pytest
import torch
from kernels import needs_triton, random, relative_error

from lumen.ops.lora import add_update, lora_update, lora_weight, write_pair


def test_the_update_is_a_product_with_what_merging_adds():
    x, a, b = random(5, 33, learns=False), random(4, 33, learns=False), random(19, 4, learns=False)
    assert relative_error(lora_update(x, a, b, 0.7), x @ lora_weight(a, b, 0.7).T) <= 1e-6


@needs_triton
@pytest.mark.parametrize(("rows", "width", "waist"), [(1, 33, 8), (70, 140, 24)])
def test_an_update_is_added_to_what_is_there(rows, width, waist):
    residual, thin = random(rows, width, learns=False), random(rows, waist, learns=False)
    u = random(width, waist, learns=False)
    assert relative_error(add_update(residual, thin, u), residual + thin @ u.T) <= 2e-6


@needs_triton
@pytest.mark.parametrize("column", [0, 3])
def test_a_pair_is_written_beside_the_others_and_zeros_where_they_have_none(column):
    a, b = random(5, 150, learns=False), random(33, 5, learns=False)
    beside, below = torch.full((33, 8), 7.0), torch.full((6, 150), 7.0)
    write_pair(a, b, 0.5, beside, below, column)
    wanted = torch.zeros(33, 8)
    wanted[:, column : column + 5] = 0.5 * b
    assert torch.equal(beside, wanted)
    assert torch.equal(below[:5], a) and torch.equal(below[5:], torch.full((1, 150), 7.0))
    write_pair(None, None, 0.5, beside, below, column)
    assert torch.equal(beside, torch.zeros(33, 8)) and torch.equal(below[:5], a)
