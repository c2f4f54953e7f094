"""What one run is told: `RunConfig`, read from a TOML file and dotted overrides, with the origin of every value.

Defaults stand here and nowhere else, and nothing but the file and the overrides sets a value, never the environment.
Written back by `write_toml`, the resolved configuration is a run file itself, and running it repeats the run.

A relative path in a file is relative to that file; in a recipe or an override, to the working directory. A model or a
data set may also be a plain name without slash or dot, such as `lumen-demo`; it is kept if no such file exists. So is
a model's id of the Hub, `owner/name` or `owner/name@revision`.
"""

import inspect
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
import tomli_w
from msgspec import Meta

from lumen import schema
from lumen.errors import ConfigError, closest
from lumen.hub import is_id

Count = Annotated[int, Meta(ge=1)]
CountOrOff = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model, and how it is held in memory."""

    path: str = ""  # folder with config.json, tokenizer and safetensors, or "owner/name" of the Hub; required
    nf4: bool = True  # hold the frozen linear weights in 4 bits (QLoRA)
    fp8: bool = False  # while training, multiply by them in 8 bits: faster on GPUs of 2022 and later, less exact
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and activations; auto = by device
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = cuda where there is one
    offline: bool = False  # take a model of the Hub from the cache, and open no socket


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which linear layers learn, and how much they may."""

    rank: Count = 16  # R
    alpha: Positive = 16.0  # the update is scaled by alpha / rank
    dropout: Fraction = 0.0  # share of the adapter's inputs that is dropped while training
    targets: tuple[str, ...] = ()  # roles, as "attn.q"; empty or "all-linear" = the family's own list
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    dora: bool = False  # learn the length of each row of a weight beside its direction (DoRA)
    init: Literal["default", "gaussian"] = "default"  # first values of A: uniform, or normal with std 1 / rank
    rank_pattern: dict[str, Count] = field(default_factory=dict)  # other ranks, by PEFT's rule, as { "q_proj" = 8 }
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)  # other alphas, by the same rule
    modules_to_save: tuple[Literal["embed", "head"], ...] = ()  # matrices that learn whole beside the adapter
    adapter: str = ""  # folder or Hub id of an adapter to train further; its layers, rank, alpha and kind are kept


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that are added to the vocabulary. Embedding and head then learn whole, also beside an adapter."""

    add: tuple[str, ...] = ()  # their texts, as "<tool>"
    special: bool = True  # structure that no decoded text shows; false = words
    init: Literal["mean", "subtokens"] = "mean"  # their first rows: mean of all trained rows, or of what spelled them


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where examples come from, and how they become rows of tokens."""

    train: tuple[str, ...] = ()  # files of examples, or "lumen-demo"; required
    eval: str = ""  # file of held-out examples
    eval_fraction: Fraction = 0.0  # hold out this share of the training examples instead
    format: Literal["auto", "chat", "prompt-completion", "text"] = "auto"  # shape of a record; auto = by its keys
    chat_template: str = ""  # Jinja file that replaces the checkpoint's own template
    chat_format: str = ""  # named format, as "chatml", that replaces it instead; model_specs/chat holds them
    system: str = ""  # system text of every conversation without one; saved with the chat template
    train_on: Literal["all-assistant", "last-assistant", "everything"] = "all-assistant"  # which tokens are learned
    instruction_part: str = ""  # text before each question; with response_part, it marks by hand what is learned
    response_part: str = ""  # text before each answer, which is learned up to the next instruction_part
    max_length: Annotated[int, Meta(ge=2)] = 2048  # T, tokens in a row
    packing: bool = True  # several examples share a row, none sees another
    too_long: Literal["error", "split", "truncate", "drop"] = "error"  # fate of an example longer than max_length
    workers: CountOrOff | Literal["auto"] = "auto"  # processes that encode; 0 = none; auto = by records and cores


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long and how fast the run learns."""

    method: Literal["lora", "full"] = "lora"  # learn an adapter, or every weight
    epochs: Positive = 1.0  # passes over the training data
    steps: CountOrOff = 0  # optimizer steps; 0 = as epochs says
    batch_size: Count = 2  # B, rows in one forward pass
    accumulate: Count = 1  # forward passes in one step
    lr: Positive = 2e-4  # learning rate at its highest
    embedding_lr: NotNegative = 0.0  # the same for embedding and head, where they learn; 0 = lr
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # what the learning rate does after warm-up
    warmup_steps: CountOrOff = 0  # 0 = as warmup_fraction says
    warmup_fraction: Fraction = 0.03  # share of all steps in which the learning rate rises
    weight_decay: NotNegative = 0.0  # decoupled, not on norms and biases
    beta1: Fraction = 0.9  # AdamW, memory of the gradient
    beta2: Fraction = 0.999  # AdamW, memory of its square
    eps: Positive = 1e-8  # AdamW
    clip: NotNegative = 1.0  # highest norm of the gradient; 0 = no limit
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  # of shuffling, dropout and the adapter's first values
    keep: Literal["auto", "all", "attention", "input"] = "auto"  # of a block for its backward pass; auto = what fits
    offload: bool = True  # under "auto", what does not fit may wait in the host's memory instead
    memory_gib: NotNegative = 0.0  # device memory that the run may take; 0 = what is free
    optimizer_bits: Literal["auto", 8, 32] = "auto"  # of AdamW's averages; auto = 8 on a GPU for large adapters
    optimizer_paged: bool = False  # on a GPU, AdamW's averages lie in the host's memory, for some time on the bus
    graph: bool = True  # on a GPU, run a step as one CUDA graph where its shapes allow
    profile: bool = False  # record one step: a trace, and a table of where the time went
    eval_every: CountOrOff = 0  # steps between evaluations; 0 = at the end only
    save_every: CountOrOff = 0  # steps between checkpoints; 0 = at the end only
    keep_checkpoints: Count = 2  # newest checkpoints that stay on disk
    sample_every: CountOrOff = 0  # steps between sample answers; 0 = before and after only


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model is asked before, during and after training."""

    prompts: tuple[str, ...] = ()  # one user message each
    max_tokens: Count = 64  # longest answer
    temperature: NotNegative = 0.0  # 0 = always the likeliest token


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the run writes."""

    folder: str = ""  # the run's folder; empty = runs/<name of the file> in the working directory


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that one run is told. Equal configurations are equal runs, wherever their values came from."""

    model: Model = Model()
    lora: Lora = Lora()
    tokens: Tokens = Tokens()
    data: Data = Data()
    train: Train = Train()
    sample: Sample = Sample()
    output: Output = Output()

    # Not annotated, hence not a field: no file can set it, and comparing ignores it. `load_config` fills it.
    _origins = MappingProxyType({})

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from: the name of a file, "override" or "default"."""
        if key not in _keys():
            raise ConfigError(f"{key!r} is no key of a run.{closest(key, _keys())}")
        return self._origins.get(key, "default")

    def with_path(self, key: str, path: str) -> "RunConfig":
        """The same run with `path` under a dotted key; the origins of all values stay."""
        section, _, name = key.partition(".")
        changed = replace(self, **{section: replace(getattr(self, section), **{name: path})})
        object.__setattr__(changed, "_origins", self._origins)
        return changed


# where one string stands for a list of one
LISTS = ("lora.targets", "lora.modules_to_save", "tokens.add", "data.train", "sample.prompts")
PATHS = {"model.path", "lora.adapter", "data.train", "data.eval", "data.chat_template", "output.folder"}
NAMES = ("model.path", "data.train", "data.eval")  # paths that may be a plain name instead
IDS = ("model.path", "lora.adapter")  # paths that may be an id of the Hub instead


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Values from one source, by dotted key; later layers win."""

    where: str  # for messages
    origin: str  # for RunConfig.origin
    values: Mapping[str, object]


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of a run, checked, with absolute paths.

    source     a TOML file, a run's folder (its config.toml; the run stays in that folder), or the name of a recipe
    overrides  such as ['lora.rank=32']: values are TOML, a bare word is a string; the last one wins

    ConfigError for a source that is none of these, an unknown key, a value of the wrong type or outside its range, and
    for values that contradict each other; it names the file or the override at fault.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    layers = [*_read_source(source), *(_read_override(text) for text in overrides)]
    values = {key: value for layer in layers for key, value in layer.values.items()}
    config = schema.read(RunConfig, _nested(values), str(source))
    object.__setattr__(config, "_origins", {key: layer.origin for layer in layers for key in layer.values})
    _refuse_contradictions(config, str(source))
    return config


def _refuse_contradictions(config: RunConfig, where: str) -> None:
    """Raises for values that are right one by one and wrong together."""
    model, data, train = config.model, config.data, config.train
    wrong = [
        (not model.path, "is missing: it names the folder of the base model", ["model.path"]),
        (not data.train, "is missing: it names the files of examples", ["data.train"]),
        (
            train.method == "full" and model.nf4,
            "contradict each other: 4-bit weights are frozen and cannot all learn; add model.nf4=false",
            ["train.method", "model.nf4"],
        ),
        (
            train.method == "full" and model.fp8,
            "contradict each other: only frozen weights are multiplied in 8 bits; leave model.fp8 out",
            ["train.method", "model.fp8"],
        ),
        (
            bool(data.eval) and data.eval_fraction > 0,
            "contradict each other: name a file of held-out examples, or hold out a share, not both",
            ["data.eval", "data.eval_fraction"],
        ),
        (
            bool(data.chat_template) and bool(data.chat_format),
            "contradict each other: name a file with a chat template, or a format, not both",
            ["data.chat_template", "data.chat_format"],
        ),
        (
            bool(data.instruction_part) != bool(data.response_part),
            "belong together: name what stands before a question and what stands before an answer",
            ["data.instruction_part", "data.response_part"],
        ),
        (
            bool(data.response_part) and data.train_on == "everything",
            "contradict each other: markers say what is learned, and the rest is not",
            ["data.response_part", "data.train_on"],
        ),
        (
            train.eval_every > 0 and not data.eval and data.eval_fraction == 0,
            "has nothing to evaluate on; name data.eval, or hold out a share by data.eval_fraction=0.1",
            ["train.eval_every"],
        ),
        (
            train.sample_every > 0 and not config.sample.prompts,
            "has no prompts to answer; give sample.prompts",
            ["train.sample_every"],
        ),
        (
            0 < train.steps <= train.warmup_steps,
            "contradict each other: warm-up must be shorter than the run",
            ["train.warmup_steps", "train.steps"],
        ),
    ]
    for holds, complaint, keys in wrong:
        if holds:
            found = " and ".join(f"{key}={json.dumps(_value(config, key))} ({config.origin(key)})" for key in keys)
            raise ConfigError(f"{where}: {found} {complaint}.")


def _value(config: RunConfig, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def write_toml(config: RunConfig) -> str:
    """A run file with every value of `config`; `load_config` reads an equal configuration from it."""
    told = sorted({origin for origin in config._origins.values() if origin != "default"})
    header = [
        "# The resolved configuration of a run. To repeat it: python -m lumen.train THIS_FILE output.folder=ELSEWHERE"
    ]
    for origin in told:
        keys = [key for key in _keys() if config.origin(key) == origin]
        header.append(f"# Set by {origin}: {', '.join(keys)}")
    return "\n".join(header) + "\n\n" + tomli_w.dumps(asdict(config))


def schema_json() -> str:
    """The JSON schema of a run file, for editors; a field's comment in this module is its description."""
    described = msgspec.json.schema(RunConfig)
    for section in fields(RunConfig):
        properties = described["$defs"][section.type.__name__]["properties"]
        for name, comment in _comments(section.type):
            properties[name]["description"] = comment
            if f"{section.name}.{name}" in LISTS:
                array = {key: properties[name].pop(key) for key in ("type", "items")}
                properties[name]["anyOf"] = [{"type": "string"}, array]
    for definition in described["$defs"].values():
        definition["additionalProperties"] = False
    return json.dumps(described, indent=2)


def list_recipes() -> dict[str, str]:
    """The recipes inside the package: name → the first line of its comment, by name."""
    texts = {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in _recipe_files()}
    return {name: texts[name].splitlines()[0].lstrip("# ") for name in sorted(texts)}


def read_recipe(name: str) -> str:
    """The text of a recipe; ConfigError for an unknown name."""
    for file in _recipe_files():
        if file.name == f"{name}.toml":
            return file.read_text("utf-8")
    known = list_recipes()
    raise ConfigError(f"There is no recipe {name!r}.{closest(name, known)} Recipes: {', '.join(known) or 'none'}.")


def _recipe_files() -> Iterator[Traversable]:
    return (file for file in resources.files("lumen").joinpath("recipes").iterdir() if file.name.endswith(".toml"))


def _comments(section: type) -> Iterator[tuple[str, str]]:
    """(field, comment) of a section, from its source: the comment is written once and read by people and editors."""
    return iter(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(section), re.MULTILINE))


def _keys() -> list[str]:
    """All dotted keys, in the order of the file."""
    return [f"{section.name}.{field.name}" for section in fields(RunConfig) for field in fields(section.type)]


def _texts() -> set[str]:
    """The dotted keys whose value is a text."""
    return {
        f"{section.name}.{field.name}"
        for section in fields(RunConfig)
        for field in fields(section.type)
        if field.type is str
    }


def _read_source(source: str | Path) -> list[_Layer]:
    """The values of a file, a run's folder or a recipe, and the output folder that this source implies."""
    path = Path(source).expanduser()
    if path.is_file():
        return [_default_output(path.stem), _parse(path.read_bytes(), path.name, path.parent)]
    if (path / "config.toml").is_file():  # the run may have been moved since its file was written: it stays where it is
        stays = _Layer(where=str(path), origin="config.toml", values={"output.folder": _absolute(path)})
        return [_parse((path / "config.toml").read_bytes(), "config.toml", path), stays]
    is_recipe = str(source) in list_recipes()
    if path.is_dir() and not is_recipe:
        raise ConfigError(f"{path}: wanted a run's folder, but it holds no config.toml.")
    if (path.suffix == ".toml" or len(path.parts) > 1) and not is_recipe:
        raise ConfigError(f"{path}: there is no such file or run folder.")
    return [_default_output(path.name), _parse(read_recipe(path.name).encode(), f"{path.name}.toml", None)]


def _default_output(name: str) -> _Layer:
    return _Layer(where="default", origin="default", values={"output.folder": _absolute(Path("runs", name))})


def _parse(text: bytes, name: str, base: Path | None) -> _Layer:
    """A TOML file as a layer; its relative paths start at `base`, None for a recipe."""
    try:
        nested = tomllib.loads(text.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not valid TOML: {error}.") from None
    return _Layer(where=name, origin=name, values=_checked(nested, name, base))


def _read_override(text: str) -> _Layer:
    """'lora.rank=32' as a layer."""
    key, equals, value = (part.strip() for part in text.partition("="))
    where = f"override {text}"
    if not equals or not key:
        raise ConfigError(f"{where}: wanted key=value, as lora.rank=32.")
    if near := [known for known in _keys() if known.endswith(f".{key}")]:
        raise ConfigError(f"{where}: a key needs its section. Did you mean {near[0]!r}?")
    parsed = _toml_value(value, where)
    if key in _texts() and isinstance(parsed, bool | int | float):
        raise ConfigError(f"{where}: wanted text, and {value} is a number or a truth. As text: {key}='\"{value}\"'")
    nested = _nested({key: parsed})
    return _Layer(where=where, origin="override", values=_checked(nested, where, Path()))


def _toml_value(text: str, where: str) -> object:
    """`32`, `true`, `"a b"`, `["x"]` as TOML says; everything else that has no quotes or brackets is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"{where}: {text} is not a TOML value: {error}. Strings in a list need quotes.") from None
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _checked(nested: dict, where: str, base: Path | None) -> dict[str, object]:
    """One source's values by dotted key, with absolute paths; checked alone, so that messages name this source."""
    for key in LISTS:
        section, name = key.split(".")
        if isinstance(nested.get(section), dict) and isinstance(nested[section].get(name), str):
            nested[section][name] = [nested[section][name]]
    schema.read(RunConfig, nested, where)
    values = {f"{section}.{name}": value for section, table in nested.items() for name, value in table.items()}
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key}: wanted a finite number, found {value}.")
    for key in PATHS & values.keys():
        given = values[key]
        values[key] = (
            [_place(key, path, base) for path in given] if isinstance(given, list) else _place(key, given, base)
        )
    if values.get("lora.targets") == ["all-linear"]:
        values["lora.targets"] = []
    if values.get("output.folder") == "":
        del values["output.folder"]
    return values


def _nested(values: Mapping[str, object]) -> dict:
    """{'lora.rank': 32} as {'lora': {'rank': 32}}; a key without a dot stays at the top, and the schema refuses it."""
    nested: dict = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


def _place(key: str, path: str, base: Path | None) -> str:
    """`path` made absolute; an empty one stays, and so does a name or an id if nothing of that name lies in `base`.

    A recipe (None) has its plain names kept: whatever lies in the working directory must not change what it means.
    """
    looks_so = (key in NAMES and re.fullmatch(r"[\w-]+", path)) or (key in IDS and is_id(path))
    is_name = looks_so and not (base and (base / path).exists())
    return path if is_name or not path else _absolute((base or Path()) / Path(path).expanduser())


def _absolute(path: Path) -> str:
    """Without resolving symbolic links: the user's own name for a folder is the one to show."""
    return os.path.abspath(path)
