"""Compiles every kernel for GPUs that need not be here, and prints what each takes of a multiprocessor, as JSON lines.

python tests/ops/compile_kernels.py        TRITON_INTERPRET must not be set

The launch code itself runs, on tensors of the meta device, which have shapes and no memory, and Triton compiles where
it would launch. So the constants, the options and what Triton makes of each argument (a stride that is a multiple of
16, a size of 1) are those of a training step.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from lumen import ops
from lumen.ops._triton import INTERPRETED
from lumen.ops.adamw import Averages, Moments
from lumen.ops.decode_attention import append_column
from lumen.ops.fp8 import add_to, quantize_rows
from lumen.ops.gated import ACTIVATIONS
from lumen.ops.gated_waist import Taken, gated_waist_forward, gated_waist_gradient
from lumen.ops.linear_loss import _fused_chunk_loss
from lumen.ops.nf4 import BLOCK, NESTED_BLOCK, _pack
from lumen.ops.nf4_matvec import nf4_matvec
from lumen.ops.waist import normed_product, waist_gradients

PROCESSORS, WARP = 132, 32
KIB = 1024
# bytes of shared memory that one program may take (CUDA programming guide, table of technical specifications), and the
# cases: an RTX 4090 runs the code of an A100 in less memory, so only what takes most of it is compiled again
TARGETS = {"sm_80": (163 * KIB, ""), "sm_89": (99 * KIB, "attention 256"), "sm_90": (227 * KIB, "")}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
B, T, D, F, V, H, K, E, R = 4, 2048, 4096, 14336, 128256, 32, 8, 128, 16  # Llama 3 8B


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, learns: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=learns)


def gradients(outputs: object, leaves: list[Tensor]) -> None:
    outputs = [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if output.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs], allow_unused=True)


def packed(outputs: int, inputs: int) -> ops.NF4:
    blocks = outputs * inputs // BLOCK
    return ops.NF4(
        codes=tensor(outputs * inputs // 2, dtype=torch.uint8),
        absmax=tensor(blocks, dtype=torch.uint8),
        nested_absmax=tensor(-(-blocks // NESTED_BLOCK), dtype=torch.float32),
        offset=tensor(dtype=torch.float32),
        shape=(outputs, inputs),
        dtype=torch.bfloat16,
    )


def projections(inputs: int, *outputs: int) -> list[ops.Projection]:
    wide = {"dtype": torch.float32, "learns": True}
    return [
        ops.Projection(weight=packed(n, inputs), a=tensor(R, inputs, **wide), b=tensor(n, R, **wide), scale=2.0)
        for n in outputs
    ]


def norm(width: int, plus_one: bool) -> None:
    x, weight = tensor(B * T, width, learns=True), tensor(width, learns=True)
    gradients(ops.rms_norm(x, weight, 1e-5, plus_one), [x])
    gradients(ops.rms_norm(x, weight, 1e-5, plus_one), [x, weight])


def group(inputs: int, outputs: tuple[int, ...], source: str, turned: bool = False) -> None:
    """One of the four groups of a block, forward and backward, and with the one row of decoding.

    turned  with dropout, and rows that learn their length
    """
    layers, x = projections(inputs, *outputs), tensor(B, T, inputs, learns=True)
    if turned:
        lengths = [tensor(n, dtype=torch.float32, learns=True) for n in outputs]
        layers = [replace(layer, dropout=0.1, magnitude=m) for layer, m in zip(layers, lengths, strict=True)]
    pairs = [part for layer in layers for part in (layer.a, layer.b)]
    options = {"residual": tensor(B, T, D, learns=True)} if len(outputs) == 1 else {}
    few = {"residual": tensor(1, 1, D)} if len(outputs) == 1 else {}
    if source == "norm":
        options = few = {"norm": tensor(inputs), "eps": 1e-5}
    if source == "gated":
        x, up = (tensor(B, T, 2 * inputs, learns=True) * 1).split(inputs, dim=-1)
        options, few = options | {"up": up, "kind": "silu"}, few | {"up": tensor(1, 1, inputs), "kind": "silu"}
    gradients(ops.project(layers, x, **options), [x, *pairs])
    with torch.no_grad():
        ops.project(layers, tensor(1, 1, inputs), **few)
        if source == "norm":
            ops.project(layers, tensor(8, 1, inputs), **few)


def gate(kind: str, dtype: torch.dtype = torch.bfloat16) -> None:
    pair = [tensor(B * T, F, dtype=dtype, learns=True) for _ in range(2)]
    gradients(ops.gated(*pair, kind), pair)


def middle(kind: str, *ranks: int) -> None:
    """Between gate, up and down, whose pairs have these ranks; 0 for none."""
    gate, up = tensor(B * T, 2 * F).split(F, dim=1)
    both, down = ranks[0] + ranks[1], ranks[2]
    halves = [tensor(F, rank) if rank else None for rank in ranks[:2]]
    taken = Taken(tensor(B * T, -(-both // 8) * 8), *halves) if both else None
    for dead in (False, True):
        gated_waist_forward(gate, up, kind, tensor(down, F), taken, dead)
    pair = (tensor(B * T, down), tensor(down, F)) if down else None
    gated_waist_gradient(tensor(B * T, F), gate, up, kind, taken, pair, (gate, up))


def around(outputs: tuple[int, ...], rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The skinny products of layers that read the same norm."""
    ranks, wide = (rank,) * len(outputs), rank * len(outputs)
    x, weight = tensor(B * T, D, dtype=dtype), tensor(D, dtype=dtype)
    grad, waist = tensor(B * T, sum(outputs), dtype=dtype), tensor(B * T, wide, dtype=dtype)
    u = tensor(sum(outputs), wide, dtype=dtype)
    waist_gradients(grad, u, waist, outputs, ranks)
    waist_gradients(grad, u, waist)
    normed_product(waist, x)
    for plus_one in (False, True):
        normed_product(waist, x, weight, tensor(B * T, dtype=torch.float32), plus_one)


def turn(head_dim: int, turned: int) -> None:
    heads = [tensor(B, T, n, head_dim, learns=True) * 1 for n in (H, K, K)]
    tables = [tensor(B, T, turned // 2, dtype=torch.float32) for _ in range(2)]
    gradients(ops.rotate_qk(*heads, *tables), heads)
    ops.rotary(heads[0], *tables)


def attend(head_dim: int, softcap: float) -> None:
    heads = [tensor(B, T, n, head_dim, learns=True) for n in (H, K, K)]
    reach = ops.Reach(first=tensor(B, T, dtype=torch.int32), queries=T)
    gradients(ops.attention(*heads, scale=head_dim**-0.5, reach=reach, softcap=softcap), heads)


def decode(head_dim: int, softcap: float) -> None:
    cache = [tensor(1, 4096, K, head_dim) for _ in range(2)]
    filled, first = tensor(dtype=torch.int32), tensor(1, dtype=torch.int32)
    ops.decode_attention(tensor(1, 1, H, head_dim), *cache, filled, first, scale=head_dim**-0.5, softcap=softcap)
    append_column(*cache, *[tensor(1, 1, K, head_dim)] * 2, filled)


def unpack() -> None:
    ops.dequantize_nf4(packed(F, D))
    ops.dequantize_nf4(packed(1000, 100))  # programs do not come out even


def pack() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _pack(tensor(F * D, dtype=dtype))
        _pack(tensor(1000 * 99, dtype=dtype))  # the last block is incomplete


def multiply_few(rows: int) -> None:
    nf4_matvec(tensor(rows, D), packed(F, D))


def round_rows(width: int, factored: bool) -> None:
    quantize_rows(tensor(B * T, width), tensor(width) if factored else None)


def add_update() -> None:
    add_to(tensor(B * T, D), tensor(B * T, D), tensor(B * T, R), tensor(D + R, D + R)[:D, D:])


def lose(softcap: float, need_gradient: bool) -> None:
    logits, target = tensor(1024, V, dtype=torch.float32), tensor(1024, dtype=torch.int64)
    _fused_chunk_loss(logits, target, softcap, torch.bfloat16, need_gradient)


def update() -> None:
    parameters = [tensor(F, R, dtype=torch.float32), tensor(R, D, dtype=torch.float32)]
    moments = [Moments.zeros(parameter) for parameter in parameters]
    numbers = {name: [1e-4, 1e-4] for name in ("rates", "corrections", "decays")}
    factor = tensor(dtype=torch.float32)
    ops.adamw(parameters, parameters, moments, beta1=0.9, beta2=0.999, eps=1e-8, factor=factor, **numbers)
    averages = [Averages.zeros(parameter) for parameter in parameters]
    ops.adamw(parameters, parameters, averages, beta1=0.9, beta2=0.999, eps=1e-8, factor=factor, **numbers)


CASES: dict[str, Callable[[], None]] = {
    "norm 4096": partial(norm, D, False),
    "norm 8192": partial(norm, 8192, False),
    "norm 4096 plus one": partial(norm, D, True),
    "q k v": partial(group, D, (H * E, K * E, K * E), "norm"),
    "o": partial(group, H * E, (D,), "plain"),
    "gate up": partial(group, D, (F, F), "norm"),
    "down": partial(group, F, (D,), "gated"),
    "q k v, thinned and turned": partial(group, D, (H * E, K * E, K * E), "norm", True),
    "down, thinned and turned": partial(group, F, (D,), "gated", True),
    **{f"gated {kind}": partial(gate, kind) for kind in ACTIVATIONS},
    "gated fp32": partial(gate, "silu", torch.float32),
    **{f"gated {kind}, pairs": partial(middle, kind, R, R, R) for kind in ACTIVATIONS},
    **{f"gated, pairs of {rank}": partial(middle, "silu", rank, rank, rank) for rank in (8, 32, 64)},
    "gated, no pair of down": partial(middle, "silu", R, R, 0),
    "gated, a pair of down alone": partial(middle, "silu", 0, 0, R),
    "waist of q k v": partial(around, (H * E, K * E, K * E), R),
    "waist of gate up": partial(around, (F, F), R),
    **{f"waist of {rank}": partial(around, (D,), rank) for rank in (8, 16, 32, 64)},
    "waist of q k v, fp32": partial(around, (H * E, K * E, K * E), R, torch.float32),
    "rotary": partial(turn, E, E),
    "rotary, a quarter turns": partial(turn, E, E // 4),
    "attention 64": partial(attend, 64, 0.0),
    "attention 64, soft cap": partial(attend, 64, 50.0),
    "attention 128": partial(attend, 128, 0.0),
    "attention 128, soft cap": partial(attend, 128, 50.0),
    "attention 256": partial(attend, 256, 0.0),
    "attention 256, soft cap": partial(attend, 256, 50.0),
    **{f"decode {width}": partial(decode, width, 0.0) for width in (64, 128, 256)},
    "decode 256, soft cap": partial(decode, 256, 50.0),
    "pack": pack,
    "unpack": unpack,
    **{f"fp8 {width}": partial(round_rows, width, False) for width in (D, F)},
    "fp8, add": add_update,
    **{f"fp8 {width}, factors": partial(round_rows, width, True) for width in (D, 2 * F)},
    **{f"{rows} rows": partial(multiply_few, rows) for rows in (1, 2, 4, 8)},
    "loss": partial(lose, 0.0, True),
    "loss alone": partial(lose, 0.0, False),
    "loss, soft cap": partial(lose, 30.0, True),
    "adamw": update,
}


def pretend(target: str) -> None:
    """From here on Triton compiles for `target`, and the launch code finds itself on such a GPU."""
    major, minor = int(target[3]), int(target[4])
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: target,  # Triton keeps what it has compiled by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, WARP),
        )
    )
    properties = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=PROCESSORS, shared_memory_per_block_optin=TARGETS[target][0]
    )
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (major, minor)


def compiled(case: Callable[[], None]) -> dict[str, object]:
    """What Triton compiled for a case: the hash of its source and options → the kernel."""
    found: dict[str, object] = {}

    def launch(kernel: triton.JITFunction, grid: object) -> Callable[..., None]:
        def compile_only(*args: object, **options: object) -> None:
            made = kernel.warmup(*args, grid=grid, **options)
            found[made.hash] = made

        return compile_only

    triton.JITFunction.__getitem__ = launch
    case()
    return found


def resources(kernels: list[object]) -> Iterator[tuple[int, int]]:
    """(registers of a thread, bytes of its stack) of each; a stack is where registers that did not suffice spill to."""
    with tempfile.TemporaryDirectory() as folder:
        for index, kernel in enumerate(kernels):
            path = Path(folder, f"{index}.cubin")
            path.write_bytes(kernel.asm["cubin"])
            text = subprocess.run([TOOL, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
            yield tuple(int(re.search(rf"{what}:(\d+)", text.stdout)[1]) for what in ("REG", "STACK"))


def main() -> int:
    if INTERPRETED:
        print("error: TRITON_INTERPRET is set: kernels are not compiled. Unset it.", file=sys.stderr)
        return 2
    for name, module in list(sys.modules.items()):
        if name.startswith("lumen.ops.") and hasattr(module, "choice"):
            module.choice = lambda op, available: "triton"
    for target, (most, wanted) in TARGETS.items():
        pretend(target)
        seen: dict[str, tuple[str, object]] = {}
        for case, run in CASES.items():
            for key, kernel in compiled(run).items() if wanted in case else ():
                seen.setdefault(key, (case, kernel))
        measured = resources([kernel for _, kernel in seen.values()])
        for (case, kernel), (registers, stack) in zip(seen.values(), measured, strict=True):
            line = {"target": target, "kernel": kernel.name, "case": case, "registers": registers, "stack": stack}
            line |= {"shared": kernel.metadata.shared, "most_shared": most, "warps": kernel.metadata.num_warps}
            print(json.dumps(line | {"stages": kernel.metadata.num_stages}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
