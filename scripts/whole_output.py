"""How a script ends whose output is read by another program."""

import os
import signal
import sys
from collections.abc import Callable


def exit_with(main: Callable[[], int]) -> None:
    """Ends the process with what `main` returns; where nobody reads on (`| head`), as SIGPIPE would, without a word."""
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)
