"""Locks on files between processes. The system gives them back when a process ends, however it ends."""

import errno
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


def lock(file: IO) -> bool:
    """Locks `file`, open for writing, until it is closed; False where another process holds it.

    A forked child holds nothing. True as well on a file system that knows no locks.
    """
    try:
        if fcntl is None:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in TAKEN
    return True
