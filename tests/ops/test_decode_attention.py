"""Attention of one token over a cache: the kernel against its reference, and the reference against `attention`."""

import pytest
import torch
from kernels import needs_triton, random, relative_error

from lumen import ops
from lumen.ops.decode_attention import append_column, decode_attention

B, S, H, K, E = 2, 150, 6, 2, 24
CASES = [(1, (0, 0)), (37, (0, 5)), (140, (100, 0))]  # filled keys, the first that each row sees


def inputs(length, first):
    q, k, v = random(B, 1, H, E), random(B, S, K, E, seed=1), random(B, S, K, E, seed=2)
    counts = torch.tensor(length, dtype=torch.int32), torch.tensor(first, dtype=torch.int32)
    return [t.detach().clone() for t in (q, k, v)] + list(counts)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("length", "first"), CASES)
def test_it_is_attention_over_the_filled_part(length, first, softcap):
    q, k, v, *counts = inputs(length, first)
    k[:, length:], v[:, length:] = float("nan"), float("nan")  # whatever lies there
    found = decode_attention(q, k, v, *counts, scale=0.2, softcap=softcap)
    for row, start in enumerate(first):
        part = slice(start, length)
        wanted = ops.attention(
            q[row : row + 1], k[row : row + 1, part], v[row : row + 1, part], scale=0.2, softcap=softcap
        )
        assert relative_error(found[row : row + 1], wanted) <= 2e-6


@needs_triton
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("length", "first"), CASES)
def test_the_kernel_matches_the_reference(length, first, softcap):
    arguments = inputs(length, first)
    with ops.use("triton"):
        found = decode_attention(*arguments, scale=0.2, softcap=softcap)
    assert relative_error(found, decode_attention(*arguments, scale=0.2, softcap=softcap)) <= 2e-6


@needs_triton
def test_a_column_is_written_and_no_other():
    """The kernel and the reference; k and v may be parts of a wider row, as a group of layers leaves them."""
    for length in (1, 90, S):
        joined = random(B, 1, 3, K, 700, learns=False)
        wanted = [random(B, S, K, 700, seed=seed, learns=False) for seed in (1, 2)]
        found, kernel = ([buffer.clone() for buffer in wanted] for _ in range(2))
        count = torch.tensor(length, dtype=torch.int32)
        append_column(*found, joined[:, :, 1], joined[:, :, 2], count)
        with ops.use("triton"):
            append_column(*kernel, joined[:, :, 1], joined[:, :, 2], count)
        for index, buffer in enumerate(wanted):
            buffer[:, length - 1] = joined[:, 0, 1 + index]
            assert torch.equal(found[index], buffer) and torch.equal(kernel[index], buffer)
