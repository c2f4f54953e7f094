"""Times every operation on a GPU, beside PyTorch's own and, where they are installed, Liger's and bitsandbytes'.

scripts/bench_ops                       all operations, in the shapes of an 8B Llama with 8192 tokens
scripts/bench_ops --only attention      one of them; may be given several times
scripts/bench_ops --json                one JSON document instead of the table
scripts/bench_ops --tiny                every case once in small shapes, to see that it runs; without a GPU, in Triton's
                                        interpreter, where TRITON_INTERPRET=1 is set

A rate counts the work that the operation must do, whoever does it: an input is read once, an output written once, and
of an attention only what is seen. Its share is of what this GPU reached in the same run: copying 1 GiB, where bytes
are counted, or a bf16 product of 8192 × 8192 × 8192, where multiplications are.

A time is the median of many, by the device's clock. Before each call a buffer larger than the cache is read, so that
inputs come from memory, and for so long that the host has issued the call's work before the clock starts.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lumen import ops
from lumen.ops._triton import INTERPRETED
from lumen.ops.adamw import Moments
from lumen.ops.nf4 import nf4_matvec

PEERS = ("torch", "liger", "bitsandbytes")  # what fails of theirs is told, and no failure of this script
SWEEP_BYTES = 2**30  # more than any cache, and what the copy is measured with
MAX_REPEATS, MIN_REPEATS, REPEAT_MS = 100, 20, 300.0


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of an 8B Llama; the letters are those of the whole project."""

    rows: tuple[tuple[int, int], ...] = ((4, 2048), (2, 8192))  # (B, T)
    D: int = 4096
    F: int = 14336
    V: int = 128256
    H: int = 32
    K: int = 8
    E: int = 128
    R: int = 16
    document: int = 256
    window: int = 1024
    learned: int = 42_000_000  # values that the optimizer updates
    matrices: int = 32  # that one after another are multiplied with one vector
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def N(self) -> int:
        return math.prod(self.rows[0])

    def random(self, *shape: int, learns: bool = False, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale
        return values.requires_grad_(learns)


TINY = Shapes(
    rows=((1, 16), (1, 32)), D=64, F=128, V=300, H=4, K=2, E=16, R=8, document=8, window=8, learned=3000, matrices=2,
    device="cuda" if torch.cuda.is_available() else "cpu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to time; `work` is what it must do, in bytes moved or in floating-point operations."""

    name: str
    who: str
    run: Callable[[], object]
    work: float
    unit: str  # "byte" | "flop"
    calls: int = 1  # of the operation, in one run
    prepare: Callable[[], object] = lambda: None  # is called before each run, and not timed


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a case came to; `failed` says why there are no numbers."""

    op: str
    name: str
    who: str
    ms: float | None = None
    rate: float | None = None  # TB/s or TFLOP/s
    unit: str = ""
    share: float | None = None  # of the ceiling
    failed: str = ""


def peer(name: str, s: Shapes) -> ModuleType | None:
    """The module of another project, where it is installed and there is a GPU for it."""
    if s.device != "cuda":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def forced(implementation: str, function: Callable[[], Tensor], *names: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with ops.use(implementation, *names):
            return function()

    return run


def forward(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)


def backward(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
    """Gradients of `leaves` for a random incoming one, again and again from the forward pass of the first call."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            output = function()
            made.append(partial(torch.autograd.grad, output, leaves, torch.randn_like(output), retain_graph=True))
        return made[0]()

    return run


def restored(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Puts back what `tensors` hold now: for who leaves gradients in the place of activations."""
    copies = [tensor.detach().clone() for tensor in tensors]

    def restore() -> None:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data.copy_(copy)  # past autograd, which would refuse another pass through what has changed

    return restore


def both_ways(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
    def run() -> object:
        output = function()
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    return run


# --- the operations: what each must do, and who can do it ---


def rms_norm(s: Shapes) -> Iterator[Case]:
    x, weight, size = s.random(s.N, s.D, learns=True), s.random(s.D), s.N * s.D * 2
    who = {
        "lumen": forced("triton", lambda: ops.rms_norm(x, weight, 1e-5)),
        "torch": lambda: F.rms_norm(x, (s.D,), weight, 1e-5),
    }
    if liger := peer("liger_kernel.ops.rms_norm", s):
        # not in place: the incoming gradient serves many times
        who["liger"] = lambda: liger.LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)
    for name, function in who.items():
        yield Case(name="forward", who=name, run=forward(function), work=2 * size, unit="byte")
        yield Case(name="backward", who=name, run=backward(function, [x]), work=3 * size, unit="byte")


def gated(s: Shapes) -> Iterator[Case]:
    gate, up, size = s.random(s.N, s.F, learns=True), s.random(s.N, s.F, learns=True), s.N * s.F * 2
    who = {
        "lumen": forced("triton", lambda: ops.gated(gate, up, "silu")),
        "torch": lambda: F.silu(gate) * up,
    }
    if liger := peer("liger_kernel.ops.swiglu", s):
        who["liger"] = lambda: liger.LigerSiLUMulFunction.apply(gate, up)
    prepare = {"liger": restored([gate, up])}  # its backward pass leaves the gradients there
    for name, function in who.items():
        yield Case(name="forward", who=name, run=forward(function), work=3 * size, unit="byte")
        common = {"name": "backward", "work": 5 * size, "unit": "byte"}
        yield Case(who=name, run=backward(function, [gate, up]), **common, prepare=prepare.get(name, lambda: None))


def rotate_qk(s: Shapes) -> Iterator[Case]:
    B, T = s.rows[0]
    q, k, v = (s.random(B, T, heads, s.E) for heads in (s.H, s.K, s.K))
    angle = torch.rand(B, T, s.E // 2, device=s.device) * 6.28
    cos, sin = angle.cos(), angle.sin()
    turn = partial(ops.rotate_qk, q, k, v, cos, sin)
    who = {"lumen": forced("triton", turn), "torch": forced("reference", turn)}
    if liger := peer("liger_kernel.ops.rope", s):
        full = [torch.cat((table, table), -1).to(s.dtype) for table in (cos, sin)]
        who["liger"] = partial(liger.LigerRopeFunction.apply, q.transpose(1, 2), k.transpose(1, 2), *full)
    work = 2 * 2 * (q.numel() + k.numel()) + 2 * 4 * cos.numel()
    for name, function in who.items():
        yield Case(name="q and k, forward", who=name, run=forward(function), work=work, unit="byte")


def unpack_nf4(s: Shapes) -> Iterator[Case]:
    weight = s.random(s.F, s.D, scale=0.02)
    packed = ops.quantize_nf4(weight)
    common = {"name": f"{s.F} x {s.D}", "work": packed.nbytes + 2 * weight.numel(), "unit": "byte"}
    yield Case(who="lumen", run=forced("triton", partial(ops.dequantize_nf4, packed)), **common)
    if bitsandbytes := peer("bitsandbytes.functional", s):
        theirs = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        yield Case(who="bitsandbytes", run=partial(bitsandbytes.dequantize_4bit, *theirs), **common)


def matvec_nf4(s: Shapes) -> Iterator[Case]:
    """One token's product with matrices that follow one another, as in decoding: replays of a captured graph."""
    x, dense = s.random(1, s.D), [s.random(s.F, s.D, scale=0.02) for _ in range(s.matrices)]
    packed = [ops.quantize_nf4(weight) for weight in dense]
    common = {"name": f"{s.F} x {s.D}, 1 row", "unit": "byte", "calls": s.matrices}
    runs = [partial(nf4_matvec, x, weight) for weight in packed]
    yield Case(who="lumen", run=captured(s, runs), work=packed[0].nbytes, **common)
    runs = [partial(F.linear, x, weight) for weight in dense]
    yield Case(who="torch bf16", run=captured(s, runs), work=2 * dense[0].numel(), **common)
    if bitsandbytes := peer("bitsandbytes", s):
        quantize = partial(bitsandbytes.functional.quantize_4bit, compress_statistics=True, quant_type="nf4")
        theirs = [quantize(weight, blocksize=64) for weight in dense]
        runs = [partial(bitsandbytes.matmul_4bit, x, codes.t(), state) for codes, state in theirs]
        yield Case(who="bitsandbytes", run=captured(s, runs), work=packed[0].nbytes, **common)


def captured(s: Shapes, runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All `runs`, without a gradient; on a GPU as one CUDA graph, which the first call makes."""
    made: list[tuple[torch.cuda.CUDAGraph, list[object]]] = []

    @torch.no_grad()
    def replay() -> None:
        if s.device != "cuda" or not made:  # what is compiled or chosen at a first call is not captured
            for run in runs:
                run()
        if s.device == "cuda":
            if not made:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    made.append((graph, [run() for run in runs]))  # the outputs are kept: each has its own memory
            made[0][0].replay()

    return replay


def attention(s: Shapes) -> Iterator[Case]:
    scale = s.E**-0.5
    for B, T in s.rows:
        yield from seen_attention(s, B, T, "causal", None, 0.0, B * T * (T + 1) / 2, scale)
    B, T = s.rows[1]
    device = torch.device(s.device)
    document = (torch.arange(T, device=device) // s.document).expand(B, T)
    pairs = B * T * (s.document + 1) / 2
    name, reach = f"documents of {s.document}", ops.reach(T, T, document, 0, device)
    yield from seen_attention(s, B, T, name, reach, 0.0, pairs, scale)
    pairs = B * (T * s.window - s.window * (s.window - 1) / 2)
    name, reach = f"window {s.window}", ops.reach(T, T, None, s.window, device)
    yield from seen_attention(s, B, T, name, reach, 0.0, pairs, scale)
    B, T = s.rows[0]
    yield from seen_attention(s, B, T, "soft cap 50", None, 50.0, B * T * (T + 1) / 2, scale)


def seen_attention(
    s: Shapes, B: int, T: int, name: str, reach: ops.Reach | None, softcap: float, pairs: float, scale: float
) -> Iterator[Case]:
    """Attention of which `pairs` of a query and a key are seen: two products of E each forward, five backward."""
    leaves = [s.random(B, T, heads, s.E, learns=True) for heads in (s.H, s.K, s.K)]
    theirs = [leaf.detach().transpose(1, 2).contiguous().requires_grad_() for leaf in leaves]
    function = partial(ops.attention, *leaves, scale=scale, reach=reach, softcap=softcap)
    who = {"lumen triton": (forced("triton", function), leaves)}
    sdpa = partial(F.scaled_dot_product_attention, *theirs, scale=scale, enable_gqa=True)
    if reach is not None:
        # a head of its own for each query head: with a mask, PyTorch's fused kernel knows no groups
        alone = [leaf.detach().repeat_interleave(s.H // leaf.shape[1], 1).requires_grad_() for leaf in theirs]
        masked = partial(F.scaled_dot_product_attention, *alone, attn_mask=reach.mask, scale=scale)
        who["torch mask"] = (masked, alone)
    elif s.device == "cuda" and not softcap:
        causal = partial(sdpa, is_causal=True)
        who = {"lumen cudnn": (forced("cudnn", function), leaves)} | who
        who["torch flash"] = (with_backend(SDPBackend.FLASH_ATTENTION, causal), theirs)
        who["torch cudnn"] = (with_backend(SDPBackend.CUDNN_ATTENTION, causal), theirs)
    work, title = 4 * s.E * s.H * pairs, f"{B} x {T} {name}"
    for label, (run, inputs) in who.items():
        common = {"who": label, "unit": "flop"}
        yield Case(name=f"{title}, forward", run=forward(run), work=work, **common)
        yield Case(name=f"{title}, backward", run=backward(run, inputs), work=2.5 * work, **common)


def with_backend(backend: SDPBackend, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return function()

    return run


def linear_cross_entropy(s: Shapes) -> Iterator[Case]:
    x, weight = s.random(s.N, s.D, learns=True), s.random(s.V, s.D, scale=0.02)
    target = torch.randint(s.V, (s.N,), device=s.device)
    counted = torch.arange(s.N, device=s.device)
    work = 4.0 * s.N * s.D * s.V  # logits, and the gradient of x; the head is frozen
    who = {
        "lumen": forced("triton", lambda: ops.linear_cross_entropy(x, weight, target, counted=counted)[0]),
        "torch": lambda: F.cross_entropy((x @ weight.T).float(), target, reduction="sum"),
    }
    if liger := peer("liger_kernel.ops.fused_linear_cross_entropy", s):
        who["liger"] = lambda: liger.LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, target, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    for name, function in who.items():
        title = f"{s.N} counted, forward and backward"
        yield Case(name=title, who=name, run=both_ways(function, [x]), work=work, unit="flop")


def project(s: Shapes) -> Iterator[Case]:
    groups = {
        "q k v": (s.D, (s.H * s.E, s.K * s.E, s.K * s.E)),
        "o": (s.H * s.E, (s.D,)),
        "gate up": (s.D, (s.F, s.F)),
        "down": (s.F, (s.D,)),
    }
    for name, (inputs, outputs) in groups.items():
        layers = [
            ops.Projection(
                weight=ops.quantize_nf4(s.random(out, inputs, scale=0.02)), scale=2.0,
                a=s.random(s.R, inputs, learns=True, scale=0.01, dtype=torch.float32),
                b=s.random(out, s.R, learns=True, scale=0.01, dtype=torch.float32),
            )
            for out in outputs
        ]  # fmt: skip
        # forward W x and the update's two; backward ∂x, and for the update ∂xa, ∂x, ∂A and ∂B
        pairs = sum(s.R * (inputs + out) for out in outputs)
        work = s.N * (4.0 * inputs * sum(outputs) + 6.0 * pairs)
        run, prepare = projected(s, layers, inputs, name)
        common = {"name": f"{name}, forward and backward", "work": work, "unit": "flop", "prepare": prepare}
        yield Case(who="lumen", run=forced("triton", run), **common)
        # PyTorch knows no NF4: layer by layer, each with a weight that our kernel has unpacked
        yield Case(who="torch", run=forced("reference", run, "project", "rms_norm", "gated"), **common)


def projected(
    s: Shapes, layers: list[ops.Projection], inputs: int, name: str
) -> tuple[Callable[[], object], Callable[[], None]]:
    """Forward and backward of one group of a block, its input made as the block makes it; and what goes before."""
    pairs = [part for layer in layers for part in (layer.a, layer.b)]
    x = s.random(s.N, inputs, learns=True)
    leaves, spent = [x, *pairs], []
    if len(layers) > 1:
        options = {"norm": s.random(inputs), "eps": 1e-5}
    else:
        options = {"residual": s.random(s.N, layers[0].outputs, learns=True)}
        leaves.append(options["residual"])
    if name == "down":
        options |= {"up": s.random(s.N, inputs, learns=True), "kind": "silu"}
        leaves.append(options["up"])
        spent = [x, options["up"]]  # their gradients take their place
    grads = [s.random(s.N, layer.outputs, scale=0.01) for layer in layers]

    def run() -> object:
        outputs = ops.project(layers, x, **options)[: len(layers)]
        return torch.autograd.grad(outputs, leaves, grads)

    return run, restored(spent)


def adamw_8bit(s: Shapes) -> Iterator[Case]:
    sizes = [s.R * s.D, s.R * s.F]  # the two kinds of matrix that an 8B model's pairs are made of, near enough
    count = max(s.learned // sum(sizes), 1)
    parameters = [s.random(size, scale=0.01, dtype=torch.float32) for _ in range(count) for size in sizes]
    grads = [torch.randn_like(parameter) * 1e-3 for parameter in parameters]
    moments = [Moments.zeros(parameter) for parameter in parameters]
    each = {
        name: [value] * len(parameters) for name, value in {"rates": 1e-4, "corrections": 0.5, "decays": 0.0}.items()
    }
    factor = torch.ones((), device=s.device)
    learned = sum(parameter.numel() for parameter in parameters)
    update = partial(ops.adamw, parameters, grads, moments, beta1=0.9, beta2=0.999, eps=1e-8, factor=factor, **each)
    title = f"{learned / 1e6:.1f} M values"
    yield Case(name=title, who="lumen", run=forced("triton", update), work=learned * (16 + 4 * 4 / 256), unit="byte")
    theirs = [torch.nn.Parameter(parameter) for parameter in parameters]
    for parameter, grad in zip(theirs, grads, strict=True):
        parameter.grad = grad
    run = torch.optim.AdamW(theirs, lr=1e-4, fused=True).step
    yield Case(name=title, who="torch fp32 fused", run=run, work=learned * 28, unit="byte")
    if bitsandbytes := peer("bitsandbytes", s):
        run = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-4).step
        yield Case(name=title, who="bitsandbytes", run=run, work=learned * (16 + 4 * 4 / 256), unit="byte")


OPS: dict[str, Callable[[Shapes], Iterator[Case]]] = {
    "rms_norm": rms_norm,
    "rotate_qk": rotate_qk,
    "gated": gated,
    "unpack_nf4": unpack_nf4,
    "matvec_nf4": matvec_nf4,
    "attention": attention,
    "linear_cross_entropy": linear_cross_entropy,
    "project": project,
    "adamw_8bit": adamw_8bit,
}


# --- timing ---


class Clock:
    """Median times by the device's events."""

    def __init__(self) -> None:
        self.buffer = torch.ones(SWEEP_BYTES // 4, device="cuda")
        self.sweep_ms = self._device_ms(self.buffer.sum, lambda: None, 5, 0)

    def _device_ms(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int, sweeps: int) -> float:
        marks = []
        for _ in range(repeats):
            prepare()
            for _ in range(sweeps):
                self.buffer.sum()  # reads, and so leaves nothing in the cache that has yet to be written back
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run()
            pair[1].record()
            marks.append(pair)
        torch.cuda.synchronize()
        return median(start.elapsed_time(stop) for start, stop in marks)

    def median_ms(self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
        for _ in range(3):
            prepare()
            run()
        prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        issued_ms = 1000 * (time.perf_counter() - begin)
        rough = self._device_ms(run, prepare, 3, 1)
        repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(REPEAT_MS / max(rough, 1e-3))))
        return self._device_ms(run, prepare, repeats, 1 + math.ceil(issued_ms / self.sweep_ms))


def once_ms(run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    prepare()
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def ceilings(median_ms: Callable[..., float], tiny: bool) -> dict[str, float]:
    """What the GPU reaches: TB/s of a copy, read and written, and TFLOP/s of a product in bf16."""
    size, device = (2**12, TINY.device) if tiny else (SWEEP_BYTES, "cuda")
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "byte": 2 * size / median_ms(lambda: target.copy_(source)) / 1e9,
        "flop": 2 * n**3 / median_ms(lambda: a @ b) / 1e9,
    }


def measure(op: str, case: Case, median_ms: Callable[..., float], ceiling: dict[str, float]) -> Result:
    result = Result(op=op, name=case.name, who=case.who, unit={"byte": "TB/s", "flop": "TFLOP/s"}[case.unit])
    try:
        ms = median_ms(case.run, case.prepare) / case.calls
    except Exception as error:  # is told, and counts for the exit code; the other cases are worth having all the same
        return replace(result, failed=reason(error))
    rate = case.work / ms / 1e9
    return replace(result, ms=ms, rate=rate, share=rate / ceiling[case.unit])


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def results(op: str, shapes: Shapes, median_ms: Callable[..., float], ceiling: dict[str, float]) -> Iterator[Result]:
    try:
        for case in OPS[op](shapes):
            yield measure(op, case, median_ms, ceiling)
    except Exception as error:  # while inputs were made; lumen's cases come first
        yield Result(op=op, name="the cases after these", who="", failed=reason(error))


def line(result: Result) -> str:
    head = f"{result.op:<21}{result.name:<40}{result.who:<17}"
    if result.failed:
        return f"{head} failed: {result.failed}"
    return f"{head}{result.ms:>9.4f}{result.rate:>9.2f} {result.unit:<8}{100 * result.share:>6.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(OPS), metavar="OP", help=f"one of {', '.join(OPS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--tiny", action="store_true", help="run every case once in small shapes; times mean nothing")
    chosen = parser.parse_args()
    if not chosen.tiny and not torch.cuda.is_available():
        print("error: bench_ops times a GPU, and PyTorch finds none. --tiny tries the cases without.", file=sys.stderr)
        return 2
    if not (torch.cuda.is_available() or INTERPRETED):
        print("error: without a GPU, --tiny needs Triton's interpreter. Set TRITON_INTERPRET=1.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    shapes = TINY if chosen.tiny else Shapes()
    median_ms = once_ms if chosen.tiny else Clock().median_ms
    ceiling = ceilings(median_ms, chosen.tiny)
    names = ("torch", "triton", "liger_kernel", "bitsandbytes")
    versions = {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    if not chosen.json:
        print(f"{gpu}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
        print(f"{ceiling['byte']:.2f} TB/s copied, {ceiling['flop']:.0f} TFLOP/s in bf16")
        print(f"{'operation':<21}{'case':<40}{'by':<17}{'ms':>9}{'rate':>9} {'':<8}{'share':>8}")
    found = []
    for op in chosen.only or OPS:
        for result in results(op, shapes, median_ms, ceiling):
            found.append(result)
            if not chosen.json:
                print(line(result), flush=True)
        if shapes.device == "cuda":
            torch.cuda.empty_cache()
    if chosen.json:
        head = {"gpu": gpu, "versions": versions, "copy_tb_per_s": ceiling["byte"]}
        head |= {"bf16_tflop_per_s": ceiling["flop"], "results": [asdict(result) for result in found]}
        print(json.dumps(head, indent=1))
    return 1 if any(result.failed and not result.who.startswith(PEERS) for result in found) else 0


if __name__ == "__main__":
    sys.exit(main())
