"""The norm's kernel against its reference."""

import pytest
import torch
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


@pytest.mark.parametrize("batch", [1, 3])
def test_heads_that_lie_apart_are_read_and_kept_where_they_are(batch):
    """As q in q, k and v of tokens; the gradient may lie apart as well."""
    joined, weight = random(batch, 5, 7, 24), random(24)
    assert_kernel_equals_reference(lambda: ops.rms_norm(joined[:, :, 1:4], weight, 1e-5) * 2, [joined, weight])
    into = random(batch, 5, 9, 24)

    def beside():  # the gradient of a part of something wider is a view of that
        return torch.cat((ops.rms_norm(joined[:, :, 1:4], weight, 1e-5), into[:, :, 3:]), dim=2)

    assert_kernel_equals_reference(beside, [joined, weight])
    kept = []
    with (
        ops.use("triton", "rms_norm"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        ops.rms_norm(joined[:, :, 1:4], weight, 1e-5)
    assert joined.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in kept}
    assert all(x.numel() < joined.numel() // 4 for x in kept if x.untyped_storage().data_ptr() != joined.data_ptr())
