"""What is done beside the import of PyTorch: by a thread, where there is a GPU, and by the command alone."""

import subprocess
import sys
import threading
import time
from functools import lru_cache

import pytest

from lumen import early
from lumen.ops import ahead


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
    assert all(thread.daemon for thread in running())  # an end of the command does not wait for it
    early.finish()


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


def test_who_wants_what_was_begun_waits_for_it_and_else_for_nothing(asked, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(early, "_know_triton", lambda: going.wait() and time.sleep(0.02))
    early.begin()
    assert len(running()) == 1
    going.set()
    early.finish()
    assert not running()
    early.finish()


def test_triton_is_hashed_once_by_two_who_ask_at_once(monkeypatch):
    """The second waits for the first: what Triton keeps by itself is kept only when it is there."""
    cache = pytest.importorskip("triton.runtime.cache")
    monkeypatch.setattr(early, "GPU", ("/dev/null",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hashed, begun = [], threading.Event()

    @lru_cache
    def hash_of_triton() -> str:
        begun.set()
        time.sleep(0.05)
        hashed.append(1)
        return "3.6"

    monkeypatch.setattr(cache, "triton_key", hash_of_triton)
    early.begin()
    begun.wait()
    assert ahead.know_triton() == "3.6"
    early.finish()
    assert len(hashed) == 1


def test_an_import_beside_it_lets_it_have_its_turn_soon(monkeypatch):
    usual_s, told = sys.getswitchinterval(), []
    monkeypatch.setattr(early, "know_triton", lambda: told.append(sys.getswitchinterval()))
    early._know_triton()
    assert told == [pytest.approx(early.SWITCH_S, rel=1e-3)] and sys.getswitchinterval() == usual_s


def test_threads_take_turns_more_often_until_the_last_has_ended():
    usual_s = sys.getswitchinterval()
    quick_s = pytest.approx(early.SWITCH_S, rel=1e-3)
    first, second = early.quick_turns(), early.quick_turns()
    with first:
        second.__enter__()
        assert sys.getswitchinterval() == quick_s
    assert sys.getswitchinterval() == quick_s
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == usual_s > early.SWITCH_S


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
