"""python -m lumen.doctor: what this machine has, what lumen makes of it, and what is missing or broken.

Which implementation of an operation runs is not read from a table but seen: the embedded demo model takes a step of
QLoRA and writes a few tokens on the device that a run would take, and the operations say what they chose. The same step
is taken by their references, and the two losses must agree.

Nothing is installed or changed, and no network is reached without --online.
"""

from __future__ import annotations  # they name what may be missing

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lumen.errors import KernelError, LumenError

try:
    import torch
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from rich.console import Console
    from rich.table import Table

    from lumen import hub, ops
    from lumen.adapter import attach_lora
    from lumen.checkpoint import choose_device, choose_dtype, load_model
    from lumen.config import Lora
    from lumen.data.batch import batches
    from lumen.data.packing import pack
    from lumen.demo import demo_folder
    from lumen.objectives.sft import sft_loss
    from lumen.sampling import generate
    from lumen.text.conversation import Text
    from lumen.text.tokenizer import load_tokenizer
    from lumen.text.turns import encode_text
except ImportError as error:  # a dependency is not here or broken, which is what this verb is asked for
    BROKEN = f"{type(error).__name__}: {error}"
else:
    BROKEN = ""

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ">=3.11,<3.14"
DEMO = "lumen-demo"
TEXT = "Two oat lattes for Anna, please, and one flat white to go."
AGREE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}  # of two losses, relative: rounding, no more


def examine(*, online: bool = False) -> dict:
    """All that is found, ready for JSON: `problems` is what lumen needs and is broken, `notes` what could be better."""
    report: dict = {"problems": [], "notes": []}
    sections: dict[str, Callable[[dict], object]] = {
        "versions": versions,
        "packages": packages,
        "devices": devices,
        "cpu": cpu,
        "operations": operations,
        "disk": disk,
        "hub": lambda report: hub_access(report, online),
    }
    for name, section in sections.items():
        try:
            report[name] = section(report)
        except Exception as error:  # whatever is broken is what was asked for
            report[name] = None
            report["problems"].append(f"{name}: {type(error).__name__}: {error}")
    return report


# What is installed


def versions(report: dict) -> dict[str, str]:
    """Of Python and of what computes; "not installed" is a version too."""
    found = {"python": platform.python_version(), "lumen": _version("lumen"), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda or "not in this build of torch", "triton": _version("triton")}
    if not SpecifierSet(PYTHON).contains(found["python"], prereleases=True):
        report["problems"].append(f"lumen wants Python {PYTHON}, found {found['python']}. Make .venv with another.")
    return found | {"system": f"{platform.system()} {platform.machine()}"}


def packages(report: dict) -> list[dict]:
    """What lumen and its extras want, and what is here; a wrong version of what lumen itself wants is a problem."""
    rows = []
    for extra, text in requirements():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        found = _version(wanted.name)
        fits = found != NONE and wanted.specifier.contains(found, prereleases=True)
        asked = f"{wanted.name}{wanted.specifier}"
        rows.append({"extra": extra, "name": wanted.name, "wanted": asked, "found": found, "fits": fits})
        if not fits and not extra:
            report["problems"].append(f"lumen wants {asked}, found {found}. {install_command([asked])}")
    return rows


def requirements() -> list[tuple[str, str]]:
    """(extra or "", requirement), as the checkout's pyproject.toml says, else as the installed package does."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        listed = [("", text) for text in project["dependencies"]]
        listed += [(extra, text) for extra, texts in project["optional-dependencies"].items() for text in texts]
    else:
        extra_of = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")
        texts = metadata.requires("lumen") or []
        listed = [(match[1] if (match := extra_of.search(text)) else "", text) for text in texts]
    return [(extra, text) for extra, text in listed if _name(text) != "lumen"]  # an extra that takes others


def install_command(wanted: list[str]) -> str:
    """The command line that installs `wanted` for this Python."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "pip", "install", *wanted])


def missing_extras(report: dict) -> dict[str, dict]:
    """Extra → what it lacks, and the command that installs that."""
    lacking: dict[str, list[str]] = {}
    for row in report["packages"] or []:
        if row["extra"] and not row["fits"]:
            lacking.setdefault(row["extra"], []).append(row["wanted"])
    return {extra: {"missing": names, "command": install_command(names)} for extra, names in lacking.items()}


def unimportable() -> str:
    """What keeps lumen from being imported here, and the command that installs what lumen needs and is not here."""
    lacking = [text for extra, text in requirements() if not extra and _version(_name(text)) == NONE]
    return f"lumen cannot be imported here: {BROKEN}. " + (install_command(lacking) if lacking else "Install it anew.")


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


NONE = "not installed"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NONE


# What computes


def devices(report: dict) -> list[dict]:
    """The GPUs, with memory, capability and the dtypes that they have units for; empty without one."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            build = "is a build for CPUs only" if torch.version.cuda is None else "does not see it"
            report["notes"].append(f"An NVIDIA GPU seems to be here, but torch {torch.__version__} {build}.")
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        fast = [name for name, least in TENSOR_CORES.items() if capability >= least] or ["float32"]
        found.append(
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": total,
                "free_bytes": free,
                "capability": "{}.{}".format(*capability),
                "fast_dtypes": fast,
                "auto_dtype": _auto_dtype(f"cuda:{index}"),
            }
        )
    return found


TENSOR_CORES = {"float16": (7, 0), "bfloat16": (8, 0), "tf32": (8, 0), "float8": (8, 9)}  # since which capability


def cpu(report: dict) -> dict:
    """The processor, its threads and its memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = ["float32"]
    for name, probe in (("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported")):
        if hasattr(torch.ops.mkldnn, probe) and getattr(torch.ops.mkldnn, probe)():
            fast.append(name)
    return {
        "name": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory("SC_PHYS_PAGES"),
        "free_bytes": _memory("SC_AVPHYS_PAGES"),
        "fast_dtypes": fast,
        "auto_dtype": _auto_dtype("cpu"),
    }


def _auto_dtype(device: str) -> str:
    return str(choose_dtype("auto", torch.device(device))).removeprefix("torch.")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _memory(pages: str) -> int | None:
    """Bytes, of the whole machine; None where the system does not say."""
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in getattr(os, "sysconf_names", {}) else None


def operations(report: dict) -> dict:
    """What each operation with a choice took, and why, in a step and an answer of the demo model on this device.

    A loss that is not finite, or not that of the references, is a problem.
    """
    began_s, device = time.monotonic(), choose_device("auto")
    folder = demo_folder(DEMO)
    model = load_model(folder, nf4=True)
    dtype = str(model.dtype).removeprefix("torch.")
    attach_lora(model, Lora(rank=4))
    tokenizer = load_tokenizer(folder)
    example = encode_text(Text(TEXT), tokenizer)
    [batch] = [batch.to(device) for batch in batches(pack([example, example], 2 * len(example.ids)).rows, 1)]
    loss = _step(model, batch)
    [answer] = generate(model, [example.ids[:8]], max_tokens=4, stop_ids=())
    chosen = ops.explain()
    try:
        with ops.use("reference"):
            reference = _step(model, batch)
    except KernelError as error:
        reference = None
        report["notes"].append(f"The step could not be compared with the references: {error}")
    if not math.isfinite(loss):
        report["problems"].append(f"A training step of {DEMO} on {device} has the loss {loss}.")
    elif reference is not None and abs(loss - reference) > AGREE[dtype] * abs(reference):
        report["problems"].append(
            f"A training step of {DEMO} on {device} has the loss {loss:.6f}, by the references {reference:.6f}. An "
            "implementation is wrong on this device; please report it with this page."
        )
    return {
        "device": str(device),
        "dtype": dtype,
        "chosen": chosen,
        "loss": loss,
        "reference_loss": reference,
        "answered_tokens": len(answer.ids),
        "seconds": round(time.monotonic() - began_s, 2),
    }


def _step(model: torch.nn.Module, batch: object) -> float:
    """Forward and backward; the mean loss."""
    loss = sft_loss(model, batch)
    loss.total.backward()
    model.zero_grad(set_to_none=True)
    return (loss.total / loss.count).item()


# What is around it


def disk(report: dict) -> list[dict]:
    """Room for downloads, for runs, and for the kernels that Triton compiles once and keeps for later runs."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    kernels = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    places = {"models of the Hub": hub.cache_folder(), "working folder": Path.cwd(), "compiled kernels": kernels}
    rows = []
    for what, folder in places.items():
        there = next(place for place in (folder, *folder.parents) if place.is_dir())
        free = shutil.disk_usage(there).free
        rows.append({"what": what, "path": str(folder), "free_bytes": free, "writable": os.access(there, os.W_OK)})
        if not rows[-1]["writable"]:
            report["notes"].append(f"{there} may not be written to: {what}.")
    return rows


def hub_access(report: dict, online: bool) -> dict:
    """Whether a token is here, and, only if asked, whether the Hub answers."""
    found: dict = {"token": hub.has_token(), "reachable": None}
    if online:
        try:
            found |= {"address": hub.reach(), "reachable": True}
        except LumenError as error:
            found |= {"reachable": False, "reason": str(error)}
    return found


# What a person sees


def show(report: dict, console: Console) -> None:
    """Prints the report, readable in 80 columns."""
    _print_table(console, "Versions", (report["versions"] or {}).items())
    _print_table(console, "Devices", [*_device_rows(report), *_cpu_rows(report["cpu"] or {})])
    _print_operations(console, report["operations"])
    _print_table(console, "Packages", _package_rows(report))
    for extra, lacks in missing_extras(report).items():
        console.print(f"To have the extra {extra!r}:", markup=False)
        console.print(f"  {lacks['command']}\n", style="cyan", markup=False, soft_wrap=True)
    rows = [(row["what"], f"{_gib(row['free_bytes'])} free in {row['path']}") for row in report["disk"] or []]
    _print_table(console, "Disk and Hub", [*rows, *_hub_rows(report["hub"] or {})])
    for kind, style in (("notes", "yellow"), ("problems", "bold red")):
        for sentence in report[kind]:
            console.print(f"{kind.removesuffix('s')}: {sentence}", style=style, markup=False)
    if not report["problems"]:
        console.print("Everything that lumen needs is here and works.", style="green")


def _print_table(console: Console, title: str, rows: object) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", str(value))
    console.print(title, style="bold")
    console.print(table, markup=False)
    console.print()


def _device_rows(report: dict) -> list[tuple[str, str]]:
    rows = []
    for index, gpu in enumerate(report["devices"] or []):
        memory = f"{_gib(gpu['free_bytes'])} of {_gib(gpu['memory_bytes'])} free"
        rows += [(f"GPU {index}", f"{gpu['name']}, {memory}, capability {gpu['capability']}"), ("", _dtypes(gpu))]
    return rows or [("GPU", "none that torch sees")]


def _cpu_rows(cpu: dict) -> list[tuple[str, str]]:
    if not cpu:
        return []
    memory = f", {_gib(cpu['memory_bytes'])}" if cpu["memory_bytes"] else ""
    what = f"{cpu['name']}, {cpu['instructions']}{memory}"
    return [("CPU", what), ("", f"{cpu['threads']} threads of {cpu['cores']} cores"), ("", _dtypes(cpu))]


def _dtypes(device: dict) -> str:
    return f"fast in {', '.join(device['fast_dtypes'])}; auto takes {device['auto_dtype']}"


def _print_operations(console: Console, found: dict | None) -> None:
    if not found:
        return
    rows = [(op, choice) for op, choice in found["chosen"].items()]
    rows.append(("all others", "have one implementation"))
    _print_table(console, f"Operations, as {DEMO} ran them on {found['device']} in {found['dtype']}", rows)


def _package_rows(report: dict) -> list[tuple[str, str]]:
    """One row for lumen itself and one for each extra."""
    told: dict[str, list[str]] = {}
    for row in report["packages"] or []:
        wrong = "" if row["fits"] else f" (wanted {row['wanted']})"
        told.setdefault(row["extra"], []).append(f"{row['name']} {row['found']}{wrong}")
    return [(f"extra {extra}" if extra else "lumen", ", ".join(texts)) for extra, texts in told.items()]


def _hub_rows(found: dict) -> list[tuple[str, str]]:
    rows = [("token of the Hub", "found" if found.get("token") else "none: gated and private models want one")]
    if found.get("reachable") is None:
        return [*rows, ("Hub", "not asked; --online asks")]
    return [*rows, ("Hub", f"{found['address']} answers" if found["reachable"] else f"not reached: {found['reason']}")]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all is well, 1 something that lumen needs is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m lumen.doctor",
        description="Show what this machine has, what lumen makes of it, and what is missing or broken.",
        epilog="Exit code 1 when something that lumen needs is broken. Nothing is installed or changed.",
    )
    parser.add_argument("--online", action="store_true", help="ask whether the Hub can be reached; else no network")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout")
    asked = parser.parse_args(arguments)
    if BROKEN:
        print(json.dumps({"ok": False, "problems": [unimportable()]}) if asked.json else f"problem: {unimportable()}")
        return 1
    report = examine(online=asked.online)
    if asked.json:
        extras = missing_extras(report)
        print(json.dumps({"ok": not report["problems"], **report, "missing_extras": extras}, indent=2))
    else:
        show(report, Console(highlight=False))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
