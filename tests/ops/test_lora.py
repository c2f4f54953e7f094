"""The updates of layers that read the same few rows: two kernels against the sum they stand for."""

import pytest
import torch
from kernels import needs_triton, random, relative_error

from lumen.ops.lora import few_updates, few_updates_reference

pytestmark = needs_triton


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("ranks", [(4,), (16, 16, 16), (0, 5, 3), (7, 0, 1), (2, 9), (40,)])
def test_few_updates_match_their_reference(ranks, rows):
    inputs, outputs = 4200 if rows == 1 else 600, [140, 33, 70][: len(ranks)]  # more than one tile, and no whole one
    x = random(rows, inputs, learns=False)
    a = [random(rank, inputs, seed=i, learns=False) if rank else None for i, rank in enumerate(ranks)]
    b = [
        random(out, rank, seed=i, learns=False) if rank else None
        for i, (out, rank) in enumerate(zip(outputs, ranks, strict=True))
    ]
    bias = [None if i == 1 else random(out, learns=False) for i, out in enumerate(outputs)]
    residual = random(rows, outputs[0], learns=False) if len(ranks) == 1 else None
    arguments = (x, a, b, [0.7, 2.0, 1.0][: len(ranks)], outputs, bias, residual)
    found, wanted = few_updates(*arguments), few_updates_reference(*arguments)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) <= 2e-6
