"""A rope of a page bound to one `config.json`: which kind it is there, with which numbers, and what is refused.

Positions are the part of `config.json` that grows new words most often, and a word that is not understood changes every
answer without an error. So a key of `rope_scaling` that the page's kind does not read is refused, as is a rope type
that the page does not name. See `nn/rope.py` for what each kind computes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from lumen.errors import SpecError
from lumen.page import ROPE_KINDS, ROPE_TYPES, Number, Page, RopePage, lookup

GGUF_TENSORS = {"longrope": ("rope_factors_long", "rope_factors_short")}  # what a kind adds to a GGUF file
LONGEST = 2**31 - 1  # tokens that a model may have been trained with at once


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One kind of rotary position: see `nn/rope.py` for what each kind computes from these."""

    kind: str
    theta: float
    turned: int  # components of a head that turn, from the first on; the others keep their values at every position
    factor: float = 1.0
    low: float = 0.0
    high: float = 0.0
    trained_length: int = 0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = True
    short: tuple[float, ...] = ()  # divisors of the frequencies, up to the trained length and beyond it
    long: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()  # pairs that turn by each part of a position: time, height, width
    interleaved: bool = False  # whether these take turns; of mrope alone
    attention_factor: float = 1.0  # what cos and sin are multiplied by, and q·k therefore by its square


@dataclass(frozen=True, kw_only=True)
class RopeSource:
    """Where the numbers of a rope come from: a section of a page, and one config.json."""

    page: RopePage
    layers: str  # full | window
    family: str
    config: dict
    where: str
    number: Callable[[str, Number], float]  # (what it is, how the page says it) → the number

    def get(self, name: str) -> float:
        return self.resolve(f"rope.{self.layers}.{name}", getattr(self.page, name))

    def resolve(self, what: str, said: Number) -> float:
        """`number`, but SpecError for one that would be none, 0 or infinite once it is computed with."""
        found = self.number(what, said)
        if not _fp32_holds(found):
            keys = [word for word in (said if isinstance(said, list) else [said]) if isinstance(word, str)]
            raise SpecError(
                f"{self.where}: {' or '.join(keys) or what} wants a number that fp32 can hold, found {_short(found)}."
            )
        return found


def bind_ropes(
    page: Page, config: dict, where: str, number: Callable[[str, Number], float], head_dim: int
) -> dict[str, RopeSpec]:
    """Kind of layer → its rope; SpecError for a type, a key or a number that the rope's kind does not know."""
    sources = {
        layers: RopeSource(page=rope, layers=layers, family=page.name, config=config, where=where, number=number)
        for layers, rope in page.rope.items()
    }
    return {layers: _bind_rope(source, head_dim) for layers, source in sources.items()}


def _bind_rope(source: RopeSource, head_dim: int) -> RopeSpec:
    kinds = [source.page.kind] if isinstance(source.page.kind, str) else source.page.kind
    if source.layers == "full":
        kind = _choose_kind(source, kinds)
        _refuse_unread_keys(source, kind)
    else:  # rope_scaling speaks of the other layers
        (kind,) = kinds
    words = {
        **{"trained_length": _trained_length, "truncate": _truncate, "short": _divisors, "long": _divisors},
        **{"sections": _sections, "interleaved": lambda source, name: source.page.interleaved},
    }
    own = {name: words[name](source, name) if name in words else source.get(name) for name in ROPE_KINDS[kind]}
    own = _with_attention_factor(kind, own | {"theta": float(source.get("theta"))}, source)
    known = {field.name for field in fields(RopeSpec)}
    spec = RopeSpec(
        kind=kind,
        turned=_turned(source, head_dim),
        **{name: value for name, value in own.items() if name in known},
    )
    _check(spec, source)
    return spec


def _choose_kind(source: RopeSource, kinds: list[str]) -> str:
    """Of the kinds that the page names, the one that config.json names."""
    types = {ROPE_TYPES.get(kind, kind): kind for kind in kinds}
    if "linear" in types:
        types.setdefault("default", "linear")  # by a factor of 1, which such pages name as the other choice
    found = lookup(source.config, "rope_scaling.rope_type") or "default"
    if not isinstance(found, str) or found not in types:
        wanted = " or ".join(map(repr, types))
        raise SpecError(
            f"{source.where}: rope_scaling.rope_type is {found!r}; family {source.family!r} wants {wanted}."
        )
    return types[found]


def _refuse_unread_keys(source: RopeSource, kind: str) -> None:
    scaling = source.config.get("rope_scaling") or {}
    if scaling.get("rope_type", "default") == "default":  # what stands beside "default" does not count
        return
    said = [getattr(source.page, name) for name in ("theta", "partial", *ROPE_KINDS[kind])]
    keys = {key for value in said for key in (value if isinstance(value, list) else [value])} | {
        "rope_scaling.rope_type"
    }
    for key, value in scaling.items():
        if value is not None and f"rope_scaling.{key}" not in keys:
            raise SpecError(
                f"{source.where}: rope_scaling.{key} is {value!r}, and the rope {kind!r} of family {source.family!r} "
                f"reads no such key. Remove it, if the model was made without it."
            )


def _turned(source: RopeSource, head_dim: int) -> int:
    share, found = source.get("partial"), source.config.get("partial_rotary_factor")
    if found is not None and found != share:
        raise SpecError(
            f"{source.where}: partial_rotary_factor is {found!r}; family {source.family!r} turns {share:g} of a head."
        )
    turned = int(head_dim * share)
    if not 0 < share <= 1 or turned < 2 or turned % 2:
        raise SpecError(
            f"{source.where}: partial_rotary_factor wants an even number of the {head_dim} components of a head, "
            f"found {share!r}, which is {head_dim * share:g} of them."
        )
    return turned


def _fp32_holds(value: float) -> bool:
    """Whether fp32, which frequencies and the numbers of a GGUF file are held in, has `value` as a normal number."""
    return value == 0 or 2.0**-126 <= abs(value) < 2.0**128  # NaN is in no range; Python compares its long integers


def _short(value: float) -> str:
    """`value` for a message, which hundreds of digits would bury."""
    digits = repr(value)
    return digits if len(digits) <= 40 else f"{digits[:20]}… of {len(digits)} digits"


def _trained_length(source: RopeSource, name: str) -> int:
    found = source.get(name)
    if found != int(found) or not 2 <= found <= LONGEST:
        raise SpecError(
            f"{source.where}: rope wants the whole number of tokens, from 2 to {LONGEST}, that the model was trained "
            f"with, found {found}."
        )
    return int(found)


def _truncate(source: RopeSource, name: str) -> bool:
    found = lookup(source.config, source.page.truncate)
    if found is not None and not isinstance(found, bool):
        raise SpecError(f"{source.where}: {source.page.truncate} wants true or false, found {found!r}.")
    return True if found is None else found


def _divisors(source: RopeSource, name: str) -> tuple[float, ...]:
    key = getattr(source.page, name)
    found = lookup(source.config, key)
    if not isinstance(found, list) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and _fp32_holds(value)
        for value in found
    ):
        raise SpecError(f"{source.where}: {key} wants a list of numbers above 0, which fp32 can hold; found {found!r}.")
    return tuple(map(float, found))


def _sections(source: RopeSource, name: str) -> tuple[int, ...]:
    found = lookup(source.config, source.page.sections)
    if not isinstance(found, list) or len(found) != 3 or not all(type(value) is int and value >= 0 for value in found):
        raise SpecError(
            f"{source.where}: {source.page.sections} wants three whole numbers, how many pairs of components turn by "
            f"time, height and width; found {found!r}."
        )
    return tuple(found)


def _with_attention_factor(kind: str, own: dict, source: RopeSource) -> dict:
    """`own` with the factor that config.json names, or the one that transformers derives where it names none."""
    if "attention_factor" not in own:
        return own
    if kind == "longrope" and not own["factor"]:
        own["factor"] = source.resolve("the context", "max_position_embeddings") / own["trained_length"]
    if not own["attention_factor"]:
        own["attention_factor"] = (_yarn_factor if kind == "yarn" else _longrope_factor)(own)
    return own if kind == "yarn" else own | {"factor": 1.0}  # of longrope nothing else comes from it


def _yarn_factor(own: dict) -> float:
    """0.1 · ln(factor) + 1 (Peng et al. 2023, eq. 22), or a ratio of two such terms where both weights are named."""

    def term(weight: float) -> float:
        return 0.1 * weight * math.log(own["factor"]) + 1.0 if own["factor"] > 1 else 1.0

    if own.get("mscale") and own.get("mscale_all_dim"):
        whole = term(own["mscale_all_dim"])
        return term(own["mscale"]) / whole if whole else 0.0  # which is refused
    return term(1.0)


def _longrope_factor(own: dict) -> float:
    factor = own["factor"]
    return math.sqrt(1 + math.log(factor) / math.log(own["trained_length"])) if factor > 1 else 1.0


def _check(spec: RopeSpec, source: RopeSource) -> None:
    where = source.where
    if spec.theta <= 0 or spec.factor < 1:
        raise SpecError(f"{where}: rope wants theta > 0 and factor >= 1, found {spec.theta} and {spec.factor}.")
    if spec.kind == "llama3" and not (0 < spec.low < spec.high and spec.trained_length > 0):
        raise SpecError(
            f"{where}: rope_scaling wants 0 < low_freq_factor < high_freq_factor and a trained length, "
            f"found {spec.low}, {spec.high} and {spec.trained_length}."
        )
    if spec.kind == "yarn" and not (0 < spec.beta_slow <= spec.beta_fast and spec.theta > 1):
        raise SpecError(
            f"{where}: rope_scaling wants 0 < beta_slow <= beta_fast and a rope_theta above 1, "
            f"found {spec.beta_slow}, {spec.beta_fast} and {spec.theta}."
        )
    if spec.attention_factor <= 0 or not _fp32_holds(spec.attention_factor):
        raise SpecError(
            f"{where}: attention_factor wants a number above 0, which fp32 can hold; found {spec.attention_factor}."
        )
    if spec.kind == "mrope" and sum(spec.sections) != spec.turned // 2:
        raise SpecError(
            f"{where}: {source.page.sections} wants numbers that sum to {spec.turned // 2}, one for each pair of the "
            f"{spec.turned} components of a head, found {list(spec.sections)}, which sum to {sum(spec.sections)}."
        )
    if spec.interleaved and any(3 * (spec.sections[part] - 1) + part >= sum(spec.sections) for part in (1, 2)):
        raise SpecError(
            f"{where}: {source.page.sections} wants numbers that can take turns, height and width with no more than a "
            f"third of all, found {list(spec.sections)}."
        )
    if spec.kind == "longrope":
        for name in ("short", "long"):
            if len(getattr(spec, name)) != spec.turned // 2:
                raise SpecError(
                    f"{where}: {getattr(source.page, name)} wants {spec.turned // 2} numbers, one for each pair of "
                    f"components that turns, found {len(getattr(spec, name))}."
                )
