"""A run's folder survives what happens to it: kills, full disks, damaged files; and a resumed run goes on exactly."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch

from lumen.config import RunConfig, load_config
from lumen.errors import CheckpointError, ConfigError, LumenError
from lumen.run import Run, StopSignal, load_checkpoint, random_state, read_lines, restore_random_state

TOLD = ["model.path=lumen-demo", "data.train=lumen-demo"]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    empty = tmp_path / "run.toml"
    empty.write_text("")
    return load_config(empty, [*TOLD, f"output.folder={tmp_path / 'run'}"])


@pytest.fixture
def run(config) -> Run:
    return Run.create(config.output.folder, config)


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.full((3, 5), float(step))
    return {
        "adapter": {"attn.q.a": weight, "attn.q.b": weight.bfloat16()},
        "optimizer": {"mean.attn.q.a": weight, "updates.attn.q.a": torch.tensor(step)},
    }


def save(run: Run, *steps: int) -> Path:
    return [run.save_checkpoint(step, tensors(step), {"epoch": 0, "at": step}) for step in steps][-1]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_new_run_writes_a_config_that_repeats_it(run, config):
    assert load_config(run.folder) == config


def test_a_folder_in_use_is_refused_and_left_alone(config, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"Choose another by output.folder=…, or add --resume"):
        Run.create(taken, config)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_accepted(config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", config).folder.is_dir()


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="there is no run to resume"):
        Run.resume(tmp_path)


def test_resuming_may_go_further_but_not_learn_otherwise(run, tmp_path):
    empty = tmp_path / "run.toml"
    further = load_config(empty, [*TOLD, f"output.folder={run.folder}", "train.steps=500"])
    resumed = Run.resume(run.folder, further)
    assert load_config(run.folder).train.steps == 0  # until it is known that it can go on
    resumed.go_on(-1)
    assert load_config(run.folder).train.steps == 500
    otherwise = load_config(empty, [*TOLD, f"output.folder={run.folder}", "lora.rank=32"])
    with pytest.raises(ConfigError, match=r"lora.rank was 16, now 32 \(override\)"):
        Run.resume(run.folder, otherwise)


RESUMES = """
import sys
from lumen.errors import ConfigError
from lumen.run import Run
try:
    Run.resume(sys.argv[1])
except ConfigError as error:
    sys.exit(str(error))
"""


def test_a_folder_serves_one_process_at_a_time(run):
    def resume() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", RESUMES, run.folder], capture_output=True, text=True, timeout=60)

    with run:
        refused = resume()
        assert refused.returncode == 1 and "another process is training in this folder" in refused.stderr
    assert resume().returncode == 0


def test_a_rewound_run_reads_as_one_run(run):
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1 / step})
        run.log_samples(step, ["Hi\u2028there"], [f"answer {step}"])
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    run.go_on(2)
    run.log({"step": 3, "loss": 0.25})
    assert list(run.metrics()) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]
    assert [line["answer"] for line in read_lines(run.samples_path)] == ["answer 1", "answer 2"]
    run.go_on(-1)
    assert list(run.metrics()) == []


def test_a_line_of_metrics_is_on_disk_as_soon_as_it_is_logged(run):
    run.log({"step": 1, "loss": 2.0})
    assert run.metrics_path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_damaged_line_of_metrics_is_named(run):
    run.metrics_path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: wanted a line of JSON"):
        run.go_on(2)


def test_a_checkpoint_comes_back_bit_for_bit(run):
    found = load_checkpoint(save(run, 7))
    assert found.step == 7
    assert found.state == {"epoch": 0, "at": 7}
    assert found.tensors.keys() == tensors(7).keys()
    for group, members in tensors(7).items():
        assert found.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)


def test_the_newest_checkpoints_are_kept_by_number_not_by_name(run):
    save(run, 8, 9, 10, 11)
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["step-10", "step-11"]


def test_saving_a_step_twice_keeps_the_first(run):
    folder = save(run, 5)
    before = (folder / "manifest.json").stat().st_mtime_ns
    save(run, 5)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda folder: flip_a_byte(folder / "adapter.safetensors"), "adapter.safetensors: its SHA-256 differs"),
        (lambda folder: flip_a_byte(folder / "state.json"), "state.json: its SHA-256 differs"),
        (lambda folder: os.truncate(folder / "optimizer.safetensors", 50), "optimizer.safetensors: wanted "),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors: the file is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: os.truncate(folder / "manifest.json", 30), "manifest.json: wanted JSON"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 6, "files": {}}'), "names no state.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": "6"}'), "manifest.json: "),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(run, harm, why):
    damaged = save(run, 5, 6)
    harm(damaged)
    found, skipped = run.latest_checkpoint()
    assert found.step == 5
    assert len(skipped) == 1
    assert str(damaged) in skipped[0] and why in skipped[0]
    with pytest.raises(CheckpointError):
        load_checkpoint(damaged)


def test_a_manifest_cannot_lead_out_of_its_folder(run):
    folder = save(run, 6)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../config.toml"] = manifest["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing from the checkpoint"):
        load_checkpoint(folder)


def test_a_pickle_dropped_into_a_checkpoint_is_never_opened(run):
    folder = save(run, 6)
    (folder / "rng_state.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "rng_state.pth" not in load_checkpoint(folder).tensors


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(run):
    damaged = save(run, 5, 6)
    flip_a_byte(damaged / "adapter.safetensors")
    save(run, 6)
    assert run.latest_checkpoint()[0].step == 6


def test_damaged_later_checkpoints_do_not_push_out_whole_ones(run):
    save(run, 5, 9)
    flip_a_byte(run.checkpoints_path / "step-9" / "state.json")
    save(run, 7)
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["step-5", "step-7"]


def test_without_checkpoints_there_is_none_to_resume_from(run):
    assert run.latest_checkpoint() == (None, [])


def test_a_full_disk_while_saving_loses_nothing(run):
    save(run, 1)
    big = {"adapter": {"weight": torch.zeros(200_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(LumenError, match="cannot be written"):
            run.save_checkpoint(2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-1"]
    assert run.latest_checkpoint()[0].step == 1


SAVES_FOREVER = """
import sys, torch
from lumen.config import load_config
from lumen.run import Run
run = Run.resume(sys.argv[1])
weight = torch.zeros(300_000)
for step in range(1, 100_000):
    run.save_checkpoint(step, {"adapter": {"weight": weight + step}}, {"at": step})
    run.log({"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01])
def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint(run, after_s):
    with run:
        pass  # the folder is another process's now
    command = [sys.executable, "-c", SAVES_FOREVER, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        saved = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(after_s)
        process.kill()
    resumed = Run.resume(run.folder)
    found, skipped = resumed.latest_checkpoint()
    assert skipped == []
    assert found.step >= saved[-1]
    assert torch.equal(found.tensors["adapter"]["weight"], torch.full((300_000,), float(found.step)))
    assert not list(resumed.checkpoints_path.glob(".*")), "what was half written must be gone"


def draws() -> list[float]:
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(3).tolist()]


def test_generators_go_on_where_they_were_saved():
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state
    state = json.loads(json.dumps(random_state()))
    expected = draws()
    draws()
    restore_random_state(state)
    assert draws() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpus_random_state_is_not_dropped_silently():
    with pytest.raises(CheckpointError, match="there is no GPU"):
        restore_random_state({**random_state(), "cuda": ""})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == before


STOPS = """
import os, signal
from lumen.run import StopSignal
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""


def test_a_second_signal_ends_the_process_at_once():
    ended = subprocess.run([sys.executable, "-c", STOPS], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "True\n")
    assert "a second signal ends the run" in ended.stderr


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_summary_says_on_what_the_run_was_made(run):
    run.write_summary({"final_loss": 0.5}, "cpu")
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["final_loss"] == 0.5
    assert summary["device"] == "cpu"
    assert summary["versions"]["torch"] == torch.__version__
