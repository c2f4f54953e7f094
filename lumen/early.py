"""What a run on a GPU will want and that needs no PyTorch, done beside the import of PyTorch, which takes seconds."""

import os
import threading

GPU = ("/dev/nvidiactl", "/dev/dxg")  # one of them is there where a driver is: Linux, and Linux within Windows


def begin() -> None:
    """Starts a thread that learns Triton's hash of itself: a second over 400 MB, before any kernel can be launched.

    It asks no driver, ends by itself, and keeps no process alive. Without a GPU, or without Triton, nothing is done.
    """
    if any(map(os.path.exists, GPU)) and os.environ.get("TRITON_INTERPRET") != "1":
        threading.Thread(target=_know_triton, name="lumen-early", daemon=True).start()


def _know_triton() -> None:
    try:
        from triton.runtime.cache import triton_key  # not at the top: it is the work
    except ImportError:
        return
    triton_key()  # which Triton keeps for the process
