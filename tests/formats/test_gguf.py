"""The GGUF container: what we write is read by the `gguf` package, and no damaged file is believed."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lumen.errors import CheckpointError, ExportError, LumenError
from lumen.formats.blocks import CODECS
from lumen.formats.gguf import GGUFTensor, Value, header, read_gguf, write_gguf_file

METADATA = {
    "general.architecture": Value("string", "llama"),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65535),
    "a.i16": Value("i16", -32768),
    "a.u32": Value("u32", 2**32 - 1),
    "a.i32": Value("i32", -(2**31)),
    "a.f32": Value("f32", 0.5),
    "a.bool": Value("bool", True),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f64": Value("f64", 1e-300),
    "text": Value("string", "für 世界 🙂\n"),
    "empty.text": Value("string", ""),
    "texts": Value("string[]", ("a", "", "Ġb")),
    "numbers": Value("i32[]", (1, -2, 3)),
    "scores": Value("f32[]", (0.5, -1.0)),
    "flags": Value("bool[]", (True, False)),
    "none": Value("u32[]", ()),
}


def tensor(name: str, values: torch.Tensor, kind: str = "f32") -> GGUFTensor:
    rows = values.reshape(-1, values.shape[-1])
    return GGUFTensor(name=name, shape=tuple(values.shape), type=kind, chunks=lambda: [CODECS[kind].encode(rows)])


def write_small(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {
        "vector.weight": torch.randn(5, generator=generator),
        "matrix.weight": torch.randn(3, 64, generator=generator),
        "stack.weight": torch.randn(2, 3, 32, generator=generator),
    }
    kinds = {"vector.weight": "f32", "matrix.weight": "q8_0", "stack.weight": "f16"}
    write_gguf_file(path, METADATA, [tensor(name, value, kinds[name]) for name, value in values.items()])
    return values


def test_everything_written_is_read_back(tmp_path):
    values = write_small(tmp_path / "small.gguf")
    file = read_gguf(tmp_path / "small.gguf")
    assert file.metadata == METADATA
    assert list(file.tensors) == list(values)
    for name, value in values.items():
        codec = file.tensors[name].codec
        rows = value.reshape(-1, value.shape[-1])
        assert file.tensors[name].shape == tuple(value.shape)
        assert torch.equal(file.read_rows(name), codec.decode(codec.encode(rows)))
    assert torch.equal(file.read_rows("stack.weight", 4, 1), file.read_rows("stack.weight")[4:5])


def test_the_gguf_package_reads_the_same_metadata_and_tensors(tmp_path):
    values = write_small(tmp_path / "small.gguf")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    theirs = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.") and key != "none"
    }
    assert theirs == {key: list(v.data) if v.is_array else v.data for key, v in METADATA.items() if key != "none"}
    for found, (name, value) in zip(reader.tensors, values.items(), strict=True):
        assert found.name == name
        assert tuple(found.shape)[::-1] == tuple(value.shape)
        decoded = gguf.dequantize(found.data, found.tensor_type)
        assert np.allclose(decoded, value.numpy(), atol=0.02)


def test_every_tensor_and_the_end_of_the_file_are_aligned(tmp_path):
    path = tmp_path / "small.gguf"
    write_small(path)
    assert all(info.start % 32 == 0 for info in read_gguf(path).tensors.values())
    assert path.stat().st_size % 32 == 0


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "phi-3"])
def test_metadata_of_files_from_llama_cpp_is_packed_to_the_same_bytes(shared_data, tmp_path, name):
    path = shared_data / "vocab" / f"ggml-vocab-{name}.gguf"
    file = read_gguf(path)
    assert len(file.metadata["tokenizer.ggml.tokens"].data) == len(file.metadata["tokenizer.ggml.token_type"].data)
    ours = header(file.metadata, []).rstrip(b"\0")
    assert path.read_bytes().startswith(ours)


def test_offsets_beyond_four_gibibytes_are_right(tmp_path):
    """Three tensors of 2 GiB as a sparse file: the header is ours, the data a hole with one marked row."""
    tensors = [GGUFTensor(name=f"t{i}", shape=(2**19, 2**10), type="f32", chunks=list) for i in range(3)]
    head = header({}, tensors)
    path = tmp_path / "large.gguf"
    marker = np.arange(2**10, dtype=np.float32)
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + 2 * 2**31 + 7 * 2**12)
        file.write(marker.tobytes())
        file.truncate(len(head) + 3 * 2**31)
    ours = read_gguf(path)
    assert ours.tensors["t2"].start == len(head) + 2**32
    assert np.array_equal(ours.read_rows("t2", 7, 1)[0].numpy(), marker)
    theirs = gguf.GGUFReader(path).tensors[2]
    assert np.array_equal(theirs.data.reshape(2**19, 2**10)[7], marker)


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"a.count": Value("u32", -1)}, [], "'a.count': a u32 cannot hold '-1'"),
        ({"a.count": Value("u32", 1.5)}, [], "'a.count': a u32 cannot hold '1.5'"),
        ({"a.text": Value("string", "\ud800")}, [], "'a.text': a string cannot hold"),
        ({}, [("x", (3, 40), "q8_0")], "rows of 40; q8_0 wants a multiple of 32"),
        ({}, [("x", (), "f32")], "1 to 4 dimensions"),
        ({}, [("x", (1, 1, 1, 1, 1), "f32")], "1 to 4 dimensions"),
        ({}, [("x", (0, 4), "f32")], "none of them 0"),
        ({}, [("x" * 64, (4,), "f32")], "64 bytes"),
        ({}, [("x", (4,), "f32"), ("x", (4,), "f32")], "two tensors are called 'x'"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path, metadata, tensors, words):
    entries = [GGUFTensor(name=name, shape=shape, type=kind, chunks=list) for name, shape, kind in tensors]
    with pytest.raises(ExportError, match=words):
        write_gguf_file(tmp_path / "x.gguf", metadata, entries)
    assert not list(tmp_path.iterdir())


# --- damaged and hostile files ---------------------------------------------------------------------------------------


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _file(
    entries: bytes = b"", entry_count: int = 0, infos: bytes = b"", tensor_count: int = 0, data: bytes = b""
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, entry_count) + entries + infos
    return head + bytes(-len(head) % 32) + data


def _info(name: bytes = b"x", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HOSTILE = {
    "empty": (b"", "0 bytes"),
    "other magic": (b"GGML" + bytes(60), "magic number"),
    "other version": (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "wanted GGUF version 3, found 2"),
    "header cut": (b"GGUF" + struct.pack("<I", 3), "the header wants 20 bytes"),
    "entries without end": (_file(entry_count=2**63), "'' wants 4 bytes"),
    "tensors without end": (_file(tensor_count=2**63), "'' wants 4 bytes"),
    "key longer than the file": (_file(struct.pack("<Q", 2**20), 1), "a metadata key wants 1048576 bytes"),
    "key of 2^63 bytes": (_file(struct.pack("<Q", 2**63), 1), "more than the 16777216"),
    "key not UTF-8": (_file(_string(b"\xff\xfe") + struct.pack("<IB", 0, 1), 1), "not UTF-8"),
    "unknown kind": (_file(_string(b"k") + struct.pack("<I", 99), 1), "kind 99"),
    "array of arrays": (_file(_string(b"k") + struct.pack("<IIQ", 9, 9, 1), 1), "kind 9"),
    "array beyond the limit": (_file(_string(b"k") + struct.pack("<IIQ", 9, 0, 2**62), 1), "more than the 67108864"),
    "array beyond the file": (_file(_string(b"k") + struct.pack("<IIQ", 9, 4, 2**20), 1), "'k' wants 4194304 bytes"),
    "bool of 2": (_file(_string(b"k") + struct.pack("<IB", 7, 2), 1), "bool with the value 2"),
    "key twice": (_file(2 * (_string(b"k") + struct.pack("<IB", 0, 1)), 2), "'k' occurs twice"),
    "alignment of 24": (_file(_string(b"general.alignment") + struct.pack("<II", 4, 24), 1), "power of two"),
    "alignment of 0": (_file(_string(b"general.alignment") + struct.pack("<II", 4, 0), 1), "power of two"),
    "alignment as text": (
        _file(_string(b"general.alignment") + struct.pack("<I", 8) + _string(b"32"), 1),
        "power of two",
    ),
    "tensor twice": (_file(infos=_info() + _info(offset=32), tensor_count=2, data=bytes(64)), "two tensors"),
    "no dimensions": (_file(infos=_info(sizes=()), tensor_count=1, data=bytes(32)), "0 dimensions"),
    "five dimensions": (_file(infos=_info(sizes=(1,) * 5), tensor_count=1, data=bytes(32)), "5 dimensions"),
    "dimension of 0": (_file(infos=_info(sizes=(4, 0)), tensor_count=1, data=bytes(32)), "dimension of 0"),
    "unknown type": (_file(infos=_info(kind=200), tensor_count=1, data=bytes(32)), "GGML type 200"),
    "row not in blocks": (_file(infos=_info(sizes=(40,), kind=8), tensor_count=1, data=bytes(64)), "multiple of 32"),
    "product over 2^64": (_file(infos=_info(sizes=(2**40, 2**40)), tensor_count=1, data=bytes(32)), "cut off"),
    "gap before a tensor": (_file(infos=_info(offset=32), tensor_count=1, data=bytes(64)), "offset 0, found 32"),
    "overlapping tensors": (_file(infos=_info() + _info(b"y"), tensor_count=2, data=bytes(64)), "offset 32, found 0"),
    "data missing": (_file(infos=_info(), tensor_count=1), "cut off"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path, data, words):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as error:
        read_gguf(path)
    assert "bad.gguf" in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "small.gguf"
    write_small(path)
    data = path.read_bytes()
    for size in {*range(0, len(data), 7), len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_a_flipped_byte_is_refused_or_read_but_never_crashes(tmp_path):
    path = tmp_path / "small.gguf"
    write_small(path)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for place in generator.integers(0, 800, size=400):
        changed = data.copy()
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        try:
            file = read_gguf(path)
            assert all(file.read_rows(name).ndim == 2 for name in file.tensors)
        except LumenError:
            continue
