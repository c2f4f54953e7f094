"""A model loaded while the data is encoded: the same model, the same errors in the same order, and no thread left."""

import gc
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from contextlib import suppress

import pytest
import torch
from tiny_models import llama

from lumen import early, loading
from lumen.checkpoint import load_model
from lumen.config import Data, Lora, Model, Output, RunConfig, Train
from lumen.demo import MODELS, demo_folder
from lumen.errors import CheckpointError, DataError, KernelError
from lumen.loading import Loading
from lumen.run import Run
from lumen.train import prepare

LOG = logging.getLogger("lumen")


@pytest.fixture
def config(tmp_path) -> RunConfig:
    base = shutil.copytree(demo_folder(next(iter(MODELS))), tmp_path / "base")
    turns = [{"role": role, "content": "one two"} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return RunConfig(
        model=Model(path=str(base), nf4=False),
        lora=Lora(rank=4),
        data=Data(train=(str(tmp_path / "chats.jsonl"),), max_length=64),
        train=Train(steps=1, batch_size=1),
        output=Output(folder=str(tmp_path / "run")),
    )


@pytest.fixture
def beside(monkeypatch):
    """As on a GPU, but for the device."""
    monkeypatch.setattr(loading, "choose_device", lambda name: torch.device("cuda"))


@pytest.fixture
def endless(monkeypatch) -> threading.Event:
    """A model that never comes; set as soon as it is waited for."""
    begun = threading.Event()

    def load(folder, *, proceed, **_):
        begun.set()
        while True:
            proceed()
            time.sleep(0.001)

    monkeypatch.setattr(loading, "load_model", load)
    return begun


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lumen-loading")]


def prepared(config: RunConfig, folder):
    return prepare(config, Run.create(folder, config), None)


def damage_data(config):
    with open(config.data.train[0], "a") as file:
        file.write("{")


def damage_model(config):
    path = f"{config.model.path}/model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 8)


def test_a_model_loaded_beside_the_data_is_the_model(config, tmp_path, monkeypatch):
    """To the bit, the adapter's random start too: loading draws no numbers, in which thread it may be."""
    in_turn, state = prepared(config, tmp_path / "turn"), torch.get_rng_state()
    monkeypatch.setattr(loading, "choose_device", lambda name: torch.device("cuda"))
    other = prepared(config, tmp_path / "beside")
    assert torch.equal(torch.get_rng_state(), state) and not threads()
    wanted, found = in_turn.model.state_dict(), other.model.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    learned = [name for name, parameter in in_turn.model.named_parameters() if parameter.requires_grad]
    assert learned == [name for name, parameter in other.model.named_parameters() if parameter.requires_grad]


def test_an_error_in_the_data_ends_the_loading_at_once(config, tmp_path, beside, endless):
    damage_data(config)
    with pytest.raises(DataError, match=r"chats\.jsonl.*2"):
        prepared(config, tmp_path / "run")
    assert endless.is_set() and not threads()


@pytest.mark.parametrize("how", ["in turn", "beside"])
def test_an_error_in_the_model_is_that_of_load_model_and_comes_after_those_of_the_data(config, tmp_path, request, how):
    if how == "beside":
        request.getfixturevalue("beside")
    damage_model(config)
    with pytest.raises(CheckpointError) as wanted:
        load_model(config.model.path)
    with pytest.raises(CheckpointError) as found:
        prepared(config, tmp_path / "first")
    assert str(found.value) == str(wanted.value) and not threads()
    damage_data(config)
    with pytest.raises(DataError):
        prepared(config, tmp_path / "second")


def test_an_interrupt_while_the_model_is_waited_for_leaves_no_thread(config, beside, endless):
    def interrupt():
        endless.wait()
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), Loading(config, lambda: None) as begun:
        interrupting.start()
        begun.model()
    interrupting.join()
    assert not threads()


def test_a_second_interrupt_while_the_thread_is_waited_for_undoes_the_same(config, beside, endless, monkeypatch):
    usual, end = sys.getswitchinterval(), loading.ThreadPoolExecutor.shutdown

    def interrupted(threads, **_):
        end(threads, wait=False)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loading.ThreadPoolExecutor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt), Loading(config, lambda: None):
        endless.wait()
        raise KeyboardInterrupt
    assert not LOG.filters and sys.getswitchinterval() == usual
    for thread in threading.enumerate():
        if thread.name.startswith("lumen-loading"):  # nobody has waited for it, and it ends all the same
            thread.join(timeout=10)
    assert not threads()


@pytest.mark.parametrize("whose", ["data", "model"])
def test_of_a_loading_that_ended_in_an_error_no_weights_are_left(config, beside, monkeypatch, whose):
    """Without the collector of garbage, which comes when it likes: on a GPU they are in the way of the next attempt."""
    held, there = [], threading.Event()

    def load(folder, *, proceed, **_):
        weights = torch.zeros(1000)
        held.append(weakref.ref(weights))
        there.set()
        while whose == "data":
            proceed()
            time.sleep(0.001)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(loading, "load_model", load)
    gc.collect()
    gc.disable()
    try:
        with suppress(DataError, torch.OutOfMemoryError), Loading(config, lambda: None) as begun:
            there.wait()
            if whose == "model":
                begun.model()
            raise DataError("a bad record")
        del begun
        assert [weights() for weights in held] == [None]
    finally:
        gc.enable()


def test_rounding_to_8_bits_asks_before_each_group_of_layers_whether_to_go_on(tmp_path):
    llama(tmp_path)
    asked = []
    model = load_model(tmp_path, device="cpu", fp8=True, proceed=lambda: asked.append(1))
    groups = 4 * len(model.blocks)  # what reads the same: q, k and v; o; gate and up; down
    assert len(asked) == 1 + sum(len(name.parts) for name in model.spec.tensors()) + groups

    def stop():
        asked.pop()
        if not asked:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        load_model(tmp_path, device="cpu", fp8=True, proceed=stop)


def test_what_loading_logs_is_said_after_what_the_data_gave_to_say(config, beside, monkeypatch, caplog):
    said = threading.Event()

    def load(*_, **__):
        LOG.warning("of the model")
        said.set()
        raise CheckpointError("no model")

    monkeypatch.setattr(loading, "load_model", load)
    with pytest.raises(CheckpointError, match="no model"), Loading(config, lambda: None) as begun:
        said.wait()
        LOG.warning("of the data")
        begun.model()
    assert caplog.messages == ["of the data", "of the model"]
    assert not LOG.filters


def test_nothing_is_put_onto_the_gpu_before_it_is_ready(config, beside, monkeypatch):
    def ready():
        raise KernelError("no compiler")

    monkeypatch.setattr("lumen.checkpoint.carry", lambda *_: pytest.fail("a weight was on its way"))
    with pytest.raises(KernelError, match="no compiler"), Loading(config, ready) as begun:
        begun.model()


def test_threads_take_turns_more_often_only_while_the_model_is_loaded(config, beside, endless):
    usual = sys.getswitchinterval()
    with Loading(config, lambda: None):
        assert sys.getswitchinterval() == pytest.approx(early.SWITCH_S, rel=1e-3) and usual > early.SWITCH_S
    assert sys.getswitchinterval() == usual


def test_on_the_cpu_no_thread_is_started(config):
    with Loading(config, lambda: pytest.fail("there is no GPU to be ready")) as begun:
        assert not threads()
        assert begun.model().device.type == "cpu"
