"""What the loop asks of an objective: where batches come from, what they cost, and where in the data it stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lumen.data.batch import Batch
from lumen.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one batch costs, as sums: only the loop knows how many tokens the step's other batches hold."""

    total: Tensor  # fp32 scalar with a gradient: the sum over counted tokens
    count: Tensor  # fp32 scalar: how many tokens counted


class Objective(Protocol):
    def batches(self, model: Decoder) -> Iterator[list[Batch]]:
        """The micro-batches of one step after another, without end, from the objective's position on; on the CPU."""

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """The cost of one batch that lies on the model's device."""

    def position(self) -> dict[str, int]:
        """Where in the data the next batch begins, as JSON: what a checkpoint keeps."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""

    def epochs_done(self) -> float:
        """Passes over the data so far, with the fraction of the present one."""
