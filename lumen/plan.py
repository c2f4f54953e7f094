"""python -m lumen.plan: what a run will need before it starts: memory, tokens, steps, time; and how it uses its memory.

Memory, besides the weights, is: 4 bytes a learned value for itself, 4 for its gradient, AdamW's averages, one unpacked
group of layers or, where there is room, all of them, what the blocks keep (`nn/recompute.py`), and what one block's
backward pass or the loss works with.

From these sums a run chooses what its blocks keep, and so does a plan. On a GPU a plan then runs passes of a few blocks
that keep so (`probe.py`), and foretells time and peak from what they took. Of experts, and where not even that fits, it
tells the sums, and the time of the work at the measured rates of this GPU: products, and bytes moved by everything
else. On a CPU, where a small model's time is the interpreter's, none is foretold.

The peak is that of what PyTorch allocates, as in a run's metrics; the CUDA context comes on top, half a GiB and less.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import get_args

import torch

from lumen.checkpoint import choose_device, choose_dtype
from lumen.config import RunConfig, load_config
from lumen.data.batch import RowStream, stack
from lumen.data.packing import Packed
from lumen.errors import ConfigError, LumenError
from lumen.memory import host_memory_bytes
from lumen.models.decoder import Decoder
from lumen.nn.recompute import KEEP_ALL, MOST_ROWS, ON_THE_WAY, Keeping, Level, bytes_per_token, choose_keeping
from lumen.objectives.examples import Examples, load_examples
from lumen.probe import Probe, probe
from lumen.spec import ModelSpec
from lumen.speed import flops_per_token

GIB = 2**30
MARGIN = 0.03  # of the device's memory that stays free: the allocator's pieces do not all fit
HOST_SHARE = 0.8  # of what the host has to give now, for what blocks keep there: pinned memory is never swapped out
CHUNK = 1024  # learned positions that have logits at the same time
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a value
LARGE = 2**25  # learned values from which on AdamW's averages take 8 bits by themselves: 67 MB instead of 256 and more


def keep(model: Decoder, config: RunConfig, tokens: int, learned: int) -> None:
    """Sets what each block of `model` keeps for its backward pass, for batches of `tokens` tokens; in place.

    On a GPU, where everything fits and room is left, the frozen weights are unpacked for good as well.
    """
    level, device = config.train.keep, model.device
    if level != "auto" or device.type != "cuda":
        model.keeping = (KEEP_ALL if level == "auto" else Keeping(level),) * len(model.blocks)
        return
    free, whole = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held
    if config.train.memory_gib:
        free = min(free, int(config.train.memory_gib * GIB) - held)
    room = int(free - MARGIN * whole * (not config.train.memory_gib)) - 4 * learned
    model.keeping, holds = arrange(model.spec, config, tokens, room, model.dtype.itemsize)
    if holds:
        model.hold_unpacked()


def arrange(
    spec: ModelSpec, config: RunConfig, tokens: int, room_bytes: int, itemsize: int = 2, *, pinned_bytes: int = 0
) -> tuple[tuple[Keeping, ...], bool]:
    """What each block keeps on a GPU, and whether the weights are unpacked for good, with `room_bytes` left beside
    weights, gradients and optimizer, and `pinned_bytes` of the host's memory not taken yet that will be by then."""
    depth, level = len(spec.layers), config.train.keep
    room = room_bytes - working_bytes(spec, tokens, itemsize)
    once = working_bytes(spec, tokens, itemsize, whole=True) - working_bytes(spec, tokens, itemsize)
    if level == "auto":
        host = int(HOST_SHARE * max(host_memory_bytes() - pinned_bytes, 0)) if config.train.offload else 0
        cost = {name: tokens * _kept_bytes(spec, config, Keeping(name), itemsize) for name in get_args(Level)}
        keeping = choose_keeping(cost, depth, room, host_bytes=host, once_bytes=once)
    else:
        keeping = (Keeping(level),) * depth
    room -= kept_bytes(spec, config, keeping, tokens, itemsize) + once * (KEEP_ALL in keeping)
    packed = config.model.nf4 and not config.model.fp8 and config.train.method == "lora" and level == "auto"
    holds = packed and set(keeping) == {KEEP_ALL} and room > itemsize * block_weights(spec) * depth
    return keeping, holds


def unbounded(config: RunConfig, device: torch.device) -> str:
    """What to tell a user who bounds a memory that is not bounded; empty where there is nothing to tell."""
    if device.type == "cuda" or not config.train.memory_gib:
        return ""
    return f"train.memory_gib = {config.train.memory_gib:g} bounds the memory of a GPU; on the CPU nothing is bounded"


def kept_bytes(spec: ModelSpec, config: RunConfig, keeping: tuple[Keeping, ...], tokens: int, itemsize: int = 2) -> int:
    """What all blocks keep on the device for `tokens` tokens; of those that are moved, what is on its way."""
    kept = sum(_kept_bytes(spec, config, each, itemsize) for each in keeping if not each.moved)
    moved = next((each for each in keeping if each.moved), None)
    return tokens * (kept + (0 if moved is None else ON_THE_WAY * _kept_bytes(spec, config, moved, itemsize)))


def _kept_bytes(spec: ModelSpec, config: RunConfig, keeping: Keeping, itemsize: int) -> int:
    """A token, of one block."""
    return bytes_per_token(spec, keeping.level, itemsize) + _dora_bytes(spec, config, keeping, itemsize)


def _dora_bytes(spec: ModelSpec, config: RunConfig, keeping: Keeping, itemsize: int) -> int:
    """A token's outputs in one block before their rows get their lengths, which the gradient of those lengths reads."""
    attention = (spec.heads + 2 * spec.kv_heads) * spec.head_dim + spec.dim
    outputs = {"input": 0, "attention": attention, "all": attention + 2 * spec.mlp_dim + spec.dim}[keeping.level]
    return itemsize * outputs * (config.lora.dora and config.train.method == "lora")


def block_weights(spec: ModelSpec) -> int:
    """Weights in the products of one block; of a block with experts, all of them."""
    attention = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    experts = spec.experts
    if experts is None:
        return attention + 3 * spec.dim * spec.mlp_dim
    return attention + 3 * spec.dim * (experts.count * experts.width + experts.shared)


def working_bytes(spec: ModelSpec, tokens: int, itemsize: int = 2, *, whole: bool = False) -> int:
    """What a step holds at its widest besides what blocks keep: one block's backward pass, or the loss's logits.

    whole  a block keeps all, whose MLP goes over all rows at once; of one that is computed again a lot of them does

    A block that is computed again is widest at the gradient of its MLP, or at that of its attention. Measured on an
    H200, Llama 3.1 8B: 151 KB a token, which are gate, up, their product, and eight rows of width D; in lots, 82 KB,
    ten rows of width D. For other shapes these rows are counted as what they are. The loss holds the logits of a chunk,
    and those of the next while it makes them.
    """
    lot = tokens if whole else min(tokens, MOST_ROWS)
    dim, q, kv = spec.dim, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    # outputs and a gradient on its way of per-head norms; the input of one around
    aside = 3 * (q + kv) // 2 * (spec.qk_norm == "head") + dim * (spec.norm_at == "around")
    # gate, up and their product of a lot; q, k, v and attention's output, made again; x, its gradients, those of lots
    mlp = 3 * lot * spec.mlp_dim + tokens * (11 * dim // 2 + 2 * q + 2 * kv + aside)
    # q, k, v, the output, their gradients; two rows of width H·E for cuDNN's sums; x, its gradient, those on their way
    attention = tokens * (3 * dim + 6 * q + 4 * kv + aside)
    block = itemsize * max(mlp, attention)
    logits = min(tokens, 2 * CHUNK) * spec.vocab * 4 + 3 * tokens * itemsize * spec.dim
    unpacked = itemsize * max(spec.dim * spec.mlp_dim * 2, spec.dim * spec.dim * 2)
    return max(block, logits) + unpacked


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need; bytes, seconds."""

    device: str
    model: str
    weights_bytes: int
    learned: int
    optimizer_bytes: int  # values, gradients and averages of what learns, on the device
    host_bytes: int  # pinned: averages that are paged, what blocks keep there
    kept: str  # in words, what the blocks keep
    kept_bytes: int
    working_bytes: int
    peak_bytes: int
    room_bytes: int  # that the run may take; 0 = unknown
    tokens_per_step: int
    steps: int
    step_s: float | None  # None where the device was not measured
    total_s: float | None
    fits: bool
    advice: str
    warning: str


def make_plan(config: RunConfig, examples: Examples) -> Plan:
    """The plan of a run whose data is at hand; measures the device for some seconds, reads no weights."""
    spec, packed, train = examples.spec, examples.train, config.train
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    on_gpu, itemsize = device.type == "cuda", dtype.itemsize
    learned, weights = _weights(spec, config, itemsize)
    optimizer, paged = _optimizer(config, learned, on_gpu)
    tokens = train.batch_size * packed.longest
    room = _room(config, device)
    if on_gpu and room:
        keeping, holds = arrange(spec, config, tokens, room - weights - optimizer, itemsize, pinned_bytes=paged)
    else:
        keeping, holds = (Keeping(train.keep) if train.keep != "auto" else KEEP_ALL,) * len(spec.layers), False
    weights += itemsize * block_weights(spec) * len(spec.layers) * holds
    kept = kept_bytes(spec, config, keeping, tokens, itemsize)
    working = working_bytes(spec, tokens, itemsize, whole=KEEP_ALL in keeping)
    host = paged + sum(_kept_bytes(spec, config, each, itemsize) * tokens for each in keeping if each.moved)
    rows = train.batch_size * train.accumulate
    steps = train.steps or round(train.epochs * -(-len(packed.rows) // rows))
    per_step = min(rows * packed.tokens / len(packed.rows), packed.tokens)
    step_s = None
    if on_gpu:
        found = _probe(spec, config, packed, keeping, holds, device, dtype)
        if found:
            working = max(found.peak_bytes(keeping) - kept, 0)
            step_s = found.seconds(keeping) * _passes(config, packed)
        else:
            step_s = _work_s(spec, config, packed, keeping, per_step, device, dtype)
        step_s += _update_s(optimizer, paged, device)
    peak = weights + optimizer + working + kept
    fits = not room or peak <= room
    packs = ", NF4" if config.model.nf4 and train.method == "lora" else ""
    return Plan(
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        model=f"{spec.name}, {_values(spec):,} weights{packs}{', unpacked for good' if holds else ''}",
        weights_bytes=weights,
        learned=learned,
        optimizer_bytes=optimizer,
        host_bytes=host,
        kept=_in_words(keeping),
        kept_bytes=kept,
        working_bytes=working,
        peak_bytes=peak,
        room_bytes=room,
        tokens_per_step=round(per_step),
        steps=steps,
        step_s=step_s,
        total_s=None if step_s is None else step_s * steps,
        fits=fits,
        advice="" if fits else _advice(config, tokens),
        warning=unbounded(config, device),
    )


def _values(spec: ModelSpec) -> int:
    return block_weights(spec) * len(spec.layers) + spec.vocab * spec.dim * (1 if spec.tied else 2)


def _weights(spec: ModelSpec, config: RunConfig, itemsize: int) -> tuple[int, int]:
    """(learned values, bytes of the weights as they are held)"""
    full = config.train.method == "full"
    linear = block_weights(spec) * len(spec.layers)
    rest = _values(spec) - linear
    learned = linear + rest if full else lora_values(spec, config)
    stored = 4 if full else itemsize
    weights = int(linear * (NF4_BYTES if config.model.nf4 and not full else stored)) + rest * stored
    return learned, weights + 2 * linear * config.model.fp8  # codes for the product, and for the gradient


def _optimizer(config: RunConfig, learned: int, on_gpu: bool) -> tuple[int, int]:
    """Bytes of values, gradients and averages of what learns: on the device, and in the host's memory."""
    full = config.train.method == "full"
    bits = {32: 32, 8: 8, "auto": 8 if on_gpu and not full and learned >= LARGE else 32}[config.train.optimizer_bits]
    averages = round(learned * (2.03 if bits == 8 else 8))
    rest = learned * (4 if full else 8)  # of all weights the values are counted as such
    return (rest, averages) if config.train.optimizer_paged and on_gpu else (rest + averages, 0)


def _probe(
    spec: ModelSpec,
    config: RunConfig,
    packed: Packed,
    keeping: tuple[Keeping, ...],
    holds: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Probe | None:
    """Runs a few blocks over the run's first rows, as wide as the longest of all."""
    taken = RowStream(packed.rows, seed=config.train.seed).take(config.train.batch_size)
    batch = stack(taken, packed.longest)
    moved = next((each for each in keeping if each.moved), None)
    size = 0 if moved is None else batch.tokens.numel() * _kept_bytes(spec, config, moved, dtype.itemsize)
    return probe(spec, config, batch, keeping, size, holds=holds, device=device, dtype=dtype)


def lora_values(spec: ModelSpec, config: RunConfig) -> int:
    """Learned values of an adapter on the layers that `lora.targets` names."""
    with torch.device("meta"):
        model = Decoder(spec)
    from lumen.adapter import attach_lora  # not at the top: only this function builds a model

    attach_lora(model, config.lora)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _room(config: RunConfig, device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, whole = torch.cuda.mem_get_info(device)
    return int(config.train.memory_gib * GIB) or int(free - MARGIN * whole)


def _in_words(keeping: tuple[Keeping, ...]) -> str:
    words = {
        "all": "keep all",
        "attention": "compute their MLP again",
        "input": "are computed again",
    }
    counts: dict[Keeping, int] = {}
    for each in keeping:
        counts[each] = counts.get(each, 0) + 1
    return ", ".join(
        f"{count} blocks {words[each.level]}{', the rest waits in the host memory' if each.moved else ''}"
        for each, count in counts.items()
    )


def _advice(config: RunConfig, tokens: int) -> str:
    ways = ["train.batch_size=1"] if config.train.batch_size > 1 else ["a smaller data.max_length"]
    if not config.model.nf4 and config.train.method == "lora":
        ways.append("model.nf4=true")
    if config.train.method == "full":
        ways.append('train.method="lora"')
    if config.train.keep != "auto":
        ways.append('train.keep="auto"')
    return f"{tokens:,} tokens at a time do not fit. What would help: " + ", ".join(ways) + "."


def _passes(config: RunConfig, packed: Packed) -> float:
    """Passes of a step, counted in those over batches as wide as the longest row; a narrower one is a part of one."""
    size = config.train.batch_size
    count = min(config.train.accumulate, -(-len(packed.rows) // size))
    if config.data.packing:
        return float(count)
    rows = RowStream(packed.rows, seed=config.train.seed).take(len(packed.rows))
    lengths = [sum(len(example.ids) for example in row) for row in rows]
    widths = [max(lengths[start : start + size]) for start in range(0, len(lengths), size)]
    return count * sum(widths) / len(widths) / packed.longest


def _update_s(size_bytes: int, paged_bytes: int, device: torch.device) -> float:
    """Seconds of clipping and AdamW: values, gradients and averages read and written, those that are paged over the
    bus, both ways at the same time."""
    seconds = 2 * size_bytes / _copy_rate(device)
    if not paged_bytes:
        return seconds
    host, near = (
        torch.empty(2**27, dtype=torch.uint8, pin_memory=True),
        torch.empty(2**27, dtype=torch.uint8).to(device),
    )
    return seconds + paged_bytes / host.nbytes * _seconds(lambda: near.copy_(host, non_blocking=True), device)


def _work_s(
    spec: ModelSpec,
    config: RunConfig,
    packed: Packed,
    keeping: tuple[Keeping, ...],
    tokens: float,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Seconds of one step's passes: products and attention at the rate of a large product, all else at a copy's."""
    full = config.train.method == "full"
    product_rate, copy_rate = _product_rate(device, dtype), _copy_rate(device)
    again = {"all": 0.0, "attention": 2 * spec.dim * spec.mlp_dim * 2.0}
    attention = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    again["input"] = again["attention"] + 2.0 * attention
    flops = flops_per_token(spec, packed, learns_base=full) + sum(again[k.level] for k in keeping)
    # about 24 rows of width D and 12 of width F are read or written for each token in each block
    moved = dtype.itemsize * len(spec.layers) * (24 * spec.dim + 12 * spec.mlp_dim)
    return tokens * (flops / product_rate + moved / copy_rate)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a large product, measured."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _copy_rate(device: torch.device) -> float:
    """Bytes a second in a copy, read and written, measured."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(function, device: torch.device, times: int = 10) -> float:
    def run() -> float:
        began_s = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began_s

    run()
    return sorted(run() for _ in range(times))[times // 2]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 it fits, 1 it does not or something failed, 2 asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="python -m lumen.plan",
        description="Say what a run will need, memory and time, before it starts, and what would make it fit.",
        epilog="Example: python -m lumen.plan my.toml train.batch_size=8 train.memory_gib=24",
    )
    parser.add_argument("source", help="RUN.toml, the name of a recipe, or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in the file, as train.batch_size=8")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object on stdout")
    asked = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(asked.source, asked.overrides)
        plan = make_plan(config, load_examples(config))
    except LumenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(json.dumps(asdict(plan)) if asked.json else describe(plan))
    return 0 if plan.fits else 1


def describe(plan: Plan) -> str:
    """The plan for a person."""
    lines = [
        f"device    {plan.device}",
        f"model     {plan.model}: {_size(plan.weights_bytes)}",
        f"learns    {plan.learned:,} values: {_size(plan.optimizer_bytes)} with gradients and averages",
        f"keeps     {plan.kept}: {_size(plan.kept_bytes)}",
        f"works in  {_size(plan.working_bytes)}",
        *([f"host      {_size(plan.host_bytes)}, pinned"] if plan.host_bytes else []),
        f"peak      {_size(plan.peak_bytes)}" + (f" of {_size(plan.room_bytes)}" if plan.room_bytes else ""),
        f"steps     {plan.steps:,} of {plan.tokens_per_step:,} tokens",
    ]
    if plan.step_s is not None:
        lines.append(
            f"time      {plan.step_s:.3g} s a step, {plan.total_s / 60:.3g} minutes in all, without evaluation"
        )
    if plan.warning:
        lines.append(f"warning   {plan.warning}")
    lines.append("fits" if plan.fits else f"does not fit: {plan.advice}")
    return "\n".join(lines)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
