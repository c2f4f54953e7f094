"""What a run on a GPU will want and that needs no PyTorch, done beside the import of PyTorch, which takes seconds.

`begin` starts it, `finish` waits for it; who needs the result before that asks `know_triton`, and waits as well.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GPU = ("/dev/nvidiactl", "/dev/dxg")  # one of them is there where a driver is: Linux, and Linux within Windows
# How long a thread that computes in Python keeps others from their next call; 5 ms are usual. On one core the hash
# beside an import ends after 2.2 s with 5 ms, which is later than the import, and after 1.3 s with this; beside a
# thread that encodes, on two cores, 1,000 pieces of a model take 0.94 s with 5 ms and 0.25 s with this, alone 0.12 s.
# The other thread takes no longer.
SWITCH_S = 0.0002

_begun: list[threading.Thread] = []
_hashing, _turning = threading.Lock(), threading.Lock()
_usual_s: list[float] = []  # for each that is inside `quick_turns`, the interval from before all of them


def begin() -> None:
    """Starts a thread that learns Triton's hash of itself: a second over 400 MB, before any kernel can be launched.

    It asks no driver, ends by itself, and keeps no process alive. Without a GPU, or without Triton, nothing is done.
    """
    if any(map(os.path.exists, GPU)) and os.environ.get("TRITON_INTERPRET") != "1":
        _begun.append(threading.Thread(target=_know_triton, name="lumen-early", daemon=True))
        _begun[-1].start()


def finish() -> None:
    """Waits until what was begun has ended; where nothing was, there is no wait."""
    while _begun:
        _begun.pop().join()


def know_triton() -> str:
    """Triton's hash of itself, which Triton keeps for the process; who asks while it is made waits for that one.

    ImportError where there is no Triton.
    """
    with _hashing:
        from triton.runtime.cache import triton_key  # not at the top: it is a part of the work

        return triton_key()


@contextmanager
def quick_turns() -> Iterator[None]:
    """Inside, all threads of the process take turns after SWITCH_S; several may be inside, in any threads."""
    with _turning:
        _usual_s.append(_usual_s[0] if _usual_s else sys.getswitchinterval())
        sys.setswitchinterval(min(_usual_s[0], SWITCH_S))
    try:
        yield
    finally:
        with _turning:
            before_s = _usual_s.pop()
            if not _usual_s:
                sys.setswitchinterval(before_s)


def _know_triton() -> None:
    with quick_turns(), suppress(ImportError):  # without Triton there is nothing to know
        know_triton()
