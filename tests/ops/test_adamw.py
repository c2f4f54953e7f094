"""AdamW with 8-bit averages: the kernel against its reference, the tables and the update against bitsandbytes."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from kernels import needs_triton

from lumen import ops
from lumen.ops.adamw import Averages, Moments, _signed, _unsigned, adamw, adamw_reference

CPU = torch.device("cpu")
SHAPES = [(16, 300), (40, 7), (9000,)]


def options(update, count, factor=1.0, decay=1e-4):
    return {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "rates": [1e-3 / (1 - 0.9**update)] * count,
        "corrections": [(1 - 0.999**update) ** 0.5] * count,
        "decays": [decay] * count,
        "factor": torch.tensor(factor),
    }


def run(implementation, kind=Moments, updates=3):
    random = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=random) for shape in SHAPES]
    moments = [kind.zeros(parameter) for parameter in parameters]
    for update in range(1, updates + 1):
        grads = [torch.randn(shape, generator=random) * 0.01 for shape in SHAPES]
        with ops.use(implementation):
            adamw(parameters, grads, moments, **options(update, len(SHAPES), factor=0.5))
    return parameters, moments


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(_signed(CPU), create_dynamic_map(signed=True))
    assert torch.equal(_unsigned(CPU), create_dynamic_map(signed=False))


@needs_triton
def test_the_kernel_matches_the_reference():
    (found, found_moments), (wanted, wanted_moments) = run("triton"), run("reference")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    for one, other in zip(found_moments, wanted_moments, strict=True):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.square, other.square)


@needs_triton
def test_the_kernel_with_averages_in_fp32_matches_the_reference():
    (found, found_averages), (wanted, wanted_averages) = run("triton", Averages), run("reference", Averages)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    for one, other in zip(found_averages, wanted_averages, strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.square, other.square, rtol=1e-6, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_nothing_moves_when_the_factor_is_not_finite(implementation, factor):
    parameter = torch.randn(300)
    before, moments = parameter.clone(), Moments.zeros(parameter)
    codes = moments.mean.clone()
    with ops.use(implementation):
        adamw([parameter], [torch.ones(300)], [moments], **options(1, 1, factor=factor))
    assert torch.equal(parameter, before) and torch.equal(moments.mean, codes)


def test_updates_follow_those_of_bitsandbytes():
    random = torch.Generator().manual_seed(1)
    theirs = torch.nn.Parameter(torch.randn(64, 300, generator=random))
    ours, moments = theirs.detach().clone(), None
    moments = Moments.zeros(ours)
    optimizer = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=0.1)
    for update in range(1, 11):
        theirs.grad = torch.randn(64, 300, generator=random) * 0.01
        adamw([ours], [theirs.grad.clone()], [moments], **options(update, 1))
        optimizer.step()
    moved = (theirs - ours).abs()
    # both round the averages to 8 bits, not always to the same side: a twentieth of one step's length, at the most
    assert moved.mean() <= 2e-5 and moved.max() <= 1e-3


def test_a_narrow_parameter_is_rounded_once():
    """Decay and update are each less than half of the step below 1, 2⁻⁸, and together more."""
    parameter, grad = torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 0.0, "rate": 0.006, "correction": 1.0, "decay": 0.0015}
    averages = Averages(mean=torch.full((4,), 0.1), square=torch.full((4,), 1.0))
    adamw_reference(parameter, grad, averages, **settings, factor=torch.tensor(1.0))
    assert parameter.equal(torch.full((4,), 1 - 2**-8, dtype=torch.bfloat16))  # 1 - 0.0015 - 0.006 · 0.19
