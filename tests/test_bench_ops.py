"""The script that times the operations: every case runs, and without a GPU it says so."""

import json
import os
import subprocess
import sys
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


def test_without_a_gpu_it_refuses():
    done = run("--only", "rms_norm")
    assert done.returncode == 2 and "finds none" in done.stderr
