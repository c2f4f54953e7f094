"""python -m lumen.plan: what a run will need before it starts: memory, tokens, steps, time; and how it uses its memory.

Counting. A linear layer of n weights costs 2n operations a token forward, 2n for the gradient of its input, and 2n for
its own gradient where it learns. Attention costs 4·H·E operations for each pair of a query and a key that it sees,
forward, and 2.5 times as much backward. Only learned positions meet the head. `flops_per_token`, which progress lines
divide by time, leaves out what is computed again and what an adapter adds: it is the work that the step is for.

Memory, besides the weights, is: 4 bytes a learned value for itself, 4 for its gradient, AdamW's averages, one unpacked
group of layers, what the blocks keep (`nn/recompute.py`), and what one block's backward pass works with.

Time is the work at the rates of this GPU, measured when asked: products, and bytes moved by everything else. On a CPU,
where a small model's time is the interpreter's, none is foretold.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass

import torch

from lumen.checkpoint import choose_device, choose_dtype
from lumen.config import RunConfig, load_config
from lumen.data.packing import Packed
from lumen.errors import ConfigError, LumenError
from lumen.models.decoder import Decoder
from lumen.nn.recompute import KEEP_ALL, Keeping, bytes_per_token, choose_keeping
from lumen.objectives.examples import Examples, load_examples
from lumen.spec import ModelSpec

GIB = 2**30
MARGIN = 0.03  # of the device's memory that stays free: the allocator's pieces do not all fit
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
    room = int(free - MARGIN * whole * (not config.train.memory_gib))
    room -= 4 * learned + working_bytes(model.spec, tokens)
    model.keeping = choose_keeping(model.spec, tokens, room, may_move=config.train.offload)
    if all(keeping == KEEP_ALL for keeping in model.keeping):
        room -= len(model.blocks) * bytes_per_token(model.spec, "all") * tokens
        if config.model.nf4 and not config.model.fp8 and room > 2 * block_weights(model.spec) * len(model.blocks):
            model.hold_unpacked()


def block_weights(spec: ModelSpec) -> int:
    """Weights in the products of one block; of a block with experts, all of them."""
    attention = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    experts = spec.experts
    if experts is None:
        return attention + 3 * spec.dim * spec.mlp_dim
    return attention + 3 * spec.dim * (experts.count * experts.width + experts.shared)


def active_weights(spec: ModelSpec) -> int:
    """Weights that a token meets on its way through all blocks."""
    experts = spec.experts
    attention = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    dense = attention + 3 * spec.dim * spec.mlp_dim
    sparse = attention + 3 * spec.dim * (experts.per_token * experts.width + experts.shared) if experts else 0
    return sum(sparse if layer.sparse else dense for layer in spec.layers)


def context(packed: Packed) -> float:
    """How many keys a token's document has, on average over tokens."""
    lengths = [len(example.ids) for row in packed.rows for example in row]
    return sum(n * n for n in lengths) / sum(lengths)


def flops_per_token(spec: ModelSpec, packed: Packed, *, learns_base: bool) -> float:
    """Operations a token of `packed` in one forward and backward pass, as the module says."""
    passes = 6 if learns_base else 4
    head = spec.vocab * spec.dim * packed.counted / packed.tokens
    seen = context(packed)
    pairs = sum(min(seen / 2, layer.window) if layer.window else seen / 2 for layer in spec.layers)
    return passes * (active_weights(spec) + head) + 3.5 * 4 * spec.heads * spec.head_dim * pairs


def working_bytes(spec: ModelSpec, tokens: int, itemsize: int = 2) -> int:
    """What a step holds at its widest besides what blocks keep: one block's backward pass, or the loss's logits.

    Measured on an H200, Llama 3.1 8B: 151 KB a token, which are gate, up, their product, and eight rows of width D.
    """
    block = tokens * itemsize * (3 * spec.mlp_dim + 8 * spec.dim)
    logits = min(tokens, CHUNK) * spec.vocab * 4 + 2 * tokens * itemsize * spec.dim
    unpacked = itemsize * max(spec.dim * spec.mlp_dim * 2, spec.dim * spec.dim * 2)
    return max(block, logits) + unpacked


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need; bytes, seconds."""

    device: str
    model: str
    weights_bytes: int
    learned: int
    optimizer_bytes: int  # values, gradients and averages of what learns
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


def make_plan(config: RunConfig, examples: Examples) -> Plan:
    """The plan of a run whose data is at hand; measures the device for about a second, reads no weights."""
    spec, packed, train = examples.spec, examples.train, config.train
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    itemsize, full = dtype.itemsize, train.method == "full"
    linear = block_weights(spec) * len(spec.layers)
    rest = spec.vocab * spec.dim * (1 if spec.tied else 2)
    learned = linear + rest if full else lora_values(spec, config)
    stored = 4 if full else itemsize
    weights = int(linear * (NF4_BYTES if config.model.nf4 and not full else stored)) + rest * stored
    weights += 2 * linear * config.model.fp8  # codes for the product, and for the gradient
    bits = {32: 32, 8: 8, "auto": 8 if device.type == "cuda" and not full and learned >= LARGE else 32}
    averages = learned * (2.03 if bits[train.optimizer_bits] == 8 else 8)
    optimizer = int(averages + learned * (4 if full else 8))
    tokens = train.batch_size * packed.longest
    working = working_bytes(spec, tokens, itemsize)
    room = _room(config, device)
    left = room - weights - optimizer - working
    level = train.keep
    if level == "auto" and room and device.type == "cuda":
        keeping = choose_keeping(spec, tokens, left, may_move=train.offload)
    else:
        keeping = (Keeping(level) if level != "auto" else KEEP_ALL,) * len(spec.layers)
    kept = sum(bytes_per_token(spec, k.level, itemsize) * tokens for k in keeping if not k.moved)
    kept += 2 * bytes_per_token(spec, "attention", itemsize) * tokens * any(k.moved for k in keeping)
    peak = weights + optimizer + working + kept
    rows = train.batch_size * train.accumulate
    steps = train.steps or round(train.epochs * -(-len(packed.rows) // rows))
    per_step = min(rows * packed.tokens / len(packed.rows), packed.tokens)
    step_s = _step_s(spec, packed, keeping, per_step, full, device, dtype) if device.type == "cuda" else None
    fits = not room or peak <= room
    return Plan(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        model=f"{spec.name}, {linear + rest:,} weights{', NF4' if config.model.nf4 and not full else ''}",
        weights_bytes=weights,
        learned=learned,
        optimizer_bytes=optimizer,
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
    )


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


def _step_s(
    spec: ModelSpec,
    packed: Packed,
    keeping: tuple[Keeping, ...],
    tokens: float,
    full: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Seconds of one step: products and attention at the rate of a large product, all else at that of a copy."""
    product_rate, copy_rate = _rates(device, dtype)
    again = {"all": 0.0, "attention": 2 * spec.dim * spec.mlp_dim * 2.0}
    attention = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    again["input"] = again["attention"] + 2.0 * attention
    flops = flops_per_token(spec, packed, learns_base=full) + sum(again[k.level] for k in keeping)
    # about 24 rows of width D and 12 of width F are read or written for each token in each block
    moved = dtype.itemsize * len(spec.layers) * (24 * spec.dim + 12 * spec.mlp_dim)
    return tokens * (flops / product_rate + moved / copy_rate)


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(operations a second in a large product, bytes a second in a copy, read and written), measured."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * size**3 / _seconds(lambda: a @ b, device), 2 * source.nbytes / _seconds(
        lambda: target.copy_(source), device
    )


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
        f"peak      {_size(plan.peak_bytes)}" + (f" of {_size(plan.room_bytes)}" if plan.room_bytes else ""),
        f"steps     {plan.steps:,} of {plan.tokens_per_step:,} tokens",
    ]
    if plan.step_s is not None:
        lines.append(
            f"time      {plan.step_s:.3g} s a step, {plan.total_s / 60:.3g} minutes in all, without evaluation"
        )
    lines.append("fits" if plan.fits else f"does not fit: {plan.advice}")
    return "\n".join(lines)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
