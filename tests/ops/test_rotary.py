"""Rotary positions: the kernels against the reference; turning back; a part of a head."""

import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random

from lumen import ops

B, T, H, K, E = 2, 19, 4, 2, 24


def tables(half):
    angles = random(B, T, half, seed=3, learns=False)
    return angles.cos(), angles.sin()


def test_turning_back_gives_what_was_there():
    x, (cos, sin) = random(B, T, H, E), tables(E // 2)
    torch.testing.assert_close(ops.rotary(ops.rotary(x, cos, sin), cos, -sin), x)


def test_what_lies_behind_the_tables_stays():
    x, (cos, sin) = random(B, T, H, E), tables(8)
    turned = ops.rotary(x, cos, sin)
    assert torch.equal(turned[..., 16:], x[..., 16:]) and not torch.equal(turned[..., :16], x[..., :16])


@needs_triton
@pytest.mark.parametrize("half", [E // 2, 8])
def test_values_and_gradients_match_the_reference(half):
    x, (cos, sin) = random(B, T, H, E), tables(half)
    assert_kernel_equals_reference(lambda: ops.rotary(x, cos, sin), [x])


@needs_triton
@pytest.mark.parametrize("half", [E // 2, 8])
def test_q_and_k_of_one_projection_match_the_reference(half):
    joined, (cos, sin) = random(B, T, (H + 2 * K) * E), tables(half)

    def turned():
        q, k, v = (part.view(B, T, -1, E) for part in (joined * 1).split([H * E, K * E, K * E], dim=-1))
        return ops.rotate_qk(q, k, v, cos, sin)

    assert_kernel_equals_reference(turned, [joined])
