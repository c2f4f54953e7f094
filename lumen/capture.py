"""Forward and backward pass of a batch, run as they stand or as one CUDA graph.

A small model's step is a thousand launches that take longer to ask for than to run. A graph asks once: the launches of
one pass are recorded over tensors that stay where they are, and a replay repeats them with what those tensors hold
then. A recording serves batches of one shape, so rows are made equally wide and the number of learned positions is
rounded up (`data/batch.stack`). A shape is recorded when it comes for the third time; shapes that come rarely, as the
last batch of an epoch, run as they stand.

A recording holds the memory of a pass. Where that is missing for a batch of another shape, all recordings are given up
and batches run as they stand: slower, with the same result.

A replay writes its gradients over those of the replay before; what the step had summed until then is added to them.
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
    grads: list[Tensor | None]  # of the parameters that learn, static: a replay writes them


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
        self._learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
        before: list[Tensor | None] = []
        try:
            before += [None if p.grad is None else p.grad.clone() for p in self._learned]
            return self._run_new(shape, batch)
        except torch.OutOfMemoryError:
            LOG.warning(
                "Recorded steps hold the memory that a batch of another shape wants: none is recorded any more."
            )
        if before:  # else the copies themselves found no memory
            self._set_grads(before)
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
        """Records one pass without running it. The passes before have left every buffer in its place."""
        batch = replace(batch, **{name: tensor.clone() for name, tensor in batch.tensors.items()})
        before, graph = [parameter.grad for parameter in self._learned], torch.cuda.CUDAGraph()
        self._set_grads([None] * len(before))  # so that autograd hands its results over and adds nothing
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                loss = self._pass(batch)
            grads = [parameter.grad for parameter in self._learned]
        finally:
            self._set_grads(before)
        return _Recording(graph=graph, batch=batch, loss=loss, grads=grads)

    def _set_grads(self, grads: list[Tensor | None]) -> None:
        for parameter, grad in zip(self._learned, grads, strict=True):
            parameter.grad = grad

    def _replay(self, recording: _Recording, batch: Batch) -> Loss:
        written = [(p, own) for p, own in zip(self._learned, recording.grads, strict=True) if own is not None]
        # what the step has summed until now; what this very recording has, is copied before it is written over
        endangered = [own for parameter, own in written if parameter.grad is own]
        copies = iter(torch._foreach_mul(endangered, 1.0) if endangered else ())
        before = [next(copies) if parameter.grad is own else parameter.grad for parameter, own in written]
        for name, tensor in batch.tensors.items():
            source: Tensor = tensor if tensor.is_cuda else tensor.pin_memory()
            getattr(recording.batch, name).copy_(source, non_blocking=True)
        recording.graph.replay()
        for parameter, own in written:
            parameter.grad = own
        if added := [(own, grad) for (_, own), grad in zip(written, before, strict=True) if grad is not None]:
            torch._foreach_add_(*map(list, zip(*added, strict=True)))
        # copies: the next replay writes over them
        return Loss(total=recording.loss.total.clone(), count=recording.loss.count.clone())
