"""A family's page bound to one `config.json`.

`Family.bind(config)` reads the numbers of one checkpoint off the keys that the page names and gives a `ModelSpec`:
plain values, one record per layer, no string that means a key of `config.json`. Everything that must agree about a
model reads its `ModelSpec`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lumen.errors import SpecError, closest
from lumen.names import ModuleName, NameTable
from lumen.page import ROPE_KINDS, ChatPage, GGUFPage, Number, Page, RopePage, page_names, read_page

LAYER_TYPES = {"full": "full_attention", "window": "sliding_attention"}  # what config.json calls our kinds of layer
DIMS = {  # ModelSpec field → key of config.json; the same words in every family that lumen knows
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "vocab": "vocab_size",
    "context_length": "max_position_embeddings",
}


# The page bound to a checkpoint ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One kind of rotary position: see `nn/rope.py` for what each kind computes from these."""

    kind: str
    theta: float
    factor: float = 1.0
    low: float = 0.0
    high: float = 0.0
    trained_length: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    kind: str  # full | window
    window: int  # tokens that a query sees, itself included; 0 = all
    rope: RopeSpec


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """One tensor of a model: its three names, its shape, and how its values go into a GGUF file."""

    role: str  # blocks.3.attn.q.weight
    checkpoint: str
    gguf: str
    shape: tuple[int, ...]
    transform: str
    heads: int  # heads in the tensor's rows, for `rope_pairs`


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that the code needs to know of one model; sizes in elements, `context_length` in tokens."""

    name: str
    architecture: str
    dim: int  # D
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # E
    mlp_dim: int  # F
    vocab: int  # V
    context_length: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    norm: str
    norm_at: str
    mlp: str
    bias: frozenset[str]
    qk_norm: str
    scale: float  # what q·k is multiplied by
    softcap: float
    embed_scale: float | str
    tied: bool
    logits_softcap: float
    names: NameTable
    lora_targets: tuple[str, ...]
    gguf: GGUFPage
    chat: ChatPage | None
    config: dict  # config.json as it was read, in the hub's classic spelling

    @property
    def rope(self) -> RopeSpec:
        """The rope of the layers that see everything: the one a GGUF file names first."""
        return next((layer.rope for layer in self.layers if layer.kind == "full"), self.layers[0].rope)

    @property
    def window_rope(self) -> RopeSpec:
        """The rope of the layers that see a window; `rope` where there are none."""
        return next((layer.rope for layer in self.layers if layer.kind == "window"), self.rope)

    @property
    def window(self) -> int:
        """Tokens that a query of a window layer sees; 0 where there are none."""
        return max(layer.window for layer in self.layers)

    def tensors(self) -> Iterator[TensorName]:
        """Every tensor that a checkpoint of this model holds, in the order of the page."""
        for name in self.names:
            part = _part(name.role)
            if part == "head" and self.tied:
                continue
            shape = self._shape(part)
            if shape is None:  # a row for a module that this model's switches leave out
                continue
            yield self._tensor(name, "weight", shape)
            if part.removeprefix("attn.") in self.bias and part.startswith("attn."):
                yield self._tensor(name, "bias", shape[:1])

    def _tensor(self, name: ModuleName, kind: str, shape: tuple[int, ...]) -> TensorName:
        return TensorName(
            role=f"{name.role}.{kind}",
            checkpoint=f"{name.checkpoint}.{kind}",
            gguf=f"{name.gguf}.{kind}",
            shape=shape,
            transform=name.transform,
            heads=self.kv_heads if name.role.endswith("attn.k") else self.heads,
        )

    def _shape(self, part: str) -> tuple[int, ...] | None:
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "embed": (self.vocab, self.dim),
            "head": (self.vocab, self.dim),
            "norm": (self.dim,),
            "attn_norm": (self.dim,),
            "mlp_norm": (self.dim,),
            "attn.q": (q_dim, self.dim),
            "attn.k": (kv_dim, self.dim),
            "attn.v": (kv_dim, self.dim),
            "attn.o": (self.dim, q_dim),
            "mlp.gate": (self.mlp_dim, self.dim),
            "mlp.up": (self.mlp_dim, self.dim),
            "mlp.down": (self.dim, self.mlp_dim),
        }
        if self.norm_at == "around":
            shapes |= {"attn_post_norm": (self.dim,), "mlp_post_norm": (self.dim,)}
        if self.qk_norm == "head":
            shapes |= {"attn.q_norm": (self.head_dim,), "attn.k_norm": (self.head_dim,)}
        return shapes.get(part)


def _part(role: str) -> str:
    """`attn.q` of `blocks.3.attn.q`; a role outside the blocks is its own part."""
    return role.split(".", 2)[2] if role.startswith("blocks.") else role


# Pages and config.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One page of `model_specs/`, checked."""

    page: Page

    @staticmethod
    def names() -> list[str]:
        """The names of all pages, sorted."""
        return page_names()

    @staticmethod
    @cache
    def load(name: str) -> "Family":
        """The page `model_specs/NAME.toml`; SpecError for an unknown name or a page of unknown words."""
        return Family(read_page(name))

    def mismatches(self, config: dict) -> list[str]:
        """Why `[match]` does not hold for `config`, one sentence a row; empty when it holds."""
        found = {key: _lookup(config, key) for key in self.page.match}
        return [
            f"{self.page.name} wants {key} = {wanted}, found {found[key]!r}"
            for key, wanted in self.page.match.items()
            if not _allows(wanted, found[key])
        ]

    def bind(self, config: dict, where: str = "config.json") -> ModelSpec:
        """The page with the numbers of one checkpoint.

        config  as `read_config` gives it
        where   names the file in messages

        Refuses, with SpecError, what `[expect]` does not allow, keys that are missing, and sizes that disagree.
        """
        page = self.page
        _check_expectations(page, config, where)
        sizes = {name: _integer(config, key, where) for name, key in DIMS.items()}
        depth = sizes.pop("depth")
        heads, dim = sizes["heads"], sizes["dim"]
        kv_heads = _integer(config, "num_key_value_heads", where, heads)
        if heads % kv_heads:
            raise SpecError(f"{where}: num_key_value_heads is {kv_heads}, which does not divide the {heads} heads.")
        if config.get("head_dim") is None and dim % heads:
            raise SpecError(f"{where}: hidden_size {dim} is not a multiple of {heads} heads, and there is no head_dim.")
        head_dim = _integer(config, "head_dim", where, dim // heads)
        if head_dim % 2:
            raise SpecError(f"{where}: head_dim is {head_dim}; rotary positions want an even one.")
        known = config | {"head_dim": head_dim}
        number = _Numbers(known, where, page.name)
        ropes = {kind: number.rope(kind, rope) for kind, rope in page.rope.items()}
        window = int(number("attention.window", page.attention.window))
        if "window" in page.attention.layers and window < 1:
            raise SpecError(f"{where}: {page.attention.window} wants a window of at least 1 token, found {window}.")
        pattern = page.attention.layers
        kinds = [pattern[i % len(pattern)] for i in range(depth)]
        _check_layer_types(page, config, kinds, where)
        tensors = dict(page.tensors)
        block_rows = _flatten(tensors.pop("block", {}))
        return ModelSpec(
            **sizes,
            name=page.name,
            architecture=page.architecture,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=number("norm_eps", "rms_norm_eps"),
            layers=tuple(
                LayerSpec(kind=kind, window=window if kind == "window" else 0, rope=ropes.get(kind, ropes["full"]))
                for kind in kinds
            ),
            norm=page.block.norm,
            norm_at=page.block.norm_at,
            mlp=page.block.mlp,
            bias=frozenset(page.attention.bias),
            qk_norm=page.attention.qk_norm,
            scale=number("attention.scale", page.attention.scale) ** -0.5,
            softcap=float(number("attention.softcap", page.attention.softcap)),
            embed_scale=page.embed.scale,
            tied=bool(config.get("tie_word_embeddings", False)) if page.embed.tied is None else page.embed.tied,
            logits_softcap=float(number("logits.softcap", page.logits.softcap)),
            names=NameTable(_flatten(tensors), block_rows, depth, f"model_specs/{page.name}.toml"),
            lora_targets=tuple(page.lora.targets),
            gguf=page.gguf,
            chat=page.chat,
            config=config,
        )


def read_config(folder: Path | str) -> dict:
    """`config.json` of a model folder, in the hub's classic spelling.

    Newer writers put `rope_theta` and the scaling into `rope_parameters` and call `torch_dtype` `dtype`; both spellings
    come out as `rope_theta`, `rope_scaling` (always there, with `rope_type`; "default" means none) and `torch_dtype`.
    Where each kind of layer has parameters of its own, those of the window layers come out as `rope_local_base_freq`.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SpecError(
            f"{path} does not exist. A model is a folder with config.json, safetensors and a tokenizer."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise SpecError(f"{path}: wanted a JSON object, found {type(config).__name__}.")
    return _classic_spelling(config, str(path))


def find_family(config: dict, where: str = "config.json") -> Family:
    """The page that describes `config`: its architecture, and the most specific `[match]` that holds.

    SpecError when no page knows the architecture, none matches, or two match equally well.
    """
    named = config.get("architectures") or []
    architecture = named[0] if isinstance(named, list) and named else named
    families = [Family.load(name) for name in Family.names()]
    same = [family for family in families if family.page.architecture == architecture]
    if not same:
        known = sorted({family.page.architecture for family in families})
        hint = closest(str(architecture), known)
        raise SpecError(
            f"{where}: architectures is {architecture!r}, which no page describes.{hint} Known: {', '.join(known)}."
        )
    matching = [family for family in same if not family.mismatches(config)]
    if not matching:
        reasons = "; ".join(reason for family in same for reason in family.mismatches(config))
        raise SpecError(f"{where}: no page of {architecture} matches: {reasons}.")
    most = max(len(family.page.match) for family in matching)
    best = [family for family in matching if len(family.page.match) == most]
    if len(best) > 1:
        names = " and ".join(family.page.name for family in best)
        raise SpecError(f"{where}: the pages {names} match equally well; their [match] sections must tell them apart.")
    return best[0]


def load_family(folder: Path | str) -> ModelSpec:
    """The `ModelSpec` of a model folder: its page found, bound to its `config.json`. Reads no weights."""
    config = read_config(folder)
    where = str(Path(folder) / "config.json")
    return find_family(config, where).bind(config, where)


def _classic_spelling(config: dict, where: str) -> dict:
    config = dict(config)
    if "dtype" in config:
        config.setdefault("torch_dtype", config.pop("dtype"))
    scaling = config.get("rope_scaling") or {}
    if parameters := config.pop("rope_parameters", None):
        if not isinstance(parameters, dict):
            raise SpecError(f"{where}: rope_parameters wants an object, found {parameters!r}.")
        scaling = dict(parameters)
        if windowed := scaling.pop(LAYER_TYPES["window"], None):
            config["rope_local_base_freq"] = _plain_theta(windowed, where)
        scaling = dict(scaling.pop(LAYER_TYPES["full"], scaling))
        config["rope_theta"] = scaling.pop("rope_theta", config.get("rope_theta"))
    if not isinstance(scaling, dict):
        raise SpecError(f"{where}: rope_scaling wants an object, found {scaling!r}.")
    scaling = dict(scaling)
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    # what stands beside "default" does not count, as in transformers
    config["rope_scaling"] = {"rope_type": "default"} if scaling["rope_type"] == "default" else scaling
    return config


def _plain_theta(parameters: dict, where: str) -> float | None:
    """`rope_theta` of the window layers, whose positions no known family scales."""
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise SpecError(
            f"{where}: rope_parameters.{LAYER_TYPES['window']}.rope_type is {kind!r}; only 'default' is known there."
        )
    return parameters.get("rope_theta")


def _lookup(config: dict, key: str) -> object:
    """The value of a dotted key, or None."""
    value: object = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _integer(config: dict, key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(f"{where}: {key} wants a positive whole number, found {value!r}.")
    return value


@dataclass(frozen=True)
class _Numbers:
    """Resolves the numbers of a page against one config."""

    config: dict
    where: str
    page: str

    def __call__(self, what: str, value: Number) -> float:
        options = value if isinstance(value, list) else [value]
        for option in options:
            found = _lookup(self.config, option) if isinstance(option, str) else option
            if found is None:
                continue
            if not isinstance(found, int | float) or isinstance(found, bool):
                raise SpecError(f"{self.where}: {option} wants a number, found {found!r}.")
            return found
        raise SpecError(
            f"{self.where}: {what} of page {self.page!r} wants {' or '.join(map(repr, options))}, found neither."
        )

    def rope(self, kind: str, page: RopePage) -> RopeSpec:
        wanted = {name: self(f"rope.{kind}.{name}", getattr(page, name)) for name in ROPE_KINDS[page.kind]}
        spec = RopeSpec(kind=page.kind, theta=float(self(f"rope.{kind}.theta", page.theta)), **wanted)
        if spec.theta <= 0 or spec.factor < 1:
            raise SpecError(
                f"{self.where}: rope wants theta > 0 and factor >= 1, found {spec.theta} and {spec.factor}."
            )
        if page.kind == "llama3" and not (0 < spec.low < spec.high and spec.trained_length > 0):
            raise SpecError(
                f"{self.where}: rope_scaling wants 0 < low_freq_factor < high_freq_factor and a trained length, "
                f"found {spec.low}, {spec.high} and {spec.trained_length}."
            )
        return spec


def _flatten(rows: dict, prefix: str = "") -> dict[str, list[str]]:
    """`{"attn": {"q": […]}}`, as TOML reads `attn.q = […]`, becomes `{"attn.q": […]}`."""
    flat: dict[str, list[str]] = {}
    for key, value in rows.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_expectations(page: Page, config: dict, where: str) -> None:
    for key, wanted in page.expect.items():
        found = _lookup(config, key)
        if found is not None and not _allows(wanted, found):
            allowed = wanted if isinstance(wanted, list) else [wanted]
            raise SpecError(
                f"{where}: {key} is {found!r}; family {page.name!r} wants {' or '.join(map(repr, allowed))}."
            )


def _allows(wanted: object, found: object) -> bool:
    """Whether a row of `[match]` or `[expect]` holds for the value of its key; None is an absent one."""
    if wanted in ("present", "absent"):
        return (found is not None) == (wanted == "present")
    return found in (wanted if isinstance(wanted, list) else [wanted])


def _check_layer_types(page: Page, config: dict, kinds: list[str], where: str) -> None:
    """Newer writers list the kind of every layer; the list must be what the page says."""
    found = config.get("layer_types")
    if found is None:
        return
    wanted = [LAYER_TYPES[kind] for kind in kinds]
    if not isinstance(found, list) or len(found) != len(wanted):
        raise SpecError(f"{where}: layer_types wants a list of {len(wanted)} words, one a layer, found {found!r}.")
    for layer, pair in enumerate(zip(found, wanted, strict=True)):
        if pair[0] != pair[1]:
            raise SpecError(f"{where}: layer_types[{layer}] is {pair[0]!r}; family {page.name!r} wants {pair[1]!r}.")
