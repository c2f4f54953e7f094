"""What stands at a path after a write went well, failed, or met a full disk (a small tmpfs, a size limit)."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumen.errors import ConfigError, LumenError
from lumen.formats.atomic import replacing, replacing_folder, write_bytes, write_json, write_text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def size_limit() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes; a write past it fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    yield 65_536
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_three_writers_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_text(path, "Grüße\r\n")
    assert path.read_bytes() == "Grüße\r\n".encode()
    write_json(path, {"ö": [1, 2.5, None]})
    assert json.loads(path.read_text("utf-8")) == {"ö": [1, 2.5, None]} and "ö" in path.read_text("utf-8")
    assert names(tmp_path) == ["file"]


def test_json_without_a_standard_spelling_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    write_bytes(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), FileNotFoundError(2, "no", "/elsewhere")])
def test_an_error_in_the_block_passes_through_and_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, replacing(path) as temporary:
        temporary.write_text("new")
        raise error
    assert raised.value is error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new"


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, sys; from lumen.formats.atomic import replacing\n"
        "with replacing(sys.argv[1]) as temporary: temporary.write_text('new'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert path.read_text() == "old"


def test_a_full_disk_names_file_and_bytes_and_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "file"
    path.write_text("old")
    with pytest.raises(LumenError, match=r"file: cannot be written, no space left.* after [\d,]+ bytes"):
        write_bytes(path, bytes(100_000))
    assert path.read_text() == "old" and names(small_disk) == ["file"]


def test_a_file_beyond_the_size_limit_keeps_the_old_file(tmp_path: Path, size_limit: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(LumenError, match=r"file: cannot be written, file too large after 65,536 bytes.*ulimit -f"):
        write_bytes(path, bytes(size_limit + 1))
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_half_folder(small_disk: Path) -> None:
    with pytest.raises(LumenError, match="new: cannot be written"), replacing_folder(small_disk / "new") as temporary:
        (temporary / "first").write_bytes(bytes(30_000))
        (temporary / "second").write_bytes(bytes(60_000))
    assert names(small_disk) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LumenError, match=r"there is no folder .*missing"):
        write_bytes(tmp_path / "missing" / "file", b"")


def test_a_target_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(LumenError, match="file: cannot be written: Is a directory"):
        write_bytes(tmp_path / "file", b"")
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with replacing_folder(path) as temporary:
        (temporary / "inner").mkdir()
        write_text(temporary / "inner" / "file", "text")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "text" and names(tmp_path) == ["new"]


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with replacing_folder(tmp_path / "new") as temporary:
        write_text(temporary / "file", "text")
    assert names(tmp_path / "new") == ["file"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_target_in_use_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new"
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="new: a new or empty folder was wanted"), replacing_folder(path):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["new"] and os.path.lexists(path)


def test_an_error_removes_the_folder_with_all_that_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "new") as temporary:
        write_text(temporary / "file", "text")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
