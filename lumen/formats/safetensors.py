"""Tensors in .safetensors files: one file, or a folder of shards with an index, as the Hugging Face hub lays them out.

A file is 8 bytes with the header's length (little-endian), the header as JSON, and the tensors' bytes:

    {"__metadata__": {"format": "pt"}, "norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}, …}

Offsets count from the end of the header, in bytes; the tensors cover the rest of the file without a gap. A folder holds
`model.safetensors`, or shards and `model.safetensors.index.json`, whose "weight_map" names the shard of each tensor.

Reading is done by the safetensors library, which checks header and offsets and maps the file into memory: opening
costs the header, a tensor costs its pages when they are first touched. Writing is done here, since the library wants
all tensors of a file at once: the header is known from shapes and dtypes alone, so the tensors can follow it one by
one, and a write holds one tensor in memory, however large the shard.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import msgspec
import safetensors
import torch
from torch import Tensor

from lumen.errors import CheckpointError, closest
from lumen.formats.atomic import replacing

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
METADATA = {"format": "pt"}  # other readers refuse a file that does not say which framework's layout it has
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}  # told from other files only to say why they are refused; never opened

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


class TensorFiles:
    """The tensors of a checkpoint folder, each read when it is asked for. A context manager; closing it is optional.

    Opening reads the headers only. A CheckpointError says what is wrong with the folder: no weights or only pickles, a
    damaged file, shards that are missing or lie elsewhere, tensors on which the index and the shards disagree.
    """

    def __init__(self, folder: Path | str, *, file: str | None = None) -> None:
        """file  one file of the folder to read alone, whatever else is there; None reads the folder's weights"""
        self._folder = Path(folder)
        index = None if file else _read_index(self._folder)
        names = sorted(set(index.values())) if index else [file or SINGLE]
        with ExitStack() as opened:
            self._shards = {name: opened.enter_context(_open(self._folder / name)) for name in names}
            self._shard_of = _locate(self._folder, self._shards, index)
            self._opened = opened.pop_all()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets the files. Tensors that were read stay valid: each keeps its file mapped."""
        self._opened.close()

    def names(self) -> list[str]:
        """All tensors, in the order of their names."""
        return sorted(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        word = self._slice(name).get_dtype()
        if word not in DTYPES:
            raise CheckpointError(
                f"{self.file_of(name)}: {name!r} has dtype {word}, which lumen cannot compute with. "
                f"Convert the checkpoint to one of {', '.join(DTYPES)}."
            )
        return DTYPES[word]

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, its memory being the file's own pages; writing to it never reaches the file."""
        self.dtype(name)  # refuses what lumen cannot compute with
        return self._shards[self._shard_of[name]].get_tensor(name)

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor, for messages."""
        if name not in self._shard_of:
            raise CheckpointError(f"{self._folder}: there is no tensor {name!r}.{closest(name, self._shard_of)}")
        return self._folder / self._shard_of[name]

    def _slice(self, name: str) -> object:
        return self._shards[self.file_of(name).name].get_slice(name)


def open_file(path: Path | str) -> TensorFiles:
    """The tensors of one .safetensors file, as an adapter's. Refusals are those of `TensorFiles`."""
    path = Path(path)
    return TensorFiles(path.parent, file=path.name)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that will be written: what the header says of it, and where its values come from when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_sharded(
    folder: Path | str,
    entries: list[TensorEntry],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Writes a checkpoint's tensors into an existing folder, as one file or as shards and an index.

    Shards are filled in the order of `entries`; a tensor larger than `shard_bytes` has a shard for itself. One tensor
    is held at a time. No file gets its name before all are on the disk, so a failure leaves an older checkpoint intact.
    Refused with a CheckpointError: a folder with weights that would stay beside the new ones, a name that comes twice,
    a tensor that is not as its entry says. A full disk raises the LumenError of `replacing`.
    """
    folder = Path(folder)
    if repeated := [name for name, times in Counter(entry.name for entry in entries).items() if times > 1]:
        raise CheckpointError(f"{folder}: more than one tensor is called {repeated[0]!r}. Give each its own name.")
    shards = _fill_shards(entries, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    _refuse_leftovers(folder, {*names, INDEX} if len(shards) > 1 else {SINGLE})
    with ExitStack() as renames:
        if len(shards) > 1:  # entered first, so renamed last: an index never names a shard that is not there yet
            index = renames.enter_context(replacing(folder / INDEX))
            index.write_text(json.dumps(_index(shards, names), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards, strict=True):
            _write(renames.enter_context(replacing(folder / name)), shard, metadata)


def write_file(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = METADATA) -> None:
    """Writes one .safetensors file of tensors that are in memory. A full disk raises the LumenError of `replacing`."""
    entries = [
        TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    with replacing(path) as temporary:
        _write(temporary, entries, metadata)


# Reading: the folder


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard name, checked to lie in the folder; None if the folder's weights are `model.safetensors`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Name the folder that holds config.json and weights.")
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if not os.path.lexists(single):
            raise CheckpointError(_without_weights(folder))
        _check_inside(folder, SINGLE, single)
        return None
    shard_of = _parse_index(index)
    for shard in set(shard_of.values()):
        _check_inside(folder, shard, index)
    if single.exists() and SINGLE not in shard_of.values():
        raise CheckpointError(f"{folder}: holds two checkpoints, {SINGLE} and the shards of {INDEX}. Remove one.")
    missing = sorted({shard for shard in shard_of.values() if not (folder / shard).is_file()})
    if missing:
        raise CheckpointError(f"{index}: names {', '.join(missing)}, not in the folder. Download the checkpoint again.")
    return shard_of


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def _parse_index(path: Path) -> dict[str, str]:
    wanted = '{"weight_map": {"tensor": "shard.safetensors", …}} was wanted'
    try:
        shard_of = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and msgspec's own are ValueErrors
        raise CheckpointError(f"{path}: {wanted}, found: {error}. Download the file again.") from error
    if not shard_of:
        raise CheckpointError(f"{path}: {wanted}, found a map of no tensors. Download the file again.")
    return shard_of


def _check_inside(folder: Path, shard: str, where: Path) -> None:
    """Refuses a name that leads out of the folder: an index is as foreign as the checkpoint it came with."""
    if shard != Path(shard).name or not shard.endswith(".safetensors") or not shard.isprintable():
        raise CheckpointError(
            f"{where}: {shard!r} is not the name of a .safetensors file in this folder, and is not opened. "
            f"Do not trust this checkpoint."
        )
    target, real = Path(os.path.realpath(folder / shard)), Path(os.path.realpath(folder))
    if target.parent != real and not (real.parent.name == "snapshots" and _is_blob(target, real.parent.parent)):
        raise CheckpointError(
            f"{folder / shard}: is a link to {target}, outside of its folder, and is not opened. "
            f"If you trust that file, copy it here in the link's place."
        )


def _is_blob(target: Path, repository: Path) -> bool:
    """Whether a link of the Hub's cache leads where its client keeps files.

    snapshots/COMMIT/NAME links to blobs/SHA256 of its repository; that may be a link itself, to blobs/XX/HASH of the
    cache, which all repositories share.
    """
    return target.parent == repository / "blobs" or target.parent.parent == repository.parent / "blobs"


def _without_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES | {".safetensors"})
    wanted = f"{folder}: {SINGLE} or {INDEX} was wanted, found {', '.join(found) or 'no weights'}."
    if any(Path(name).suffix in PICKLES for name in found):
        return f"{wanted} A pickle can run any program when it is opened: get the checkpoint's safetensors version."
    if "adapter_model.safetensors" in found:
        return f"{wanted} This is an adapter: load it onto the model it was trained from."
    return f"{wanted} Is this the right folder, and did its download finish?"


# Reading: files


def _open(path: Path) -> safetensors.safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path}: a .safetensors file was wanted, there is none. Is the name right?")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: a whole safetensors file was wanted, found {path.stat().st_size:,} bytes that are not one "
            f"({error}). Download or write the file again."
        ) from error
    except (RuntimeError, MemoryError) as error:  # a copy-on-write map: Linux wants memory that could back all of it
        raise CheckpointError(
            f"{path}: {path.stat().st_size:,} bytes cannot be mapped into memory ({error}). "
            f"Save the checkpoint in smaller shards, or give the machine more memory or swap."
        ) from error


def _locate(folder: Path, shards: dict[str, safetensors.safe_open], index: dict[str, str] | None) -> dict[str, str]:
    """Tensor name -> shard name, as the shards themselves have it; refuses what the index says otherwise."""
    shard_of: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.keys():  # noqa: SIM118 - a safe_open is no dict
            if name in shard_of:
                raise CheckpointError(
                    f"{folder}: {name!r} is in two shards, {shard_of[name]} and {shard}. Download the checkpoint again."
                )
            shard_of[name] = shard
    if index is None or index == shard_of:
        return shard_of
    name = min(name for name in index.keys() | shard_of.keys() if index.get(name) != shard_of.get(name))
    raise CheckpointError(
        f"{folder / INDEX}: puts {name!r} in {index.get(name, 'no shard')}, found it in {shard_of.get(name, 'none')}. "
        f"Index and shards are of different checkpoints: download them again."
    )


# Writing


def _fill_shards(entries: list[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    """Entries in their order, cut where the next one would not fit."""
    shards: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.size_bytes
    return shards


def _index(shards: list[list[TensorEntry]], names: list[str]) -> dict:
    return {
        "metadata": {"total_size": sum(entry.size_bytes for shard in shards for entry in shard)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }


def _refuse_leftovers(folder: Path, written: set[str]) -> None:
    """A reader could not tell which of two checkpoints in one folder counts."""
    weights = {path.name for path in folder.glob("model*.safetensors*")}
    if leftovers := sorted(weights - written):
        raise CheckpointError(
            f"{folder}: has weights that this checkpoint would not replace: {', '.join(leftovers)}. "
            f"Remove them, or write to another folder."
        )


def _write(path: Path, entries: list[TensorEntry], metadata: Mapping[str, str]) -> None:
    # Widest dtype first: then every tensor starts at a multiple of its item size, which mapped memory needs.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with open(path, "wb") as file:
        file.write(_header(entries, metadata))
        for entry in entries:
            file.write(_bytes_of(entry))
        file.flush()
        os.fsync(file.fileno())  # a disk may only now be found full, and no shard may have its name by then


def _header(entries: list[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    ends = list(accumulate((entry.size_bytes for entry in entries), initial=0))
    fields: dict[str, dict] = {"__metadata__": dict(metadata)}
    for entry, start, end in zip(entries, ends, ends[1:], strict=False):
        fields[entry.name] = {"dtype": WORDS[entry.dtype], "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8, the widest item
    return len(text).to_bytes(8, "little") + text


def _bytes_of(entry: TensorEntry) -> memoryview:
    tensor = entry.read().detach()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise CheckpointError(
            f"{entry.name!r} was to be written as {entry.dtype} {entry.shape}, found {tensor.dtype} "
            f"{tuple(tensor.shape)}. The header is written already: correct the entry."
        )
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
