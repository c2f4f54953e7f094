"""The chunked loss against its reference, torch's cross-entropy and numerical gradients, and the memory it saves."""

import pytest
import torch
from kernels import needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

from lumen import ops
from lumen.errors import KernelError
from lumen.ops.linear_loss import linear_cross_entropy, linear_cross_entropy_reference, linear_logprobs

# dtype: (relative tolerance of the loss, of the gradients' norm). bf16 rounds the gradient of every logit once.
TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-5, 1e-2)}


def problem(rows=37, dim=24, vocab=101, dtype=torch.float32, weight_dtype=None, uncounted=0.4, seed=0):
    """Random x, weight and target; about `uncounted` of the targets are -100."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=random).to(weight_dtype or dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=random)
    target[torch.rand(rows, generator=random) < uncounted] = -100
    return x, weight, target


def gradients(function, x, weight, target, *args):
    """The loss, the count, and the gradients of x and weight for an incoming gradient of 0.37."""
    total, count = function(x, weight, target, *args)
    return total.detach(), count, *torch.autograd.grad(total * 0.37, (x, weight))


def distance(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradients_match_the_reference(dtype, chunk, softcap):
    x, weight, target = problem(dtype=dtype)
    wanted = gradients(linear_cross_entropy_reference, x, weight, target, softcap)
    found = gradients(linear_cross_entropy, x, weight, target, softcap, chunk)
    assert found[1] == wanted[1] == (target != -100).sum()
    assert distance(found[0], wanted[0]) < TOLERANCE[dtype][0]
    for gradient, expected in zip(found[2:], wanted[2:], strict=True):
        assert gradient.dtype == dtype
        assert distance(gradient, expected) < TOLERANCE[dtype][1]


def test_a_large_vocabulary_matches_torch_cross_entropy():
    x, weight, target = problem(rows=5, vocab=50_257, uncounted=0.2)
    total, count = linear_cross_entropy(x, weight, target)
    mean = torch.nn.functional.cross_entropy(x @ weight.T, target)
    assert torch.allclose(total / count, mean, rtol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_match_numerical_differences(softcap):
    x, weight, target = problem(rows=6, dim=4, vocab=9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, target, softcap, 4)[0], (x, weight))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gradient_has_the_dtype_of_its_input(dtype, weight_dtype):
    x, weight, target = problem(dtype=dtype, weight_dtype=weight_dtype)
    found = gradients(linear_cross_entropy, x, weight, target)
    wanted = gradients(linear_cross_entropy_reference, x, weight, target)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert (found[2].dtype, found[3].dtype) == (dtype, weight_dtype)
    assert distance(found[2], wanted[2]) < 1e-2 and distance(found[3], wanted[3]) < 1e-2


def test_logits_of_bf16_inputs_are_not_rounded_to_bf16():
    x, weight, target = problem(dtype=torch.bfloat16)
    rounded = torch.nn.functional.cross_entropy((x @ weight.T).float(), target, reduction="sum")
    exact = torch.nn.functional.cross_entropy(x.double() @ weight.double().T, target, reduction="sum")
    found = linear_cross_entropy(x, weight, target)[0]
    assert distance(found, exact) < 1e-6 < distance(rounded, exact)


def test_logits_of_all_tokens_never_exist_together():
    x, weight, target = problem(rows=256, dim=8, vocab=64, uncounted=0.0)
    with LargestTensor() as largest:
        total, _ = linear_cross_entropy(x, weight, target, 0.0, 16)
        total.backward()
    assert largest.elements == max(x.numel(), 16 * 64) < 256 * 64


def test_positions_that_do_not_count_never_reach_the_head():
    x, weight, target = problem(rows=256, dim=2, vocab=64, uncounted=0.0)
    target[3:] = -100
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, target)[0].backward()
    assert largest.elements == x.numel()  # 512; the three rows of logits are 192


def test_a_frozen_weight_gets_no_gradient_buffer():
    x, weight, target = problem(rows=4, dim=8, vocab=999, uncounted=0.0)
    frozen = weight.detach()
    with LargestTensor() as largest:
        linear_cross_entropy(x, frozen, target, 0.0, 1)[0].backward()
    assert largest.elements == frozen.numel()  # the transposed view alone
    assert frozen.grad is None and x.grad is not None


def test_a_frozen_input_leaves_the_weight_its_gradient():
    x, weight, target = problem()
    wanted = gradients(linear_cross_entropy_reference, x, weight, target)[3]
    (found,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, target)[0] * 0.37, weight)
    assert distance(found, wanted) < 1e-5


def test_without_grad_the_loss_is_the_same_and_has_no_graph():
    x, weight, target = problem()
    with torch.no_grad():
        evaluated, _ = linear_cross_entropy(x, weight, target, 3.0)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, linear_cross_entropy(x, weight, target, 3.0)[0].detach())


def test_nothing_counted_is_a_loss_of_zero_with_zero_gradients():
    x, weight, target = problem()
    total, count, grad_x, grad_weight = gradients(linear_cross_entropy, x, weight, torch.full_like(target, -100))
    assert total == 0 and count == 0
    assert grad_x.shape == x.shape and not grad_x.any()
    assert grad_weight.shape == weight.shape and not grad_weight.any()


def test_backward_can_run_twice_with_the_same_result():
    x, weight, target = problem()
    total, _ = linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(total, (x, weight), retain_graph=True)
    second = torch.autograd.grad(total, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_huge_logits_stay_finite():
    x, weight, target = problem()
    found = gradients(linear_cross_entropy, (x.detach() * 1e4).requires_grad_(), weight, target)
    assert all(torch.isfinite(value).all() for value in found)


def test_shapes_that_disagree_are_refused_with_all_three_shapes():
    x, weight, target = problem()
    with pytest.raises(KernelError, match=r"\(37, 24\), \(101, 23\) and \(37,\)"):
        linear_cross_entropy(x, weight[:, :-1], target)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_logprobs_of_each_position_and_their_gradients_equal_torch(implementation, softcap):
    x, weight, target = problem()
    worth = torch.randn(len(x), generator=torch.Generator().manual_seed(5))
    with ops.use(implementation, "linear_cross_entropy"):
        found = linear_logprobs(x, weight, target, softcap, 8)
        ours = torch.autograd.grad((found * worth).sum(), (x, weight))
    logits = x @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    picked = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    wanted = torch.where(target == -100, 0.0, picked)
    assert distance(found, wanted) <= 1e-6
    for one, other in zip(ours, torch.autograd.grad((wanted * worth).sum(), (x, weight)), strict=True):
        assert distance(one, other) <= 1e-5


@needs_triton
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_the_kernel_gives_the_loss_and_gradients_of_the_reference(softcap):
    x, weight, target = problem(vocab=5003)
    with ops.use("triton", "linear_cross_entropy"):
        found = gradients(linear_cross_entropy, x, weight, target, softcap, 8)
    wanted = gradients(linear_cross_entropy_reference, x, weight, target, softcap)
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) <= 1e-5


def test_positions_may_be_named_that_do_not_count():
    x, weight, target = problem()
    everywhere = torch.arange(len(x))
    total, count = linear_cross_entropy(x, weight, target, counted=everywhere)
    wanted, wanted_count = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(total, wanted)
    assert count == wanted_count
    grad_x, grad_weight = torch.autograd.grad(total, (x, weight))
    other_x, other_weight = torch.autograd.grad(wanted, (x, weight))
    torch.testing.assert_close(grad_x, other_x)
    torch.testing.assert_close(grad_weight, other_weight)
