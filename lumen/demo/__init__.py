"""The embedded demo: a tiny base model and a dataset that make the first run work without a network.

`base/` is a Llama-3.1-shaped model in the hub's layout, `data/` holds chats to fine-tune it on and to examine it with.
Both are made here: the texts and the tokenizer by `scripts/make_demo_data`, the weights by `scripts/pretrain_demo`.
A run names them as it names a folder or a file: `model.path = "lumen-demo"`, `data.eval = "lumen-demo-heldout"`.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lumen.errors import ConfigError, closest

_HERE = Path(__file__).parent

MODELS = MappingProxyType({"lumen-demo": _HERE / "base"})
DATA = MappingProxyType(
    {"lumen-demo": _HERE / "data" / "train.jsonl", "lumen-demo-heldout": _HERE / "data" / "heldout.jsonl"}
)


def demo_folder(name: str) -> Path:
    """The folder of the packaged model `name`, one of MODELS; ConfigError for any other name."""
    return _look_up(name, MODELS, "model")


def demo_data(name: str) -> Path:
    """The file of the packaged data set `name`, one of DATA; ConfigError for any other name."""
    return _look_up(name, DATA, "data set")


def _look_up(name: str, known: Mapping[str, Path], kind: str) -> Path:
    if name not in known:
        raise ConfigError(
            f"no {kind} called {name!r} comes with lumen.{closest(name, known)} There is: {', '.join(known)}."
        )
    return known[name]
