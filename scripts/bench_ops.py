"""Times every operation on a GPU, beside PyTorch's own and, where they are installed, Liger's and bitsandbytes'.

scripts/bench_ops                       all operations, in the shapes of an 8B Llama with 8192 tokens
scripts/bench_ops --only attention      one of them; may be given several times
scripts/bench_ops --json                one JSON document instead of the table
scripts/bench_ops --tiny                every case once in small shapes, to see that it runs; without a GPU, in Triton's
                                        interpreter, where TRITON_INTERPRET=1 is set

A rate counts the work that the operation must do, whoever does it: an input is read once, an output written once, and
of an attention only what is seen. Its share is of what this GPU reached in the same run: copying 1 GiB, where bytes
are counted, or a bf16 product of 8192 × 8192 × 8192, where multiplications are. A line has lumen's time, rate and
share, then the times of others, and in parentheses how many times lumen's that is.

A time is the median of many, by the device's clock. Before each call a buffer larger than the cache is read, so that
inputs come from memory, and for so long that the host has issued the call's work before the clock starts.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_ops_cases import OPS, TINY, Case, Shapes
from whole_output import exit_with

from lumen.ops._triton import INTERPRETED

PEERS = ("torch", "compiled", "liger", "bitsandbytes")  # what fails of theirs is told, and no failure of this script
SWEEP_BYTES = 2**30  # more than any cache, and what the copy is measured with
MAX_REPEATS, MIN_REPEATS, REPEAT_MS = 50, 10, 150.0


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


def lines(found: list[Result]) -> Iterator[str]:
    """One line for each case: what is lumen's first, and the others beside it."""
    for name in dict.fromkeys(result.name for result in found):
        own, *others = [result for result in found if result.name == name]
        head = f"{own.op:<21}{own.name:<40}"
        if own.failed:
            yield f"{head}{own.who} failed: {own.failed}"
        else:
            numbers = f"{own.ms:>9.4f}{own.rate:>9.2f} {own.unit:<8}{100 * own.share:>6.1f} %"
            yield f"{head}{numbers}  {own.who.removeprefix('lumen'):<8}{'  '.join(beside(own, o) for o in others)}"


def beside(own: Result, other: Result) -> str:
    if other.failed:
        return f"{other.who} failed: {other.failed[:60]}"
    return f"{other.who} {other.ms:.4f} ({other.ms / own.ms:.2f})"


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
        numbers = f"{'ms':>9}{'rate':>9} {'':<8}{'share':>8}"
        print(f"{'operation':<21}{'case':<40}{numbers}  {'by':<8}others, ms (times lumen's)")
    found, begin = [], time.perf_counter()
    for op in chosen.only or OPS:
        of_one = list(results(op, shapes, median_ms, ceiling))
        found += of_one
        if not chosen.json:
            print("\n".join(lines(of_one)), flush=True)
        if shapes.device == "cuda":
            torch.cuda.empty_cache()
    if chosen.json:
        head = {"gpu": gpu, "versions": versions, "copy_tb_per_s": ceiling["byte"]}
        head |= {"bf16_tflop_per_s": ceiling["flop"], "results": [asdict(result) for result in found]}
        print(json.dumps(head, indent=1))
    else:
        print(f"{time.perf_counter() - begin:.0f} s")
    return 1 if any(result.failed and not result.who.startswith(PEERS) for result in found) else 0


if __name__ == "__main__":
    exit_with(main)
