"""What a user points a verb at: a folder or a Hub id of a model or an adapter, or a run; and the model behind it."""

from dataclasses import dataclass, replace
from pathlib import Path

from lumen.adapter import load_adapter
from lumen.checkpoint import load_model
from lumen.config import RunConfig, load_config
from lumen.demo import MODELS, demo_folder
from lumen.errors import CheckpointError, ConfigError
from lumen.hub import fetch, is_id, parse_id, pin
from lumen.model_config import read_config
from lumen.models.decoder import Decoder
from lumen.peft_files import CONFIG_FILE, read_adapter_config
from lumen.prequantized import check_quantization
from lumen.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Source:
    """A base model and, where something was trained beside it, the adapter."""

    name: str
    base: Path
    adapter: Path | None = None
    nf4: bool = False  # the base is held in 4 bits: it comes so, or the adapter was trained beside its 4-bit image
    dtype: str = "auto"
    device: str = "auto"
    base_id: str = ""  # of the base on the Hub, with its commit, when it came from there
    run: Path | None = None  # the folder of the run that trained it
    base_path: str = ""  # how the adapter or the run names its base

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


def locate(path: str, *, offline: bool = False) -> Path:
    """The folder that `path` names: a packaged model's for its name, the cache's for an id of the Hub, else itself.

    What has the shape of an id is one only if nothing of this name lies here. It is looked up, and downloaded where it
    is not in the cache yet, unless `offline`; errors are those of `hub.fetch`.
    """
    if path in MODELS:
        return demo_folder(path)
    return fetch(path, offline=offline) if is_on_hub(path) else Path(path)


def is_on_hub(path: str) -> bool:
    """Whether `path` is an id of the Hub, being no path of this disk."""
    return is_id(path) and not Path(path).exists()


def pin_model(config: RunConfig, *, resume: bool = False) -> RunConfig:
    """A run on a model or an adapter of the Hub names its commit, so that repeating or resuming it means the same
    weights.

    Without a revision it is the newest commit, or that of the run which is resumed.
    """
    resumed = resume and Path(config.output.folder, "config.toml").is_file()
    before = load_config(config.output.folder) if resumed else None
    for key in ("model.path", "lora.adapter"):
        if is_on_hub(path := _at(config, key)):
            config = config.with_path(key, _pinned(path, _at(before, key) if before else "", config.model.offline))
    return config


def _at(config: RunConfig, key: str) -> str:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _pinned(path: str, before: str, offline: bool) -> str:
    """`path` with a commit: that of `before`, where a run began with the same repository and no other is asked for."""
    if parse_id(path).revision is None and is_id(before) and parse_id(before).repo == parse_id(path).repo:
        return before
    return pin(path, offline=offline)


def find_source(path: str) -> Source:
    """The source that `path` names: a run's folder, an adapter's, a model's, "lumen-demo", or an id of the Hub.

    A folder that is there goes before an id. ConfigError for what is none of these; CheckpointError for a run that has
    not come to a result yet, and for an adapter whose base is not where it says.
    """
    on_hub, folder = is_on_hub(path), locate(path)
    name = parse_id(path).name if on_hub else folder.resolve().name
    if (folder / "config.toml").is_file():
        return _run(folder)
    if (folder / CONFIG_FILE).is_file():
        return _adapter(folder, name)
    if (folder / "config.json").is_file():
        id = parse_id(path).at(folder.name) if on_hub else ""
        return Source(name=name, base=folder, base_id=id, nf4=_comes_packed(folder))
    found = "a folder without any of these" if folder.is_dir() else "nothing"
    raise ConfigError(
        f"{path}: wanted the folder of a run (config.toml), of an adapter ({CONFIG_FILE}) or of a model (config.json), "
        f"or owner/name of the Hub; found {found}."
    )


def starting_point(config: RunConfig) -> Source:
    """What a run begins from: its base, and the adapter that it trains further, if `lora.adapter` or `model.path` name
    one.

    Errors are those of `find_source`; ConfigError for two adapters, and for one under a full fine-tuning.
    """
    path, offline = config.model.path, config.model.offline
    folder = locate(path, offline=offline)
    if not folder.exists():
        raise CheckpointError(
            f"model.path: there is no folder {folder}. A model is a folder with config.json, tokenizer and "
            f"safetensors, owner/name of the Hub, or {', '.join(MODELS)}."
        )
    source = Source(name=folder.resolve().name, base=folder, base_path=path)
    if (folder / "config.toml").is_file():
        source = _run(folder)
    elif (folder / CONFIG_FILE).is_file():
        source = _adapter(folder, folder.resolve().name, offline=offline)
    if config.lora.adapter and source.adapter:
        raise ConfigError(
            f"model.path={path} is an adapter already, and lora.adapter={config.lora.adapter} another: name one. "
            "Merge the first into its base to train a second beside it."
        )
    if config.lora.adapter:
        adapter = locate(config.lora.adapter, offline=offline)
        if (adapter / "config.toml").is_file() and (adapter / "adapter").is_dir():
            raise ConfigError(
                f"lora.adapter: {adapter} is a run's folder. Its adapter is there: lora.adapter={adapter / 'adapter'}"
            )
        source = replace(source, adapter=adapter)
    if source.adapter and config.train.method == "full":
        raise ConfigError(
            f"train.method=full wants a whole model, found the adapter {source.adapter}. Merge it first: "
            f"python -m lumen.export {source.adapter} MERGED --as merged"
        )
    return source


def _run(folder: Path) -> Source:
    config = load_config(folder)
    name, path = folder.resolve().name, config.model.path
    if config.train.method == "full":
        if not (folder / "model/config.json").is_file():
            raise CheckpointError(_unfinished(folder))
        return Source(
            name=name, base=folder / "model", dtype=config.model.dtype, device=config.model.device, run=folder
        )
    if not (folder / "adapter" / CONFIG_FILE).is_file():
        raise CheckpointError(_unfinished(folder))
    base = locate(path, offline=config.model.offline)
    if not (base / "config.json").is_file():  # it trained an adapter further: both name the same base
        begun = _adapter(folder / "adapter", name, of_run=True, offline=config.model.offline)
        base, path = begun.base, begun.base_path
    return Source(
        name=name,
        base=base,
        base_path=path,
        adapter=folder / "adapter",
        nf4=config.model.nf4,
        dtype=config.model.dtype,
        device=config.model.device,
        base_id=path if is_on_hub(path) else "",
        run=folder,
    )


def _adapter(folder: Path, name: str, *, of_run: bool = False, offline: bool = False) -> Source:
    if not of_run and folder.name == "adapter" and (folder.parent / "config.toml").is_file():
        return _run(folder.parent)  # which knows whether the base was in 4 bits
    config = read_adapter_config(folder)
    named = str(config.get("base_model_name_or_path") or "")
    if named and (folder / named / "config.json").is_file():  # beside the adapter
        base = folder / named
        return Source(name=name, base=base, adapter=folder, nf4=_comes_packed(base), base_path=str(base.resolve()))
    if is_on_hub(named):
        id = parse_id(named)
        base = locate(id.at(id.revision or config.get("revision")), offline=offline)
        id = id.at(base.name)
        return Source(name=name, base=base, adapter=folder, nf4=_comes_packed(base), base_id=id, base_path=id)
    if not named or not (locate(named) / "config.json").is_file():
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {named!r}, where there is no model. Put the path or "
            "the Hub id of the model that it was trained on there."
        )
    base = locate(named)
    return Source(name=name, base=base, adapter=folder, nf4=_comes_packed(base), base_path=named)


def _comes_packed(base: Path) -> bool:
    """Whether the weights of a model are bitsandbytes' NF4: its blocks are then used as they are."""
    return check_quantization(read_config(base), str(base / "config.json"))


def _unfinished(folder: Path) -> str:
    return f"{folder}: the run has no result yet. Continue it: python -m lumen.train {folder} --resume"
