"""Files and folders that are either whole or not there: temporary beside the target, fsync, rename.

A full disk or Ctrl-C while writing leaves what stood at the path before, and no temporary; a crash of the machine can
leave a temporary, whose name starts with a dot. It lies beside the target, as a rename is atomic only in one file
system.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumen.errors import ConfigError, LumenError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a path beside `path` to write a file to; leaving the block makes it durable and renames it to `path`.

    Any error in the block removes the temporary and leaves an older `path` as it was. A full disk and a missing or
    read-only folder raise a LumenError; every other error passes through unchanged.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        _explain(error, path, temporary)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path | str) -> Iterator[Path]:
    """Yields a new folder beside `path` to fill; leaving the block makes all of it durable and renames it to `path`.

    `path` may not exist yet, or be an empty folder; anything else is refused with a ConfigError. On an error in the
    block the temporary folder is removed with all that is in it; errors are those of `replacing`.
    """
    path = Path(os.path.abspath(path))  # so that "." has a name; links are not resolved, but refused
    if os.path.ismount(path):
        raise ConfigError(f"{path}: is a mount point, which no rename can replace. Name a new folder inside it.")
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path}: a new or empty folder was wanted, found one in use. Name another, or move it away.")
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            _sync(written)
        _sync(temporary)
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        _explain(error, path, temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replaces the file `path` by `data`; errors are those of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Replaces the file `path` by `text` in UTF-8, line ends as they are; errors are those of `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: object) -> None:
    """Replaces the file `path` by `value` as indented JSON. NaN and infinity, which JSON lacks, are a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _beside(path: Path) -> Path:
    """A free name in the folder of `path`, for a file that keeps the user's umask (tempfile's would be private)."""
    if not path.parent.is_dir():
        raise LumenError(f"{path}: cannot be written, there is no folder {path.parent}. Make it first.")
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    """Waits until the file's bytes, or the folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, path: Path, temporary: Path) -> None:
    """Raises what `error` means to a person who wanted `path` written; returns when it is about another file."""
    if error.errno in FULL:
        free = shutil.disk_usage(path.parent).free
        bound = "Raise the limit on the size of a file (ulimit -f, or the file system's)"
        raise LumenError(
            f"{path}: cannot be written, {error.strerror.lower()} after {_size_bytes(temporary):,} bytes "
            f"({free:,} bytes are free in {path.parent}). What stood there before is unharmed. "
            f"{bound if error.errno == errno.EFBIG else 'Free some space'}, or write to another disk."
        ) from error
    if error.filename is not None and Path(error.filename).is_relative_to(temporary):
        raise LumenError(f"{path}: cannot be written: {error.strerror}. May you write in {path.parent}?") from error


def _size_bytes(written: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 when nothing came into being."""
    files = written.rglob("*") if written.is_dir() else [written]
    return sum(file.stat().st_size for file in files if file.is_file())
