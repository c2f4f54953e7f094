"""Supervised fine-tuning: the cross-entropy of the learned tokens.

    loss = − Σ log p(target | what came before in its document)  /  number of learned tokens

summed here, divided by the loop over all micro-batches of a step, so that a token weighs the same however the step is
split.
"""

import math
from collections.abc import Iterator

import torch

from lumen.data.batch import Batch, RowStream, batches, one_ahead
from lumen.data.packing import Packed
from lumen.memory import OF_A_PASS, memory_told
from lumen.models.decoder import Decoder
from lumen.objectives.base import Loss
from lumen.ops.linear_loss import linear_cross_entropy


class SFT:
    """Rows of encoded examples, in an order that depends on the seed and the epoch alone.

    A step takes `batch_size * accumulate` rows, or what is left of the epoch, however they are split into
    micro-batches.
    """

    def __init__(
        self,
        packed: Packed,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        position: dict[str, int] | None = None,
        fixed_shapes: bool = False,
        ahead: bool = False,
    ):
        """position      where an earlier run stood, as `position()` said; None begins the first epoch
        fixed_shapes  every batch is as wide as the longest row of all, as a captured step wants it
        ahead         a step's batches are made by another thread while the step before runs
        """
        self.width = packed.longest if fixed_shapes else 0
        self.packed = packed
        self.batch_size, self.accumulate = batch_size, accumulate
        self._stream = RowStream(packed.rows, seed=seed, **(position or {}))
        self._ahead, self._stands = ahead, (self._stream.epoch, self._stream.position)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.packed.rows) / (self.batch_size * self.accumulate))

    def batches(self, model: Decoder) -> Iterator[list[Batch]]:
        steps = self._steps()
        for micro, stands in one_ahead(steps) if self._ahead else steps:
            self._stands = stands
            yield micro

    def _steps(self) -> Iterator[tuple[list[Batch], tuple[int, int]]]:
        """The micro-batches of each step, and where the stream stands after them: a thread may be a step further.

        It makes tensors and calls nothing of CUDA, which would break a graph that the loop is recording: pinning, a
        tenth of a millisecond, stays with who copies.
        """
        while True:
            rows = self._stream.take(self.batch_size * self.accumulate)
            yield list(batches(rows, self.batch_size, self.width)), (self._stream.epoch, self._stream.position)

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        return sft_loss(model, batch)

    def position(self) -> dict[str, int]:
        return dict(zip(("epoch", "position"), self._stands, strict=True))

    def epochs_done(self) -> float:
        epoch, position = self._stands
        return epoch + position / len(self.packed.rows)


def sft_loss(model: Decoder, batch: Batch) -> Loss:
    """Summed cross-entropy of `batch`; logits exist for one chunk of learned positions at a time."""
    hidden = model(batch.tokens, batch.position, batch.document if batch.packed else None)  # (B, T, D)
    total, count = linear_cross_entropy(
        hidden.flatten(0, 1),
        model.head_weight,
        batch.target.flatten(),
        model.spec.logits_softcap,
        counted=batch.learned,
    )
    return Loss(total=total, count=count)


@torch.no_grad()
def mean_loss(model: Decoder, packed: Packed, batch_size: int) -> float:
    """Mean cross-entropy per learned token over all of `packed`, with dropout off. The model's mode is put back."""
    training = model.training
    model.eval()
    total = count = 0.0
    for batch in batches(packed.rows, batch_size):
        with memory_told(f"an evaluation of {batch.extent}", OF_A_PASS):
            loss = sft_loss(model, batch.to(model.device))
        total, count = total + loss.total.item(), count + loss.count.item()
    model.train(training)
    return total / count
