"""Kernels compiled before they are needed, by a process without a GPU, into the cache where the launch looks for them.

Triton compiles a kernel when it is first launched, for the dtypes and constants of that launch and for what it notices
of the other arguments (a size of 1, a multiple of 16), and keeps the machine code on disk. Two dozen kernels one after
the other, each with a launcher in C, are many seconds in which the GPU waits.

Which ones a step will launch is not listed anywhere: the code that launches them says it. It runs here on tensors of
the meta device, which have shapes and no memory, in a process that `pretend` makes believe that they lie on the GPU;
where it would launch, a child is forked that compiles that kernel and ends, and another one its launcher. So a cache
key is made of the same things as that of the launch itself, by the same code of Triton's, and a kernel that was not
foreseen is compiled in its turn.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import torch

from lumen import early
from lumen.errors import KernelError
from lumen.ops._triton import INTERPRETED, triton

WARP = 32
LONGEST_S = 600  # a kernel takes seconds; what takes longer than this hangs, and nobody waits for it any more


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What of a GPU decides which kernels are launched on it, and how they are compiled; names are PyTorch's."""

    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    free_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> "Gpu":
        """That of a CUDA device; begins to use it."""
        found = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        names = ("major", "minor", "multi_processor_count", "shared_memory_per_block_optin")
        return cls(**{name: getattr(found, name) for name in names}, free_bytes=free, total_bytes=total)


def compiles() -> bool:
    """Whether kernels are compiled here at all: there is Triton, and it does not interpret them."""
    return triton is not None and not INTERPRETED


def cache_folder() -> Path:
    """Where Triton keeps what it has compiled."""
    return Path(triton.knobs.cache.dir)


def know_triton() -> str:
    """Triton's hash of itself, a part of every cache key: half a second over 400 MB, once in the process."""
    return early.know_triton()


def start_driver() -> None:
    """Makes Triton able to launch on this GPU, for which it builds a library in C at the first time.

    KernelError where that cannot be: without a C compiler, or with a cache that is empty and cannot be written.
    """
    try:
        _ = triton.runtime.driver.active
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise KernelError(
            f"Triton cannot launch kernels on this GPU: {error} It wants a C compiler (gcc, clang, or what CC names), "
            f"Python's headers, and a folder that it may write to: {cache_folder()}, or what TRITON_CACHE_DIR names."
        ) from error


def leave_compiler_out() -> None:
    """From here on, and for good, PyTorch's operations on the meta device do without its compiler.

    They ask it only that it leave them alone, for which it would be imported: 1.5 s.
    """
    torch._dynamo = sys.modules["torch._dynamo"] = ModuleType("torch._dynamo")
    torch._dynamo.disable = lambda function, *_, **__: function
    torch._dynamo.decorators = SimpleNamespace(skip=lambda function: function)
    torch._dynamo.config = SimpleNamespace(error_on_nested_fx_trace=False)  # which torch.utils.checkpoint reads


def pretend(gpu: Gpu) -> None:
    """From here on, and for good, this process takes tensors of the meta device for tensors on `gpu`."""
    device = f"sm_{gpu.major}{gpu.minor}"  # Triton keeps what it has compiled by device
    target = triton.backends.compiler.GPUTarget("cuda", 10 * gpu.major + gpu.minor, WARP)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: device,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    torch.cuda.get_device_properties = lambda device=None: gpu
    torch.cuda.get_device_capability = lambda device=None: (gpu.major, gpu.minor)
    torch.Tensor.is_cuda = True
    torch.mm = _product
    leave_compiler_out()
    for name, module in list(sys.modules.items()):
        if name.startswith("lumen.ops.") and hasattr(module, "processors"):
            module.processors = lambda device: gpu.multi_processor_count


_mm = torch.mm


def _product(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None, **others) -> torch.Tensor:
    """`torch.mm`, which for a wider result not every PyTorch can do on the meta device."""
    if out_dtype is not None:
        return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)
    return _mm(a, b, **others)


@contextmanager
def compiling(at_once: int) -> Iterator[Callable[[], tuple[int, int]]]:
    """Inside the `with`, what would be launched is compiled instead, each kernel once, by up to `at_once` children.

    Gives a function that waits for all of them and returns how many were compiled, and how many could not be; why is
    written to stderr. Where nothing was launched outside of forked children, forking is safe: they compile and end.

    A launcher in C takes as long as a small kernel and has a child of its own. Those come last: the kernels are known
    within a fraction of a second, and the slowest of them decides how long all takes.
    """
    children: dict[int, tuple[str, str]] = {}  # what each is at work on
    launchers: dict[tuple[str, str], Callable[[], None]] = {}  # still to be built
    seen: set[tuple[str, str]] = set()
    failed: set[tuple[str, str]] = set()

    def reap() -> None:
        child, status = os.wait()
        known = children.pop(child, None)
        failed.update([known] if status and known else [])

    def begin(known: tuple[str, str], work: Callable[[], None]) -> None:
        while len(children) >= at_once:
            reap()
        children[_fork(work)] = known

    def launch(kernel: "triton.JITFunction", grid: object) -> Callable[..., None]:
        def start(*arguments: object, **options: object) -> None:
            def is_known(*, key: str, compile: dict, **_: object) -> bool:
                if (known := (kernel.__name__, key)) not in seen:
                    seen.add(known)
                    new.append(known)
                    launchers[known] = partial(_build_launcher, kernel, compile["signature"], compile["constants"])
                return True  # Triton leaves it at that, and compiles nothing

            new: list[tuple[str, str]] = []
            triton.knobs.runtime.jit_cache_hook = is_known
            kernel.warmup(*arguments, grid=grid, **options)
            triton.knobs.runtime.jit_cache_hook = None
            for known in new:
                begin(known, partial(_compile, kernel, arguments, options))

        return start

    def finish() -> tuple[int, int]:
        while launchers:
            begin(*launchers.popitem())
        while children:
            reap()
        return len(seen) - len(failed), len(failed)

    before, triton.JITFunction.__getitem__ = triton.JITFunction.__getitem__, launch
    try:
        yield finish
    finally:
        triton.JITFunction.__getitem__ = before
        finish()


def _compile(kernel: "triton.JITFunction", arguments: tuple, options: dict) -> None:
    """Puts the kernel into Triton's cache."""
    kernel.warmup(*arguments, grid=(1,), **options)


def _build_launcher(kernel: "triton.JITFunction", signature: dict, constants: dict) -> None:
    """Puts the C code that launches the kernel into Triton's cache.

    It follows from the signature, but for an argument that is a tensor descriptor, which none of ours is.
    """
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(SimpleNamespace(fn=kernel, signature=signature, constants=constants), _NoMetadata())


class _NoMetadata:
    """Of a kernel that is not compiled yet; a launcher only keeps it, to launch."""

    def __getattr__(self, name: str) -> None:
        return None


def _fork(work: Callable[[], None]) -> int:
    """The id of a child that does `work` and ends, with 1 where that failed; after LONGEST_S in any case."""
    if child := os.fork():
        return child
    signal.alarm(LONGEST_S)
    end_after(work)


def end_after(work: Callable[[], None]) -> NoReturn:
    """Does `work` and ends this process, with 1 and a traceback where that failed; nothing else of Python's is run."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
