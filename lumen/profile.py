"""What a run measures of the machine: the memory it took, and where the time of one step went."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lumen.formats.atomic import write_text

ROWS = 40


@contextmanager
def recorded(folder: Path, device: torch.device) -> Iterator[None]:
    """What runs inside the `with` is written to `profile.txt` and `trace.json` (for ui.perfetto.dev) in `folder`."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        yield
        if on_gpu:
            torch.cuda.synchronize(device)
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    total = sum(time for time, _ in spent.values()) or 1.0
    rows = sorted(spent.items(), key=lambda row: -row[1][0])[:ROWS]
    lines = [f"{'ms':>10}  {'share':>6}  {'calls':>6}  what ran on the {'GPU' if on_gpu else 'CPU'}"]
    lines += [f"{time / 1e3:10.3f}  {time / total:6.1%}  {count:6}  {key[:120]}" for key, (time, count) in rows if time]
    lines.append(f"{total / 1e3:10.3f}  in all")
    write_text(folder / "profile.txt", "\n".join(lines) + "\n")
    profiler.export_chrome_trace(str(folder / "trace.json"))


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was held: allocated by PyTorch on a GPU, resident in the whole process on the CPU; 0 on Windows,
    where Python does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
