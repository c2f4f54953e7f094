"""Passes with and without recordings; what is recorded needs a GPU (`tests/test_gpu.py`), who gives way does not."""

import logging
from types import SimpleNamespace

import pytest
import torch

from lumen.capture import Passes, _Recording, can_record
from lumen.nn.recompute import Keeping
from lumen.objectives.base import Loss


class Model(torch.nn.Module):
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)


def batch_of(width: int) -> SimpleNamespace:
    batch = SimpleNamespace(tensors={"tokens": torch.zeros(1, width)}, packed=False, extent=f"1 row x {width} tokens")
    batch.to = lambda device: batch
    return batch


@pytest.fixture
def passes(monkeypatch):
    """Batches as wide as `full` exceed the memory while anything is recorded, half of their gradients summed."""

    def loss(model, batch):
        width = batch.tensors["tokens"].shape[1]
        if width == full and made._recordings:
            (width * model.weight).sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Loss(total=(width * (model.weight + model.bias)).sum(), count=torch.tensor(1.0))

    full = 5
    monkeypatch.setattr(Passes, "_record", lambda self, batch: batch)
    monkeypatch.setattr(Passes, "_replay", lambda self, recording, batch: self._pass(batch))
    made = Passes(Model(), loss, capture=True)
    return made


def test_recordings_give_way_to_a_batch_that_finds_no_memory(passes, caplog):
    for _ in range(3):
        passes.run(batch_of(2))
    assert len(passes._recordings) == 1
    with caplog.at_level(logging.WARNING, "lumen"):
        assert passes.run(batch_of(5)).total == 5 * 6
    assert "none is recorded any more" in caplog.text
    assert not passes._recordings and not passes.capture
    for _ in range(4):
        passes.run(batch_of(5))
    assert not passes._recordings
    wanted = torch.full((3,), 3 * 2.0 + 5 * 5.0)
    assert passes.model.weight.grad.equal(wanted) and passes.model.bias.grad.equal(wanted)
    assert passes.model.frozen.grad is None


def test_a_batch_without_memory_and_without_recordings_is_an_error(passes, monkeypatch):
    monkeypatch.setattr(passes, "loss", lambda model, batch: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    monkeypatch.setattr("lumen.memory._told", lambda *told: " ".join(told))
    with pytest.raises(torch.OutOfMemoryError, match="a pass over 1 row x 5 tokens"):
        passes.run(batch_of(5))
    assert passes.capture


@pytest.mark.parametrize(
    ("sparse", "moved", "wanted"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_experts_and_moved_blocks_are_not_recorded(sparse, moved, wanted):
    layers = (SimpleNamespace(sparse=False), SimpleNamespace(sparse=sparse))
    keeping = (Keeping("attention", moved=moved), Keeping())
    assert can_record(SimpleNamespace(spec=SimpleNamespace(layers=layers), keeping=keeping)) is wanted


def test_a_replay_adds_what_was_summed_before_and_writes_over_what_it_wrote_itself(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    model = Model()
    passes = Passes(model, None, capture=True)
    static, grads = batch_of(2), [torch.zeros(3), None]  # the bias takes no part
    graph = SimpleNamespace(replay=lambda: grads[0].fill_(float(static.tensors["tokens"].sum())))
    static.tokens = static.tensors["tokens"]
    loss = Loss(total=torch.tensor(1.0), count=torch.tensor(1.0))
    recording = _Recording(graph=graph, batch=static, loss=loss, grads=grads)

    def replay(value: float) -> float:
        batch = batch_of(2)
        batch.tensors["tokens"] += value
        passes._replay(recording, batch)
        return model.weight.grad.unique().item()

    assert replay(1) == 2 and model.bias.grad is None
    assert replay(2) == 2 + 4 and replay(3) == 2 + 4 + 6
    model.weight.grad = None  # the next step
    assert replay(5) == 10
    model.weight.grad, model.bias.grad = torch.ones(3), torch.ones(3)  # of a batch that ran as it stands
    assert replay(5) == 11 and model.bias.grad.unique() == 1
