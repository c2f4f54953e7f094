"""Files written here are read by the safetensors library and back; damaged folders are refused by name."""

import errno
import json
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumen.errors import CheckpointError, LumenError
from lumen.formats.safetensors import (
    DTYPES,
    INDEX,
    SINGLE,
    TensorEntry,
    TensorFiles,
    open_file,
    write_file,
    write_sharded,
)

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entries_of(tensors: dict[str, Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def header_file(path: Path, header: dict | bytes, data: bytes = bytes(8)) -> Path:
    """A file with this very header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(5, i + 1, generator=generator) for i in range(4)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """`a` and `b` in the first shard, `c` in the second, written by the safetensors library."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / SHARD_1)
    save_file({"c": torch.ones(4)}, tmp_path / SHARD_2)
    write_index(tmp_path, {"a": SHARD_1, "b": SHARD_1, "c": SHARD_2})
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))


# What is written


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 3), (2, 3, 5)], ids=str)
def test_every_dtype_and_shape_makes_the_round_trip(tmp_path: Path, dtype: torch.dtype, shape: tuple) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    write_file(tmp_path / "x.safetensors", {"x": tensor})
    with open_file(tmp_path / "x.safetensors") as files:
        assert (files.shape("x"), files.dtype("x")) == (shape, dtype)
        assert torch.equal(files.read("x").view(torch.uint8), tensor.view(torch.uint8)) if shape else True
        assert torch.equal(files.read("x").float(), tensor.float())
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"].float(), tensor.float())


def test_a_file_equals_the_librarys_own_byte_for_byte(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_file(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_narrow_dtype_first_does_not_misalign_the_next(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5), "c": torch.ones(1, dtype=torch.float64)}
    write_file(tmp_path / "x.safetensors", tensors)
    files = open_file(tmp_path / "x.safetensors")
    assert all(files.read(name).data_ptr() % files.dtype(name).itemsize == 0 for name in "abc")
    assert all(torch.equal(files.read(name), tensors[name]) for name in "abc")


def test_transposed_and_learned_tensors_are_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T.requires_grad_()
    write_file(tmp_path / "x.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_what_fits_one_shard_is_a_single_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, entries_of(tensors), shard_bytes=200)
    assert names(tmp_path) == [SINGLE]
    assert load_file(tmp_path / SINGLE).keys() == tensors.keys()


def test_shards_are_filled_in_order_and_the_index_names_each(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, entries_of(tensors), shard_bytes=70)  # the tensors have 20, 40, 60 and 80 bytes
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert names(tmp_path) == [first, second, third, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert list(index["weight_map"].values()) == [first, first, second, third]
    with TensorFiles(tmp_path) as files:
        assert files.names() == sorted(tensors)
        assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())
        assert files.file_of("layers.2.weight") == tmp_path / second


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    write_sharded(tmp_path, entries_of(model.state_dict()), shard_bytes=4000)
    assert (tmp_path / INDEX).exists()
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from lumen.formats.safetensors import TensorEntry, write_sharded
entries = [TensorEntry(str(i), (2**20,), torch.float32, lambda: torch.ones(2**20)) for i in range(64)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_sharded(sys.argv[1], entries)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown_kib = int(subprocess.check_output([sys.executable, "-c", code, tmp_path]))
    assert (tmp_path / SINGLE).stat().st_size > 2**28
    assert grown_kib < 32 * 1024  # the file has 256 MiB, a tensor 4


def test_an_entry_that_reads_something_else_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.bfloat16)):
        with pytest.raises(CheckpointError, match=r"'x' was to be written as torch.float32 \(2,\), found"):
            write_sharded(tmp_path, [TensorEntry("x", (2,), torch.float32, lambda wrong=wrong: wrong)])
    assert names(tmp_path) == []


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="called 'x'"):
        write_sharded(tmp_path, entries_of({"x": torch.ones(2)}) * 2)
    with pytest.raises(CheckpointError, match="called 'x'"):
        write_sharded(tmp_path, entries_of({"x": torch.ones(2)}) * 2, shard_bytes=8)


def test_weights_that_would_stay_beside_the_new_ones_are_refused(sharded: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=f"would not replace: {SHARD_1}, {SHARD_2}, {INDEX}"):
        write_sharded(sharded, entries_of(tensors))
    assert names(sharded) == [SHARD_1, SHARD_2, INDEX]


def test_a_full_disk_leaves_the_older_checkpoint_intact(sharded: Path) -> None:
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(LumenError, match=f"{SHARD_2}: cannot be written, file too large after 4,096 bytes"):
            write_sharded(sharded, entries_of({"a": torch.zeros(9), "b": torch.zeros(2000)}), shard_bytes=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before


def test_an_error_while_reading_a_tensor_leaves_no_temporary(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise OSError(errno.EIO, "the disk with the base model is gone")

    with pytest.raises(OSError, match="base model is gone"):
        write_sharded(tmp_path, [*entries_of({"a": torch.ones(2)}), TensorEntry("x", (2,), torch.float32, fail)])
    assert names(tmp_path) == []


# What is read


def test_a_shared_checkpoint_is_read_like_the_library_reads_it(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    expected = load_file(folder / SINGLE)
    with TensorFiles(folder) as files:
        assert files.names() == sorted(expected)
        for name, tensor in expected.items():
            assert torch.equal(files.read(name), tensor)
            assert (files.shape(name), files.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def test_tensors_are_the_files_own_pages(sharded: Path) -> None:
    tensor = TensorFiles(sharded).read("c")
    spans = re.findall(rf"^(\w+)-(\w+) .*{SHARD_2}$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in spans)


def test_a_tensor_outlives_the_closed_files(sharded: Path) -> None:
    with TensorFiles(sharded) as files:
        tensor = files.read("a")
    assert torch.equal(tensor, torch.ones(2))


def test_writing_to_a_tensor_does_not_reach_the_file(sharded: Path) -> None:
    TensorFiles(sharded).read("a").zero_()
    assert torch.equal(TensorFiles(sharded).read("a"), torch.ones(2))


def test_an_unknown_tensor_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_file(tmp_path / SINGLE, {"model.norm.weight": torch.ones(2)})
    with TensorFiles(tmp_path) as files, pytest.raises(CheckpointError, match=r"Did you mean 'model.norm.weight'"):
        files.read("model.norm.weights")


def test_a_dtype_that_lumen_cannot_use_is_named(tmp_path: Path) -> None:
    header_file(tmp_path / SINGLE, {"x": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}})
    with TensorFiles(tmp_path) as files, pytest.raises(CheckpointError, match=r"'x' has dtype F4.*BF16"):
        files.read("x")


# What is refused


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        TensorFiles(tmp_path / "missing")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "found no weights"),
        (["pytorch_model.bin"], "found pytorch_model.bin. A pickle can run any program"),
        (["consolidated.00.pth"], "found consolidated.00.pth. A pickle"),
        (["adapter_model.safetensors"], "This is an adapter"),
        (["other.safetensors"], "found other.safetensors"),
    ],
    ids=str,
)
def test_a_folder_without_weights_is_told_what_it_has(tmp_path: Path, found: list[str], message: str) -> None:
    for name in found:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": A}, bytes(7)),
        ({"a": A}, bytes(9)),
        ({"a": A, "b": A}, bytes(8)),
        ({"a": {**A, "dtype": "F99"}}, bytes(8)),
        ({"a": {**A, "shape": [-2]}}, bytes(8)),
        ({"a": {**A, "shape": [2**40, 2**40]}}, bytes(8)),
        ({"a": {**A, "data_offsets": [8, 0]}}, bytes(8)),
        (b"not JSON", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
    ],
    ids=["cut", "too long", "overlap", "dtype", "negative", "overflow", "backwards", "no JSON", "no UTF-8", "deep"],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, header: dict | bytes, data: bytes) -> None:
    path = header_file(tmp_path / SINGLE, header, data)
    for attempt in (lambda: TensorFiles(tmp_path), lambda: open_file(path)):
        with pytest.raises(CheckpointError, match=f"{SINGLE}: a whole safetensors file was wanted, found .* bytes"):
            attempt()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, tensors)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"found {length:,} bytes"):
            open_file(path)


def test_a_file_that_cannot_be_mapped_is_refused_with_its_size(tmp_path: Path) -> None:
    path = header_file(tmp_path / SINGLE, {"x": {"dtype": "U8", "shape": [2**36], "data_offsets": [0, 2**36]}}, b"")
    os.truncate(path, path.stat().st_size + 2**36)  # a hole of 64 GiB
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model.safetensors: 68,719,.* bytes cannot be mapped into memory"):
            TensorFiles(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: .* there is none"):
        open_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="there is none"):
        open_file(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "x.bin", "\0.safetensors"]
)
def test_a_shard_name_that_leads_elsewhere_is_refused(sharded: Path, shard: str) -> None:
    write_index(sharded, {"a": SHARD_1, "b": SHARD_1, "c": shard})
    with pytest.raises(CheckpointError, match=f"{INDEX}: .* is not the name of a .safetensors file in this folder"):
        TensorFiles(sharded)


@pytest.mark.parametrize("name", [SINGLE, SHARD_2])
def test_a_link_out_of_the_folder_is_refused(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    (sharded / SHARD_2).rename(elsewhere)
    (sharded / name).symlink_to(elsewhere)
    if name == SINGLE:
        (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*secret.safetensors, outside"):
        TensorFiles(sharded)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path, sharded: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / INDEX).write_bytes((sharded / INDEX).read_bytes())
    for name in (SHARD_1, SHARD_2):
        blob = tmp_path / "models--o--n" / "blobs" / f"sha of {name}"
        blob.parent.mkdir(exist_ok=True)
        (sharded / name).rename(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    assert TensorFiles(snapshot).names() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("kept", "allowed"),
    [
        ("blobs/3f/hash", True),
        ("blobs/hash", False),
        ("blobs/3f/9a/hash", False),
        ("models--o--other/blobs/hash", False),
    ],
)
def test_a_link_on_to_the_blobs_that_repositories_share_is_followed_and_no_other(
    tmp_path: Path, sharded: Path, kept: str, allowed: bool
) -> None:
    snapshot, blobs = (tmp_path / "models--o--n" / part for part in ("snapshots/abc", "blobs"))
    for folder in (snapshot, blobs, (tmp_path / kept).parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(tmp_path / kept, {"a": torch.ones(2)})
    (blobs / "sha").symlink_to(tmp_path / kept)
    (snapshot / SINGLE).symlink_to("../../blobs/sha")
    if allowed:
        assert torch.equal(TensorFiles(snapshot).read("a"), torch.ones(2))
    else:
        with pytest.raises(CheckpointError, match=r"is a link to .*hash, outside of its folder"):
            TensorFiles(snapshot)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARD_2).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX}: names {SHARD_2}, not in the folder"):
        TensorFiles(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": SHARD_1, "b": SHARD_1, "c": SHARD_2, "d": SHARD_2}, f"puts 'd' in {SHARD_2}, found it in none"),
        ({"a": SHARD_1, "c": SHARD_2}, f"puts 'b' in no shard, found it in {SHARD_1}"),
        ({"a": SHARD_1, "b": SHARD_2, "c": SHARD_2}, f"puts 'b' in {SHARD_2}, found it in {SHARD_1}"),
    ],
    ids=["only in the index", "only in a shard", "in another shard"],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(sharded: Path, weight_map: dict, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "c": torch.ones(4)}, sharded / SHARD_2)
    with pytest.raises(CheckpointError, match=f"'a' is in two shards, {SHARD_1} and {SHARD_2}"):
        TensorFiles(sharded)


def test_two_checkpoints_in_one_folder_are_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2)}, sharded / SINGLE)
    with pytest.raises(CheckpointError, match="holds two checkpoints"):
        TensorFiles(sharded)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no map"),
        pytest.param(b'{"weight_map": {}}', id="empty map"),
        pytest.param(b'{"weight_map": {"a": 1}}', id="number"),
        pytest.param(b'{"weight_map": {"\xff": "a"}}', id="no UTF-8"),
        pytest.param(b'{"x": ' + b"[" * 100_000, id="deep"),
    ],
)
def test_a_damaged_index_is_refused_with_its_name(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=f'{INDEX}: {{"weight_map": .* was wanted, found'):
        TensorFiles(sharded)


def test_refusing_a_folder_leaves_no_file_open(sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        test_an_index_that_disagrees_with_the_shards_is_refused(sharded, {"a": SHARD_1}, "'b'")
    assert len(os.listdir("/proc/self/fd")) <= before
