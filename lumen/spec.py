"""A family's page bound to one `config.json`.

`Family.bind(config)` reads the numbers of one checkpoint off the keys that the page names and gives a `ModelSpec`:
plain values, one record per layer, no string that means a key of `config.json`. Everything that must agree about a
model reads its `ModelSpec`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from lumen.errors import SpecError
from lumen.expert_spec import EXACT, ExpertsSpec, bind_experts, size_keys, sparse_layers
from lumen.model_config import LAYER_TYPES, read_config
from lumen.names import ModuleName, NameTable, Part, TensorName
from lumen.page import ChatPage, GGUFPage, Number, Page, lookup, page_names, read_page
from lumen.rope_spec import GGUF_TENSORS, RopeSpec, bind_ropes
from lumen.text_half import REFUSED, TextHalfPage

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
class LayerSpec:
    kind: str  # full | window
    window: int  # tokens that a query sees, itself included; 0 = all
    rope: RopeSpec
    sparse: bool  # experts in the place of the MLP


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
    experts: ExpertsSpec | None  # None where every layer has an MLP
    names: NameTable
    lora_targets: tuple[str, ...]
    gguf: GGUFPage
    chat: ChatPage | None
    config: dict  # config.json as it was read, in the hub's classic spelling; the text half of a vision model's
    text_half: TextHalfPage | None = None  # how a vision checkpoint names its tensors, where this is one's text half

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

    @property
    def length_without_windows(self) -> int:
        """Tokens up to which a runtime that knows no windows gives this model's answers."""
        return min(self.context_length, self.window or self.context_length)

    def tensors(self) -> Iterator[TensorName]:
        """Every tensor that a checkpoint of this model holds, in the order of the page."""
        ends: dict[str, int] = {}  # rows of each checkpoint tensor that earlier roles have taken
        for name in self.names:
            part = _part(name.role)
            if part == "head" and self.tied:
                continue
            shape = self._shape(part, self._is_sparse(name.role))
            if shape is None:  # a row for a module that this model's switches leave out
                continue
            yield self._tensor(name, "weight", shape, ends)
            if part.removeprefix("attn.") in self.bias and part.startswith("attn."):
                yield self._tensor(name, "bias", shape[:1], ends)

    def _tensor(self, name: ModuleName, kind: str, shape: tuple[int, ...], ends: dict[str, int]) -> TensorName:
        checkpoint = f"{name.checkpoint}.{kind}"
        first = ends.get(checkpoint, 0)
        ends[checkpoint] = first + shape[0]
        return TensorName(
            role=f"{name.role}.{kind}",
            checkpoint=checkpoint,
            gguf=f"{name.gguf}.{kind}",
            shape=shape,
            transform=name.transform,
            heads=self.kv_heads if name.role.endswith("attn.k") else self.heads,
            parts=_stacked_parts(name, kind, shape) or (Part(name=checkpoint, first=first, rows=shape[0]),),
            exact=_part(name.role) in EXACT,
        )

    def _is_sparse(self, role: str) -> bool:
        return role.startswith("blocks.") and self.layers[int(role.split(".")[1])].sparse

    def _shape(self, part: str, sparse: bool) -> tuple[int, ...] | None:
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
        if sparse:
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith("mlp.")}
            shapes |= self.experts.shapes(self.dim)
        return shapes.get(part)


def _part(role: str) -> str:
    """`attn.q` of `blocks.3.attn.q`; a role outside the blocks is its own part."""
    return role.split(".", 2)[2] if role.startswith("blocks.") else role


def _stacked_parts(name: ModuleName, kind: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """Where the slices of a stack lie; none for what is no stack."""
    slices = enumerate(name.modules) if name.stack else ()
    return tuple(Part(name=f"{module}.{kind}", first=0, rows=shape[1], index=index) for index, module in slices)


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

    @property
    def architectures(self) -> list[str]:
        """What `config.json` may call the family: its own name, then the vision models that hold it."""
        return [self.page.architecture, *(self.page.text_half.architectures if self.page.text_half else ())]

    @property
    def size_keys(self) -> dict[str, str]:
        """The words of the page's `[sizes]` → the keys of config.json that hold the same."""
        keys = DIMS | {"layers": DIMS["depth"], "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
        return keys | (size_keys(self.page.experts) if self.page.experts else {})

    def mismatches(self, config: dict) -> list[str]:
        """Why `[match]` does not hold for `config`, one sentence a row; empty when it holds."""
        found = {key: lookup(config, key) for key in self.page.match}
        return [
            f"{self.page.name} wants {key} = {wanted}, found {found[key]!r}"
            for key, wanted in self.page.match.items()
            if not _allows(wanted, found[key])
        ]

    def _half(self, config: dict) -> TextHalfPage | None:
        """The page's `[text_half]`, where `config` is that of a vision checkpoint which it names."""
        half = self.page.text_half
        return half if half is not None and _architecture(config) in half.architectures else None

    def bind(self, config: dict, where: str = "config.json") -> ModelSpec:
        """The page with the numbers of one checkpoint.

        config  as `read_config` gives it
        where   names the file in messages

        Refuses, with SpecError, what `[expect]` does not allow, keys that are missing, and sizes that disagree.
        """
        page, half = self.page, self._half(config)
        if half is not None:
            config = half.defaults | config | {"architectures": [page.architecture]}
        _check_expectations(page, config, where)
        sizes, depth = _sizes(config, where)
        number = _Numbers(config | {"head_dim": sizes["head_dim"]}, where, page.name)
        ropes = bind_ropes(page, config, where, number, sizes["head_dim"])
        if (rope := ropes["full"]).kind == "yarn":  # a config.json often names the length before yarn
            sizes["context_length"] = max(sizes["context_length"], int(rope.factor * rope.trained_length))
        layers = _dense_layers(page, config, where, number, ropes, depth)
        experts = bind_experts(page.experts, config, where, number) if page.experts else None
        sparse = sparse_layers(page.experts, config, where, number, depth) if page.experts else set()
        tensors = dict(page.tensors)
        block_rows = _flatten(tensors.pop("block", {}))
        return ModelSpec(
            **sizes,
            name=page.name,
            architecture=page.architecture,
            norm_eps=number("norm_eps", "rms_norm_eps"),
            layers=tuple(replace(layer, sparse=index in sparse) for index, layer in enumerate(layers)),
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
            experts=experts,
            names=NameTable(
                _flatten(tensors), block_rows, depth, f"model_specs/{page.name}.toml", experts.count if experts else 0
            ),
            lora_targets=tuple(page.lora.targets),
            gguf=replace(page.gguf, extra=[*page.gguf.extra, *GGUF_TENSORS.get(ropes["full"].kind, ())]),
            chat=page.chat,
            config=config,
            text_half=half,
        )


def find_family(config: dict, where: str = "config.json") -> Family:
    """The page that describes `config`: its architecture, and the most specific `[match]` that holds.

    SpecError when no page knows the architecture, none matches, or two match equally well.
    """
    architecture = _architecture(config)
    families = [Family.load(name) for name in Family.names()]
    same = [family for family in families if architecture in family.architectures]
    if not same:
        known = sorted({known for family in families for known in family.architectures})
        near = get_close_matches(architecture, known, n=1)
        hint = f" The nearest known is {near[0]!r}, whose arithmetic may differ." if near else ""
        hint = REFUSED.get(architecture, hint)
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


def _architecture(config: dict) -> str:
    named = config.get("architectures") or "unnamed"
    return str(named[0] if isinstance(named, list) else named)


def _sizes(config: dict, where: str) -> tuple[dict[str, int], int]:
    """The sizes of a `ModelSpec` by the names of its fields, and the number of its layers."""
    sizes = {name: _integer(config, key, where) for name, key in DIMS.items()}
    heads, dim = sizes["heads"], sizes["dim"]
    kv_heads = _integer(config, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise SpecError(f"{where}: num_key_value_heads is {kv_heads}, which does not divide the {heads} heads.")
    if config.get("head_dim") is None and dim % heads:
        raise SpecError(f"{where}: hidden_size {dim} is not a multiple of {heads} heads, and there is no head_dim.")
    head_dim = _integer(config, "head_dim", where, dim // heads)
    if head_dim % 2:
        raise SpecError(f"{where}: head_dim is {head_dim}; rotary positions want an even one.")
    depth = sizes.pop("depth")
    return sizes | {"kv_heads": kv_heads, "head_dim": head_dim}, depth


def _dense_layers(
    page: Page, config: dict, where: str, number: "_Numbers", ropes: dict[str, RopeSpec], depth: int
) -> list[LayerSpec]:
    """What attention is in each layer; which of them have experts is another matter."""
    window, pattern = int(number("attention.window", page.attention.window)), page.attention.layers
    if "window" in pattern and window < 1:
        raise SpecError(f"{where}: {page.attention.window} wants a window of at least 1 token, found {window}.")
    kinds = [pattern[i % len(pattern)] for i in range(depth)]
    _check_layer_types(page, config, kinds, where)
    return [
        LayerSpec(
            kind=kind, window=window if kind == "window" else 0, rope=ropes.get(kind, ropes["full"]), sparse=False
        )
        for kind in kinds
    ]


def _integer(config: dict, key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(f"{where}: {key} wants a positive whole number, found {value!r}.")
    if value >= 2**31:
        raise SpecError(f"{where}: {key} wants a whole number below 2^31, found {value}.")
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
            found = lookup(self.config, option) if isinstance(option, str) else option
            if found is None:
                continue
            if not isinstance(found, int | float) or isinstance(found, bool):
                raise SpecError(f"{self.where}: {option} wants a number, found {found!r}.")
            if found != found or abs(found) == float("inf"):  # JSON as Python reads it knows NaN and Infinity
                raise SpecError(f"{self.where}: {option} wants a number that fp32 can hold, found {found!r}.")
            return found
        raise SpecError(
            f"{self.where}: {what} of page {self.page!r} wants {' or '.join(map(repr, options))}, found neither."
        )


def _flatten(rows: dict, prefix: str = "") -> dict[str, list[str]]:
    """`{"attn": {"q": […]}}`, as TOML reads `attn.q = […]`, becomes `{"attn.q": […]}`."""
    flat: dict[str, list[str]] = {}
    for key, value in rows.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_expectations(page: Page, config: dict, where: str) -> None:
    for key, wanted in page.expect.items():
        found = lookup(config, key)
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
