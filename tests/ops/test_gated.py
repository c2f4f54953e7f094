"""The gated activations' kernel against its reference, and the reference against PyTorch's activations."""

import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random
from torch.nn import functional as F

from lumen import ops

PYTORCH = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}


@pytest.mark.parametrize("kind", PYTORCH)
def test_it_is_the_activation_times_up(kind):
    gate, up = random(7, 30), random(7, 30, seed=1)
    torch.testing.assert_close(ops.gated(gate, up, kind), PYTORCH[kind](gate) * up)


@needs_triton
@pytest.mark.parametrize("kind", PYTORCH)
def test_values_and_gradients_match_the_reference(kind):
    both = random(7, 600)

    def function():
        gate, up = (both * 20).split(300, dim=1)  # far out, where an exponential would overflow
        return ops.gated(gate, up, kind)

    assert_kernel_equals_reference(function, [both])
