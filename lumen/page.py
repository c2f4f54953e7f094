"""A page of `model_specs/`: what distinguishes Gemma 2 from Llama 3, in a closed vocabulary.

Notation: a number is a number; a string in a number's place is a (dotted) key of `config.json`; a list is a row of
alternatives of which the first that exists counts. `[match]` chooses among pages of one architecture, `[expect]` states
what the code takes for granted; a checkpoint that says otherwise is refused. In both, a list is a choice,
and the words "present" and "absent" ask whether the key holds anything but null.

Decision: the GGUF tokenizer kind is not on the page · because it follows from the checkpoint's own tokenizer files, and
one family is trained with several · revisit when a runtime needs a name that the files do not determine.
"""

import tomllib
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path

from lumen import schema
from lumen.errors import SpecError, closest
from lumen.text_half import TextHalfPage

Number = int | float | str | list[int | float | str]  # a value, a key of config.json, or alternatives
Flag = bool | str  # a value, or a key of config.json
Key = str | None  # a key of config.json, or none

ROPE_KINDS = {  # what each kind reads beside theta
    "plain": (),
    "linear": ("factor",),
    "llama3": ("factor", "low", "high", "trained_length"),
    "yarn": (
        *("factor", "trained_length", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("factor", "trained_length", "short", "long", "attention_factor"),
    "mrope": ("sections", "interleaved"),
}
ROPE_TYPES = {"plain": "default", "mrope": "default"}  # kinds that config.json calls otherwise
ROPE_LISTS = ("short", "long", "sections")  # what a kind reads off a list of config.json, which has no default
CHOICES = {
    "block.norm": ("rms", "rms_plus_one"),
    "block.norm_at": ("before", "around"),
    "block.mlp": ("silu", "gelu_tanh"),
    "attention.qk_norm": ("none", "head"),
    "experts.shared_gate": ("none", "sigmoid"),
}


@dataclass(frozen=True, kw_only=True)
class BlockPage:
    norm: str = "rms"
    norm_at: str = "before"
    mlp: str = "silu"


@dataclass(frozen=True, kw_only=True)
class ExpertsPage:
    """A mixture of experts in the place of the MLP, in some layers or all; absent: every layer has an MLP."""

    count: Number  # X, experts of a sparse layer
    per_token: Number  # those that a token is sent to
    width: Number  # inner width of one expert
    normalize: Flag  # the weights of a token's experts are scaled to a sum of 1
    shared: Number = 0  # inner width of the expert that every token is sent to; 0 = there is none
    shared_gate: str = "none"
    step: Number = 1  # sparse are the layers step − 1, 2 · step − 1, …
    dense: Key = None  # lists layers that are not sparse whatever `step` says


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
    kind: str | list[str]  # a list: the one that rope_scaling.rope_type names; it calls plain and mrope "default"
    theta: Number
    partial: Number = 1.0  # the share of a head that turns, from its first component on
    factor: Number = 1.0
    low: Number = 0.0
    high: Number = 0.0
    trained_length: Number = 0
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    truncate: str = ""  # a key of config.json; true where there is none
    short: str = ""  # keys of lists
    long: str = ""
    sections: str = ""  # a key of a list
    interleaved: bool = False  # the parts of a position take turns in a head, or lie behind each other
    attention_factor: Number = 0.0  # 0: as the kind derives it
    mscale: Number = 0.0
    mscale_all_dim: Number = 0.0


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
    # key under the arch → (dotted) field of ModelSpec; or config.KEY, a whole number that no arithmetic of ours reads
    metadata: dict[str, str] = field(default_factory=dict)
    normalizes_experts: bool = False  # what llama.cpp does, whatever the file says
    reads_norm_eps: bool = True  # false: llama.cpp takes 0, whatever the file says
    width_scale_depth: int = 0  # at this depth llama.cpp scales q·k by dim / heads, at any other by head_dim


@dataclass(frozen=True, kw_only=True)
class ChatPage:
    """The family's turns as [before, after]; used where a checkpoint brings no template of its own.

    `{bos}` and `{eos}` stand for the tokenizer's own tokens, `{today}` for the day as 2026-11-22.
    """

    begin: str = ""
    system: list[str] = field(default_factory=list)
    system_in_user: bool = False  # the system text opens the first user turn, before the user's words
    default_system: str | None = None  # the system text of a conversation without one; None: no system turn then
    user: list[str]
    assistant: list[str]
    prompt: str | None = None  # what opens an answer to be generated; None: what opens the assistant's turn
    last_after: str | None = None  # closes the last answer of a training text; None: as any other
    think: list[str] = field(default_factory=list)  # around the thoughts of the last answer; the history drops them
    trim: bool = False  # words are stripped of blanks at both ends


@dataclass(frozen=True, kw_only=True)
class FormatPage:
    """A chat format with a name of its own, not bound to a family: a page of `model_specs/chat/`."""

    name: str
    aliases: list[str] = field(default_factory=list)
    source: str  # where the text of the turns is published
    eos_may_end_turns: bool  # EOS takes the place of the end of a turn where the vocabulary has no such token
    chat: ChatPage


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
    experts: ExpertsPage | None = None
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    tensors: dict[str, list[str] | dict]
    lora: LoraPage
    gguf: GGUFPage
    chat: ChatPage | None = None
    text_half: TextHalfPage | None = None  # vision checkpoints whose text half this family is


def page_names() -> list[str]:
    """The names of all pages, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _pages().iterdir() if entry.name.endswith(".toml"))


def read_page(name: str) -> Page:
    """The page `model_specs/NAME.toml`; SpecError for an unknown name or a page of unknown words."""
    if name not in page_names():
        raise SpecError(f"There is no page model_specs/{name}.toml.{closest(name, page_names())}")
    where = f"model_specs/{name}.toml"
    return parse_page((_pages() / f"{name}.toml").read_text("utf-8"), where)


def parse_page(text: str, where: str) -> Page:
    """The page that `text` holds as TOML, `where` in messages; SpecError for unknown words."""
    page = schema.read(Page, tomllib.loads(text), where, SpecError)
    _check_words(page, where)
    return page


def read_format_pages() -> list[FormatPage]:
    """All pages of `model_specs/chat/`, by name; SpecError for one of unknown words."""
    files = [file for file in (_pages() / "chat").iterdir() if file.name.endswith(".toml")]
    return [
        schema.read(FormatPage, tomllib.loads(file.read_text("utf-8")), f"model_specs/chat/{file.name}", SpecError)
        for file in sorted(files, key=lambda file: file.name)
    ]


def lookup(config: dict, key: str) -> object:
    """The value of a dotted key of `config.json`, or None."""
    value: object = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _pages() -> resources.abc.Traversable:
    """`model_specs/`: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = resources.files("lumen") / "model_specs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "model_specs"


def _check_words(page: Page, where: str) -> None:
    """Refuses words that no code implements."""
    for key, choices in CHOICES.items():
        section, name = key.split(".")
        if (found := getattr(page, section)) is None:  # a section that the page leaves out
            continue
        if (word := getattr(found, name)) not in choices:
            raise SpecError(f"{where}: {key} is {word!r}; known: {', '.join(choices)}.{closest(word, choices)}")
    if unknown := set(page.rope) - {"full", "window"}:
        raise SpecError(f"{where}: has sections of rope for {sorted(unknown)}; known: full, window.")
    for layers, rope in page.rope.items():
        _check_rope(layers, rope, _rope_kinds(layers, rope, where), where)
    if unknown := set(page.attention.layers) - {"full", "window"}:
        raise SpecError(f"{where}: attention.layers names {sorted(unknown)}; known: full, window.")
    if unknown := set(page.attention.bias) - {"q", "k", "v", "o"}:
        raise SpecError(f"{where}: attention.bias names {sorted(unknown)}; known: q, k, v, o.")
    if "full" not in page.rope:
        raise SpecError(f"{where}: wants a section [rope.full].")


def _rope_kinds(layers: str, rope: RopePage, where: str) -> list[str]:
    """The kinds that a section names; refuses unknown ones, and such as config.json does not tell apart."""
    if layers != "full" and not isinstance(rope.kind, str):
        raise SpecError(f"{where}: rope.{layers}.kind wants one word; config.json chooses among those of rope.full.")
    kinds = [rope.kind] if isinstance(rope.kind, str) else rope.kind
    if not kinds:
        raise SpecError(f"{where}: rope.{layers}.kind wants a word or several, found none.")
    named: dict[str, str] = {}  # as config.json calls a kind → the kind
    for kind in kinds:
        if kind not in ROPE_KINDS:
            raise SpecError(f"{where}: rope.{layers}.kind is {kind!r}; known: {', '.join(ROPE_KINDS)}.")
        word = ROPE_TYPES.get(kind, kind)
        if word in named:
            raise SpecError(
                f"{where}: rope.{layers}.kind names {named[word]!r} and {kind!r}, and config.json calls both {word!r}. "
                f"Leave one, and give the other a page of its own that [match] tells apart."
            )
        named[word] = kind
    return kinds


def _check_rope(layers: str, rope: RopePage, kinds: list[str], where: str) -> None:
    """Refuses a setting that none of the kinds reads, and lists that one of them reads and the page does not name."""
    read = {name for kind in kinds for name in ROPE_KINDS[kind]}
    for setting in fields(RopePage):
        name, found = setting.name, getattr(rope, setting.name)
        if name in ROPE_LISTS and name in read and not found:
            raise SpecError(f"{where}: rope.{layers}.{name} wants a key of config.json, found none.")
        if name not in ("kind", "theta", "partial") and name not in read and found != setting.default:
            raise SpecError(
                f"{where}: rope.{layers}.{name} is {found!r}, and no rope of kind {' or '.join(map(repr, kinds))} "
                f"reads it. Remove it, or name a kind that does."
            )
