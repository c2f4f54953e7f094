"""The process that compiles the first step's kernels: what it leaves, and what a run does with and without it."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cuda_driver import compiling_environment
from tiny_models import llama

from lumen import warming
from lumen.config import Data, Lora, Model, Output, RunConfig, Train
from lumen.data.batch import stack
from lumen.ops import ahead
from lumen.ops.ahead import Gpu
from lumen.text.conversation import Encoded
from lumen.warming import Warming

H100 = Gpu(
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    free_bytes=80 << 30,
    total_bytes=80 << 30,
)
NEEDED = {"_unpack_kernel", "_attention_grad_kv_kernel", "_rms_norm_forward_kernel", "_cross_entropy_kernel"}


def request(folder, config: RunConfig) -> str:
    rows = [[Encoded(ids=list(range(length)), learn=[True] * length) for length in (20, 44)]]
    return warming._request(config, folder, "bfloat16", H100, stack(rows, 64))


@pytest.mark.slow
def test_the_first_step_of_a_run_is_compiled_and_marked(tmp_path):
    pytest.importorskip("triton")
    model = tmp_path / "model"
    llama(model).to(torch.bfloat16).save_pretrained(model)
    environment = compiling_environment(tmp_path)
    config = RunConfig(model=Model(path=str(model), nf4=True), lora=Lora(rank=4), data=Data(train=("x",)))
    asked, command = request(model, config), [sys.executable, "-c", warming.PROCESS]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]
    compiled = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert compiled >= NEEDED
    assert len(list((tmp_path / "cache").glob("lumen-*"))) == 1
    assert list((tmp_path / "cache").rglob("__triton_launcher*.so"))


def test_the_mark_is_of_what_decides_the_kernels(tmp_path, monkeypatch):
    """The same model trained into another folder, at another rate, finds them compiled; another rank does not."""
    monkeypatch.setattr(ahead, "know_triton", lambda: "3.6")
    monkeypatch.setattr(ahead, "cache_folder", lambda: tmp_path)
    config = RunConfig(model=Model(path="m"), data=Data(train=("x",)))
    mark = warming._mark(request(tmp_path, config))
    again = replace(config, train=Train(lr=1e-5, steps=7), output=Output(folder="elsewhere"), data=Data(train=("y",)))
    assert warming._mark(request(tmp_path, again)) == mark
    assert warming._mark(request(tmp_path, replace(config, lora=Lora(rank=8)))) != mark
    assert warming._mark(request(tmp_path, replace(config, train=Train(keep="input")))) != mark


def test_on_a_cpu_nothing_is_started():
    idle = Warming(RunConfig(model=Model(path="nowhere", device="cpu"), data=Data(train=("x",))))
    idle.begin(None, None)
    idle.finish()


@pytest.fixture
def started(monkeypatch, tmp_path):
    """`begin` with a request for a run on a GPU, where the process runs `code` instead."""
    monkeypatch.setattr(warming, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(Gpu, "of", lambda device: H100)
    monkeypatch.setattr(ahead, "compiles", lambda: True)
    monkeypatch.setattr(ahead, "know_triton", lambda: "3.6")
    monkeypatch.setattr(ahead, "cache_folder", lambda: tmp_path)

    def start(code: str) -> tuple[Warming, str]:
        monkeypatch.setattr(warming, "PROCESS", code)
        config = RunConfig(model=Model(path="m"), data=Data(train=("x",)))
        begun, asked = Warming(config), request(tmp_path, config)
        begun._ask(asked)
        return begun, asked

    return start


def test_the_process_is_told_what_the_run_will_do(started, tmp_path):
    begun, asked = started(f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())")
    begun.finish()
    told = json.loads((tmp_path / "told").read_text())
    assert told == json.loads(asked)
    assert told["batch"]["shapes"]["tokens"] == [[1, 64], "int64"] and told["batch"]["plain"] == {"packed": True}


def test_a_process_that_fails_is_said_and_no_obstacle(started, caplog):
    with caplog.at_level(logging.WARNING, "lumen"):
        started("raise RuntimeError('no compiler here')")[0].finish()
    assert "are when first used" in caplog.text and "no compiler here" in caplog.text


def test_a_process_that_does_not_end_is_given_up(started, caplog, monkeypatch):
    monkeypatch.setattr(warming, "LONGEST_S", 0.2)
    with caplog.at_level(logging.WARNING, "lumen"):
        started("import time; time.sleep(60)")[0].finish()
    assert "took more than 0.2 s" in caplog.text


def test_a_run_whose_kernels_are_marked_waits_for_nothing(started, tmp_path, monkeypatch):
    monkeypatch.setattr(warming, "_mark", lambda asked: tmp_path)
    begun, _ = started("import time; time.sleep(60)")
    assert begun._process is None
