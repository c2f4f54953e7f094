"""What is done beside the import of PyTorch: by a thread, where there is a GPU, and by the command alone."""

import subprocess
import sys
import threading

import pytest

from lumen import early


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lumen-early"]


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """As if there were a GPU; what has been learned."""
    done: list[str] = []
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(early, "GPU", (str(tmp_path / "nothing"), str(tmp_path / "nvidiactl")))
    monkeypatch.setattr(early, "_know_triton", lambda: done.append("triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return done


def begun() -> None:
    early.begin()
    for thread in running():
        assert thread.daemon  # an end of the command does not wait for it
        thread.join()


def test_triton_is_known_early_where_there_is_a_gpu(asked):
    begun()
    assert asked == ["triton"]


def test_nothing_is_done_without_a_gpu_or_where_kernels_are_interpreted(asked, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    begun()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(early, "GPU", ("/nowhere",))
    begun()
    assert asked == []


def test_it_needs_no_pytorch_and_triton_keeps_what_it_learned():
    """In an interpreter of its own: PyTorch is not imported, and the second asking computes nothing."""
    code = (
        "import sys\nfrom lumen import early\nearly._know_triton()\n"
        "from triton.runtime.cache import triton_key\n"
        "assert triton_key.cache_info().currsize == 1 and 'torch' not in sys.modules"
    )
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_begins_before_pytorch_is_imported():
    """And a program that imports the module begins nothing."""
    trace = (
        "import runpy, sys\nfrom lumen import early\norder = []\n"
        "early.begin = lambda: order.append('torch' in sys.modules)\n"
        "sys.argv = ['lumen.train', '--list']\n"
        "try: runpy.run_module('lumen.train', run_name=sys.argv.pop())\nexcept SystemExit: pass\n"
    )
    for name, wanted in (("__main__", "[False]"), ("lumen.train", "[]")):
        code = trace.replace("sys.argv.pop()", repr(name)) + f"assert order == {wanted}, order\n"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
