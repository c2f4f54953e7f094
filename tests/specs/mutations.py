"""Wrong specs: for every switch of a page, what a slip in the page or in the code that reads it would make of it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from lumen.rope_spec import RopeSpec
from lumen.spec import LayerSpec, ModelSpec


def mutations(spec: ModelSpec) -> dict[str, ModelSpec]:
    """What is wrong → a spec that is wrong in that, for all that this model has."""
    return dict(_wrong(spec))


def _wrong(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    other_norm = {"rms": "rms_plus_one", "rms_plus_one": "rms"}[spec.norm]
    yield f"norm is {other_norm}", replace(spec, norm=other_norm)
    yield "epsilon of the norms", replace(spec, norm_eps=0.1)
    if spec.norm_at == "around":
        yield "norms after each half missing", replace(spec, norm_at="before")
    if spec.mlp in (other_mlp := {"silu": "gelu_tanh", "gelu_tanh": "silu"}):
        yield f"mlp is {other_mlp[spec.mlp]}", replace(spec, mlp=other_mlp[spec.mlp])
    for part in spec.bias:
        yield f"bias of {part} missing", replace(spec, bias=spec.bias - {part})
    if spec.qk_norm != "none":
        yield "norms of q and k missing", replace(spec, qk_norm="none")
    width = spec.dim // spec.heads
    yield "scale by the wrong width", replace(spec, scale=(spec.dim if width == spec.head_dim else width) ** -0.5)
    if spec.softcap:
        yield "soft cap of the scores missing", replace(spec, softcap=0.0)
    if spec.logits_softcap:
        yield "soft cap of the logits missing", replace(spec, logits_softcap=0.0)
    if spec.embed_scale != 1.0:
        yield "embedding not scaled", replace(spec, embed_scale=1.0)
    if spec.experts is not None:
        yield from _wrong_experts(spec)
    yield from _wrong_layers(spec)
    yield from _wrong_ropes(spec)


def _wrong_experts(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    own = spec.experts
    word = "not " if own.normalize else ""
    yield f"weights of the experts {word}normalized", _experts(spec, normalize=not own.normalize)
    yield "one expert less for a token", _experts(spec, per_token=own.per_token - 1)
    yield "one expert more for a token", _experts(spec, per_token=own.per_token + 1)
    if own.shared:
        yield "shared expert missing", _experts(spec, shared=0)
    if own.shared_gate != "none":
        yield "gate of the shared expert missing", _experts(spec, shared_gate="none")


def _wrong_layers(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    if spec.window:
        yield "window missing", _layers(spec, lambda layer: replace(layer, window=0))
        for tokens, word in ((1, "long"), (-1, "short")):
            longer = _layers(spec, lambda layer, by=tokens: replace(layer, window=layer.window and layer.window + by))
            yield f"window one too {word}", longer
    if len({layer.kind for layer in spec.layers}) > 1:
        yield "windows in the wrong layers", replace(spec, layers=spec.layers[1:] + spec.layers[:1])
    if len({layer.rope for layer in spec.layers}) > 1:
        yield "one rope for all layers", _layers(spec, lambda layer: replace(layer, rope=spec.rope))


def _wrong_ropes(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    kind, half = spec.rope.kind, spec.head_dim // 2
    other = half if spec.rope.turned == spec.head_dim else spec.head_dim
    yield "another rotary base", _ropes(spec, lambda rope: replace(rope, theta=rope.theta * 10))
    yield f"{other} components of a head turn", _ropes(spec, lambda rope: _turning(rope, other))
    if spec.rope.attention_factor != 1:
        yield "scores not scaled by the rope", _ropes(spec, lambda rope: replace(rope, attention_factor=1.0))
    if kind != "longrope" and any(layer.rope.factor != 1 for layer in spec.layers):
        yield "rotary factor missing", _ropes(spec, lambda rope: replace(rope, factor=1.0))
        yield "rotary factor twice", _ropes(spec, lambda rope: replace(rope, factor=rope.factor**2))
    if kind in ("llama3", "yarn", "longrope"):
        yield "rope is plain", _ropes(spec, lambda rope: replace(rope, kind="plain"))
    if kind in ("llama3", "yarn"):
        yield "rope is linear", _ropes(spec, lambda rope: replace(rope, kind="linear"))
        yield "rope: trained_length twice", _ropes(spec, lambda rope: _twice(rope, "trained_length"))
    if kind == "longrope":
        shorter = _ropes(spec, lambda rope: replace(rope, trained_length=rope.trained_length - 1))
        yield "rope: trained_length one too short", shorter
    for switch in {"llama3": ("low", "high"), "yarn": ("beta_fast", "beta_slow")}.get(kind, ()):
        yield f"rope: {switch} twice", _ropes(spec, lambda rope, name=switch: _twice(rope, name))
    if kind == "yarn":
        yield "rope: truncate", _ropes(spec, lambda rope: replace(rope, truncate=not rope.truncate))
    for switch in ("short", "long") if kind == "longrope" else ():
        reversed_list = getattr(spec.rope, switch)[::-1]
        backwards = _ropes(spec, lambda rope, name=switch, own=reversed_list: replace(rope, **{name: own}))
        yield f"rope: {switch} list backwards", backwards


def _twice(rope: RopeSpec, switch: str) -> RopeSpec:
    return replace(rope, **{switch: getattr(rope, switch) * 2})


def _turning(rope: RopeSpec, components: int) -> RopeSpec:
    """`rope` on another share of a head; the lists that longrope has for its pairs are cut, or go on with ones."""
    ones = (1.0,) * components
    lists = {name: (getattr(rope, name) + ones)[: components // 2] for name in ("short", "long") if getattr(rope, name)}
    return replace(rope, turned=components, **lists)


def _layers(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec:
    return replace(spec, layers=tuple(change(layer) for layer in spec.layers))


def _ropes(spec: ModelSpec, change: Callable[[RopeSpec], RopeSpec]) -> ModelSpec:
    return _layers(spec, lambda layer: replace(layer, rope=change(layer.rope)))


def _experts(spec: ModelSpec, **changes: object) -> ModelSpec:
    return replace(spec, experts=replace(spec.experts, **changes))
