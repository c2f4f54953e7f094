"""How kernels are held against their references: in Triton's interpreter, in fp32, on sizes that fit no tile."""

import pytest
import torch
from torch import Tensor

from lumen import ops
from lumen.ops._triton import triton

TOLERANCE = 2e-6  # relative, fp32: sums in another order

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def random(*shape: int, seed: int = 0, learns: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_(learns)


def values_and_gradients(implementation, function, leaves) -> list[Tensor]:
    """What `function()` gives under `implementation`, and the gradients of `leaves` for a random incoming one."""
    with ops.use(implementation):
        found = function()
        outputs = list(found) if isinstance(found, tuple) else [found]
        incoming = [random(*output.shape, seed=7, learns=False) for output in outputs]
        return outputs + list(torch.autograd.grad(outputs, leaves, incoming))


def assert_kernel_equals_reference(function, leaves, tolerance: float = TOLERANCE) -> None:
    found = values_and_gradients("triton", function, leaves)
    wanted = values_and_gradients("reference", function, leaves)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert relative_error(one, other) <= tolerance, index
