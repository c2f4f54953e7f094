"""Forward and backward pass of a batch, run as they stand or as one CUDA graph.

A small model's step is a thousand launches that take longer to ask for than to run. A graph asks once: the launches of
one pass are recorded over tensors that stay where they are, and a replay repeats them with what those tensors hold
then. A recording serves batches of one shape, so rows are made equally wide and the number of learned positions is
rounded up (`data/batch.stack`). A shape is recorded when it comes for the third time; shapes that come rarely, as the
last batch of an epoch, run as they stand.

A recording holds the memory of a pass. Where that is missing for a batch of another shape, all recordings are given up
and batches run as they stand: slower, with the same result.

Gradients are summed into the same tensors by both, so an optimizer that goes with this sets them to zero in place.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumen.data.batch import Batch
from lumen.memory import OF_A_PASS, memory_told
from lumen.models.decoder import Decoder
from lumen.objectives.base import Loss

LOG = logging.getLogger("lumen")
MOST = 6  # recordings: each may hold as much memory as one pass


@dataclass(frozen=True, kw_only=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Batch  # static: a replay reads it
    loss: Loss  # static: a replay writes it


def can_record(model: Decoder) -> bool:
    """Whether a pass asks the device for nothing: not where experts, multiplied one by one, want their numbers of rows,
    nor where what blocks keep is moved to the host's memory."""
    experts = any(layer.sparse for layer in model.spec.layers)
    return not experts and not any(keeping.moved for keeping in model.keeping)


class Passes:
    """Runs batches and sums their gradients into the parameters; `run` is all there is to call.

    loss     of a batch, as an objective computes it
    capture  False runs every batch as it stands
    """

    def __init__(self, model: Decoder, loss: Callable[[Decoder, Batch], Loss], *, capture: bool):
        self.model, self.loss, self.capture = model, loss, capture
        self._seen: Counter[tuple] = Counter()
        self._recordings: dict[tuple, _Recording] = {}

    def run(self, batch: Batch) -> Loss:
        """Sums the gradients of one batch, which may still lie on the CPU; its loss, detached, on the device.

        OutOfMemory where the GPU's memory does not suffice; gradients may then be summed in part.
        """
        with memory_told(f"a pass over {batch.extent}", OF_A_PASS):
            return self._run(batch)

    def _run(self, batch: Batch) -> Loss:
        shape = (*((name, tensor.shape) for name, tensor in batch.tensors.items()), batch.packed)
        if shape in self._recordings:
            return self._replay(self._recordings[shape], batch)
        self._seen[shape] += 1
        batch = batch.to(self.model.device)
        if not self._recordings:
            return self._run_new(shape, batch)
        learned, before = [p for p in self.model.parameters() if p.requires_grad], []
        try:
            before += [None if p.grad is None else p.grad.clone() for p in learned]
            return self._run_new(shape, batch)
        except torch.OutOfMemoryError:
            LOG.warning(
                "Recorded steps hold the memory that a batch of another shape wants: none is recorded any more."
            )
        for parameter, grad in zip(learned, before, strict=False):  # none where the copies themselves found no memory
            parameter.grad = grad
        self._recordings.clear()
        self.capture = False
        torch.cuda.empty_cache()
        return self._run_new(shape, batch)

    def _run_new(self, shape: tuple, batch: Batch) -> Loss:
        if self.capture and self._seen[shape] > 2 and len(self._recordings) < MOST:
            self._recordings[shape] = self._record(batch)
            return self._replay(self._recordings[shape], batch)
        return self._pass(batch)

    def _pass(self, batch: Batch) -> Loss:
        loss = self.loss(self.model, batch)
        loss.total.backward()
        return replace(loss, total=loss.total.detach())

    def _record(self, batch: Batch) -> _Recording:
        """Records one pass without running it. The passes before have left every buffer and gradient in its place."""
        batch = replace(batch, **{name: tensor.clone() for name, tensor in batch.tensors.items()})
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            loss = self._pass(batch)
        return _Recording(graph=graph, batch=batch, loss=loss)

    @staticmethod
    def _replay(recording: _Recording, batch: Batch) -> Loss:
        for name, tensor in batch.tensors.items():
            source: Tensor = tensor if tensor.is_cuda else tensor.pin_memory()
            getattr(recording.batch, name).copy_(source, non_blocking=True)
        recording.graph.replay()
        # copies: the next replay writes over them
        return Loss(total=recording.loss.total.clone(), count=recording.loss.count.clone())
