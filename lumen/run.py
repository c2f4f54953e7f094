"""A run's folder: what it was told, what it measured, and checkpoints from which it continues exactly.

    config.toml          the resolved configuration
    metrics.jsonl        one line a step, and lines of evaluation
    samples.jsonl        one line an answer to a sample prompt
    adapter/             the result, written by `lumen.adapter`
    .lock                held by the process that writes here
    checkpoints/step-N/  one .safetensors file per group of tensors, state.json, manifest.json
    summary.json         what came of it

A step counts finished updates of the optimizer: checkpoint N and lines of step N are about the model after N updates.

A checkpoint is filled in a temporary folder, made durable, and renamed, so that a crash leaves it whole or not there.
Its manifest says the size and SHA-256 of every file: what was damaged later is seen before it is used. All of it is
safetensors and JSON, which hold no programs; a file that the manifest does not name is not opened.
"""

import base64
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import IO

import numpy
import torch
from torch import Tensor

from lumen import schema
from lumen.config import RunConfig, load_config, write_toml
from lumen.errors import CheckpointError, ConfigError, LumenError
from lumen.formats.atomic import replacing_folder, write_json, write_text
from lumen.formats.lock import lock
from lumen.formats.safetensors import open_file, write_file

LOCK = ".lock"

# Keys that a resumed run may be told anew: how far it goes (the schedule follows), what it shows, how it spends memory.
MAY_CHANGE = {
    *("train.epochs", "train.steps", "train.eval_every", "train.save_every", "train.sample_every"),
    *("sample.prompts", "sample.max_tokens", "sample.temperature", "data.eval", "output.folder"),
    *("train.keep_checkpoints", "train.keep", "train.offload", "train.memory_gib", "train.graph", "train.profile"),
    *("train.optimizer_paged", "data.workers", "model.offline"),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `Run.save_checkpoint` was given, read back. The tensors lie on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # group → name → tensor
    state: dict


class Run:
    """One run's folder, open for writing by this process alone until `with` ends; from `Run.create` or `Run.resume`."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.config = config
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.adapter_path = folder / "adapter"
        self.checkpoints_path = folder / "checkpoints"
        self._lock: IO | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    @classmethod
    def create(cls, folder: Path | str, config: RunConfig) -> "Run":
        """Makes the folder and writes config.toml; ConfigError if something is there already."""
        run = cls(Path(folder), config)
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            raise ConfigError(
                f"{folder}: wanted a new or empty folder for the run, found one in use. "
                f"Choose another by output.folder=…, or add --resume to continue the run there."
            )
        try:
            run.checkpoints_path.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"output.folder: {folder} cannot be made: {error.strerror}.") from None
        run._take()
        write_text(run.folder / "config.toml", write_toml(config))
        return run

    @classmethod
    def resume(cls, folder: Path | str, config: RunConfig | None = None) -> "Run":
        """Opens the folder of an earlier run, and removes what a killed run left half written in it.

        config  what the run is told now; None = as it was told before. Refused with a ConfigError where it would make a
                different run of it: all keys but `MAY_CHANGE` must be as they were. `go_on` writes it.

        ConfigError where another process has the folder open.
        """
        folder = Path(folder)
        if not (folder / "config.toml").is_file():
            raise ConfigError(
                f"{folder}: there is no run to resume, its config.toml is missing. Start without --resume."
            )
        before = load_config(folder)
        run = cls(folder, config or before)
        if changes := _changes(before, run.config):
            raise ConfigError(
                f"{folder}: the run cannot be resumed with other values: {'; '.join(changes)}. "
                f"Resume it as it was, or start a new one by output.folder=…"
            )
        run._take()
        run.checkpoints_path.mkdir(exist_ok=True)
        for abandoned in run.checkpoints_path.glob(".step-*.tmp"):
            shutil.rmtree(abandoned)
        return run

    def _take(self) -> None:
        """Keeps other processes out until `_release`, or until this one ends, however it does."""
        try:
            self._lock = (self.folder / LOCK).open("a")
        except OSError as error:
            raise LumenError(f"{self.folder}: cannot be written: {error.strerror}. May you write there?") from None
        if not lock(self._lock):
            self._release()
            raise ConfigError(
                f"{self.folder}: another process is training in this folder. Wait for it, stop it, or choose another "
                "by output.folder=…"
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def discard(self) -> None:
        """Removes a folder in which no step was taken, so that the corrected command finds it free."""
        self._release()
        shutil.rmtree(self.folder)

    def log(self, line: Mapping[str, object]) -> None:
        """Appends one line to metrics.jsonl; it has a "step", and numbers that are finite."""
        _append(self.metrics_path, [line])

    def log_samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Appends what the model answered after `step` updates to samples.jsonl."""
        pairs = zip(prompts, answers, strict=True)
        _append(self.samples_path, [{"step": step, "prompt": prompt, "answer": answer} for prompt, answer in pairs])

    def metrics(self) -> Iterator[dict]:
        """The lines of metrics.jsonl so far."""
        return read_lines(self.metrics_path)

    def go_on(self, step: int) -> None:
        """Makes what the run is told now its config.toml, and drops metrics and samples of later steps than `step`, so
        that the files read as one run; -1 drops all.
        """
        write_text(self.folder / "config.toml", write_toml(self.config))
        for path in (self.metrics_path, self.samples_path):
            kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in read_lines(path) if line["step"] <= step]
            write_text(path, "".join(kept))

    def save_checkpoint(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping) -> Path:
        """Writes checkpoints/step-N, then removes all but the newest `train.keep_checkpoints` up to this step.

        tensors  group → name → tensor, one file a group; state is JSON. A whole checkpoint of this step stays as it is.
        On a full disk a LumenError: older checkpoints are unharmed and nothing half written remains.
        """
        folder = self.checkpoints_path / f"step-{step}"
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        if not folder.exists():
            with replacing_folder(folder) as temporary:
                for group, members in tensors.items():
                    write_file(temporary / f"{group}.safetensors", members)
                write_json(temporary / "state.json", state)
                files = {path.name: asdict(_measure(path)) for path in sorted(temporary.iterdir())}
                write_json(temporary / "manifest.json", {"step": step, "files": files})
        kept = [found for found in self._steps() if found <= step][: self.config.train.keep_checkpoints]
        for found in self._steps():
            if found not in kept:
                shutil.rmtree(self.checkpoints_path / f"step-{found}")
        return folder

    def latest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, or None, and for every newer one why it was passed over."""
        skipped = []
        for step in self._steps():
            try:
                return load_checkpoint(self.checkpoints_path / f"step-{step}"), skipped
            except CheckpointError as error:
                skipped.append(str(error))
        return None, skipped

    def write_summary(self, values: Mapping[str, object], device: torch.device | str) -> None:
        """Writes summary.json: `values`, and on what machine and with which versions they came about."""
        versions = {name: _version(name) for name in ("lumen", "torch", "numpy", "safetensors", "tokenizers")}
        machine = {
            "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "versions": {"python": platform.python_version(), **versions},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.folder / "summary.json", {**values, **machine})

    def _steps(self) -> list[int]:
        """Steps of the checkpoints on disk, whole or not, newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.checkpoints_path.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads a checkpoint; CheckpointError unless every file has the size and the SHA-256 that it was written with."""
    folder = Path(folder)
    manifest = _check(folder)
    tensors = {}
    for name in manifest.files:
        if name.endswith(".safetensors"):
            with open_file(folder / name) as file:
                tensors[name.removesuffix(".safetensors")] = {tensor: file.read(tensor) for tensor in file.names()}
    return Checkpoint(step=manifest.step, tensors=tensors, state=_read_json(folder / "state.json"))


def read_lines(path: Path) -> Iterator[dict]:
    """The lines of a run's .jsonl file, none if it does not exist. A last line that a crash cut off is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"{path}:{number}: wanted a line of JSON: {error}. Remove the line.") from None


def random_state() -> dict:
    """The states of all generators that a run draws from, as JSON: torch on CPU and GPU, python and numpy."""
    version, numbers, gauss = random.getstate()
    state = {
        "torch": _to_text(torch.get_rng_state()),
        "python": [version, list(numbers), gauss],
        "numpy": numpy.random.get_state(legacy=False),
    }
    state["numpy"]["state"]["key"] = state["numpy"]["state"]["key"].tolist()
    if torch.cuda.is_initialized():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict) -> None:
    """Sets all generators to what `random_state` returned; CheckpointError where that cannot be done."""
    if "cuda" in state and not torch.cuda.is_available():
        raise CheckpointError(
            "The checkpoint holds a GPU's random state, and there is no GPU: resume where it was begun."
        )
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


class StopSignal:
    """While this context is entered, SIGINT and SIGTERM ask the run to stop: `requested` becomes True.

    The loop looks after each step, saves and leaves, which is said on stderr at once. A second signal ends the process,
    even inside a long operation of torch, since the first one gives both signals back to the system. Signals reach only
    the main thread; entered elsewhere, this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SAID = b"\nstopping: this step ends, then everything is saved; a second signal ends the run without that\n"

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        with suppress(OSError):  # a handler may come amidst a print: this passes by Python's buffers
            os.write(2, self.SAID)


# Manifests


@dataclass(frozen=True, kw_only=True)
class _File:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    step: int
    files: dict[str, _File]  # by name inside the checkpoint's folder


def _measure(path: Path) -> _File:
    with path.open("rb") as file:
        return _File(size_bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _check(folder: Path) -> _Manifest:
    """The manifest of a checkpoint whose files are all as it says; CheckpointError otherwise."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: manifest.json is missing, so that nothing vouches for this checkpoint.")
    manifest = schema.read(_Manifest, _read_json(path), str(path), CheckpointError)
    if "state.json" not in manifest.files:
        raise CheckpointError(f"{path}: it names no state.json, which every checkpoint has.")
    for name, wanted in manifest.files.items():
        file = folder / name
        if name != Path(name).name or not file.is_file():
            raise CheckpointError(f"{file}: the file is missing from the checkpoint.")
        if (size_bytes := file.stat().st_size) != wanted.size_bytes:
            raise CheckpointError(f"{file}: wanted {wanted.size_bytes:,} bytes, found {size_bytes:,}.")
        if _measure(file) != wanted:
            raise CheckpointError(
                f"{file}: its SHA-256 differs from the manifest's: it was damaged after it was written."
            )
    return manifest


def _is_whole(folder: Path) -> bool:
    try:
        _check(folder)
    except CheckpointError:
        return False
    return True


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: wanted JSON: {error}.") from None


# Small parts


def _append(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise LumenError(
            f"{path}: cannot be written: {error.strerror}. Checkpoints are unharmed: use --resume."
        ) from error


def _changes(before: RunConfig, now: RunConfig) -> list[str]:
    """What differs between two configurations and may not, as "lora.rank was 16, now 32 (override)"."""
    old, new = asdict(before), asdict(now)
    return [
        f"{section}.{name} was {value!r}, now {new[section][name]!r} ({now.origin(f'{section}.{name}')})"
        for section, values in old.items()
        for name, value in values.items()
        if f"{section}.{name}" not in MAY_CHANGE and new[section][name] != value
    ]


def _to_text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
