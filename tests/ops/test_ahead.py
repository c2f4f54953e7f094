"""Kernels compiled ahead are those that a launch finds: the same keys, from tensors without memory and with it."""

import subprocess
import sys

import pytest
from cuda_driver import compiling_environment
from kernels import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return compiling_environment(tmp_path_factory.mktemp("driver"))


STEP = """
import torch
from lumen import ops
from lumen.ops import ahead

H100 = ahead.Gpu(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448,
                 free_bytes=80 << 30, total_bytes=80 << 30)
ahead.pretend(H100)

def step(device):
    x = torch.empty(40, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    one = torch.empty(1, 256, dtype=torch.bfloat16, device=device)
    ops.rms_norm(x, torch.empty(256, device=device), 1e-5).backward(x.detach())
    ops.gated(one, one, "silu")
"""

AHEAD_AND_THEN = (
    STEP
    + """
from triton import JITFunction, knobs

with ahead.compiling(2) as finish:
    step("meta")
    step("meta")  # nothing new
    print(*finish())

from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import build

def launch(kernel, grid):
    def start(*arguments, **options):
        made = kernel.warmup(*arguments, grid=grid, **options)
        CudaLauncher(made.src, made.metadata)
    return start

hits = []
knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
build._build = None  # a launcher that was not built ahead fails
JITFunction.__getitem__ = launch
step("cpu")
print(len(hits), all(hits))
"""
)

FAILING = (
    STEP
    + """
from triton.backends.nvidia import compiler
from triton.runtime import build

WHAT
with ahead.compiling(2) as finish:
    step("meta")
    print(*finish())
"""
)


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_launch_finds_every_kernel_that_was_compiled_ahead(environment):
    done = run(AHEAD_AND_THEN, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, found = done.stdout.splitlines()
    assert (compiled, found) == ("3 0", "3 True")


def test_products_of_any_size_are_made_without_a_gpu(environment):
    code = """
from lumen.ops.product import add_product, product

x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((16_384, 4096), (28_672, 4096)))
print(add_product(product(x, w.T), x, w.T).shape)
"""
    done = run(STEP + code, environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout.strip() == "torch.Size([16384, 28672])", done.stderr[-3000:]


@pytest.mark.parametrize("what", ["compiler.CUDABackend.make_cubin", "build._build"])
def test_a_kernel_or_launcher_that_does_not_compile_is_counted_and_said(environment, tmp_path, what):
    done = run(FAILING.replace("WHAT", f"{what} = lambda *_: 1 / 0"), environment | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.stdout.split() == ["0", "3"], done.stderr[-3000:]
    assert done.stderr.count("ZeroDivisionError") == 3
