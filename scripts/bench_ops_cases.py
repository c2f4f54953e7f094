"""What `bench_ops.py` times: for every operation what it must do, in bytes or in multiplications, and who can do it.

"torch" is the same in PyTorch's own operations, "compiled" what torch.compile makes of that.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lumen import ops
from lumen.ops.adamw import Moments
from lumen.ops.dropout import draw_seeds, thinned
from lumen.ops.nf4_matvec import nf4_matvec
from lumen.ops.rotary import rotary_reference


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


def peer(name: str, s: Shapes) -> ModuleType | None:
    """The module of another project, where it is installed and there is a GPU for it."""
    if s.device != "cuda":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def with_compiled(s: Shapes, function: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """PyTorch's own `function`, and where there is a GPU what torch.compile makes of it."""
    who = {"torch": function}
    if s.device == "cuda":
        torch._functorch.config.donated_buffer = False  # a backward pass is timed many times over
        who["compiled"] = torch.compile(function, dynamic=False)
    return who


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


# --- the operations ---


def rms_norm(s: Shapes) -> Iterator[Case]:
    x, weight, size = s.random(s.N, s.D, learns=True), s.random(s.D, learns=True), s.N * s.D * 2
    who = {"lumen": forced("triton", lambda: ops.rms_norm(x, weight, 1e-5))}
    who |= with_compiled(s, lambda: F.rms_norm(x, (s.D,), weight, 1e-5))
    if liger := peer("liger_kernel.ops.rms_norm", s):
        # not in place: the incoming gradient serves many times
        who["liger"] = lambda: liger.LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)
    for name, function in who.items():
        yield Case(name="forward", who=name, run=forward(function), work=2 * size, unit="byte")
        yield Case(name="backward", who=name, run=backward(function, [x, weight]), work=3 * size, unit="byte")


def gated(s: Shapes) -> Iterator[Case]:
    gate, up, size = s.random(s.N, s.F, learns=True), s.random(s.N, s.F, learns=True), s.N * s.F * 2
    who = {"lumen": forced("triton", lambda: ops.gated(gate, up, "silu"))}
    who |= with_compiled(s, lambda: F.silu(gate) * up)
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
    who = {"lumen": forced("triton", partial(ops.rotate_qk, q, k, v, cos, sin))}
    who |= with_compiled(s, lambda: (rotary_reference(q, cos, sin), rotary_reference(k, cos, sin)))
    if liger := peer("liger_kernel.ops.rope", s):
        full = [torch.cat((table, table), -1).to(s.dtype) for table in (cos, sin)]
        who["liger"] = partial(liger.LigerRopeFunction.apply, q.transpose(1, 2), k.transpose(1, 2), *full)
    work = 2 * 2 * (q.numel() + k.numel()) + 2 * 4 * cos.numel()
    for name, function in who.items():
        yield Case(name="q and k, forward", who=name, run=forward(function), work=work, unit="byte")


def dropout(s: Shapes) -> Iterator[Case]:
    x, seed = s.random(s.N, s.D), draw_seeds(1, torch.device(s.device))[0]
    who = {"lumen": forced("triton", lambda: thinned(x, 0.1, seed))} | with_compiled(s, lambda: F.dropout(x, 0.1))
    for name, function in who.items():
        yield Case(name="forward", who=name, run=forward(function), work=4 * x.numel(), unit="byte")


def pack_nf4(s: Shapes) -> Iterator[Case]:
    weight = s.random(s.F, s.D, scale=0.02)
    work = ops.quantize_nf4(weight).nbytes + 2 * weight.numel()
    common = {"name": f"{s.F} x {s.D}", "work": work, "unit": "byte"}
    yield Case(who="lumen", run=forced("triton", partial(ops.quantize_nf4, weight)), **common)
    if bitsandbytes := peer("bitsandbytes.functional", s):
        theirs = partial(bitsandbytes.quantize_4bit, blocksize=64, compress_statistics=True, quant_type="nf4")
        yield Case(who="bitsandbytes", run=partial(theirs, weight), **common)


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


def decode_attention(s: Shapes) -> Iterator[Case]:
    """One token's attention to a cache that is full, layer after layer: replays of a captured graph."""
    S = s.rows[1][1]
    q, caches = s.random(1, 1, s.H, s.E), [s.random(2, 1, S, s.K, s.E) for _ in range(s.matrices)]
    filled = torch.full((), S, dtype=torch.int32, device=s.device)
    first = torch.zeros(1, dtype=torch.int32, device=s.device)
    common = {"name": f"1 token, {S} keys", "work": 2 * S * s.K * s.E * 2, "unit": "byte", "calls": s.matrices}
    runs = [partial(ops.decode_attention, q, *cache, filled, first, scale=s.E**-0.5) for cache in caches]
    yield Case(who="lumen", run=forced("triton", captured(s, runs)), **common)
    sdpa = partial(F.scaled_dot_product_attention, q.transpose(1, 2), enable_gqa=True)
    runs = [partial(sdpa, *(part.transpose(1, 2) for part in cache)) for cache in caches]
    yield Case(who="torch", run=captured(s, runs), **common)


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
    who = {"lumen": forced("triton", lambda: ops.linear_cross_entropy(x, weight, target, counted=counted)[0])}
    who |= with_compiled(s, lambda: F.cross_entropy((x @ weight.T).float(), target, reduction="sum"))
    if liger := peer("liger_kernel.ops.fused_linear_cross_entropy", s):
        who["liger"] = lambda: liger.LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, target, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    for name, function in who.items():
        title = f"{s.N} counted, forward and backward"
        yield Case(name=title, who=name, run=both_ways(function, [x]), work=work, unit="flop")


def linear_logprobs(s: Shapes) -> Iterator[Case]:
    x, weight = s.random(s.N, s.D, learns=True), s.random(s.V, s.D, scale=0.02)
    target = torch.randint(s.V, (s.N,), device=s.device)
    common = {"name": "forward and backward", "work": 4.0 * s.N * s.D * s.V, "unit": "flop"}
    own = forced("triton", lambda: ops.linear_logprobs(x, weight, target).sum())
    yield Case(who="lumen", run=both_ways(own, [x]), **common)
    theirs = both_ways(lambda: -F.cross_entropy((x @ weight.T).float(), target, reduction="sum"), [x])
    yield Case(who="torch", run=theirs, **common)


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
    "dropout": dropout,
    "pack_nf4": pack_nf4,
    "unpack_nf4": unpack_nf4,
    "matvec_nf4": matvec_nf4,
    "attention": attention,
    "decode_attention": decode_attention,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_logprobs": linear_logprobs,
    "project": project,
    "adamw_8bit": adamw_8bit,
}
