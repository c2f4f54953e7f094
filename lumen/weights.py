"""The weights of a model folder under the names of its page, whatever form they are stored in.

A `Weights` looks like the folder's `TensorFiles`, but for two things that nothing above it has to know: a vision
model's checkpoint shows its text half alone (`text_half.py`), and an NF4 weight that bitsandbytes packed shows as one
tensor, of the shape and dtype that it had before (`prequantized.py`). `packed` gives its blocks as they are.
"""

from pathlib import Path

import torch
from torch import Tensor

from lumen.errors import CheckpointError, closest
from lumen.formats.safetensors import TensorFiles
from lumen.ops.nf4 import NF4, dequantize_nf4
from lumen.prequantized import DTYPES, State, check_quantization, packed_weights, read_nf4, read_state
from lumen.spec import ModelSpec
from lumen.text_half import own_names


class Weights:
    """The tensors of the model that `spec` describes, each read when it is asked for. A context manager."""

    def __init__(self, folder: Path | str, spec: ModelSpec) -> None:
        """CheckpointError for what `TensorFiles` refuses, and for a quantization that lumen does not read."""
        self._folder, where = Path(folder), str(Path(folder) / "config.json")
        announced = check_quantization(spec.config, where)
        self._files = TensorFiles(folder)
        stored = self._files.names()
        packed = packed_weights(stored)
        if announced != bool(packed):
            raise CheckpointError(
                f"{where}: quantization_config {'announces' if announced else 'does not announce'} 4-bit weights, "
                f"found {len(packed)} of them in the files. Is config.json that of these weights?"
            )
        sides = {side for own in packed.values() for side in own}
        stored = [name for name in stored if name not in sides]
        self.aside: list[str] = []  # tensors of the folder that are no part of the text model
        self._stored = {name: name for name in stored}
        if spec.text_half is not None:
            self._stored, self.aside = own_names(stored, spec.text_half, str(folder))
        self._states: dict[str, State] = {
            own: read_state(self._files, name) for own, name in self._stored.items() if name in packed
        }

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def packed_names(self) -> set[str]:
        """The weights that are stored in NF4."""
        return set(self._states)

    @property
    def prequantized(self) -> bool:
        """Whether the checkpoint comes in 4 bits: then those blocks and what was left beside them are the model."""
        return bool(self._states)

    def names(self) -> list[str]:
        """All tensors of the model, in the order of their names."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._states[name].shape) if name in self._states else self._files.shape(self._stored_name(name))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the stored values; for an NF4 weight the one that it had before."""
        if name in self._states:
            return DTYPES[self._states[name].dtype]
        return self._files.dtype(self._stored_name(name))

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU; an NF4 weight dequantized, rounded to the dtype that it had."""
        packed = self.packed(name)
        return self._files.read(self._stored_name(name)) if packed is None else dequantize_nf4(packed)

    def packed(self, name: str) -> NF4 | None:
        """The blocks of a weight that is stored in NF4, on the CPU; None for any other tensor."""
        if name not in self._states:
            return None
        return read_nf4(self._files, self._stored_name(name), self._states[name])

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor, for messages."""
        return self._files.file_of(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:
            raise CheckpointError(f"{self._folder}: there is no tensor {name!r}.{closest(name, self._stored)}")
        return self._stored[name]
