"""PyTorch's fused attention, the kernels and the reference agree, in values and gradients, for every reach."""

import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton

from lumen import ops
from lumen.errors import KernelError

CASES = {  # document, window
    "causal": (None, 0),
    "window": (None, 5),
    "documents": (torch.tensor([[0] * 9 + [1] * 3 + [2] * 20 + [-1] * 5, [0] * 37]), 0),
    "documents_and_window": (torch.tensor([[0] * 30 + [1] * 7] * 2), 4),
}


def reach(document=None, window=0, T=37, S=37):
    return ops.reach(T, S, document, window, torch.device("cpu"))


def tensors(T=37, S=37, dtype=torch.float32, width=16):
    random = torch.Generator().manual_seed(3)
    shapes = [(2, T, 6, width), (2, S, 2, width), (2, S, 2, width)]
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def run(implementation, inputs, **options):
    with ops.use(implementation):
        out = ops.attention(*inputs, scale=0.25, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_the_reference(case, dtype, tolerance):
    inputs, seen = tensors(dtype=dtype), reach(*CASES[case])
    for found, wanted in zip(run("torch", inputs, reach=seen), run("reference", inputs, reach=seen), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_queries_are_the_last_of_the_keys():
    q, k, v = tensors()
    whole = ops.attention(q, k, v, scale=0.25)
    tail = ops.attention(q[:, -4:], k, v, scale=0.25, reach=reach(T=4))
    torch.testing.assert_close(tail, whole[:, -4:])


def test_a_query_sees_itself_and_as_many_before_it_as_the_window_says():
    q, k, _ = tensors()
    v = torch.eye(37).reshape(1, 37, 1, 37).expand(2, 37, 2, 37)
    with ops.use("reference"):
        seen = ops.attention(q, k, v[..., :16], scale=0.25, reach=reach(window=3))[0, 10, 0] > 0
    assert seen.nonzero().flatten().tolist() == [8, 9, 10]


def test_a_soft_cap_bounds_the_scores():
    q, k, v = tensors()
    capped = ops.attention(q * 100, k, v, scale=0.25, softcap=1e-4)
    uniform = v.cumsum(1) / torch.arange(1, 38).view(1, -1, 1, 1)
    torch.testing.assert_close(capped, uniform.repeat_interleave(3, dim=2), rtol=1e-2, atol=1e-3)
    assert ops.explain()["attention"].startswith("reference: a soft cap")


def test_forcing_an_implementation_that_cannot_serve_is_refused():
    with ops.use("torch"), pytest.raises(KernelError, match="only reference"):
        ops.attention(*tensors(), scale=0.25, softcap=30.0)


def test_there_is_a_reach_only_where_the_causal_rule_does_not_decide():
    assert reach() is reach(window=37) is reach(T=1) is reach(T=4) is None
    assert reach(window=36) is not None and reach(T=1, window=36) is not None


def test_a_reach_is_the_border_of_what_queries_see_and_of_what_sees_keys():
    found = reach(torch.tensor([[0, 0, 1, 1, 1, -1]]), window=2, T=6, S=6)
    assert found.first.tolist() == [[0, 0, 2, 2, 3, 5]]
    assert found.last.tolist() == [[1, 1, 3, 4, 4, 5]]
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert reach(torch.tensor([[0, 0, 1, -1]]), T=4, S=4).mask[0, 0].int().tolist() == wanted


@needs_triton
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_match_the_reference(case, softcap):
    seen = reach(*CASES[case])
    q, k, v = tensors(width=24)
    function = lambda: ops.attention(q, k, v, scale=0.3, reach=seen, softcap=softcap)  # noqa: E731
    assert_kernel_equals_reference(function, [q, k, v])


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_last_queries_of_a_cache_see_what_they_saw(case):
    document, window = CASES[case]
    q, k, v = tensors()
    with torch.no_grad():
        whole = ops.attention(q, k, v, scale=0.25, reach=reach(document, window))
        for implementation in ("triton", "reference", "torch"):
            with ops.use(implementation):
                tail = ops.attention(q[:, -3:], k, v, scale=0.25, reach=reach(document, window, T=3))
            torch.testing.assert_close(tail, whole[:, -3:])
