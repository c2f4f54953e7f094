"""What a user points a verb at: a model's folder, an adapter's, or a run's; and the model that it stands for."""

from dataclasses import dataclass
from pathlib import Path

from lumen.adapter import CONFIG_FILE, load_adapter, read_adapter_config
from lumen.checkpoint import load_model
from lumen.config import load_config
from lumen.demo import MODELS, demo_folder
from lumen.errors import CheckpointError, ConfigError
from lumen.models.decoder import Decoder
from lumen.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Source:
    """A base model and, where something was trained beside it, the adapter."""

    name: str
    base: Path
    adapter: Path | None = None
    nf4: bool = False  # the adapter was trained beside the base's 4-bit image
    dtype: str = "auto"
    device: str = "auto"

    def load(self) -> tuple[Decoder, Tokenizer]:
        """The model as it was trained, adapter active, and the tokenizer with the chat template of the training."""
        model = load_model(self.base, dtype=self.dtype, nf4=self.nf4, device=self.device)
        if self.adapter:
            load_adapter(model, self.adapter)
        return model.eval(), self.tokenizer()

    def tokenizer(self) -> Tokenizer:
        """The one saved with the adapter; the base's, where a foreign adapter brings none."""
        names = ("tokenizer.json", "tokenizer.model")
        own = self.adapter is not None and any((self.adapter / name).is_file() for name in names)
        return load_tokenizer(self.adapter if own else self.base)


def locate(path: str) -> Path:
    """The folder that a model's path names: a packaged model's for its name, else the path itself."""
    return demo_folder(path) if path in MODELS else Path(path)


def find_source(path: str) -> Source:
    """The source that `path` names: a run's folder, an adapter's, a model's, or "lumen-demo".

    ConfigError for a path that is none of these; CheckpointError for a run that has not come to a result yet, and for
    an adapter whose base is not where it says.
    """
    folder = locate(path)
    if (folder / "config.toml").is_file():
        return _run(folder)
    if (folder / CONFIG_FILE).is_file():
        return _adapter(folder)
    if (folder / "config.json").is_file():
        return Source(name=folder.resolve().name, base=folder)
    found = "a folder without any of these" if folder.is_dir() else "nothing"
    raise ConfigError(
        f"{path}: wanted the folder of a run (config.toml), of an adapter ({CONFIG_FILE}) or of a model (config.json), "
        f"found {found}. Model ids of the Hub want their files in a local folder."
    )


def _run(folder: Path) -> Source:
    config = load_config(folder)
    name = folder.resolve().name
    if config.train.method == "full":
        if not (folder / "model/config.json").is_file():
            raise CheckpointError(_unfinished(folder))
        return Source(name=name, base=folder / "model", dtype=config.model.dtype, device=config.model.device)
    if not (folder / "adapter" / CONFIG_FILE).is_file():
        raise CheckpointError(_unfinished(folder))
    return Source(
        name=name,
        base=locate(config.model.path),
        adapter=folder / "adapter",
        nf4=config.model.nf4,
        dtype=config.model.dtype,
        device=config.model.device,
    )


def _adapter(folder: Path) -> Source:
    if folder.name == "adapter" and (folder.parent / "config.toml").is_file():
        return _run(folder.parent)  # which knows whether the base was in 4 bits
    named = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if not named or not (locate(named) / "config.json").is_file():
        raise CheckpointError(f"{folder / CONFIG_FILE}: base_model_name_or_path is {named!r}, where there is no model.")
    return Source(name=folder.resolve().name, base=locate(named), adapter=folder)


def _unfinished(folder: Path) -> str:
    return f"{folder}: the run has no result yet. Continue it: python -m lumen.train {folder} --resume"
