"""A file that is to hold one JSON object."""

import json
from pathlib import Path

from lumen.errors import LumenError


def read_object(path: Path, error: type[LumenError], missing: str) -> dict:
    """The object; `error` for a file that is damaged, holds another thing, or is missing (`missing`: what it is of).

    Likewise for one that the system does not let us read, and for a path that leads to a folder or through a file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path} does not exist. {missing}") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}. {missing}") from None
    try:
        found = json.loads(data.decode("utf-8"))
    except ValueError as reason:  # bytes that are not UTF-8, and numbers of thousands of digits, too
        raise error(f"{path} is not JSON: {reason}.") from None
    except RecursionError:
        raise error(f"{path} is not JSON that can be read: its lists or objects nest too deeply.") from None
    if not isinstance(found, dict):
        raise error(f"{path}: wanted a JSON object, found {type(found).__name__}.")
    return found
