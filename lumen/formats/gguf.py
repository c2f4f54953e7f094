"""GGUF v3: typed metadata and aligned tensors in one file, written as a stream and read back with every length checked.

Little endian throughout. A *string* is a u64 length and that many bytes of UTF-8.

    header      "GGUF" · u32 version = 3 · u64 number of tensors · u64 number of metadata entries
    entry       string key · u32 kind · the value; an array is u32 kind of its items · u64 count · the items
    tensor      string name · u32 dimensions · u64 each dimension, *innermost first* · u32 GGML type · u64 offset
    padding     zeros up to a multiple of the alignment, here and after each tensor's data
    data        the tensors in the order of their infos; an offset counts from the start of this section

Shapes here are torch's, outermost first. llama.cpp refuses gaps between tensors, names of 64 bytes and more, and names
that occur twice; so do both halves of this module. A file that came from elsewhere is never trusted: every count and
length is held against the bytes that are left before anything of that size is made.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lumen.errors import CheckpointError, ExportError
from lumen.formats.blocks import CODECS, Codec

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63
MAX_STRING_BYTES = 16 * 2**20
MAX_ARRAY_ITEMS = 64 * 2**20

_STRING, _ARRAY = 8, 9
_SCALARS = {  # kind: (its number in the file, its struct code)
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_KIND_OF_NUMBER = {number: kind for kind, (number, _) in _SCALARS.items()} | {_STRING: "string"}
_CODEC_OF_NUMBER = {codec.number: codec for codec in CODECS.values()}


@dataclass(frozen=True)
class Value:
    """One metadata value and its kind: a scalar as `u32` or `bool`, a `string`, or an array of these: `f32[]`."""

    kind: str
    data: int | float | bool | str | tuple[int | float | bool | str, ...]

    @property
    def item_kind(self) -> str:
        return self.kind.removesuffix("[]")

    @property
    def is_array(self) -> bool:
        return self.kind.endswith("[]")

    def pack(self) -> bytes:
        """The entry without its key: the number of the kind, then the value."""
        if not self.is_array:
            return struct.pack("<I", _number_of(self.kind)) + _pack_items(self.kind, (self.data,))
        head = struct.pack("<IIQ", _ARRAY, _number_of(self.item_kind), len(self.data))
        return head + _pack_items(self.item_kind, self.data)


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor to be written.

    shape   torch's, outermost first; the last dimension is the row that `type` cuts into blocks
    type    the name of a codec in `blocks.CODECS`
    chunks  called once, when the tensor's turn comes; the encoded bytes in order, in pieces of any size
    """

    name: str
    shape: tuple[int, ...]
    type: str
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def size_bytes(self) -> int:
        return _size_bytes(self.shape, CODECS[self.type])


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor in a file that was read; `start` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    start: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def size_bytes(self) -> int:
        return _size_bytes(self.shape, self.codec)


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """What a GGUF file says about itself. The tensors' bytes stay on disk until `read_rows` asks for some."""

    path: Path
    metadata: dict[str, Value] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def read_rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """`count` rows of a tensor (all by default) from row `first` on, decoded: (count, columns) fp32."""
        info = self.tensors[name]
        count = info.rows - first if count is None else count
        assert 0 <= first <= first + count <= info.rows, (name, first, count, info.shape)
        row_bytes = info.codec.row_bytes(info.shape[-1])
        data = torch.empty((count, row_bytes), dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(info.start + first * row_bytes)
            found = file.readinto(data.numpy())
        if found != data.numel():
            raise CheckpointError(
                f"{self.path}: {name!r} wants {data.numel()} bytes, found {found}. Is it being written?"
            )
        return info.codec.decode(data)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_gguf_file(path: Path, metadata: dict[str, Value], tensors: Sequence[GGUFTensor]) -> None:
    """Writes the file in one pass, holding one chunk of one tensor at a time.

    A failure leaves a partial file: write inside `atomic.replacing`. Refused with ExportError, before the file is
    opened: values outside their kind, names that llama.cpp does not take, rows that the type's blocks do not divide.
    """
    head = header(metadata, tensors)
    with path.open("wb") as file:
        file.write(head)
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                written += file.write(chunk.contiguous().view(-1).numpy())
            assert written == tensor.size_bytes, (tensor.name, written, tensor.size_bytes)
            file.write(bytes(-written % ALIGNMENT))


def header(metadata: dict[str, Value], tensors: Sequence[GGUFTensor]) -> bytes:
    """Everything that stands before the data, padded, so that the data of the first tensor follows at once."""
    _refuse_bad_tensors(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_pack_string(key), value.pack()]
        except (struct.error, UnicodeEncodeError) as reason:
            raise ExportError(
                f"metadata {key!r}: a {value.kind} cannot hold {str(value.data)[:80]!r}: {reason}."
            ) from None
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        number = CODECS[tensor.type].number
        parts += [_pack_string(tensor.name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)]
        offset += _padded(tensor.size_bytes)
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _refuse_bad_tensors(tensors: Sequence[GGUFTensor]) -> None:
    seen = set()
    for tensor in tensors:
        name, shape = tensor.name, tensor.shape
        codec = CODECS[tensor.type]
        if name in seen:
            raise ExportError(f"two tensors are called {name!r}; a GGUF file holds each name once.")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ExportError(
                f"{name!r} has {len(name.encode())} bytes; llama.cpp takes names of {MAX_NAME_BYTES} at most."
            )
        if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
            raise ExportError(
                f"{name!r} has shape {shape}; GGUF wants 1 to {MAX_DIMENSIONS} dimensions, none of them 0."
            )
        if shape[-1] % codec.block:
            raise ExportError(f"{name!r} has rows of {shape[-1]}; {codec.name} wants a multiple of {codec.block}.")
        seen.add(name)


def _number_of(kind: str) -> int:
    return _STRING if kind == "string" else _SCALARS[kind][0]


def _pack_items(kind: str, items: Sequence) -> bytes:
    if kind == "string":
        return b"".join(map(_pack_string, items))
    return struct.pack(f"<{len(items)}{_SCALARS[kind][1]}", *items)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _size_bytes(shape: tuple[int, ...], codec: Codec) -> int:
    return math.prod(shape[:-1]) * codec.row_bytes(shape[-1])


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return size + -size % alignment


# --- reading ---------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> GGUFFile:
    """The metadata and the tensors' places in the file at `path`. CheckpointError for whatever is not sound GGUF."""
    with path.open("rb") as file:
        if path.stat().st_size < len(MAGIC):
            raise CheckpointError(f"{path}: wanted a GGUF file, found one of {path.stat().st_size} bytes.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _parse(_Cursor(path, view))


class _Cursor:
    """A place in the file that moves forward and never past the end."""

    def __init__(self, path: Path, view: mmap.mmap):
        self.path = path
        self.view = view
        self.place = 0

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason} (at byte {self.place}). Is this a whole GGUF file?")

    def take(self, size: int, what: str) -> bytes:
        left = len(self.view) - self.place
        if size > left:
            raise self.refuse(f"{what} wants {size} bytes, the file has {left} left")
        self.place += size
        return self.view[self.place - size : self.place]

    def unpack(self, code: str, what: str) -> tuple:
        code = "<" + code
        return struct.unpack(code, self.take(struct.calcsize(code), what))

    def string(self, what: str) -> str:
        (size,) = self.unpack("Q", what)
        if size > MAX_STRING_BYTES:
            raise self.refuse(f"{what} is a string of {size} bytes, more than the {MAX_STRING_BYTES} that lumen reads")
        data = self.take(size, what)
        try:
            return data.decode()
        except UnicodeDecodeError as reason:
            raise self.refuse(f"{what} is not UTF-8: {reason}") from None

    def entry(self) -> tuple[str, Value]:
        name = self.string("a metadata key")
        key = repr(name)
        (number,) = self.unpack("I", key)
        if number != _ARRAY:
            kind = self.kind(number, key)
            return name, Value(kind, next(self.items(kind, 1, key)))
        number, count = self.unpack("IQ", key)
        if count > MAX_ARRAY_ITEMS:
            raise self.refuse(f"{key} is an array of {count} items, more than the {MAX_ARRAY_ITEMS} that lumen reads")
        kind = self.kind(number, key)
        return name, Value(f"{kind}[]", tuple(self.items(kind, count, key)))

    def kind(self, number: int, key: str) -> str:
        if number not in _KIND_OF_NUMBER:
            raise self.refuse(f"{key} is of kind {number}; known are {sorted(_KIND_OF_NUMBER)} and arrays of them")
        return _KIND_OF_NUMBER[number]

    def items(self, kind: str, count: int, key: str) -> Iterator:
        if kind == "string":
            return (self.string(key) for _ in range(count))
        if kind != "bool":
            return iter(self.unpack(f"{count}{_SCALARS[kind][1]}", key))
        data = self.take(count, key)
        if not set(data) <= {0, 1}:
            raise self.refuse(f"{key} is a bool with the value {max(data)}")
        return map(bool, data)


def _parse(cursor: _Cursor) -> GGUFFile:
    if (magic := cursor.take(4, "the magic number")) != MAGIC:
        raise cursor.refuse(f"wanted the magic number {MAGIC!r}, found {magic!r}")
    version, tensor_count, entry_count = cursor.unpack("IQQ", "the header")
    if version != VERSION:
        raise cursor.refuse(f"wanted GGUF version {VERSION}, found {version}")
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key, value = cursor.entry()
        if key in metadata:
            raise cursor.refuse(f"the metadata key {key!r} occurs twice")
        metadata[key] = value
    tensors = _parse_tensors(cursor, tensor_count, _alignment(cursor, metadata))
    return GGUFFile(path=cursor.path, metadata=metadata, tensors=tensors)


def _alignment(cursor: _Cursor, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", Value("u32", ALIGNMENT))
    if value.kind != "u32" or value.data < 1 or value.data & (value.data - 1):
        raise cursor.refuse(f"general.alignment wants a u32 that is a power of two, found {value.kind} {value.data}")
    return value.data


def _parse_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    places: dict[str, tuple[tuple[int, ...], Codec, int]] = {}
    end = 0  # of the tensors so far, padded, from the start of the data
    for _ in range(count):
        name, shape, codec, offset = _parse_tensor(cursor)
        if name in places:
            raise cursor.refuse(f"two tensors are called {name!r}")
        if offset != end:
            raise cursor.refuse(f"{name!r} wants to lie at offset {end}, found {offset}")
        places[name] = (shape, codec, offset)
        end = _padded(offset + _size_bytes(shape, codec), alignment)
    data = _padded(cursor.place, alignment)
    tensors = {}
    for name, (shape, codec, offset) in places.items():
        info = TensorInfo(name=name, shape=shape, codec=codec, start=data + offset)
        if (stop := info.start + info.size_bytes) > len(cursor.view):
            raise cursor.refuse(f"{name!r} ends at byte {stop}, the file has {len(cursor.view)}: it is cut off")
        tensors[name] = info
    return tensors


def _parse_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], Codec, int]:
    name = cursor.string("a tensor's name")
    (dimensions,) = cursor.unpack("I", repr(name))
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.refuse(f"{name!r} has {dimensions} dimensions, wanted 1 to {MAX_DIMENSIONS}")
    *sizes, number, offset = cursor.unpack(f"{dimensions}QIQ", repr(name))
    if 0 in sizes:
        raise cursor.refuse(f"{name!r} has a dimension of 0: {sizes}")
    if number not in _CODEC_OF_NUMBER:
        known = ", ".join(f"{codec.number} ({codec.name})" for codec in CODECS.values())
        raise cursor.refuse(f"{name!r} is of GGML type {number}; lumen reads {known}")
    codec = _CODEC_OF_NUMBER[number]
    if sizes[0] % codec.block:
        raise cursor.refuse(f"{name!r} has rows of {sizes[0]}; {codec.name} wants a multiple of {codec.block}")
    return name, tuple(sizes[::-1]), codec, offset
