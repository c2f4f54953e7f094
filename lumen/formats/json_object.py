"""A file that is to hold one JSON object."""

import json
from pathlib import Path

from lumen.errors import LumenError


def read_object(path: Path, error: type[LumenError], missing: str) -> dict:
    """The object; `error` for a file that is damaged, holds another thing, or is missing (`missing`: what it is of)."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist. {missing}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as reason:
        raise error(f"{path} is not JSON: {reason}.") from None
    if not isinstance(found, dict):
        raise error(f"{path}: wanted a JSON object, found {type(found).__name__}.")
    return found
