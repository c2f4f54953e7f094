"""What the kernels take of a multiprocessor, read from their machine code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import needs_triton

from lumen.ops._triton import triton

pytestmark = [needs_triton, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent.parent

MEASURED_WITH = "3.6."  # Triton: another one allots registers otherwise
# Bytes that a thread may spill: what was found for tiles that were chosen by their time, on an H100 and H200.
SPILLS = {
    # most on sm_80 and sm_89 alone: the matrix units there read from registers what Hopper's read from shared memory
    ("_attention_forward_kernel", "attention 64"): 32,
    ("_attention_forward_kernel", "attention 64, soft cap"): 112,
    ("_attention_forward_kernel", "attention 128, soft cap"): 16,
    ("_attention_forward_kernel", "attention 256"): 24,
    ("_attention_forward_kernel", "attention 256, soft cap"): 24,
    # the sums of 128 keys and as many values are 128 registers of each thread; those of 64 with a head of 256, too
    ("_attention_grad_kv_kernel", "attention 64, soft cap"): 40,
    ("_attention_grad_kv_kernel", "attention 128"): 80,
    ("_attention_grad_kv_kernel", "attention 128, soft cap"): 376,
    ("_attention_grad_kv_kernel", "attention 256"): 144,
    ("_attention_grad_kv_kernel", "attention 256, soft cap"): 152,
    ("_attention_grad_q_kernel", "attention 128"): 80,
    ("_attention_grad_q_kernel", "attention 128, soft cap"): 72,
    ("_attention_grad_q_kernel", "attention 256"): 208,
    ("_attention_grad_q_kernel", "attention 256, soft cap"): 208,
    # a tile of 16 rows spills nothing and is 20 % slower on an H200, addresses in fewer registers are 2 %
    ("_gated_waist_backward_kernel", "gated silu, pairs"): 16,
    ("_gated_waist_backward_kernel", "gated gelu_tanh, pairs"): 48,
    ("_gated_waist_backward_kernel", "gated gelu, pairs"): 24,
    ("_gated_waist_backward_kernel", "gated, pairs of 8"): 24,
}


def compiled() -> list[dict]:
    """One line for each kernel, case and target; in a process of its own, for here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def written() -> set[str]:
    """The names of all kernels in lumen/ops."""
    files = (ROOT / "lumen" / "ops").glob("*.py")
    return {
        name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text("utf-8"), re.MULTILINE)
    }


def fault(line: dict) -> str:
    if line["shared"] > line["most_shared"]:
        return f"asks for {line['shared']} bytes of shared memory, there are {line['most_shared']}"
    most = SPILLS.get((line["kernel"], line["case"]), 0)
    if line["stack"] > most and triton.__version__.startswith(MEASURED_WITH):
        return f"spills {line['stack']} bytes, {most} are known"
    return ""


def test_every_kernel_fits_the_gpus_it_is_compiled_for():
    lines = compiled()
    faults = [row(line) for line in lines if fault(line)]
    for target in ("sm_80", "sm_90"):
        missing = written() - {line["kernel"] for line in lines if line["target"] == target}
        faults += [f"{name} is not compiled for {target}: compile_kernels.py lacks a case" for name in sorted(missing)]
    assert not faults, "\n".join(["", *faults, "", "all of them:", *map(row, lines)])


def row(line: dict) -> str:
    numbers = f"{line['registers']:4} registers {line['stack']:5} stack {line['shared']:7} shared"
    return f"{line['target']} {line['kernel']:<28}{line['case']:<36}{numbers}  {fault(line)}"
