"""PyTorch's fused attention and the reference agree, in values and gradients, with every mask that lumen asks for."""

import pytest
import torch

from lumen import ops
from lumen.errors import KernelError

CASES = {  # document, window
    "causal": (None, 0),
    "window": (None, 5),
    "documents": (torch.tensor([[0] * 9 + [1] * 3 + [2] * 20 + [-1] * 5, [0] * 37]), 0),
    "documents_and_window": (torch.tensor([[0] * 30 + [1] * 7] * 2), 4),
}


def mask(document=None, window=0, T=37, S=37, dtype=torch.float32):
    return ops.attention_mask(T, S, document, window, dtype, torch.device("cpu"))


def tensors(T=37, S=37, dtype=torch.float32):
    random = torch.Generator().manual_seed(3)
    shapes = [(2, T, 6, 16), (2, S, 2, 16), (2, S, 2, 16)]
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def run(implementation, inputs, **options):
    with ops.use(implementation):
        out = ops.attention(*inputs, scale=0.25, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_the_reference(case, dtype, tolerance):
    inputs, seen = tensors(dtype=dtype), mask(*CASES[case], dtype=dtype)
    for found, wanted in zip(run("torch", inputs, mask=seen), run("reference", inputs, mask=seen), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_queries_are_the_last_of_the_keys():
    q, k, v = tensors()
    whole = ops.attention(q, k, v, scale=0.25)
    tail = ops.attention(q[:, -4:], k, v, scale=0.25, mask=mask(T=4))
    torch.testing.assert_close(tail, whole[:, -4:])


def test_a_query_sees_itself_and_as_many_before_it_as_the_window_says():
    q, k, _ = tensors()
    v = torch.eye(37).reshape(1, 37, 1, 37).expand(2, 37, 2, 37)
    with ops.use("reference"):
        seen = ops.attention(q, k, v[..., :16], scale=0.25, mask=mask(window=3))[0, 10, 0] > 0
    assert seen.nonzero().flatten().tolist() == [8, 9, 10]


def test_a_soft_cap_bounds_the_scores():
    q, k, v = tensors()
    capped = ops.attention(q * 100, k, v, scale=0.25, softcap=1e-4)
    uniform = v.cumsum(1) / torch.arange(1, 38).view(1, -1, 1, 1)
    torch.testing.assert_close(capped, uniform.repeat_interleave(3, dim=2), rtol=1e-2, atol=1e-3)
    assert ops.explain()["attention"].startswith("reference: a soft cap")


def test_forcing_an_implementation_that_cannot_serve_is_refused():
    with ops.use("torch"), pytest.raises(KernelError, match="only reference can serve"):
        ops.attention(*tensors(), scale=0.25, softcap=30.0)


def test_there_is_a_mask_only_where_the_causal_rule_does_not_decide():
    assert mask() is mask(window=37) is mask(T=1) is None
    assert mask(T=4) is not None and mask(window=36) is not None and mask(T=1, window=36) is not None
    document = torch.tensor([[0, 0, 1, -1]])
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert (mask(document, T=4, S=4) == 0)[0, 0].int().tolist() == wanted
