"""The script that times training steps: its lines, and a peer that fails is told."""

import importlib
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_train")


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="it is installed")
def test_a_peer_that_is_not_installed_is_told(bench, tmp_path):
    case = bench.Case(size="1b", rows=2, length=1024)
    line = bench.measure_peer("unsloth", case, 1, 16, True, tmp_path)
    assert "No module named 'unsloth'" in line["failed"]
    assert bench.in_words(line, None).startswith("unsloth  1b   2 x   1024  failed: exit code 1: ModuleNotFoundError")
    assert not list(tmp_path.iterdir())


def test_a_peers_line_says_how_many_times_as_fast_lumen_is(bench):
    own = {"peer": "lumen", "size": "8b", "rows": 8, "length": 2048, "step_s": 1.0, "tokens_per_s": 18000}
    own |= {"peak_gib": 9.0, "tflops": 300, "kept": ["all"]}
    theirs = {key: value for key, value in own.items() if key != "tflops"}
    theirs |= {"peer": "hf", "tokens_per_s": 6000, "kept": ["each block's input"]}
    assert bench.in_words(own, None).endswith("18,000 tok/s    9.00 GiB   300 TFLOP/s  all")
    assert bench.in_words(theirs, own).endswith("each block's input  lumen x 3.00")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses():
    done = subprocess.run([sys.executable, SCRIPTS / "bench_train.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "finds none" in done.stderr


def test_who_reads_no_further_is_no_reason_for_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, SCRIPTS / "bench_train.py", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # or argparse writes at once, and keeps the error to itself
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
