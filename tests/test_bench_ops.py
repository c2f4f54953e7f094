"""The script that times the operations: every case runs, and without a GPU it says so."""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lumen.ops._triton import triton

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_ops.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_every_case_runs_in_small_shapes():
    done = run("--tiny", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)["results"]
    assert not [result for result in found if result["failed"]]
    assert {result["who"] for result in found} >= {"lumen", "lumen triton", "torch"}
    lines = {(result["op"], result["name"]) for result in found}
    assert len(lines) <= 36  # with what stands around it the table fits a screen
    for op, name in lines:
        assert next(r["who"] for r in found if (r["op"], r["name"]) == (op, name)).startswith("lumen")


def test_a_line_has_lumens_figures_and_the_others_times_beside_them(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    bench = importlib.import_module("bench_ops")
    own = bench.Result(op="gated", name="forward", who="lumen", ms=0.2, rate=3.5, unit="TB/s", share=0.83)
    others = [replace(own, who="torch", ms=0.5), replace(own, who="liger", ms=None, failed="RuntimeError: no")]
    other_case = replace(own, name="backward", failed="KernelError: too wide")
    first, second = bench.lines([own, *others, other_case])
    beside = "torch 0.5000 (2.50) liger failed: RuntimeError: no"
    assert " ".join(first.split()) == f"gated forward 0.2000 3.50 TB/s 83.0 % {beside}"
    assert " ".join(second.split()) == "gated backward lumen failed: KernelError: too wide"


def test_without_a_gpu_it_refuses():
    done = run("--only", "rms_norm")
    assert done.returncode == 2 and "finds none" in done.stderr


def test_who_reads_no_further_is_no_reason_for_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, SCRIPT, "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # or argparse writes at once, and keeps the error to itself
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
