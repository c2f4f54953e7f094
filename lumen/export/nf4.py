"""A model leaves in 4 bits: safetensors with NF4 weights, laid out as bitsandbytes does it (`prequantized.py`).

transformers with bitsandbytes, vLLM and lumen load it as it is. The linear layers of the blocks are packed, with double
quantization; embedding, head, norms and experts stay as they are stored (transformers holds the experts of a layer in
one tensor, which bitsandbytes cannot pack). Of a base that comes in NF4, what an adapter does not change keeps its
blocks to the bit, and what was left in 16 bits stays so.

A weight is packed twice: once for its small parts and a checksum of its codes, since a file's header and its fp32
tensors come before the codes, and once when the codes are written. So one weight is held at a time.
"""

import tempfile
import zlib
from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lumen.checkpoint import join_pieces, linear_names, open_checkpoint, read_part, stored_dtype
from lumen.errors import ExportError
from lumen.export.merge import base_config, merge
from lumen.formats.atomic import replacing_folder, write_json
from lumen.formats.safetensors import SHARD_BYTES, TensorEntry, write_sharded
from lumen.names import FileTensor, checkpoint_tensors
from lumen.ops.nf4 import NF4, quantize_nf4
from lumen.prequantized import DTYPES, quantization_config, stored_tensors
from lumen.source import Source, find_source
from lumen.spec import ModelSpec
from lumen.weights import Weights


def write_nf4(
    source: Source | Path | str, out: Path | str, *, base: str = "original", shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes the model of `source` in NF4 into the new folder `out`, which is there whole or not at all; returns it.

    source  a run, an adapter or a model, or the path of one; an adapter is merged first, in a folder beside `out`
    base    what it is merged into, as for `merge`: the `original` weights, or their `nf4` image

    Every tensor is read back and compared. Refuses what `merge` refuses, and a weight that cannot be packed
    (KernelError); ExportError for a result that reads back otherwise.
    """
    source = source if isinstance(source, Source) else find_source(str(source))
    with replacing_folder(out) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merge-") as scratch:
        model = source.base
        if source.adapter is not None:
            model = merge(source, Path(scratch) / "merged", base=base, shard_bytes=shard_bytes)
        spec, before = open_checkpoint(source.base, announce=source.adapter is None)
        files = before
        if source.adapter is not None:
            spec, files = open_checkpoint(model)
        with files, before:
            packer, linear = _Packer(files, before), set(linear_names(spec, experts=False))
            sums: dict[str, int] = {}
            entries = []
            for tensor in checkpoint_tensors(spec.tensors()):
                packed = packer.pack(tensor) if tensor.name in linear else None
                if packed is None:
                    entries.append(_dense_entry(tensor, files))
                else:
                    entries += _packed_entries(tensor, packed, packer)
                    sums[tensor.name] = _sum(packed)
            write_sharded(folder, entries, shard_bytes)
            dense = [spec.names.by_role("head").checkpoint, *_dense_layers(spec, sums)]
            config = base_config(model, spec) | {"quantization_config": quantization_config(dense, stored_dtype(spec))}
            write_json(folder / "config.json", config)
            source.tokenizer().save(folder)
            _compare(folder, files, sums)
    return Path(out)


def _dense_layers(spec: ModelSpec, packed: Container[str]) -> list[str]:
    """The layers of the blocks whose matrices stay dense: readers pack or refuse what they are not told to leave."""
    names = [part.name for name in spec.tensors() if name.role.startswith("blocks.") for part in name.parts]
    sizes = {tensor.name: len(tensor.shape) for tensor in checkpoint_tensors(spec.tensors())}
    return [name.removesuffix(".weight") for name in dict.fromkeys(names) if sizes[name] == 2 and name not in packed]


@dataclass(frozen=True)
class _Packer:
    """The model as it is to be written, and the base as it came."""

    files: Weights
    before: Weights

    def pack(self, tensor: FileTensor) -> NF4 | None:
        """The tensor in NF4; None for one that a base in 4 bits has left dense."""
        stored = self.before.packed(tensor.name)
        if self.before.prequantized and stored is None:
            return None
        values = join_pieces(tensor, lambda _, part: read_part(self.files, part))
        if stored is not None and torch.equal(values, self.before.read(tensor.name)):
            return stored
        return quantize_nf4(values if values.dtype in DTYPES.values() else values.float())


def _packed_entries(tensor: FileTensor, packed: NF4, packer: _Packer) -> list[TensorEntry]:
    def codes() -> Tensor:
        return packer.pack(tensor).codes[:, None]

    parts = stored_tensors(tensor.name, packed)
    entries = [TensorEntry(tensor.name, tuple(parts.pop(tensor.name).shape), torch.uint8, codes)]
    return entries + [
        TensorEntry(name, tuple(part.shape), part.dtype, partial(torch.clone, part)) for name, part in parts.items()
    ]


def _dense_entry(tensor: FileTensor, files: Weights) -> TensorEntry:
    def read() -> Tensor:
        return join_pieces(tensor, lambda _, part: read_part(files, part))

    return TensorEntry(tensor.name, tensor.shape, files.dtype(tensor.name), read)


def _sum(packed: NF4) -> int:
    """A checksum of all that an NF4 weight is made of."""
    found = 0
    for tensor in packed.tensors.values():
        found = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found


def _compare(folder: Path, files: Weights, sums: dict[str, int]) -> None:
    spec, written = open_checkpoint(folder, announce=False)
    with written:
        for tensor in checkpoint_tensors(spec.tensors()):
            name, packed = tensor.name, written.packed(tensor.name)
            same = torch.equal(written.read(name), files.read(name)) if packed is None else _sum(packed) == sums[name]
            if not same:
                raise ExportError(f"{folder}: {name!r} reads back otherwise than it was written. Is the disk sound?")
