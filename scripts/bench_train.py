"""Times whole training steps on a GPU: forward, backward, clipping and AdamW, of a Llama with random weights.

scripts/bench_train                                    8B and 1B, as the table in the README was made
scripts/bench_train --size 8b --rows 4 8 --length 2048 these shapes, as much kept for the backward pass as fits
scripts/bench_train … --memory-gib 9.9                 within so much device memory
scripts/bench_train … --lengths lengths.json           rows packed from documents of these lengths
scripts/bench_train … --dropout 0.05 --dora            adapters with dropout, and with learned lengths of the rows
scripts/bench_train … --peer unsloth --peer hf         the same with a peer, in a process of its own, where installed:
                                                       full rows, its checkpointing, or none with --peer-keeps-all

LoRA on all seven projections, bf16, NF4 base. A figure is the median step after warm-up, synchronised at both ends;
tokens are all positions that hold one; memory is the peak that PyTorch allocated in the loop. TFLOP/s counts
the products of the forward pass and of the inputs' gradients, and attention, once: what is computed again does not.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from whole_output import exit_with

from lumen.adapter import attach_lora
from lumen.capture import Passes
from lumen.config import Lora, Model, RunConfig, Train
from lumen.data.batch import Batch, stack
from lumen.data.packing import Packed, pack
from lumen.models.decoder import Decoder
from lumen.nn.linear import Linear
from lumen.objectives.sft import sft_loss
from lumen.ops import explain
from lumen.optim import AdamW, clip_factor, gradient_norm
from lumen.plan import flops_per_token, keep
from lumen.spec import Family, ModelSpec
from lumen.text.conversation import Encoded

GIB = 2**30
PEERS = Path(__file__).resolve().with_name("bench_train_peer.py")
SIZES = {
    "8b": {"layers": 32, "dim": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "mlp_dim": 14336, "tied": False},
    "1b": {"layers": 16, "dim": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp_dim": 8192, "tied": True},
}
VOCAB = 128_256


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    size: str
    rows: int
    length: int
    memory_gib: float = 0.0
    keep: str = "auto"
    packed: bool = False


TABLE = (
    Case(size="8b", rows=8, length=2048, memory_gib=9.9),
    Case(size="8b", rows=4, length=2048, memory_gib=30.0),
    Case(size="8b", rows=8, length=2048),
    Case(size="8b", rows=2, length=8192, memory_gib=9.85),
    Case(size="8b", rows=1, length=32768, memory_gib=14.0),
    Case(size="1b", rows=2, length=1024),
    Case(size="1b", rows=8, length=2048),
)


def model_spec(size: str) -> ModelSpec:
    """The specification of a Llama 3.1 of this size."""
    numbers = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": numbers["dim"],
        "num_hidden_layers": numbers["layers"],
        "num_attention_heads": numbers["heads"],
        "num_key_value_heads": numbers["kv_heads"],
        "head_dim": numbers["head_dim"],
        "intermediate_size": numbers["mlp_dim"],
        "vocab_size": VOCAB,
        "tie_word_embeddings": numbers["tied"],
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    return Family.load("llama3.1").bind(config)


def random_model(size: str, lora: Lora) -> Decoder:
    """The model with random weights, its blocks in NF4, an adapter beside them; on the GPU, one tensor at a time."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(model_spec(size), torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        role, _, kind = name.rpartition(".")
        module = model.get_submodule(role)
        shape = {"device": "cuda", "dtype": torch.bfloat16}
        values = (
            torch.randn(parameter.shape, **shape) * 0.02
            if parameter.ndim == 2
            else torch.ones(parameter.shape, **shape)
        )
        if isinstance(module, Linear) and role.startswith("blocks."):
            module.quantize(values)
        else:
            setattr(module, kind, nn.Parameter(values, requires_grad=False))
    attach_lora(model, lora)
    return model.train()


def rows_of(case: Case, lengths: list[list[list]] | None) -> Packed:
    """Rows of random tokens: one document each, all of it learned; or packed documents as `lengths` has them.

    lengths  for each document its stretches, [learned, tokens]
    """
    source = random.Random(0)
    if lengths is None:
        documents = [[[True, case.length]] for _ in range(case.rows)]
    else:
        documents = source.choices(lengths, k=4 * case.rows * case.length // 200)
    encoded = []
    for stretches in documents:
        learn = [learned for learned, tokens in stretches for _ in range(tokens)]
        encoded.append(Encoded(ids=[source.randrange(4, 300) for _ in learn], learn=learn))
    packed = pack(encoded, case.length, packing=lengths is not None)
    full = sorted(packed.rows, key=lambda row: -sum(len(example.ids) for example in row))
    return replace(packed, rows=tuple(full[: case.rows]))


def measure(case: Case, model: Decoder, lengths: list | None, steps: int, lora: Lora) -> dict:
    """The figures of one line."""
    train = Train(memory_gib=case.memory_gib, keep=case.keep)
    config = RunConfig(model=Model(path="random"), lora=lora, train=train)
    packed = rows_of(case, lengths)
    batch: Batch = stack(packed.rows, case.length)
    optimizer = AdamW(
        model.named_parameters(),
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        bits=8 if case.size == "8b" else 32,
    )
    parameters = list(optimizer.parameters.values())
    torch.cuda.empty_cache()
    keep(model, config, case.rows * case.length, sum(parameter.numel() for parameter in parameters))
    moved = any(keeping.moved for keeping in model.keeping)
    passes = Passes(model, sft_loss, capture=not moved)
    count = int(batch.counted)

    def step() -> torch.Tensor:
        loss = passes.run(batch).total
        norm = gradient_norm(parameters) / count
        optimizer.step(1e-4, clip_factor(norm, 1.0) / count)
        optimizer.zero_grad()
        return loss / count

    times = []
    torch.cuda.reset_peak_memory_stats()  # before the warm-up: what a graph holds is counted while it is recorded
    for _ in range(4 + steps):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began_s)
    step_s = median(times[4:])
    tokens = int(batch.filled)
    return {
        "peer": "lumen",
        "size": case.size,
        "rows": case.rows,
        "length": case.length,
        "kept": sorted({f"{k.level}{' moved' if k.moved else ''}" for k in model.keeping}),
        "graph": passes.capture,
        "step_s": round(step_s, 4),
        "tokens_per_s": round(tokens / step_s),
        "learned_per_s": round(count / step_s),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "tflops": round(tokens / step_s * flops_per_token(model.spec, packed, learns_base=False) / 1e12),
        "loss": round(loss.item(), 4),
    }


def measure_peer(peer: str, case: Case, steps: int, rank: int, recompute: bool, folder: Path) -> dict:
    """The same by a peer, in a process of its own; {"peer", "failed"} where it is not installed or breaks.

    folder  where peers find, or first write, a model with random weights of each size; also where they run
    """
    told = {"peer": peer, "rows": case.rows, "length": case.length, "steps": steps, "rank": rank, "vocab": VOCAB}
    told |= SIZES[case.size] | {"recompute": recompute, "folder": str(folder / case.size)}
    torch.cuda.empty_cache()  # what lumen no longer uses is the peer's
    command = [sys.executable, str(PEERS), json.dumps(told)]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False, cwd=folder)
    figures = [line for line in ran.stdout.splitlines() if line.startswith('{"peer"')]
    head = {"size": case.size, "rows": case.rows, "length": case.length}
    if ran.returncode or not figures:
        said = ran.stderr.strip().splitlines() or ["it said nothing"]
        reason = next((line for line in reversed(said) if "Error" in line), said[-1])
        return head | {"peer": peer, "failed": f"exit code {ran.returncode}: {reason}"}
    return head | json.loads(figures[-1])


def in_words(line: dict, beside: dict | None) -> str:
    head = f"{line['peer']:8} {line['size']:3} {line['rows']:2} x {line['length']:6}"
    if "failed" in line:
        return f"{head}  failed: {line['failed'][:150]}"
    ratio = f"  lumen x {beside['tokens_per_s'] / line['tokens_per_s']:.2f}" if beside else ""
    rate = f"{line['tflops']:4} TFLOP/s" if "tflops" in line else " " * 12
    figures = f"{line['step_s']:8.4f} s  {line['tokens_per_s']:8,} tok/s  {line['peak_gib']:6.2f} GiB  {rate}"
    return f"{head}  {figures}  {', '.join(line['kept'])}{ratio}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="with --rows and --length: these shapes instead of the table")
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after 4 of warm-up")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="device memory to take; 0 = what is free")
    parser.add_argument("--keep", choices=("auto", "all", "attention", "input"), default="auto")
    parser.add_argument("--lengths", help="JSON: for each document its stretches, [learned, tokens]")
    parser.add_argument("--peer", action="append", default=[], choices=("unsloth", "hf"))
    parser.add_argument("--peer-keeps-all", action="store_true", help="peers recompute nothing")
    parser.add_argument("--peer-models", metavar="FOLDER", help="keeps the models written for peers, for another time")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench_train times a GPU, and PyTorch finds none here.", file=sys.stderr)
        return 2
    same = {"length": asked.length, "memory_gib": asked.memory_gib, "keep": asked.keep}
    table = [Case(size=asked.size, rows=rows, **same) for rows in asked.rows] if asked.size else TABLE
    lengths = json.loads(Path(asked.lengths).read_text()) if asked.lengths else None
    lora = Lora(rank=asked.rank, dropout=asked.dropout, dora=asked.dora)
    if asked.peer and (lengths or asked.dropout or asked.dora):
        print("error: peers are given full rows and plain LoRA: no --lengths, --dropout, --dora.", file=sys.stderr)
        return 2
    lines, model, built = [], None, ""
    with TemporaryDirectory() as own_folder:
        folder = Path(asked.peer_models or own_folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for case in table:
            if built != case.size or any(not keeping.moved for keeping in model.keeping):
                model = None  # also what was unpacked for good goes
                model, built = random_model(case.size, lora), case.size
            own = measure(case, model, lengths, asked.steps, lora)
            lines.append(own)
            if not asked.json:
                print(in_words(own, None), flush=True)
            for peer in asked.peer:
                theirs = measure_peer(peer, case, asked.steps, asked.rank, not asked.peer_keeps_all, folder)
                lines.append(theirs)
                if not asked.json:
                    print(in_words(theirs, None if "failed" in theirs else own), flush=True)
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps({**versions, "lines": lines}) if asked.json else f"{versions}\n{explain()}")
    return 0


if __name__ == "__main__":
    exit_with(main)
