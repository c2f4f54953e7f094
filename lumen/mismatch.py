"""Where `config.json` and the tensors beside it disagree, and which key most likely says something else than the files.

Numbers in `config.json` are the wish, shapes and names in the files the fact. A tensor alone says that one of them is
wrong; what it is a tensor of says which key to look at.
"""

import re
from pathlib import Path

from lumen.errors import closest
from lumen.names import FileTensor
from lumen.spec import ModelSpec

HIDDEN, INNER, VOCAB = "hidden_size", "intermediate_size", "vocab_size"
Q, KV = "num_attention_heads × head_dim", "num_key_value_heads × head_dim"
KEYS = {  # what a role is → the keys of config.json behind each axis of its weight
    "embed": (VOCAB, HIDDEN),
    "head": (VOCAB, HIDDEN),
    "attn.q": (Q, HIDDEN),
    "attn.k": (KV, HIDDEN),
    "attn.v": (KV, HIDDEN),
    "attn.o": (HIDDEN, Q),
    "attn.q_norm": ("head_dim",),
    "attn.k_norm": ("head_dim",),
    "mlp.gate": (INNER, HIDDEN),
    "mlp.up": (INNER, HIDDEN),
    "mlp.down": (HIDDEN, INNER),
    **dict.fromkeys(("norm", "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"), (HIDDEN,)),
}


def wrong_shape(spec: ModelSpec, tensor: FileTensor, found: tuple[int, ...], file: Path) -> str:
    """The sentence for a tensor of another shape than the spec wants."""
    said = f"{file}: {tensor.name!r} wants shape {tensor.shape}, found {found}."
    pairs = enumerate(zip(tensor.shape, found, strict=True)) if len(found) == len(tensor.shape) else ()
    axes = [(_key(tensor, axis), *sizes) for axis, sizes in pairs if sizes[0] != sizes[1]]
    keys = [f"{key} ({wish} by config.json, {fact} here)" for key, wish, fact in axes if key]
    if keys:
        return f"{said} The key to look at is {' and '.join(keys)}. Is config.json that of these weights?"
    return f"{said} Is {spec.name!r} the right family for this folder?"


def missing_names(spec: ModelSpec, missing: list[str], wanted: int, found: set[str], folder: Path) -> str:
    """The sentence for tensors that the spec wants and the files do not hold."""
    said = f"{folder}: {len(missing)} of {wanted} tensors are missing, the first is {missing[0]!r}."
    depth, stored = len(spec.layers), _depth(found)
    if 0 < stored < depth and all((layer := _layer(name)) is not None and layer >= stored for name in missing):
        return f"{said} num_hidden_layers is {depth} in config.json, found {stored} layers. Is the download whole?"
    if missing == [_head(spec)]:
        hint = closest(missing[0], found)
        return f"{said}{hint} Should tie_word_embeddings be true in config.json, or is the download cut short?"
    return f"{said}{closest(missing[0], found)} Is {spec.name!r} the right family for this folder?"


def extra_names(spec: ModelSpec, extra: list[str], file: Path) -> str:
    """The sentence for tensors that the files hold and the spec has no place for."""
    said = (
        f"{file.parent}: {len(extra)} tensors have no place in a {spec.name!r} model, the first is {extra[0]!r} in "
        f"{file.name}."
    )
    depth, stored = len(spec.layers), _depth(set(extra))
    if all((layer := _layer(name)) is not None and layer >= depth for name in extra):
        return f"{said} num_hidden_layers is {depth} in config.json, found {stored} layers."
    if extra == [_head(spec)]:
        return f"{said} tie_word_embeddings is true in config.json, found a head that is not the embedding."
    if all(name.endswith(".bias") for name in extra):
        return f"{said} Layers with biases are another family's: which one does config.json's architectures name?"
    return f"{said} Is config.json that of these weights?"


def _key(tensor: FileTensor, axis: int) -> str:
    """The keys behind one axis of a tensor; of several roles below each other, those of all on the first axis."""
    parts = [name.role.removesuffix(".weight").removesuffix(".bias") for name, _ in tensor.pieces]
    parts = [part.split(".", 2)[2] if part.startswith("blocks.") else part for part in parts]
    keys = [KEYS[part][axis] for part in parts if part in KEYS and axis < len(KEYS[part])]
    return " + ".join(keys if axis == 0 else keys[:1])


def _head(spec: ModelSpec) -> str:
    return f"{spec.names.by_role('head').checkpoint}.weight"


def _layer(name: str) -> int | None:
    """The number of the layer that a checkpoint's tensor belongs to, as its name says."""
    number = re.search(r"\.layers\.(\d+)\.", name)
    return int(number[1]) if number else None


def _depth(names: set[str]) -> int:
    return max((layer + 1 for name in names if (layer := _layer(name)) is not None), default=0)
