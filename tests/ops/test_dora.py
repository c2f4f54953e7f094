"""The length of an adapted row without the matrix it is the row of, and what scales rows by it."""

import pytest
import torch
from kernels import needs_triton, random, relative_error

from lumen.ops.dora import dora_norm, row_lengths, scale_gradient, scale_rows, turned_lengths
from lumen.ops.nf4 import dequantize_nf4, quantize_nf4

OUT, IN, RANK = 70, 192, 8


def pair():
    return random(RANK, IN, learns=False) / IN**0.5, random(OUT, RANK, seed=1, learns=False) / RANK**0.5


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0, 100.0])
def test_length_is_that_of_the_matrix_held_in_fp32(size):
    weight, (a, b) = random(OUT, IN, learns=False), pair()
    found = turned_lengths(row_lengths(weight), weight @ a.T, a, b, size)
    assert relative_error(found, dora_norm(weight.double(), a.double(), b.double(), size)) <= 1e-6


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0, 30.0])
def test_length_from_operands_in_bf16_keeps_the_bound(size):
    """The docstring's, whatever the signs; and, of numbers that are random, u/√in of the update's share in the mean."""
    weight, (a, b) = random(OUT, IN, learns=False), pair()
    wanted = dora_norm(weight.double(), a.double(), b.double(), size)
    crossed = weight.bfloat16().float() @ a.bfloat16().float().T
    error = (turned_lengths(row_lengths(weight), crossed, a, b, size) / wanted - 1).abs()
    length, unit = weight.norm(dim=1), 2**-8
    assert (error <= 1e-6 + 2 * unit * size * (b.abs() @ a.norm(dim=1)) * length / wanted**2).all()
    assert error.square().mean().sqrt() <= 1e-6 + unit / IN**0.5 * (size * (b @ a).norm(dim=1) / length).mean()


def test_where_nothing_was_learned_the_length_is_the_base_s_to_the_bit():
    weight, (a, b) = random(OUT, IN, learns=False), pair()
    lengths = row_lengths(weight)
    assert torch.equal(turned_lengths(lengths, weight @ a.T, a, torch.zeros_like(b), 2.0), lengths)
    assert torch.equal(lengths, dora_norm(weight, a, torch.zeros_like(b), 2.0))


def test_a_row_that_its_update_cancels_has_a_length_that_is_a_number():
    a = torch.eye(2, 64)
    weight, b = -3.0 * a, torch.eye(2)
    found = turned_lengths(row_lengths(weight), weight @ a.T, a, b, 3.0)
    assert torch.equal(found, torch.zeros(2))


def test_lengths_of_a_frozen_weight_are_kept_and_those_of_a_changed_one_are_not():
    weight = random(OUT, IN, learns=False)
    first = row_lengths(weight)
    assert row_lengths(weight) is first
    weight.mul_(2)
    assert torch.equal(row_lengths(weight), 2 * first)
    learned = torch.nn.Parameter(weight)
    first = row_lengths(learned)
    learned.data = learned.data * 2  # moves no version
    assert torch.equal(row_lengths(learned), 2 * first)


@pytest.mark.parametrize("shape", [(2050, 64), (33, 100)])
def test_lengths_of_a_packed_weight_are_of_what_its_codes_stand_for(shape):
    packed = quantize_nf4(random(*shape, learns=False))
    wanted = dequantize_nf4(packed, torch.float32).norm(dim=1)
    assert relative_error(row_lengths(packed), wanted) <= 1e-6
    assert row_lengths(packed) is row_lengths(packed)


@needs_triton
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (37, 130), (20, 1500)])
def test_rows_are_scaled_and_the_gradient_of_a_length_is_the_sum_over_them(rows, width):
    z, grad = (random(rows, width + 8, seed=i, learns=False)[:, :width] for i in range(2))
    ratio, start = random(width, seed=2, learns=False), random(rows, width, seed=3, learns=False)
    assert relative_error(scale_rows(z, ratio), ratio * z) <= 1e-7
    for added in (start, start[0]):
        assert relative_error(scale_rows(z, ratio, added), ratio * z + added) <= 1e-7
    wanted = ratio * z + start
    assert relative_error(scale_rows(z, ratio, start, out=start), wanted) <= 1e-7
    assert relative_error(start, wanted) <= 1e-7
    scaled, sums = scale_gradient(grad, z, ratio)
    assert relative_error(scaled, ratio * grad) <= 1e-7
    assert relative_error(sums, (grad.double() * z.double()).sum(0)) <= 1e-6
    assert scale_gradient(grad, None, ratio)[1] is None
