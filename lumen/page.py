"""A page of `model_specs/`: what distinguishes Gemma 2 from Llama 3, in a closed vocabulary.

Notation: a number is a number; a string in a number's place is a (dotted) key of `config.json`; a list is a row of
alternatives of which the first that exists counts. `[match]` chooses among pages of one architecture, `[expect]` states
what the code takes for granted; a checkpoint that says otherwise is refused. In both, a list is a choice,
and the words "present" and "absent" ask whether the key holds anything but null.

Decision: the GGUF tokenizer kind is not on the page · because it follows from the checkpoint's own tokenizer files, and
one family is trained with several · revisit when a runtime needs a name that the files do not determine.
"""

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from lumen import schema
from lumen.errors import SpecError, closest

Number = int | float | str | list[int | float | str]  # a value, a key of config.json, or alternatives

ROPE_KINDS = {"plain": (), "linear": ("factor",), "llama3": ("factor", "low", "high", "trained_length")}
CHOICES = {
    "block.norm": ("rms", "rms_plus_one"),
    "block.norm_at": ("before", "around"),
    "block.mlp": ("silu", "gelu_tanh"),
    "attention.qk_norm": ("none", "head"),
}


@dataclass(frozen=True, kw_only=True)
class BlockPage:
    norm: str = "rms"
    norm_at: str = "before"
    mlp: str = "silu"


@dataclass(frozen=True, kw_only=True)
class EmbedPage:
    scale: float | str = 1.0  # a factor, or "sqrt_dim"
    tied: bool | None = None  # None: as config.json says


@dataclass(frozen=True, kw_only=True)
class AttentionPage:
    layers: list[str] = field(default_factory=lambda: ["full"])  # repeated over the depth
    window: Number = 0
    bias: list[str] = field(default_factory=list)
    qk_norm: str = "none"
    scale: Number = "head_dim"  # score = q·k / sqrt(scale)
    softcap: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class RopePage:
    kind: str
    theta: Number
    factor: Number = 1.0
    low: Number = 0.0
    high: Number = 0.0
    trained_length: Number = 0


@dataclass(frozen=True, kw_only=True)
class LogitsPage:
    softcap: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class LoraPage:
    targets: list[str]


@dataclass(frozen=True, kw_only=True)
class GGUFPage:
    arch: str
    extra: list[str] = field(default_factory=list)  # tensors that GGUF wants and a checkpoint lacks
    metadata: dict[str, str] = field(default_factory=dict)  # key under the arch → (dotted) field of ModelSpec
    width_scale_depth: int = 0  # at this depth llama.cpp scales q·k by dim / heads, at any other by head_dim


@dataclass(frozen=True, kw_only=True)
class ChatPage:
    """The family's turns as [before, after]; used where a checkpoint brings no template of its own."""

    begin: str = ""
    system: list[str] = field(default_factory=list)
    user: list[str]
    assistant: list[str]
    trim: bool = False  # words are stripped of blanks at both ends


@dataclass(frozen=True, kw_only=True)
class Page:
    name: str
    architecture: str
    match: dict[str, str | int | float | bool | list] = field(default_factory=dict)
    expect: dict[str, str | int | float | bool | list] = field(default_factory=dict)
    block: BlockPage
    embed: EmbedPage = EmbedPage()
    attention: AttentionPage
    rope: dict[str, RopePage]
    logits: LogitsPage = LogitsPage()
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    tensors: dict[str, list[str] | dict]
    lora: LoraPage
    gguf: GGUFPage
    chat: ChatPage | None = None


def page_names() -> list[str]:
    """The names of all pages, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _pages().iterdir() if entry.name.endswith(".toml"))


def read_page(name: str) -> Page:
    """The page `model_specs/NAME.toml`; SpecError for an unknown name or a page of unknown words."""
    if name not in page_names():
        raise SpecError(f"There is no page model_specs/{name}.toml.{closest(name, page_names())}")
    where = f"model_specs/{name}.toml"
    page = schema.read(Page, tomllib.loads((_pages() / f"{name}.toml").read_text("utf-8")), where, SpecError)
    _check_words(page, where)
    return page


def _pages() -> resources.abc.Traversable:
    """`model_specs/`: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = resources.files("lumen") / "model_specs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "model_specs"


def _check_words(page: Page, where: str) -> None:
    """Refuses words that no code implements."""
    for key, choices in CHOICES.items():
        section, name = key.split(".")
        if (word := getattr(getattr(page, section), name)) not in choices:
            raise SpecError(f"{where}: {key} is {word!r}; known: {', '.join(choices)}.{closest(word, choices)}")
    for kind, rope in page.rope.items():
        if rope.kind not in ROPE_KINDS:
            raise SpecError(f"{where}: rope.{kind}.kind is {rope.kind!r}; known: {', '.join(ROPE_KINDS)}.")
    if unknown := set(page.attention.layers) - {"full", "window"}:
        raise SpecError(f"{where}: attention.layers names {sorted(unknown)}; known: full, window.")
    if unknown := set(page.attention.bias) - {"q", "k", "v", "o"}:
        raise SpecError(f"{where}: attention.bias names {sorted(unknown)}; known: q, k, v, o.")
    if "full" not in page.rope:
        raise SpecError(f"{where}: wants a section [rope.full].")
