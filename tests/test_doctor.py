"""The doctor says what is here, sees which implementations run, and finds what is broken."""

import io
import json
import shlex
import socket
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from lumen import doctor

PYPROJECT = tomllib.loads((doctor.ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.examine()


def broken(report: dict) -> str:
    return "\n".join(report["problems"])


def checkout(folder: Path, core: list[str], **extras: list[str]) -> Path:
    """A folder whose pyproject.toml wants these packages."""
    lists = [f"dependencies = {json.dumps(core)}", "[project.optional-dependencies]"]
    lists += [f"{extra} = {json.dumps(wanted)}" for extra, wanted in extras.items()]
    (folder / "pyproject.toml").write_text("\n".join(["[project]", *lists]))
    return folder


def shown(report: dict) -> str:
    written = io.StringIO()
    doctor.show(report, Console(width=80, file=written, highlight=False))
    return written.getvalue()


def test_here_everything_that_lumen_needs_works(report):
    assert broken(report) == ""


def test_a_step_shows_which_implementation_each_operation_takes_and_why(report):
    found = report["operations"]
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert ": " in found["chosen"]["attention"]
    assert abs(found["loss"] - found["reference_loss"]) < 0.02 * found["loss"]
    assert found["answered_tokens"] == 4


def test_an_implementation_that_is_wrong_on_this_device_is_found(monkeypatch):
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **options: right(*args, **options) * 1.05
    )
    assert "An implementation is wrong on this device" in broken(doctor.examine())


def test_what_breaks_is_reported_and_the_rest_is_still_shown(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    report = doctor.examine()
    assert "operations: RuntimeError: CUDA error: no kernel image" in broken(report)
    assert report["versions"]["torch"] == torch.__version__
    assert "problem: operations" in shown(report)


def test_a_wrong_version_of_what_lumen_needs_is_a_problem_with_its_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "ROOT", checkout(tmp_path, ["torch>=99", "numpy>=2", "no-such-package>=1"]))
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert f"lumen wants torch>=99, found {torch.__version__}" in broken(report)
    assert "lumen wants no-such-package>=1, found not installed" in broken(report)
    assert "numpy" not in broken(report)


def test_a_missing_extra_is_no_problem_and_comes_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", checkout(tmp_path, ["numpy>=2"], vision=["no-such-package>=1", "numpy>=2"]))
    report = doctor.examine()
    assert report["problems"] == []
    extra = doctor.missing_extras(report)["vision"]
    assert extra["missing"] == ["no-such-package>=1"]
    python, *arguments = shlex.split(extra["command"])
    assert Path(python).absolute() == Path(sys.executable)
    assert arguments == ["-m", "pip", "install", "no-such-package>=1"]
    assert extra["command"] in shown(report)  # on one line, to be copied


def test_outside_of_a_checkout_the_installed_package_says_what_it_wants(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    listed = doctor.requirements()
    names = {Requirement(text).name for extra, text in listed if not extra}
    assert {"torch", "safetensors", "tokenizers"} <= names
    assert ("sentencepiece", "sentencepiece") in {(extra, Requirement(text).name) for extra, text in listed}


def test_a_checkout_wants_what_its_pyproject_lists():
    listed = doctor.requirements()
    assert [text for extra, text in listed if not extra] == PYPROJECT["dependencies"]
    assert {extra for extra, _ in listed} == {"", *PYPROJECT["optional-dependencies"]}


def test_python_is_the_one_that_the_package_wants():
    assert PYPROJECT["requires-python"] == doctor.PYTHON


def test_without_online_no_socket_is_opened(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    report = doctor.examine()
    assert broken(report) == ""
    assert report["hub"]["reachable"] is None


def test_the_hub_is_told_apart_from_one_that_does_not_answer():
    hub = doctor.examine(online=True)["hub"]  # the tests run under HF_HUB_OFFLINE=1
    assert hub["reachable"] is False
    assert "HF_HUB_OFFLINE=1" in hub["reason"]


def test_it_reads_in_80_columns(report):
    lines = shown(report).splitlines()
    assert max(map(len, lines)) <= 80
    for heading in ("Versions", "Devices", "Packages", "Disk and Hub"):
        assert heading in lines
    assert "Everything that lumen needs is here and works." in lines


def test_an_old_gpu_is_described_with_the_dtype_that_is_fast_on_it(monkeypatch):
    card = {"name": "Tesla T4", "capability": (7, 5), "memory": (10 * 2**30, 15 * 2**30)}
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "mem_get_info": card["memory"],
        "get_device_capability": card["capability"],
        "get_device_name": card["name"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    report: dict = {"notes": [], "problems": []}
    [gpu] = doctor.devices(report)
    assert gpu == {
        "name": "Tesla T4",
        "memory_bytes": 15 * 2**30,
        "free_bytes": 10 * 2**30,
        "capability": "7.5",
        "fast_dtypes": ["float16"],
        "auto_dtype": "float32",
    }


def test_a_folder_without_room_to_write_is_noted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    report: dict = {"notes": [], "problems": []}
    assert doctor.disk(report)[1]["free_bytes"] == 1
    assert f"{tmp_path} may not be written to: working folder." in report["notes"]


def test_help_names_the_options_and_the_exit_code():
    command = [sys.executable, "-m", "lumen.doctor", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=doctor.ROOT).stdout
    assert "--json" in told and "--online" in told and "Exit code 1" in told
