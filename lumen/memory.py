"""What memory the host has to give; and what a person is told where a GPU's does not suffice: what was done, what is
held, and what takes less.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lumen.errors import LumenError

GIB = 2**30
MEMINFO, GROUPS, OWN_GROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of groups of processes: where they are, which the process's own is, the limit, what is held of it, and what of that
# are files that have been read and need not stay.
CGROUPS = (  # of version 2 and of version 1, whose words without "total_" leave out the groups inside
    ("", r"^0::/(.*)$", "max", "current", "{}_file"),
    ("memory", r"^\d+:(?:.*,)?memory\b.*?:/(.*)$", "limit_in_bytes", "usage_in_bytes", "total_{}_file"),
)
MUCH = 0.1  # of what PyTorch has reserved: when so much of it is unused, the pieces are the trouble and not the sum

OF_A_PASS = (
    "Less is taken with a smaller train.batch_size and a larger train.accumulate, a smaller data.max_length, "
    'train.keep="input", a smaller train.memory_gib, or train.graph=false. `python -m lumen.plan RUN` tells what fits.'
)
OF_WEIGHTS = (
    'Less is taken with model.nf4=true, train.method="lora", a smaller lora.rank, train.optimizer_bits=8 or '
    "train.optimizer_paged=true. `python -m lumen.plan RUN` tells what fits, and nvidia-smi who else uses the GPU."
)


def host_memory_bytes() -> int:
    """What the host's memory has to give to this process without swapping, and all control groups that it is in too: a
    container's, a service's, a batch job's. Where the system does not say (Linux does), as much as one could want.
    """
    found = [sys.maxsize]
    if (said := _number(MEMINFO, r"MemAvailable:\s+(\d+) kB")) is not None:
        found.append(said << 10)
    for place, own, limit, usage, name in CGROUPS:
        for group in _around(GROUPS / place, own):
            most, held = _number(group / f"memory.{limit}"), _number(group / f"memory.{usage}")
            if most is not None and held is not None:
                words = [rf"\b{name.format(kind)} (\d+)" for kind in ("inactive", "active")]
                found.append(max(most - held + sum(_number(group / "memory.stat", word) or 0 for word in words), 0))
    return min(found)


def _around(root: Path, own: str) -> list[Path]:
    """The groups that this process is in, the innermost first, `root` last; of a container the root alone, where the
    innermost is told as it is named outside.

    own  the pattern of the line that names the innermost
    """
    said = re.search(own, OWN_GROUPS.read_text(), re.MULTILINE) if OWN_GROUPS.exists() else None
    inner = root / said[1] if said else root
    groups = (inner, *inner.parents)
    return list(groups[: groups.index(root) + 1]) if inner.is_dir() and ".." not in inner.parts else [root]


def _number(file: Path, pattern: str = r"(\d+)") -> int | None:
    """The first number in a file; None where there is none, as where a limit is "max", and where it cannot be read."""
    try:
        said = re.search(pattern, file.read_text())
    except OSError:
        return None
    return int(said[1]) if said else None


class OutOfMemory(LumenError, torch.OutOfMemoryError):
    """The GPU's memory does not suffice. Who expects PyTorch's own error catches this one as well."""


@contextmanager
def memory_told(doing: str, advice: str) -> Iterator[None]:
    """A `torch.OutOfMemoryError` inside becomes an `OutOfMemory`, once; also a decorator.

    doing   what wants the memory, as "a pass over 4 rows x 2,048 tokens"
    advice  OF_A_PASS or OF_WEIGHTS
    """
    try:
        yield
    except OutOfMemory:  # who stood nearer has told more
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_told(doing, advice, str(error))) from error


def _told(doing: str, advice: str, said: str) -> str:
    """The message, where PyTorch has `said` its own. What the failed work holds is still held: its frames live."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", said)
    tensors, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    unused = reserved - tensors
    words = [
        f"The GPU's memory does not suffice for {doing}{f': {asked[1]} more were wanted' if asked else ''}. Tensors "
        f"hold {tensors / GIB:.2f} GiB, and {unused / GIB:.2f} GiB lie reserved and unused between them{_device()}.",
        advice,
    ]
    if unused > MUCH * reserved and "expandable_segments:True" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        words.append("Much is unused: a start with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may do by itself.")
    return " ".join(words)


def _device() -> str:
    if not torch.cuda.is_initialized():
        return ""
    free, whole = torch.cuda.mem_get_info()
    return f"; of the device's {whole / GIB:.2f} GiB {free / GIB:.2f} are free"
