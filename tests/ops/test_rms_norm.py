"""The norm's kernel against its reference."""

import pytest
from kernels import assert_kernel_equals_reference, needs_triton, random

from lumen import ops

pytestmark = needs_triton


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(9, 200), (2, 3, 4, 33), (1, 257)])
def test_values_and_gradients_match_the_reference(shape, plus_one):
    x, weight = random(*shape), random(shape[-1])
    assert_kernel_equals_reference(lambda: ops.rms_norm(x, weight, 1e-5, plus_one), [x, weight])


def test_rows_may_lie_apart():
    wide, weight = random(9, 96), random(40)
    assert_kernel_equals_reference(lambda: ops.rms_norm(wide[:, 16:56], weight, 1e-5), [wide, weight])
