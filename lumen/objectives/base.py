"""What the loop asks of an objective: two methods, and the position in the data that a checkpoint keeps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lumen.data.batch import Batch
from lumen.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one batch costs, as sums: only the loop knows how many tokens the step's other batches hold."""

    total: Tensor  # fp32 scalar with a gradient: the sum over counted tokens
    count: Tensor  # fp32 scalar: how many tokens counted
    metrics: dict[str, Tensor] = field(default_factory=dict)  # further sums over the batch, reported divided by `count`


class Objective(Protocol):
    def batches(self, model: Decoder) -> Iterator[list[Batch]]:
        """The micro-batches of one step after another, without end, from the objective's position on; on the CPU."""

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """The cost of one batch that lies on the model's device."""

    def position(self) -> dict[str, int]:
        """Where in the data the next batch begins, as JSON: what a checkpoint keeps."""

    def epochs_done(self) -> float:
        """Passes over the data so far, with the fraction of the present one."""
